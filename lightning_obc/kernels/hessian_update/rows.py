"""The offset-difference form for stride 1: blocks of ``Σ x xᵀ`` whose kernel rows differ by the same offset share
all of their sum but the rows at the border of the image.

Kernel row ``a`` sees the image rows ``a·dil … a·dil + height - 1``. So with ``P(y, δ) = Σ x(y) x(y + δ·dil)ᵀ`` over
the positions of an image row, the block of kernel rows ``(a, a + δ)`` is the sum of ``P(y, δ)`` over that window: one
interior that all blocks of ``δ`` share, and a few border rows. Of a 3×3 kernel's 6 row blocks only 3 are multiplied.
"Rows" are slices along the first spatial dimension, whatever the number of dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_obc.kernels.hessian_update.geometry import ConvGeometry
from lightning_obc.kernels.hessian_update.linear import CHUNK
from lightning_obc.kernels.hessian_update.precision import as_accumulable, in_range

# Where this form was measured to be faster than strips of patches: 1.4 to 2.4 times from these sizes on.
_LEAST_WIDTH = 64
_LEAST_POSITIONS = 2 * CHUNK
_LEAST_BORDERS = 6


def rows_pay(x: Tensor, geometry: ConvGeometry) -> bool:
    """Whether this form is possible and faster for an input ``[N, C, *spatial]``; it was measured on CPUs only.

    Blocks must be wide, the border a small part of the image, and the additions in float64 shared by enough positions.
    """
    taps, border = geometry.kernel_size[0], (geometry.kernel_size[0] - 1) * geometry.dilation[0]
    if x.device.type != "cpu" or taps == 1 or geometry.stride[0] != 1 or geometry.groups != 1:
        return False
    sizes = geometry.output_size(geometry.padded_size(x.shape[2:]))
    wide = x.shape[1] * geometry.positions // taps >= _LEAST_WIDTH
    large = sizes[0] >= _LEAST_BORDERS * border and x.shape[0] * math.prod(sizes) >= _LEAST_POSITIONS
    return wide and large and in_range(as_accumulable(x))


def accumulate_rows_(out: Tensor, x: Tensor, geometry: ConvGeometry) -> None:
    """Add ``Σ x xᵀ`` over all patches to the upper triangle of ``out``, for stride 1 along the rows and one group.

    Working memory: the input of about a thousand row positions, once for each kernel position of a row.

    Args:
        out: ``[1, d, d]`` float64.
        x: ``[N, C, *spatial]``; float64 is multiplied in float64, all other types in float32.
        geometry: Kernel, stride, dilation and padding.
    """
    sizes = geometry.output_size(geometry.padded_size(x.shape[2:]))
    for chunk in x.split(max(1, CHUNK // math.prod(sizes[1:]))):
        padded = geometry.pad(as_accumulable(chunk)).movedim(1, -1).contiguous()
        _add_blocks_(out[0], _unfold_rows(padded, sizes[1:], geometry), sizes[0], geometry)


def _unfold_rows(x: Tensor, sizes: tuple[int, ...], geometry: ConvGeometry) -> Tensor:
    """``[n, padded rows, positions of a row, columns of a kernel row]`` of a channels-last input."""
    steps = x.stride()[2:-1]
    strides = [step * s for step, s in zip(steps, geometry.stride[1:], strict=True)]
    kernel = [step * dil for step, dil in zip(steps, geometry.dilation[1:], strict=True)]
    view = x.as_strided(
        (*x.shape[:2], *sizes, *geometry.kernel_size[1:], x.shape[-1]),
        (*x.stride()[:2], *strides, *kernel, 1),
        x.storage_offset(),
    )
    return view.reshape(*x.shape[:2], math.prod(sizes), -1)


def _add_blocks_(out: Tensor, rows: Tensor, height: int, geometry: ConvGeometry) -> None:
    width, taps, dilation = rows.shape[-1], geometry.kernel_size[0], geometry.dilation[0]
    for offset in range(taps):
        shift, border = offset * dilation, (taps - 1 - offset) * dilation
        interior = _interior(rows, border, height, shift)
        first = [_row_product(rows, y, shift) for y in range(border)]
        last = [_row_product(rows, y, shift) for y in range(height, height + border)]
        for tap in range(taps - offset):
            start = tap * dilation
            block = out[tap * width : (tap + 1) * width, (tap + offset) * width : (tap + offset + 1) * width]
            for product in (interior, *first[start:], *last[:start]):
                block.add_(product)


def _interior(rows: Tensor, start: int, stop: int, shift: int) -> Tensor:
    """``Σ P(y, shift)`` over image rows ``start … stop - 1``, ``[width, width]`` float64."""
    width, step = rows.shape[-1], max(1, CHUNK // rows.shape[2])
    total = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
    product, count = rows.new_empty(width, width), 0
    for image in rows:
        for y in range(start, stop, step):
            end = min(y + step, stop)
            left, right = image[y:end].reshape(-1, width), image[y + shift : end + shift].reshape(-1, width)
            if count + len(left) > CHUNK and count:
                total.add_(product)
                count = 0
            # beta=0 ignores what the product held before, also NaN.
            product.addmm_(left.T, right, beta=1 if count else 0)
            count += len(left)
    return total.add_(product)


def _row_product(rows: Tensor, y: int, shift: int) -> Tensor:
    """``P(y, shift)``, ``[width, width]``."""
    width = rows.shape[-1]
    return rows[:, y].reshape(-1, width).T @ rows[:, y + shift].reshape(-1, width)
