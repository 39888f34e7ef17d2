"""The oracle: unfold everything, multiply in float64."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lightning_obc.kernels.hessian_update.geometry import ConvGeometry


def naive_linear(x: Tensor) -> Tensor:
    """``Σ x xᵀ`` of ``[N, g, d]`` positions: ``[g, d, d]`` float64 (paper, section 3: ``X Xᵀ``)."""
    x = x.double()
    return torch.einsum("ngi,ngj->gij", x, x)


def naive_unfold(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """Columns of a convolution's input ``[N, C, *spatial]``: ``[positions, g, K * C/g]`` float64.

    Columns run over (kernel position, input channel of the group), channels fastest.
    """
    x = geometry.pad(x.double())
    sizes = geometry.output_size(x.shape[2:])
    columns = []
    for offset in itertools.product(*(range(k) for k in geometry.kernel_size)):
        view = x
        for axis, o in enumerate(offset):
            start, step = o * geometry.dilation[axis], geometry.stride[axis]
            stop = start + step * (sizes[axis] - 1) + 1
            view = view[(slice(None),) * (axis + 2) + (slice(start, stop, step),)]
        columns.append(view)
    stacked = torch.stack(columns, dim=1)
    n, kernel, channels = stacked.shape[:3]
    grouped = stacked.reshape(n, kernel, geometry.groups, channels // geometry.groups, -1)
    return grouped.permute(0, 4, 2, 1, 3).reshape(-1, geometry.groups, kernel * channels // geometry.groups)


def naive_conv(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """``Σ x xᵀ`` over all output positions of a convolution: ``[g, d, d]`` float64."""
    return naive_linear(naive_unfold(x, geometry))
