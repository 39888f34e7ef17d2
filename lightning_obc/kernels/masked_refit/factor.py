"""A float32 Cholesky factor on a CPU, and solutions by it, compiled by numba.

``A = Uᵀ U`` in the packed upper triangle of :mod:`lightning_obc.kernels.obs_sweep.packed`. A row of blocks takes all
its updates at once, in register tiles as deep as the rows above it: every element is read and written once. The
diagonal blocks end as ``I - U_bb⁻¹``, so that solving with them is an update like any other.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from lightning_obc.kernels.obs_sweep.jit import STRICT
from lightning_obc.kernels.obs_sweep.packed import WIDTH, Array, at
from lightning_obc.kernels.obs_sweep.tile import FLUSH_ROWS, flush_tile, line_tile

_jit = numba.njit(**STRICT)
Indices = NDArray[np.int64]


@_jit
def gather(matrix: Array, start: int, stride: int, picked: Indices, unit: Array, count: int, packed: Array) -> int:
    """The upper triangle of ``matrix[picked, picked]``, its lines and columns times ``unit``, up to whole blocks.

    Args:
        matrix: Flat; the matrix begins at ``start`` and its lines are ``stride`` apart.
        picked: Columns, ``count`` of them; what is behind them up to a whole block is read, and does not count.
        unit: By position in ``picked``.
        packed: What is written; the identity behind ``count``.

    Returns:
        The size in whole blocks.
    """
    size = (count + WIDTH - 1) // WIDTH * WIDTH
    for block in range(size // WIDTH):
        first = np.uint64(block * WIDTH)
        for row in range((block + 1) * WIDTH):
            target, line = np.uint64(at(row, block * WIDTH)), np.uint64(start + picked[row] * stride)
            own = unit[row]
            for k in range(WIDTH):
                value = matrix[line + np.uint64(picked[first + np.uint64(k)])]
                packed[target + np.uint64(k)] = value * own * unit[first + np.uint64(k)]
    for column in range(count, size):
        for row in range(column):
            packed[at(row, column)] = 0
        packed[at(column, column)] = 1
    return size


@_jit
def factorise(packed: Array, size: int, work: Array, width: int) -> bool:
    """Factor in place; False when a pivot is not positive."""
    for row in range(0, size, WIDTH):
        for column in range(row, size, WIDTH):
            if row > 0:
                _update(packed, at(row, column), at(0, row), at(0, column), row, width)
        if not _invert_diagonal(packed, at(row, row), work):
            return False
        for column in range(row + WIDTH, size, WIDTH):
            _finish(packed, at(row, column), at(row, row), width)
    return True


@_jit
def _update(packed: Array, here: int, left: int, right: int, depth: int, width: int) -> None:
    """One block less the product of the columns above it."""
    for c in range(0, WIDTH, width):
        for r in range(0, WIDTH, FLUSH_ROWS):
            h = here + r * WIDTH + c
            flush_tile(packed, h, WIDTH, packed, h, WIDTH, packed, left + r, WIDTH, packed, right + c, WIDTH, depth)


@_jit
def _finish(packed: Array, here: int, diagonal: int, width: int) -> None:
    """``U_bb⁻ᵀ`` times a block, from below, so that it can happen in place."""
    for c in range(0, WIDTH, width):
        for r in range(WIDTH - FLUSH_ROWS, -1, -FLUSH_ROWS):
            h = here + r * WIDTH + c
            flush_tile(
                packed, h, WIDTH, packed, h, WIDTH, packed, diagonal + r, WIDTH, packed, here + c, WIDTH, r + FLUSH_ROWS
            )


@_jit
def _invert_diagonal(packed: Array, here: int, work: Array) -> bool:
    """Replace a diagonal block by ``I - U_bb⁻¹``: eliminating ``[A_bb, I]`` leaves ``[U_bb, U_bb⁻ᵀ]``."""
    for row in range(WIDTH):
        for k in range(WIDTH):
            work[2 * row * WIDTH + k] = packed[here + row * WIDTH + k]
            work[(2 * row + 1) * WIDTH + k] = 1 if k == row else 0
    for pivot in range(WIDTH):
        own = np.uint64(2 * pivot * WIDTH)
        if not work[own + np.uint64(pivot)] > 0:
            return False
        root = np.sqrt(work[own + np.uint64(pivot)])
        for k in range(2 * WIDTH):
            work[own + np.uint64(k)] /= root
        for row in range(pivot + 1, WIDTH):
            other, factor = np.uint64(2 * row * WIDTH), work[own + np.uint64(row)]
            for k in range(2 * WIDTH):
                work[other + np.uint64(k)] -= factor * work[own + np.uint64(k)]
    for row in range(WIDTH):
        for k in range(WIDTH):
            inverse = work[(2 * k + 1) * WIDTH + row]
            packed[here + row * WIDTH + k] = (1 if k == row else 0) - inverse
    return True


@_jit
def solve(packed: Array, right: Array, size: int, width: int) -> None:
    """Solve in place: forwards by ``Uᵀ``, backwards by ``U``."""
    for block in range(0, size, WIDTH):
        own, above = block, at(0, block)
        for c in range(WIDTH - width, -1, -width):
            h = own + c
            if block > 0:
                line_tile(right, h, 0, right, h, 0, right, 0, 1, packed, above + c, WIDTH, block)
        for c in range(WIDTH - width, -1, -width):
            h, diagonal = own + c, at(block, block) + c
            line_tile(right, h, 0, right, h, 0, right, own, 1, packed, diagonal, WIDTH, c + width)
    for block in range(size - WIDTH, -1, -WIDTH):
        # Rows of the triangle use what is right of them, so they go downwards; what is left of them is 0.
        for row in range(block, block + WIDTH):
            right[row] -= _dot(packed, at(row, block), right, block)
        for row in range(block):
            right[row] -= _dot(packed, at(row, block), right, block)


@_jit
def _dot(a: Array, a_at: int, b: Array, b_at: int) -> Any:
    """Product of a row of a block with a vector."""
    total = 0 * a[a_at]
    for k in range(WIDTH):
        total += a[np.uint64(a_at) + np.uint64(k)] * b[np.uint64(b_at) + np.uint64(k)]
    return total
