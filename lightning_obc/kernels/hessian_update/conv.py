"""``Σ x xᵀ`` over the patches of a convolution, without unfolding the whole input.

Index legend: ``N`` samples, ``C`` input channels, ``g`` groups, ``K`` kernel positions, ``d = K * C/g`` columns in
the order (kernel position, input channel of the group), channels fastest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lightning_obc.errors import ShapeError
from lightning_obc.kernels.hessian_update.linear import CHUNK, add_products_, check_accumulator
from lightning_obc.kernels.hessian_update.precision import as_accumulable, exact_products


@dataclass(frozen=True)
class ConvGeometry:
    """Where a convolution's patches lie. All tuples run over the spatial dimensions, first to last.

    Attributes:
        kernel_size: Kernel positions per dimension.
        stride: Step between patches.
        dilation: Step between the positions of one patch.
        padding: (before, after) per dimension.
        padding_mode: ``"constant"`` (zeros), ``"reflect"``, ``"replicate"`` or ``"circular"``.
        groups: Number of problems; channels are split evenly among them.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    padding_mode: str = "constant"
    groups: int = 1

    @property
    def positions(self) -> int:
        """``K``, the number of kernel positions."""
        return math.prod(self.kernel_size)

    def pad(self, x: Tensor) -> Tensor:
        """``[N, C, *spatial]`` with the padding applied."""
        if not any(map(any, self.padding)):
            return x
        last_first = [side for pair in reversed(self.padding) for side in pair]
        return F.pad(x, last_first, mode=self.padding_mode)

    def output_size(self, padded: Sequence[int]) -> tuple[int, ...]:
        """Patches per dimension of an input whose padded spatial sizes are given.

        Raises:
            ShapeError: The input is smaller than the kernel.
        """
        axes = zip(padded, self.kernel_size, self.stride, self.dilation, strict=True)
        sizes = tuple((size - dil * (k - 1) - 1) // step + 1 for size, k, step, dil in axes)
        if min(sizes) < 1:
            raise ShapeError(
                "An input is smaller than the kernel", got=tuple(padded), expected=f"at least {self.kernel_size}"
            )
        return sizes


def accumulate_conv_(out: Tensor, x: Tensor, geometry: ConvGeometry) -> None:
    """Add ``Σ x xᵀ`` over all patches to the upper triangle of ``out``.

    What lies below the diagonal of ``out`` is unspecified until
    :func:`~lightning_obc.kernels.hessian_update.linear.symmetrise_`. Working memory: the patches of about a thousand
    positions.

    Args:
        out: ``[g, d, d]`` float64.
        x: ``[N, C, *spatial]``; float64 is multiplied in float64, all other types in float32.
        geometry: Kernel, stride, dilation, padding and groups.

    Raises:
        ShapeError: ``x`` does not belong to ``out``.
    """
    check_accumulator(out)
    spatial = len(geometry.kernel_size)
    columns = geometry.positions * x.shape[1] // geometry.groups if x.dim() == spatial + 2 else -1
    if tuple(out.shape[:2]) != (geometry.groups, columns):
        raise ShapeError(
            "A convolution's input does not fit its accumulator",
            got=f"input {tuple(x.shape)}, accumulator {tuple(out.shape)}",
            expected=f"[N, C, {spatial} sizes] with {geometry.positions} * C / {geometry.groups} columns",
        )
    with exact_products(x.device.type):
        for patches in _patches(x, geometry):
            add_products_(out, patches)


def _patches(x: Tensor, geometry: ConvGeometry) -> Iterator[Tensor]:
    """Patches ``[n, g, d]`` of about ``CHUNK`` positions each: several small images, or strips of a large one."""
    padded = [size + sum(pair) for size, pair in zip(x.shape[2:], geometry.padding, strict=True)]
    sizes = geometry.output_size(padded)
    images = max(1, CHUNK // math.prod(sizes))
    rows = max(1, min(sizes[0], CHUNK // math.prod(sizes[1:])))
    for chunk in x.split(images):
        last = geometry.pad(as_accumulable(chunk)).movedim(1, -1).contiguous()
        for start in range(0, sizes[0], rows):
            count = min(rows, sizes[0] - start)
            yield from _unfold(last, (count, *sizes[1:]), start, geometry).split(CHUNK)


def _unfold(x: Tensor, sizes: tuple[int, ...], start: int, geometry: ConvGeometry) -> Tensor:
    """Patches of a padded, contiguous channels-last input ``[n, *padded, C]``, from output row ``start`` on."""
    groups, channels = geometry.groups, x.shape[-1] // geometry.groups
    steps = x.stride()[1:-1]
    strides = [step * s for step, s in zip(steps, geometry.stride, strict=True)]
    kernel = [step * dil for step, dil in zip(steps, geometry.dilation, strict=True)]
    view = x.as_strided(
        (x.shape[0], *sizes, groups, *geometry.kernel_size, channels),
        (x.stride(0), *strides, channels, *kernel, 1),
        x.storage_offset() + start * strides[0],
    )
    return view.reshape(-1, groups, geometry.positions * channels)
