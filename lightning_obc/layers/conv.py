"""Convolutions: one problem per group, columns in the order (kernel position, input channel of the group)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from lightning_obc.kernels.hessian_update import ConvGeometry, accumulate_conv_
from lightning_obc.layers.base import LayerAdapter, ProblemShape

_PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


class ConvAdapter(LayerAdapter):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``: any stride, dilation, padding, padding mode and groups."""

    def shape(self, module: nn.Module) -> ProblemShape:
        rows, channels, *kernel = self.weight(module).shape
        groups = _groups(module)
        return ProblemShape(groups, rows // groups, math.prod(kernel) * channels, channels)

    def to_matrix_layout(self, module: nn.Module, tensor: Tensor) -> Tensor:
        groups, rows = _groups(module), tensor.shape[0]
        return tensor.movedim(1, -1).reshape(groups, rows // groups, -1)

    def to_module_layout(self, module: nn.Module, matrix: Tensor) -> Tensor:
        rows, channels, *kernel = self.weight(module).shape
        return matrix.reshape(rows, *kernel, channels).movedim(-1, 1)

    def normalise_inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.dim() == self.weight(module).dim() - 1 else x

    def accumulate_(self, module: nn.Module, out: Tensor, x: Tensor) -> None:
        accumulate_conv_(out, x, conv_geometry(module))


def _groups(module: nn.Module) -> int:
    groups: Any = module.groups
    return int(groups)


def conv_geometry(module: Any) -> ConvGeometry:
    """The patches of a ``nn.ConvNd``.

    String padding follows :mod:`torch.nn`: ``"same"`` puts the odd element of an even kernel's padding behind.
    """
    axes = zip(module.kernel_size, module.dilation, strict=True)
    if module.padding == "same":
        totals = [dilation * (size - 1) for size, dilation in axes]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    elif module.padding == "valid":
        padding = ((0, 0),) * len(module.kernel_size)
    else:
        padding = tuple((p, p) for p in module.padding)
    return ConvGeometry(
        kernel_size=tuple(module.kernel_size),
        stride=tuple(module.stride),
        dilation=tuple(module.dilation),
        padding=padding,
        padding_mode=_PADDING_MODES[module.padding_mode],
        groups=module.groups,
    )
