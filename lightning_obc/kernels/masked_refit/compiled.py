"""Float32 Cholesky factors of many rows on a CPU, and solutions by them, compiled by numba.

``A = Uᵀ U`` in the packed upper triangle of :mod:`lightning_obc.kernels.obs_sweep.packed`. A row of blocks takes all
its updates at once, in register tiles as deep as the rows above it: every element is read and written once. The
diagonal blocks end as ``I - U_bb⁻¹``, so that solving with them is an update like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_obc.kernels.obs_sweep import packed as layout
from lightning_obc.kernels.obs_sweep.jit import STRICT, aligned, cached, source_digest
from lightning_obc.kernels.obs_sweep.packed import WIDTH, Array, at, packed_size
from lightning_obc.kernels.obs_sweep.tile import FLUSH_ROWS, flush_columns, flush_tile, line_tile
from lightning_obc.kernels.threads import run_blocks

_jit = numba.njit(**STRICT)
_FLOAT32 = np.dtype(np.float32)
Indices = NDArray[np.int64]


@_jit
def _gather(matrix: Array, start: int, stride: int, picked: Indices, count: int, packed: Array) -> None:
    """The upper triangle of ``matrix[picked, picked]``; the identity behind ``count``."""
    for block in range(len(picked) // WIDTH):
        first = np.uint64(block * WIDTH)
        for row in range((block + 1) * WIDTH):
            target, line = np.uint64(at(row, block * WIDTH)), np.uint64(start + picked[row] * stride)
            for k in range(WIDTH):
                packed[target + np.uint64(k)] = matrix[line + np.uint64(picked[first + np.uint64(k)])]
    for column in range(count, len(picked)):
        for row in range(column):
            packed[at(row, column)] = 0
        packed[at(column, column)] = 1


@_jit
def _factor(packed: Array, size: int, work: Array, width: int) -> bool:
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
def _solve(packed: Array, right: Array, start: int, size: int, width: int) -> None:
    """Solve in place: forwards by ``Uᵀ``, backwards by ``U``."""
    for block in range(0, size, WIDTH):
        own, above = start + block, at(0, block)
        for c in range(WIDTH - width, -1, -width):
            h = own + c
            if block > 0:
                line_tile(right, h, 0, right, h, 0, right, start, 1, packed, above + c, WIDTH, block)
        for c in range(WIDTH - width, -1, -width):
            h, diagonal = own + c, at(block, block) + c
            line_tile(right, h, 0, right, h, 0, right, own, 1, packed, diagonal, WIDTH, c + width)
    for block in range(size - WIDTH, -1, -WIDTH):
        # Rows of the triangle use what is right of them, so they go downwards; what is left of them is 0.
        for row in range(block, block + WIDTH):
            right[start + row] -= _dot(packed, at(row, block), right, start + block)
        for row in range(block):
            right[start + row] -= _dot(packed, at(row, block), right, start + block)


@_jit
def _dot(a: Array, a_at: int, b: Array, b_at: int) -> Any:
    """Product of a row of a block with a vector."""
    total = 0 * a[a_at]
    for k in range(WIDTH):
        total += a[np.uint64(a_at) + np.uint64(k)] * b[np.uint64(b_at) + np.uint64(k)]
    return total


@_jit
def _factor_rows(
    first: int,
    last: int,
    matrices: Array,
    columns: int,
    problem: Indices,
    picked: Indices,
    count: Indices,
    factors: Array,
    good: NDArray[np.bool_],
    work: Array,
    width: int,
) -> None:
    for row in range(first, last):
        start = problem[row] * columns * columns
        _gather(matrices, start, columns, picked[row], count[row], factors[row])
        good[row] = _factor(factors[row], picked.shape[1], work, width)


def _entries(digest: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """Compile the entries; ``digest`` makes the sources of all of them part of the key of numba's cache on disk."""

    def factor_rows(  # type: ignore[no-untyped-def]
        first, last, matrices, columns, problem, picked, count, factors, good, work, width
    ) -> None:
        if digest >= 0:
            _factor_rows(first, last, matrices, columns, problem, picked, count, factors, good, work, width)

    def solve_rows(first, last, factors, right, width) -> None:  # type: ignore[no-untyped-def]
        if digest >= 0:
            for row in range(first, last):
                _solve(
                    factors[row], right, row * (right.shape[0] // factors.shape[0]), len(right) // len(factors), width
                )

    return cached(factor_rows), cached(solve_rows)


_factor_many, _solve_many = _entries(source_digest(__file__, layout.__file__))


def factorise(
    matrices: Tensor, problem: Tensor, picked: Tensor, real: Tensor
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Factor ``matrices[problem][picked, picked]`` of every row.

    Args:
        matrices: ``[g, d, d]`` float32, symmetric, of unit diagonal.
        problem: ``[P]`` int64, the matrix of every row.
        picked: ``[P, k]`` int64, its columns.
        real: ``[P, k]`` bool, False from some column on, where ``picked`` only pads.

    Returns:
        What solves with the factors, ``[P, k]`` float32 to the same, and ``[P]`` bool, where they exist.
    """
    rows, size = picked.shape
    padded = -(-size // WIDTH) * WIDTH
    index = np.zeros((rows, padded), np.int64)
    index[:, :size] = picked.numpy()
    stride = packed_size(padded)
    factors = aligned(rows * stride, _FLOAT32).reshape(rows, stride)
    good = np.zeros(rows, np.bool_)
    flat, count = matrices.contiguous().view(-1).numpy(), real.sum(1).numpy()
    width, threads = flush_columns(_FLOAT32), min(torch.get_num_threads(), rows)
    which, columns = problem.contiguous().numpy(), matrices.shape[1]

    def begin() -> Callable[[int, int], None]:
        work = aligned(2 * WIDTH * WIDTH, _FLOAT32)

        def do(first: int, last: int) -> None:
            _factor_many(first, last, flat, columns, which, index, count, factors, good, work, width)

        return do

    run_blocks(rows, max(1, rows // (8 * threads)), threads, begin)

    def solve(right: Tensor) -> Tensor:
        values = np.zeros((rows, padded), np.float32)
        values[:, :size] = right.numpy()
        line = values.reshape(-1)
        run_blocks(rows, max(1, rows // threads), threads, lambda: lambda a, b: _solve_many(a, b, factors, line, width))
        return torch.from_numpy(values[:, :size])

    return solve, torch.from_numpy(good)
