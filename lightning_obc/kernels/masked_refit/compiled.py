"""The refit on a CPU: rows in parallel threads, a few at a time in every thread's own cache, compiled by numba.

Every row has a float32 factor of its own; float64 residuals are matrix products that the rows of a block share. No
torch operation runs in between (see :mod:`lightning_obc.kernels.host`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from lightning_obc.kernels.masked_refit.factor import Indices, factorise, gather, solve
from lightning_obc.kernels.obs_sweep import packed as layout
from lightning_obc.kernels.obs_sweep.jit import STRICT, aligned, cached, source_digest
from lightning_obc.kernels.obs_sweep.packed import WIDTH, Array, packed_size
from lightning_obc.kernels.obs_sweep.tile import FLUSH_ROWS, flush_columns, flush_tile
from lightning_obc.kernels.threads import run_blocks

_jit = numba.njit(**STRICT)
_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_EPS, _TINY = float(np.finfo(np.float64).eps), float(np.finfo(np.float64).tiny)
# Rows that share a product: one tile on every machine, two where tiles have four rows.
LANES = 8
Mask = NDArray[np.bool_]


class _Task(NamedTuple):
    """``P`` rows of one form; read only but for ``result`` and ``good``."""

    matrix: Array  # flat [g, d, d] float64: what is solved with
    dense: Array  # [P, d] float64
    solved: Mask  # [P, d], the columns Q that are solved for
    kept: bool  # Q are the kept columns, otherwise the pruned ones
    rows: Indices  # rows of this form, ascending
    problem: Indices  # [P]
    first: Indices  # [blocks + 1], where every block starts in ``rows``
    refinements: int
    width: int  # columns of a float32 tile
    width64: int
    result: Array  # [P, d] float64
    good: Mask  # [P]


class _Work(NamedTuple):
    """Memory of one thread, for the ``LANES`` rows of a block."""

    factors: Array  # [LANES, packed] float32
    inverse: Array  # of a diagonal block of a factor
    line: Array  # [k] float32
    moving: Array  # flat [d, LANES]: what is multiplied by the matrix
    source: Array  # flat [LANES, d]
    target: Array  # flat [LANES, d]: the source less the product
    picked: Indices  # [LANES, k]
    unit: Array  # [LANES, k]
    right: Array  # [LANES, k]
    solution: Array  # [LANES, k]
    residual: Array  # [LANES, k]
    length: Indices  # [LANES], |Q|
    size: Indices  # [LANES], |Q| in whole blocks
    going: Mask  # [LANES], still being refined


@_jit
def _less_product(t: _Task, w: _Work, problem: int, lanes: int) -> None:
    """``target = source - movingᵀ matrix``."""
    columns = t.dense.shape[1]
    start, whole = problem * columns * columns, columns // t.width64 * t.width64
    for column in range(0, whole, t.width64):
        for lane in range(0, lanes, FLUSH_ROWS):
            here, right = lane * columns + column, start + column
            flush_tile(
                w.target,
                here,
                columns,
                w.source,
                here,
                columns,
                w.moving,
                lane,
                LANES,
                t.matrix,
                right,
                columns,
                columns,
            )
    for column in range(whole, columns):
        line = np.uint64(start + column * columns)
        for lane in range(lanes):
            total = w.source[lane * columns + column]
            for k in range(columns):
                total -= w.moving[np.uint64(k * LANES + lane)] * t.matrix[line + np.uint64(k)]
            w.target[lane * columns + column] = total


@_jit
def _list_columns(t: _Task, w: _Work, row: int, lane: int) -> None:
    """``Q`` of a row, and the scale that makes the diagonal of its matrix 1."""
    columns, count = t.dense.shape[1], 0
    start = t.problem[row] * columns * columns
    for column in range(columns):
        if t.solved[row, column]:
            w.picked[lane, count] = column
            w.unit[lane, count] = 1 / np.sqrt(t.matrix[start + column * (columns + 1)])
            count += 1
    w.length[lane] = count
    for k in range(count, (count + WIDTH - 1) // WIDTH * WIDTH):
        w.picked[lane, k], w.unit[lane, k] = 0, 0


@_jit
def _set_right(t: _Task, w: _Work, first: int, lanes: int) -> None:
    """The right-hand sides into the sources: ``(H w₀)_U`` less ``H_UU w₀_U``, or ``w₀_S``."""
    columns = t.dense.shape[1]
    for lane in range(lanes):
        row = t.rows[first + lane]
        for column in range(columns):
            value = t.dense[row, column]
            w.source[lane * columns + column] = 0 if t.kept else value
            w.moving[column * LANES + lane] = 0 if t.solved[row, column] else -value
    if t.kept:
        _less_product(t, w, t.problem[t.rows[first]], lanes)
        for k in range(lanes * columns):
            w.source[np.uint64(k)] = w.target[np.uint64(k)]


@_jit
def _norm(values: Array, count: int) -> float:
    total = 0.0
    for k in range(count):
        total += values[np.uint64(k)] * values[np.uint64(k)]
    return np.sqrt(total)


@_jit
def _start(t: _Task, w: _Work, first: int, lanes: int) -> None:
    """Factors, and right-hand sides in the factors' scale."""
    columns = t.dense.shape[1]
    for lane in range(lanes):
        row = t.rows[first + lane]
        _list_columns(t, w, row, lane)
        start, count = t.problem[row] * columns * columns, w.length[lane]
        factor = w.factors[lane]
        w.size[lane] = gather(t.matrix, start, columns, w.picked[lane], w.unit[lane], count, factor)
        w.going[lane] = factorise(factor, w.size[lane], w.inverse, t.width)
        t.good[row] = False
        for k in range(count):
            value = w.source[lane * columns + w.picked[lane, k]] * w.unit[lane, k]
            w.right[lane, k], w.residual[lane, k], w.solution[lane, k] = value, value, 0


@_jit
def _refine(t: _Task, w: _Work, first: int, lanes: int) -> bool:
    """One step of every row that is not done. Returns whether there is any."""
    columns, some = t.dense.shape[1], False
    w.moving[:] = 0
    for lane in range(lanes):
        count = w.length[lane]
        if w.going[lane]:
            norm = max(_norm(w.residual[lane], count), _TINY)
            for k in range(count):
                w.line[k] = w.residual[lane, k] / norm
            for k in range(count, w.size[lane]):
                w.line[k] = 0
            solve(w.factors[lane], w.line, w.size[lane], t.width)
            for k in range(count):
                w.solution[lane, k] += np.float64(w.line[k]) * norm
            _spread(w, lane)
            some = True
    if some:
        _less_product(t, w, t.problem[t.rows[first]], lanes)
    for lane in range(lanes):
        if w.going[lane]:
            count = w.length[lane]
            for k in range(count):
                w.residual[lane, k] = w.target[lane * columns + w.picked[lane, k]] * w.unit[lane, k]
            # The backward error of a float64 factorisation.
            bound = _EPS * (_norm(w.right[lane], count) + count * _norm(w.solution[lane], count))
            if _norm(w.residual[lane], count) <= bound:
                t.good[t.rows[first + lane]], w.going[lane] = True, False
    return some


@_jit
def _spread(w: _Work, lane: int) -> None:
    for k in range(w.length[lane]):
        w.moving[w.picked[lane, k] * LANES + lane] = w.solution[lane, k] * w.unit[lane, k]


@_jit
def _finish(t: _Task, w: _Work, first: int, lanes: int) -> None:
    """The weights: ``w₀_U + x``, or ``(w₀ - x G)_U``."""
    columns = t.dense.shape[1]
    w.moving[:] = 0
    for lane in range(lanes):
        _spread(w, lane)
    if not t.kept:
        # The sources are still the dense weights.
        _less_product(t, w, t.problem[t.rows[first]], lanes)
    for lane in range(lanes):
        row = t.rows[first + lane]
        for column in range(columns):
            value = 0.0
            if t.kept and t.solved[row, column]:
                value = t.dense[row, column] + w.moving[column * LANES + lane]
            elif not t.kept and not t.solved[row, column]:
                value = w.target[lane * columns + column]
            t.result[row, column] = value


def _entry(digest: int) -> Callable[[int, int, _Task, _Work], None]:
    """Compile the entry; ``digest`` makes the sources of all of it part of the key of numba's cache on disk."""

    def refit_blocks(first_block: int, last_block: int, t: _Task, w: _Work) -> None:
        if digest < 0:
            return
        for block in range(first_block, last_block):
            first, lanes = t.first[block], t.first[block + 1] - t.first[block]
            _set_right(t, w, first, lanes)
            _start(t, w, first, lanes)
            for _ in range(t.refinements):
                if not _refine(t, w, first, lanes):
                    break
            _finish(t, w, first, lanes)

    return cached(refit_blocks)


_refit_blocks = _entry(source_digest(__file__, layout.__file__))


def refit(
    matrix: Array, dense: Array, mask: Mask, rows: Indices, kept: bool, refinements: int, threads: int, budget: int
) -> tuple[Array, Mask]:
    """The optimum of some rows on their masks.

    Args:
        matrix: ``[g, d, d]`` float64, contiguous: the damped Hessian when ``kept``, otherwise its inverse.
        dense: ``[P, d]`` float64, ``P = g·R``.
        mask: ``[P, d]``, True = kept.
        rows: The rows in question, ascending; what is returned of others is not defined.
        kept: Solve for the kept columns, otherwise for the pruned ones.
        refinements: The most steps of refinement.
        threads: The most threads.
        budget: Bytes of working memory. One row at a time is always allowed.

    Returns:
        Weights ``[P, d]``, and ``[P]`` where they are accurate to float64.
    """
    total, columns = dense.shape
    result, good = np.empty((total, columns)), np.zeros(total, np.bool_)
    solved = mask if kept else ~mask
    most = -(-int(solved[rows].sum(1).max()) // WIDTH) * WIDTH
    problem = np.arange(total) // (total // len(matrix))
    each = packed_size(most) * 4 + 4 * most * 8 + 3 * columns * 8
    threads = max(1, min(threads, len(rows), budget // each))
    lanes = max(1, min(LANES, -(-len(rows) // threads), budget // (threads * each)))
    first = _blocks(problem[rows], lanes)
    task = _Task(
        matrix.reshape(-1),
        dense,
        solved,
        kept,
        rows,
        problem,
        first,
        refinements,
        flush_columns(_FLOAT32),
        flush_columns(_FLOAT64),
        result,
        good,
    )

    def begin() -> Callable[[int, int], None]:
        work = _work(columns, most, lanes)
        return lambda a, b: _refit_blocks(a, b, task, work)

    blocks = len(first) - 1
    run_blocks(blocks, max(1, blocks // (8 * threads)), threads, begin)
    return result, good


def _blocks(problem: Indices, lanes: int) -> Indices:
    """Where blocks of at most ``lanes`` rows start, none of which reaches into another problem."""
    starts = np.flatnonzero(np.diff(problem, prepend=-1))
    ends = np.append(starts[1:], len(problem))
    return np.append(np.concatenate([np.arange(a, b, lanes) for a, b in zip(starts, ends, strict=True)]), len(problem))


def _work(columns: int, most: int, lanes: int) -> _Work:
    """Memory of one thread; factors of rows that no block has are never touched, and so never allocated."""

    def floats(count: int) -> Array:
        return np.zeros((LANES, count))

    stride = packed_size(most)
    return _Work(
        factors=aligned(lanes * stride, _FLOAT32).reshape(lanes, stride),
        inverse=aligned(2 * WIDTH * WIDTH, _FLOAT32),
        line=aligned(most, _FLOAT32),
        moving=aligned(columns * LANES, _FLOAT64),
        source=aligned(LANES * columns, _FLOAT64),
        target=aligned(LANES * columns, _FLOAT64),
        picked=np.zeros((LANES, most), np.int64),
        unit=floats(most),
        right=floats(most),
        solution=floats(most),
        residual=floats(most),
        length=np.zeros(LANES, np.int64),
        size=np.zeros(LANES, np.int64),
        going=np.zeros(LANES, np.bool_),
    )
