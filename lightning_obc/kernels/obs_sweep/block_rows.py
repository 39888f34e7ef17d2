"""The block sweep of one row on a CPU, compiled by numba (paper, section 4, "block-sparsity").

A block leaves one column after the other: with ``G_BB = L Lᵀ`` its ``c`` pivots are ``L_ii²`` and their losses add up
to ``½ w_Bᵀ (G_BB)⁻¹ w_B``. Panels, flushes and restarts are those of the sweep over columns (:mod:`.rows`). Choosing
needs the diagonal blocks of ``G``, which every column keeps current. Columns that are zero already are eliminated first
and stay in their blocks as columns of the identity.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

from lightning_obc.kernels.obs_sweep.block_choose import choose, score, start_pivots, weakest
from lightning_obc.kernels.obs_sweep.block_restart import restart
from lightning_obc.kernels.obs_sweep.block_state import (
    LANES,
    BlockOptions,
    BlockProblem,
    BlockResult,
    BlockScratch,
    entry,
    slot,
)
from lightning_obc.kernels.obs_sweep.jit import STRICT, cached, finite, source_digest
from lightning_obc.kernels.obs_sweep.lanes import less_product, less_scaled, times_scaled
from lightning_obc.kernels.obs_sweep.packed import (
    CHUNK,
    Array,
    at,
    correct,
    flush,
    gather,
    panel_at,
    refill,
    refill_and_flush,
)
from lightning_obc.kernels.obs_sweep.types import cheaper_to_invert

_jit = numba.njit(**STRICT)
# Passing a whole Scratch costs more than a team's arithmetic, so what runs every step is inlined.
_jit_inline = numba.njit(forceinline=True, **STRICT)
_cheaper_to_invert = _jit(cheaper_to_invert)
CONTINUE, ENDED, BROKEN, WORN = 0, 1, 2, 3


@_jit
def _sweep_row(row: int, p: BlockProblem, out: BlockResult, s: BlockScratch, o: BlockOptions) -> tuple[int, bool]:
    forced, places, done, status = _begin(row, p, s, o), p.members.shape[0], 0, CONTINUE
    source, shared, fresh, taken = p.packed[row // o.rows], True, True, 0
    if _cheaper_to_invert(p.weight.shape[1], forced):
        for k in range(forced):
            s.fixed[s.zeros[k]] = True
        taken, status = forced, WORN
    while True:
        if status == WORN:
            places = restart(row, p, s, o)
            if places <= 0:
                return done, places < 0
            source, shared, fresh = s.packed, False, True
        _load_panel(source, places, fresh, s, o)
        size = (places + LANES - 1) // LANES * LANES * o.size
        steps = o.steps if size > o.narrow else o.narrow_steps
        steps = max(steps, o.size)
        status, done, taken, depth = _panel(row, source, places, done, taken, forced, steps, fresh, p, out, s, o)
        if status in (ENDED, BROKEN):
            return done, status == BROKEN
        if status == CONTINUE:
            if shared:
                flush(source, s.packed, size, s.panel, depth, steps, o.flush_width)
            places, moves = _compact(places, 0 if shared else depth, steps, s, o)
            size = (places + LANES - 1) // LANES * LANES * o.size
            if shared:
                refill(s.packed, size, s.hole, s.mover, moves)
            else:
                refill_and_flush(s.packed, size, s.hole, s.mover, moves, s.panel, depth, steps, o.flush_width)
            source, shared, fresh = s.packed, False, False


@_jit
def _begin(row: int, p: BlockProblem, s: BlockScratch, o: BlockOptions) -> int:
    """All blocks at their own places. Returns how many columns are zero already."""
    blocks, columns, forced = p.members.shape[0], p.weight.shape[1], 0
    s.gone[:] = False
    s.alive[:] = 0
    s.weight[:] = 0
    s.column[:] = -1
    for place in range((blocks + LANES - 1) // LANES * LANES):
        s.block[place] = place if place < blocks else -1
        s.penalty[place] = o.zero if place < blocks else o.big
    for column in range(columns):
        i = p.position[column]
        s.fixed[column] = False
        s.column[i], s.alive[i], s.weight[i] = column, 1, p.weight[row, column]
        if p.zeros.shape[0] > 0 and p.zeros[row, column]:
            s.zeros[forced] = column
            forced += 1
    return forced


@_jit
def _load_panel(source: Array, places: int, fresh: bool, s: BlockScratch, o: BlockOptions) -> None:
    """Diagonal blocks and scores at the start of a panel; the padding never wins."""
    for team in range((places + LANES - 1) // LANES):
        for i in range(o.size):
            for j in range(i + 1):
                k = entry(team, i, j, o.size)
                for lane in range(LANES):
                    right, left = slot(team * LANES + lane, i, o.size), slot(team * LANES + lane, j, o.size)
                    value = source[at(left, right)] if s.alive[left] > 0 and s.alive[right] > 0 else o.zero
                    s.diagonal[k + lane] = o.one if i == j and not s.alive[right] > 0 else value
        if fresh:
            start_pivots(team, s, o)
        score(team, s, o)


@_jit_inline
def _panel(
    row: int,
    source: Array,
    places: int,
    done: int,
    taken: int,
    forced: int,
    steps: int,
    fresh: bool,
    p: BlockProblem,
    out: BlockResult,
    s: BlockScratch,
    o: BlockOptions,
) -> tuple[int, int, int, int]:
    """As many eliminations as fit ``steps`` columns.

    Returns status, blocks done in all, known zeros taken in all, and columns of this panel.
    """
    depth, teams = 0, (places + LANES - 1) // LANES
    while taken < forced and depth < steps:
        pivot = p.position[s.zeros[taken]]
        if not _eliminate(source, pivot, teams, depth, steps, s, o) >= 0:
            return BROKEN if fresh and depth == 0 else WORN, done, taken, depth
        taken, depth = taken + 1, depth + 1
        if taken == forced or depth == steps:
            for team in range(teams):
                score(team, s, o)
    if taken < forced:
        return CONTINUE, done, taken, depth
    while depth + o.size <= steps:
        place = choose(teams, s, o)
        if place < 0 or not weakest(place, s, o) > 0:
            return BROKEN if fresh and depth == 0 else WORN, done, taken, depth
        if o.one > o.worn * weakest(place, s, o) and not (fresh and depth == 0):
            return WORN, done, taken, depth
        loss = o.zero
        for i in range(o.size):
            pivot = slot(place, i, o.size)
            if s.alive[pivot] > 0:
                loss += _eliminate(source, pivot, teams, depth, steps, s, o)
                depth += 1
        out.order[row, done], out.losses[row, done] = s.block[place], loss
        s.gone[s.block[place]], s.penalty[place] = True, o.big
        done += 1
        if done == p.members.shape[0]:
            return ENDED, done, taken, depth
        for team in range(teams):
            score(team, s, o)
    return CONTINUE, done, taken, depth


@_jit_inline
def _eliminate(source: Array, pivot: int, teams: int, step: int, steps: int, s: BlockScratch, o: BlockOptions) -> float:
    """Take one column out: move weights and diagonal blocks. Returns its loss, or -1 for a pivot that is bad."""
    team, member, lane = pivot // (LANES * o.size), (pivot // LANES) % o.size, pivot % LANES
    value = s.diagonal[entry(team, member, member, o.size) + lane]
    if not 0 < value < np.inf:
        return -o.one
    inverse_root = o.one / np.sqrt(value)
    z = s.weight[pivot] * inverse_root
    size = teams * LANES * o.size
    gather(source, size, pivot, s.panel, step, steps)
    for chunk in range((size + CHUNK - 1) // CHUNK):
        correct(s.panel, chunk, pivot, step, steps, o.panel_width)
    for other in range(teams):
        _advance(other, s.panel, step, steps, s.weight, s.alive, s.diagonal, inverse_root, z, o.size)
    s.weight[pivot], s.alive[pivot], s.fixed[s.column[pivot]] = 0, 0, True
    for k in range(o.size):
        s.diagonal[entry(team, max(member, k), min(member, k), o.size) + lane] = o.one if k == member else o.zero
    return o.half * z * z


@_jit
def _advance(
    team: int,
    panel: Array,
    step: int,
    steps: int,
    weight: Array,
    alive: Array,
    diagonal: Array,
    inverse_root: float,
    z: float,
    size: int,
) -> None:
    """Scale the pivot column of one team, move its weights, and keep its diagonal blocks current."""
    for i in range(size):
        start = team * LANES * size + i * LANES
        line = panel_at(start, step, steps)
        times_scaled(inverse_root, panel, line, alive, start)
        less_scaled(z, weight, start, panel, line)
        for j in range(i + 1):
            other = panel_at(start - (i - j) * LANES, step, steps)
            less_product(diagonal, entry(team, i, j, size), panel, line, panel, other)


@_jit
def _compact(places: int, depth: int, steps: int, s: BlockScratch, o: BlockOptions) -> tuple[int, int]:
    """Move the last blocks into the places of those that left, but for ``G``. Returns places and moves of positions."""
    left = 0
    for place in range(places):
        s.target[place] = -1
        left += s.penalty[place] == 0
    smaller, place = (left + LANES - 1) // LANES * LANES, 0
    for last in range(places - 1, smaller - 1, -1):
        if s.penalty[last] == 0:
            while s.penalty[place] == 0:
                place += 1
            s.target[last], s.penalty[place], s.block[place] = place, 0, s.block[last]
    moves = 0
    for mover in range((places + LANES - 1) // LANES * LANES * o.size - 1, smaller * o.size - 1, -1):
        member = (mover // LANES) % o.size
        last = mover // (LANES * o.size) * LANES + mover % LANES
        if last < places and s.target[last] >= 0:
            hole = slot(s.target[last], member, o.size)
            for step in range(depth):
                s.panel[panel_at(hole, step, steps)] = s.panel[panel_at(mover, step, steps)]
            s.weight[hole], s.alive[hole], s.column[hole] = s.weight[mover], s.alive[mover], s.column[mover]
            s.reference[hole] = s.reference[mover]
            s.hole[moves], s.mover[moves] = hole, mover
            moves += 1
    return min(smaller, places), moves


def _entry(digest: int) -> Callable[[int, int, BlockProblem, BlockResult, BlockScratch, BlockOptions], None]:
    """Compile the entry; ``digest`` makes the sources of all of it part of the key of numba's cache on disk."""

    def sweep_rows(first: int, last: int, p: BlockProblem, out: BlockResult, s: BlockScratch, o: BlockOptions) -> None:
        if digest < 0:
            return
        for row in range(first, last):
            done, broken = _sweep_row(row, p, out, s, o)
            out.steps[row] = done
            # A pivot that overflowed leaves its trace in the losses.
            out.broken[row] = broken or not finite(out.losses[row])

    return cached(sweep_rows)


sweep_rows = _entry(source_digest(__file__))
