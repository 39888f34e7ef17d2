"""The sweep of one row on a CPU, compiled by numba: choose, eliminate, flush, compact (paper, algorithm 1).

Columns still in the working set sit at *positions* ``0 … size``, in ascending order; at a panel's end they close the
gaps of those that left. A column is *fixed* when it has been eliminated; it can leave the working set without that,
when its N:M group closes. A row whose pivots have shrunk so far that float32 has lost their digits starts again from
the float64 inverse of ``H`` on the columns that are still free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from lightning_obc.kernels.obs_sweep.choose import choose, eliminate, score
from lightning_obc.kernels.obs_sweep.jit import STRICT, cached, finite, source_digest
from lightning_obc.kernels.obs_sweep.packed import (
    CHUNK,
    Array,
    at,
    gather,
    move_and_flush,
    move_panel,
    plan_moves,
)
from lightning_obc.kernels.obs_sweep.restart import place, restart
from lightning_obc.kernels.obs_sweep.state import Options, Problem, Result, Scratch
from lightning_obc.kernels.obs_sweep.tile import FLUSH_VECTORS
from lightning_obc.kernels.obs_sweep.types import REFRESH, cheaper_to_invert

_jit = numba.njit(**STRICT)
# Passing a whole Scratch costs more than a chunk's arithmetic, so what runs every step is inlined.
_jit_inline = numba.njit(forceinline=True, **STRICT)
_cheaper_to_invert = _jit(cheaper_to_invert)
CONTINUE, ENDED, BROKEN, WORN = 0, 1, 2, 3


@_jit
def _sweep_row(row: int, p: Problem, out: Result, s: Scratch, o: Options) -> tuple[int, bool]:
    forced, size, done, status = _begin(row, p, s, o), p.weight.shape[1], 0, CONTINUE
    source, free = p.packed[row // o.rows], size
    if _cheaper_to_invert(size, forced):
        done = _take_zeros(row, forced, p, out, s, o)
        status = WORN
    while True:
        if status == WORN:
            size = restart(row, done >= forced, p, s, o)
            if size <= 0:
                return done, size < 0
            source, free = s.packed, p.weight.shape[1] - done
        fresh = status == WORN or done == 0
        _load_panel(source, size, fresh, s, o)
        steps = o.steps if size > o.narrow else o.narrow_steps
        status, done, taken, leaving = _panel(row, source, size, done, forced, steps, fresh, p, out, s, o)
        if status in (ENDED, BROKEN):
            return done, status == BROKEN
        if status == CONTINUE and REFRESH * (p.weight.shape[1] - done) <= free:
            status = WORN
        if status == CONTINUE:
            lanes = o.flush_width // FLUSH_VECTORS
            size = _stay(size, leaving, s)
            plan_moves(size, s.origin, s.moves, lanes)
            move_panel(s.panel, taken, steps, size, s.origin, s.moves, lanes)
            move_and_flush(source, s.packed, size, s.origin, s.moves, s.panel, taken, steps, o.flush_width)
        source = s.packed


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
    place(row, p.weight.shape[1], p, s, o)
    return forced


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
    score(size, s, o)


@_jit_inline
def _panel(
    row: int,
    source: Array,
    size: int,
    done: int,
    forced: int,
    steps: int,
    fresh: bool,
    p: Problem,
    out: Result,
    s: Scratch,
    o: Options,
) -> tuple[int, int, int, int]:
    """Up to ``steps`` eliminations. Returns status, steps done in all and in this panel, and positions that leave."""
    leaving = 0
    for step in range(steps):
        if done < forced:
            pivot = s.position[s.zeros[done]]
        else:
            if done == forced and p.group.shape[0] > 0:
                leaving = _close_full_groups(size, leaving, p, s, o)
            if leaving == size:
                return ENDED, done, step, leaving
            pivot = choose(size, s, o)
        sound = pivot >= 0 and 0 < s.diagonal[pivot] < np.inf
        if not sound or s.reference[pivot] > o.worn * s.diagonal[pivot]:
            return BROKEN if fresh and step == 0 else WORN, done, step, leaving
        error = _fix(row, pivot, done, done < forced, p, out, s, o)
        s.leaving[leaving], s.penalty[pivot] = pivot, o.big
        leaving, done = leaving + 1, done + 1
        if p.group.shape[0] > 0 and done > forced:
            leaving = _close_if_full(p.group[s.column[pivot]], leaving, p, s, o)
        if leaving == size:
            return ENDED, done, step + 1, leaving
        _eliminate(source, size, pivot, error, step, steps, s, o)
    return CONTINUE, done, steps, leaving


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
    score(size, s, o)
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
def _eliminate(source: Array, size: int, pivot: int, error: Any, step: int, steps: int, s: Scratch, o: Options) -> None:
    """Form the pivot column, move the weights and the diagonal, and score again."""
    gather(source, size, pivot, s.panel, step, steps)
    inverse_root = o.one / np.sqrt(s.diagonal[pivot])
    eliminate(size, pivot, inverse_root, error * inverse_root, step, steps, s, o)
    s.weight[pivot], s.diagonal[pivot] = 0, 1


@_jit
def _stay(size: int, leaving: int, s: Scratch) -> int:
    """Close the gaps of positions that leave, but for ``G`` and the panel. Returns how many stay."""
    for k in range(leaving):
        s.position[s.column[s.leaving[k]]] = -1
    count = 0
    for i in range(size):
        s.origin[count] = i
        count += s.penalty[i] == 0
    for i in range(count):
        was = s.origin[i]
        s.weight[i], s.reference[i], s.column[i] = s.weight[was], s.reference[was], s.column[was]
        s.scale[i], s.inverse_scale[i] = s.scale[was], s.inverse_scale[was]
        s.zero_point[i] = s.zero_point[was]
        s.position[s.column[i]] = i
    return count


def _entry(digest: int) -> Callable[[int, int, Problem, Result, Scratch, Options], None]:
    """Compile the entry; ``digest`` makes the sources of all of it part of the key of numba's cache on disk."""

    def sweep_rows(first: int, last: int, p: Problem, out: Result, s: Scratch, o: Options) -> None:
        if digest < 0:
            return
        for row in range(first, last):
            done, broken = _sweep_row(row, p, out, s, o)
            out.steps[row] = done
            # A pivot that overflowed leaves its trace in the losses.
            out.broken[row] = broken or not finite(out.losses[row])

    return cached(sweep_rows)


sweep_rows = _entry(source_digest(__file__))
