"""``Σ x xᵀ`` over the patches of a convolution, without unfolding the whole input.

Index legend: ``N`` samples, ``C`` input channels, ``g`` groups, ``K`` kernel positions, ``d = K * C/g`` columns in
the order (kernel position, input channel of the group), channels fastest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_obc.errors import ShapeError
from lightning_obc.kernels.hessian_update.geometry import ConvGeometry
from lightning_obc.kernels.hessian_update.linear import CHUNK, add_products_, check_accumulator
from lightning_obc.kernels.hessian_update.precision import as_accumulable, exact_products
from lightning_obc.kernels.hessian_update.rows import accumulate_rows_, rows_pay
from lightning_obc.kernels.hessian_update.sampling import drawn_positions


def accumulate_conv_(out: Tensor, x: Tensor, geometry: ConvGeometry) -> None:
    """Add ``Σ x xᵀ`` over all patches to the upper triangle of ``out``.

    What lies below the diagonal of ``out`` is unspecified until
    :func:`~lightning_obc.kernels.hessian_update.linear.symmetrise_`. Working memory: the patches of about a thousand
    positions, or the input once for each column of the kernel where :mod:`~.rows` pays.

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
    drawn = drawn_positions(x.shape[0] * math.prod(geometry.output_size(geometry.padded_size(x.shape[2:]))))
    with exact_products(x.device.type):
        if drawn is None and rows_pay(x, geometry):
            accumulate_rows_(out, x, geometry)
            return
        for patches in conv_patches(x, geometry) if drawn is None else _drawn_patches(x, geometry, *drawn):
            add_products_(out, patches)


def conv_patches(x: Tensor, geometry: ConvGeometry) -> Iterator[Tensor]:
    """Patches ``[n, g, d]`` of about ``CHUNK`` positions each: several small images, or strips of a large one."""
    sizes = geometry.output_size(geometry.padded_size(x.shape[2:]))
    images = max(1, CHUNK // math.prod(sizes))
    rows = max(1, min(sizes[0], CHUNK // math.prod(sizes[1:])))
    for chunk in x.split(images):
        last = geometry.pad(as_accumulable(chunk)).movedim(1, -1).contiguous()
        for start in range(0, sizes[0], rows):
            count = min(rows, sizes[0] - start)
            yield from _unfold(last, (count, *sizes[1:]), start, geometry).split(CHUNK)


def _drawn_patches(x: Tensor, geometry: ConvGeometry, index: Tensor, scale: float) -> Iterator[Tensor]:
    """Patches ``[n, g, d]``, times ``scale``, at some positions of all images (indices ascending, on the CPU)."""
    sizes = geometry.output_size(geometry.padded_size(x.shape[2:]))
    each, images = math.prod(sizes), max(1, CHUNK // math.prod(sizes))
    for first, chunk in enumerate(x.split(images)):
        start = first * images * each
        inside = index[(index >= start) & (index < start + len(chunk) * each)] - start
        if not len(inside):
            continue
        windows = _windows(geometry.pad(as_accumulable(chunk)).movedim(1, -1).contiguous(), sizes, 0, geometry)
        for chosen in inside.to(x.device).split(CHUNK):
            where = torch.unravel_index(chosen, (len(chunk), *sizes))
            yield windows[where].reshape(len(chosen), geometry.groups, -1) * scale


def _unfold(x: Tensor, sizes: tuple[int, ...], start: int, geometry: ConvGeometry) -> Tensor:
    """Patches of a padded, contiguous channels-last input ``[n, *padded, C]``, from output row ``start`` on."""
    columns = geometry.positions * x.shape[-1] // geometry.groups
    return _windows(x, sizes, start, geometry).reshape(-1, geometry.groups, columns)


def _windows(x: Tensor, sizes: tuple[int, ...], start: int, geometry: ConvGeometry) -> Tensor:
    """The same patches as a view ``[n, *sizes, g, *kernel, C/g]``."""
    groups, channels = geometry.groups, x.shape[-1] // geometry.groups
    steps = x.stride()[1:-1]
    strides = [step * s for step, s in zip(steps, geometry.stride, strict=True)]
    kernel = [step * dil for step, dil in zip(steps, geometry.dilation, strict=True)]
    return x.as_strided(
        (x.shape[0], *sizes, groups, *geometry.kernel_size, channels),
        (x.stride(0), *strides, channels, *kernel, 1),
        x.storage_offset() + start * strides[0],
    )
