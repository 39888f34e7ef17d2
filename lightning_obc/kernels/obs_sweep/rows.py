"""The sweep of one row on a CPU, compiled by numba: choose, eliminate, flush, compact (paper, algorithm 1).

Columns still in the working set sit at *positions* ``0 … size``; at a panel's end the last ones move into the holes of
those that left. A column is *fixed* when it has been eliminated; it can leave the working set without that, when its
N:M group closes. A row whose pivots have shrunk so far that float32 has lost their digits starts again from the float64
inverse of ``H`` on the columns that are still free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from lightning_obc.kernels.obs_sweep import packed, tile
from lightning_obc.kernels.obs_sweep.jit import STRICT, cached, lower, source_digest
from lightning_obc.kernels.obs_sweep.packed import (
    CHUNK,
    Array,
    IntArray,
    at,
    correct,
    flush,
    gather,
    invert_,
    panel_at,
    refill,
    refill_and_flush,
)
from lightning_obc.kernels.obs_sweep.types import cheaper_to_invert

_jit = numba.njit(**STRICT)
# Passing a whole Scratch costs more than a chunk's arithmetic, so what runs every step is inlined.
_jit_inline = numba.njit(forceinline=True, **STRICT)
_cheaper_to_invert = _jit(cheaper_to_invert)
_NONE = np.iinfo(np.int32).max
CONTINUE, ENDED, BROKEN, WORN = 0, 1, 2, 3


class Problem(NamedTuple):
    """Inputs, read only. ``P = g·R`` rows; an absent input has no elements."""

    weight: Array  # [P, d]
    packed: Array  # [g, packed_size(d)], G
    hessian: Array  # [g, d, d] float64, damped
    zeros: NDArray[np.bool_]  # [P, d], weights that are zero already
    scale: Array  # [P, d]
    zero_point: Array  # [P, d]
    group: IntArray  # [d], N:M group of every column
    members: IntArray  # [d], columns sorted by group
    first_member: IntArray  # [groups + 1], where a group starts in ``members``
    quota: IntArray  # [groups], zeros to make


class Result(NamedTuple):
    """Outputs, see :class:`~lightning_obc.kernels.obs_sweep.types.SweepOutput`."""

    order: IntArray
    losses: Array
    steps: IntArray
    broken: NDArray[np.bool_]
    codes: NDArray[np.uint8]


class Scratch(NamedTuple):
    """Working memory of one thread. Flat arrays, by position where not said otherwise."""

    packed: Array
    panel: Array
    packed64: Array
    panel64: Array
    weight: Array
    diagonal: Array
    reference: Array  # diagonal at the start, or at the last restart
    penalty: Array  # 0, or ``big`` once a position leaves
    score: Array
    chunk_best: Array  # by chunk
    scale: Array
    inverse_scale: Array
    zero_point: Array
    right: Array  # float64
    unit: Array  # float64
    column: IntArray  # column at a position
    position: IntArray  # by column, -1 outside the working set
    leaving: IntArray
    hole: IntArray  # by move
    mover: IntArray  # by move
    zeros: IntArray  # columns eliminated without a choice
    free: IntArray
    fixed: NDArray[np.bool_]  # by column
    target: Array  # by column, float64: value a column was fixed at
    made: IntArray  # by group: zeros so far


class Options(NamedTuple):
    """Scalars. ``big``, ``outlier`` … are in the dtype of the sweep, so that nothing is promoted."""

    rows: int  # rows per problem
    quantize: bool
    max_code: Any
    outlier: Any  # squared error, in squared steps, above which a clipped weight goes first
    big: Any
    zero: Any
    half: Any
    one: Any
    worn: Any  # reference / diagonal at a pivot that asks for a restart
    steps: int  # panel of a wide working set
    narrow_steps: int  # panel of a narrow one
    narrow: int
    flush_width: int
    panel_width: int
    flush_width64: int
    panel_width64: int


@_jit
def _sweep_row(row: int, p: Problem, out: Result, s: Scratch, o: Options) -> tuple[int, bool]:
    forced, size, done, status = _begin(row, p, s, o), p.weight.shape[1], 0, CONTINUE
    source, shared = p.packed[row // o.rows], True
    if _cheaper_to_invert(size, forced):
        done = _take_zeros(row, forced, p, out, s, o)
        status = WORN
    while True:
        if status == WORN:
            size = _restart(row, done >= forced, p, s, o)
            if size <= 0:
                return done, size < 0
            source, shared = s.packed, False
        _load_panel(source, size, status == WORN or done == 0, s, o)
        steps = o.steps if size > o.narrow else o.narrow_steps
        status, done, taken, leaving = _panel(row, source, size, done, forced, steps, p, out, s, o)
        if status in (ENDED, BROKEN):
            return done, status == BROKEN
        if status == CONTINUE and shared:
            flush(source, s.packed, size, s.panel, taken, steps, o.flush_width)
            size, moves = _compact(size, leaving, 0, steps, s)
            refill(s.packed, size, s.hole, s.mover, moves)
        elif status == CONTINUE:
            size, moves = _compact(size, leaving, taken, steps, s)
            refill_and_flush(s.packed, size, s.hole, s.mover, moves, s.panel, taken, steps, o.flush_width)
        source, shared = s.packed, False


@_jit
def _begin(row: int, p: Problem, s: Scratch, o: Options) -> int:
    """All columns at their own positions. Returns how many are zero already."""
    forced = 0
    s.made[:] = 0
    for column in range(p.weight.shape[1]):
        s.fixed[column] = False
        s.target[column] = 0
        s.column[column] = column
        s.weight[column] = p.weight[row, column]
        if p.zeros.shape[0] > 0 and p.zeros[row, column]:
            s.zeros[forced] = column
            forced += 1
    _place(row, p.weight.shape[1], p, s, o)
    return forced


@_jit
def _place(row: int, size: int, p: Problem, s: Scratch, o: Options) -> None:
    """Fill what depends on which columns sit at the first ``size`` positions."""
    s.position[:] = -1
    for i in range(size):
        column = s.column[i]
        s.position[column] = i
        if o.quantize:
            s.scale[i] = p.scale[row, column]
            s.inverse_scale[i] = o.one / s.scale[i]
            s.zero_point[i] = p.zero_point[row, column]


@_jit
def _take_zeros(row: int, forced: int, p: Problem, out: Result, s: Scratch, o: Options) -> int:
    """Record the weights that are zero already, without eliminating them one by one."""
    for k in range(forced):
        out.order[row, k] = s.zeros[k]
        s.fixed[s.zeros[k]] = True
        if p.group.shape[0] > 0:
            s.made[p.group[s.zeros[k]]] += 1
        if o.quantize:
            out.codes[row, s.zeros[k]] = np.uint8(p.zero_point[row, s.zeros[k]])
    return forced


@_jit
def _load_panel(source: Array, size: int, start: bool, s: Scratch, o: Options) -> None:
    """Diagonal, penalties and scores at the start of a panel; the padding never wins."""
    end = (size + CHUNK - 1) // CHUNK * CHUNK
    for i in range(size):
        s.diagonal[i] = source[at(i, i)]
        s.penalty[i] = 0
        if start:
            s.reference[i] = s.diagonal[i]
    for i in range(size, end):
        s.weight[i], s.diagonal[i], s.penalty[i] = 0, 1, o.big
        s.scale[i], s.inverse_scale[i], s.zero_point[i] = 1, 1, 0
    for chunk in range(end // CHUNK):
        _score(chunk, s, o)


@_jit_inline
def _panel(
    row: int,
    source: Array,
    size: int,
    done: int,
    forced: int,
    steps: int,
    p: Problem,
    out: Result,
    s: Scratch,
    o: Options,
) -> tuple[int, int, int, int]:
    """Up to ``steps`` eliminations. Returns status, steps done in all and in this panel, and positions that leave."""
    leaving, worn = 0, False
    for step in range(steps):
        if done < forced:
            pivot = s.position[s.zeros[done]]
        else:
            if done == forced and p.group.shape[0] > 0:
                leaving = _close_full_groups(size, leaving, p, s, o)
            if leaving == size:
                return ENDED, done, step, leaving
            pivot = _choose(size, s, o)
        if pivot < 0 or not 0 < s.diagonal[pivot] < np.inf:
            return BROKEN, done, step, leaving
        worn |= s.reference[pivot] > o.worn * s.diagonal[pivot]
        error = _fix(row, pivot, done, done < forced, p, out, s, o)
        s.leaving[leaving], s.penalty[pivot] = pivot, o.big
        leaving, done = leaving + 1, done + 1
        if p.group.shape[0] > 0 and done > forced:
            leaving = _close_if_full(p.group[s.column[pivot]], leaving, p, s, o)
        if leaving == size:
            return ENDED, done, step + 1, leaving
        _eliminate(source, size, pivot, error, step, steps, s, o)
    return WORN if worn else CONTINUE, done, steps, leaving


@_jit_inline
def _fix(row: int, pivot: int, done: int, known: bool, p: Problem, out: Result, s: Scratch, o: Options) -> Any:
    """Record the pivot; returns how far it is from its target."""
    column, error = s.column[pivot], s.weight[pivot]
    if o.quantize:
        zero = s.zero_point[pivot]
        code = zero if known else min(max(np.rint(error / s.scale[pivot]) + zero, o.zero), o.max_code)
        out.codes[row, column] = np.uint8(code)
        value = (code - zero) * s.scale[pivot]
        s.target[column] = value
        error -= value
    out.order[row, done] = column
    out.losses[row, done] = o.half * error * error / s.diagonal[pivot]
    s.fixed[column] = True
    if p.group.shape[0] > 0:
        s.made[p.group[column]] += 1
    return error


@_jit_inline
def _close_full_groups(size: int, leaving: int, p: Problem, s: Scratch, o: Options) -> int:
    for group in range(p.quota.shape[0]):
        leaving = _close_if_full(group, leaving, p, s, o)
    for chunk in range((size + CHUNK - 1) // CHUNK):
        _score(chunk, s, o)
    return leaving


@_jit_inline
def _close_if_full(group: int, leaving: int, p: Problem, s: Scratch, o: Options) -> int:
    """A group with all its zeros leaves the working set."""
    if s.made[group] >= p.quota[group]:
        for k in range(p.first_member[group], p.first_member[group + 1]):
            i = s.position[p.members[k]]
            if i >= 0 and s.penalty[i] == 0:
                s.leaving[leaving], s.penalty[i], s.score[i] = i, o.big, o.big
                leaving += 1
    return leaving


@_jit_inline
def _choose(size: int, s: Scratch, o: Options) -> int:
    """Position of the smallest score, the lowest column among equals; -1 when there is none."""
    chunks = (size + CHUNK - 1) // CHUNK
    best = o.big
    for chunk in range(chunks):
        best = min(best, s.chunk_best[chunk])
    if not best < o.big:
        return -1
    column = _NONE
    for chunk in range(chunks):
        if s.chunk_best[chunk] == best:
            column = min(column, _lowest_column(s.score, s.column, chunk * CHUNK, best))
    return -1 if column == _NONE else s.position[column]


@_jit
def _lowest_column(score: Array, column: IntArray, start: int, best: Any) -> int:
    lowest: Any = np.int32(_NONE)
    for k in range(CHUNK):
        i = np.uint64(start) + np.uint64(k)
        lowest = min(lowest, column[i] if score[i] == best else np.int32(_NONE))
    return lowest


@_jit_inline
def _eliminate(source: Array, size: int, pivot: int, error: Any, step: int, steps: int, s: Scratch, o: Options) -> None:
    """Form the pivot column, move the weights and the diagonal, and score again."""
    gather(source, size, pivot, s.panel, step, steps)
    inverse_root = o.one / np.sqrt(s.diagonal[pivot])
    for chunk in range((size + CHUNK - 1) // CHUNK):
        correct(s.panel, chunk, pivot, step, steps, o.panel_width)
        start = panel_at(chunk * CHUNK, step, steps)
        _advance(s.panel, start, s.weight, s.diagonal, chunk * CHUNK, inverse_root, error * inverse_root)
        if chunk == pivot // CHUNK:
            s.weight[pivot], s.diagonal[pivot] = 0, 1
        _score(chunk, s, o)


@_jit
def _advance(panel: Array, at: int, weight: Array, diagonal: Array, start: int, inverse_root: Any, z: Any) -> None:
    for k in range(CHUNK):
        i, j = np.uint64(start) + np.uint64(k), np.uint64(at) + np.uint64(k)
        v = panel[j] * inverse_root
        panel[j] = v
        weight[i] -= z * v
        diagonal[i] -= v * v


@_jit_inline
def _score(chunk: int, s: Scratch, o: Options) -> None:
    start = chunk * CHUNK
    if o.quantize:
        s.chunk_best[chunk] = _score_quantize(
            s.weight, s.diagonal, s.penalty, s.scale, s.inverse_scale, s.zero_point, s.score, start, o
        )
    else:
        s.chunk_best[chunk] = _score_prune(s.weight, s.diagonal, s.penalty, s.score, start, o.big)


@_jit
def _score_prune(weight: Array, diagonal: Array, penalty: Array, score: Array, start: int, big: Any) -> Any:
    best = big
    for k in range(CHUNK):
        i = np.uint64(start) + np.uint64(k)
        value = weight[i] * weight[i] / diagonal[i] + penalty[i]
        score[i] = value
        best = lower(best, value)
    return best


@_jit
def _score_quantize(
    weight: Array,
    diagonal: Array,
    penalty: Array,
    scale: Array,
    inverse_scale: Array,
    zero_point: Array,
    score: Array,
    start: int,
    o: Options,
) -> Any:
    """Clipped outliers score below zero, the largest squared error lowest, so that one minimum finds both."""
    best = o.big
    for k in range(CHUNK):
        i = np.uint64(start) + np.uint64(k)
        nearest = np.rint(weight[i] * inverse_scale[i]) + zero_point[i]
        code = min(max(nearest, o.zero), o.max_code)
        error = weight[i] - (code - zero_point[i]) * scale[i]
        square = error * error
        far = nearest != code and square > o.outlier * scale[i] * scale[i]
        value = (-square if far else square / diagonal[i]) + penalty[i]
        score[i] = value
        best = lower(best, value)
    return best


@_jit
def _compact(size: int, leaving: int, depth: int, steps: int, s: Scratch) -> tuple[int, int]:
    """Move the last positions into the holes of those that leave, but for ``G``. Returns the new size and the moves."""
    smaller, last, moves = size - leaving, size - 1, 0
    for k in range(leaving):
        s.position[s.column[s.leaving[k]]] = -1
    for k in range(leaving):
        hole = s.leaving[k]
        if hole >= smaller:
            continue
        while s.penalty[last] > 0:
            last -= 1
        for step in range(depth):
            s.panel[panel_at(hole, step, steps)] = s.panel[panel_at(last, step, steps)]
        s.weight[hole], s.reference[hole], s.column[hole] = s.weight[last], s.reference[last], s.column[last]
        s.scale[hole], s.inverse_scale[hole] = s.scale[last], s.inverse_scale[last]
        s.zero_point[hole] = s.zero_point[last]
        s.position[s.column[hole]] = hole
        s.hole[moves], s.mover[moves] = hole, last
        moves, last = moves + 1, last - 1
    return smaller, moves


@_jit
def _restart(row: int, close: bool, p: Problem, s: Scratch, o: Options) -> int:
    """``G`` and the weights of the working set from the float64 inverse of ``H`` on the free columns.

    With ``F`` the fixed columns at their targets ``q``: ``w_U = w₀_U + H_UU⁻¹ H_UF (w₀_F - q_F)``.
    Returns the size of the working set, or -1 when ``H_UU`` is not positive definite.
    """
    size, count = _list_free(close, p, s)
    hessian = p.hessian[row // o.rows]
    for i in range(count):
        s.unit[i] = 1 / np.sqrt(hessian[s.free[i], s.free[i]])
        s.right[i] = 0
    for j in range(count):
        line = hessian[s.free[j]]
        for i in range(j + 1):
            s.packed64[at(i, j)] = line[s.free[i]] * s.unit[i] * s.unit[j]
    if invert_(s.packed64, count, s.panel64, o.narrow_steps, o.flush_width64, o.panel_width64) > 0:
        return -1
    for column in range(p.weight.shape[1]):
        moved = np.float64(p.weight[row, column]) - s.target[column]
        if s.fixed[column] and moved != 0:
            line = hessian[column]
            for i in range(count):
                s.right[i] += moved * line[s.free[i]] * s.unit[i]
    for i in range(size):
        total = 0.0
        for j in range(count):
            total -= s.packed64[at(min(i, j), max(i, j))] * s.right[j]
        s.column[i] = s.free[i]
        s.weight[i] = p.weight[row, s.free[i]] + total * s.unit[i]
    for j in range(size):
        for i in range(j + 1):
            s.packed[at(i, j)] = -s.packed64[at(i, j)] * s.unit[i] * s.unit[j]
    _place(row, size, p, s, o)
    return size


@_jit
def _list_free(close: bool, p: Problem, s: Scratch) -> tuple[int, int]:
    """Free columns, those of the working set first. Returns how many there are in the working set, and in all."""
    size, count = 0, 0
    for kind in range(2):
        for column in range(p.weight.shape[1]):
            closed = close and p.group.shape[0] > 0 and s.made[p.group[column]] >= p.quota[p.group[column]]
            if not s.fixed[column] and closed == (kind == 1):
                s.free[count] = column
                count += 1
        if kind == 0:
            size = count
    return size, count


def _entry(digest: int) -> Callable[[int, int, Problem, Result, Scratch, Options], None]:
    """Compile the entry; ``digest`` makes the sources of all of it part of the key of numba's cache on disk."""

    def sweep_rows(first: int, last: int, p: Problem, out: Result, s: Scratch, o: Options) -> None:
        if digest < 0:
            return
        for row in range(first, last):
            done, broken = _sweep_row(row, p, out, s, o)
            out.steps[row] = done
            out.broken[row] = broken

    return cached(sweep_rows)


sweep_rows = _entry(source_digest(__file__, packed.__file__, tile.__file__))
