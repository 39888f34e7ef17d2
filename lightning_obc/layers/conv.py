"""Convolutions: one problem per group, columns in the order (kernel position, input channel of the group)."""

from __future__ import annotations

import math
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_obc.kernels.hessian_update import ConvGeometry, accumulate_conv_, accumulate_cross_conv_
from lightning_obc.layers.base import LayerAdapter, ProblemShape

_PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


class ConvAdapter(LayerAdapter):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``: any stride, dilation, padding, padding mode and groups."""

    def shape(self, module: nn.Module) -> ProblemShape:
        rows, channels, *kernel = self.current(module).shape
        groups = _groups(module)
        return ProblemShape(groups, rows // groups, math.prod(kernel) * channels, channels)

    def to_matrix_layout(self, module: nn.Module, tensor: Tensor) -> Tensor:
        groups, rows = _groups(module), tensor.shape[0]
        return tensor.movedim(1, -1).reshape(groups, rows // groups, -1)

    def to_module_layout(self, module: nn.Module, matrix: Tensor) -> Tensor:
        rows, channels, *kernel = self.current(module).shape
        return matrix.reshape(rows, *kernel, channels).movedim(-1, 1)

    def normalise_inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.dim() == self.current(module).dim() - 1 else x

    def accumulate_(self, module: nn.Module, out: Tensor, x: Tensor) -> None:
        accumulate_conv_(out, x, conv_geometry(module))

    def accumulate_cross_(self, module: nn.Module, out: Tensor, a: Tensor, b: Tensor) -> None:
        accumulate_cross_conv_(out, a, b, conv_geometry(module))


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


class ConvTransposeAdapter(LayerAdapter):
    """``nn.ConvTranspose1d``, ``2d`` and ``3d``, as the convolution of the zero-stuffed input.

    The input with ``stride - 1`` zeros between its elements, padded, meets the flipped kernel at stride 1. Columns run
    over the positions of the flipped kernel, then input channels.
    """

    def shape(self, module: nn.Module) -> ProblemShape:
        inputs, rows, *kernel = self.current(module).shape
        channels = inputs // _groups(module)
        return ProblemShape(_groups(module), rows, math.prod(kernel) * channels, channels)

    def to_matrix_layout(self, module: nn.Module, tensor: Tensor) -> Tensor:
        inputs, rows, *kernel = tensor.shape
        groups = _groups(module)
        grouped = tensor.flip(*range(2, tensor.dim())).reshape(groups, inputs // groups, rows, *kernel)
        return grouped.movedim(1, -1).reshape(groups, rows, -1)

    def to_module_layout(self, module: nn.Module, matrix: Tensor) -> Tensor:
        inputs, rows, *kernel = self.current(module).shape
        groups = _groups(module)
        grouped = matrix.reshape(groups, rows, *kernel, inputs // groups).movedim(-1, 1)
        return grouped.reshape(inputs, rows, *kernel).flip(*range(2, 2 + len(kernel)))

    def normalise_inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return _stuffed(module, x, tuple(cast(Any, module).output_padding))

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The zero-stuffed and padded input; ``output_size``, when it is given, decides its last padding."""
        x, sizes = (*args, *kwargs.values())[0].detach(), kwargs.get("output_size", args[1] if len(args) > 1 else None)
        if sizes is None:
            return self.normalise_inputs(module, x)
        spatial = len(cast(Any, module).kernel_size)
        least = _stuffed(module, x, (0,) * spatial).shape[-spatial:]
        kernel = _conv_of_stuffed(module).output_size(least)
        return _stuffed(module, x, tuple(size - k for size, k in zip(sizes[-spatial:], kernel, strict=True)))

    def accumulate_(self, module: nn.Module, out: Tensor, x: Tensor) -> None:
        accumulate_conv_(out, x, _conv_of_stuffed(module))

    def accumulate_cross_(self, module: nn.Module, out: Tensor, a: Tensor, b: Tensor) -> None:
        accumulate_cross_conv_(out, a, b, _conv_of_stuffed(module))


def _conv_of_stuffed(module: Any) -> ConvGeometry:
    """The stride-1 convolution that runs over the stuffed and padded input."""
    ones, none = (1,) * len(module.kernel_size), ((0, 0),) * len(module.kernel_size)
    return ConvGeometry(tuple(module.kernel_size), ones, tuple(module.dilation), none, groups=module.groups)


def _stuffed(module: Any, x: Tensor, output_padding: tuple[int, ...]) -> Tensor:
    """``[N, C, *padded]``: the input with its elements ``stride`` apart, padded for the equivalent convolution."""
    spatial = len(module.kernel_size)
    x = x.unsqueeze(0) if x.dim() == spatial + 1 else x
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], module.stride, strict=True)]
    stuffed = x.new_zeros(*x.shape[:2], *sizes)
    index: Any = (..., *(slice(None, None, step) for step in module.stride))
    stuffed[index] = x
    axes = zip(module.kernel_size, module.dilation, module.padding, output_padding, strict=True)
    padding = [(dil * (k - 1) - p, dil * (k - 1) - p + extra) for k, dil, p, extra in axes]
    return F.pad(stuffed, [side for pair in reversed(padding) for side in pair])
