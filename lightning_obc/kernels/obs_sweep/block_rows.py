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
    room,
)
from lightning_obc.kernels.obs_sweep.jit import STRICT, cached, finite, source_digest
from lightning_obc.kernels.obs_sweep.lanes import less_product, less_scaled, times_scaled
from lightning_obc.kernels.obs_sweep.packed import (
    CHUNK,
    Array,
    at,
    correct,
    correct_block,
    gather,
    move_and_flush,
    move_panel,
    panel_at,
    plan_moves,
)
from lightning_obc.kernels.obs_sweep.tile import FLUSH_VECTORS
from lightning_obc.kernels.obs_sweep.types import REFRESH, cheaper_to_invert

_jit = numba.njit(**STRICT)
# Passing a whole Scratch costs more than a team's arithmetic, so what runs every step is inlined.
_jit_inline = numba.njit(forceinline=True, **STRICT)
_cheaper_to_invert = _jit(cheaper_to_invert)
CONTINUE, ENDED, BROKEN, WORN = 0, 1, 2, 3


@_jit
def _sweep_row(row: int, p: BlockProblem, out: BlockResult, s: BlockScratch, o: BlockOptions) -> tuple[int, bool]:
    forced, places, done, status = _begin(row, p, s, o), p.members.shape[0], 0, CONTINUE
    source, fresh, taken, free = p.packed[row // o.rows], True, 0, places
    if _cheaper_to_invert(p.weight.shape[1], forced):
        for k in range(forced):
            s.fixed[s.zeros[k]] = True
        taken, status = forced, WORN
    while True:
        if status == WORN:
            places = restart(row, p, s, o)
            if places <= 0:
                return done, places < 0
            source, fresh, free = s.packed, True, places
        _load_panel(source, places, fresh, s, o)
        size = room(places) * o.size
        steps = o.steps if size > o.narrow else o.narrow_steps
        steps = max(steps, o.size)
        status, done, taken, depth = _panel(row, source, places, done, taken, forced, steps, fresh, p, out, s, o)
        if status in (ENDED, BROKEN):
            return done, status == BROKEN
        if status == CONTINUE and REFRESH * (p.members.shape[0] - done) <= free:
            status = WORN
        if status == CONTINUE:
            lanes = o.flush_width // FLUSH_VECTORS
            places = _stay(places, s, o)
            size = room(places) * o.size
            plan_moves(size, s.origin, s.moves, lanes)
            move_panel(s.panel, depth, steps, size, s.origin, s.moves, lanes)
            move_and_flush(source, s.packed, size, s.origin, s.moves, s.panel, depth, steps, o.flush_width)
            source, fresh = s.packed, False


@_jit
def _begin(row: int, p: BlockProblem, s: BlockScratch, o: BlockOptions) -> int:
    """All blocks at their own places. Returns how many columns are zero already."""
    blocks, columns, forced = p.members.shape[0], p.weight.shape[1], 0
    s.gone[:] = False
    s.alive[:] = 0
    s.weight[:] = 0
    s.column[:] = -1
    for place in range(room(blocks)):
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
                    right, left = i * room(places) + team * LANES + lane, j * room(places) + team * LANES + lane
                    value = source[at(left, right)] if s.alive[left] > 0 and s.alive[right] > 0 else o.zero
                    s.diagonal[k + lane] = o.one if i == j and not s.alive[right] > 0 else value
        if fresh:
            start_pivots(team, places, s, o)
        score(team, places, s, o)


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
        gather(source, room(places) * o.size, pivot, s.panel, depth, steps)
        if not _eliminate(pivot, places, 0, depth, steps, s, o) >= 0:
            return BROKEN if fresh and depth == 0 else WORN, done, taken, depth
        taken, depth = taken + 1, depth + 1
        if taken == forced or depth == steps:
            for team in range(teams):
                score(team, places, s, o)
    if taken < forced:
        return CONTINUE, done, taken, depth
    while depth + o.size <= steps:
        place = choose(teams, s, o)
        ratio = weakest(place, places, s, o) if place >= 0 else o.zero
        if not ratio > 0:
            return BROKEN if fresh and depth == 0 else WORN, done, taken, depth
        if o.one > o.worn * ratio and not (fresh and depth == 0):
            return WORN, done, taken, depth
        loss, columns = _eliminate_block(source, place, places, depth, steps, s, o)
        depth += columns
        out.order[row, done], out.losses[row, done] = s.block[place], loss
        s.gone[s.block[place]], s.penalty[place] = True, o.big
        done += 1
        if done == p.members.shape[0]:
            return ENDED, done, taken, depth
        for team in range(teams):
            score(team, places, s, o)
    return CONTINUE, done, taken, depth


@_jit_inline
def _eliminate_block(
    source: Array, place: int, places: int, depth: int, steps: int, s: BlockScratch, o: BlockOptions
) -> tuple[float, int]:
    """Take a block out, its columns corrected together by what the panel holds. Returns its loss and its columns."""
    size, count, loss = room(places) * o.size, 0, o.zero
    for i in range(o.size):
        pivot = i * room(places) + place
        if s.alive[pivot] > 0:
            gather(source, size, pivot, s.panel, depth + count, steps)
            s.pivots[count] = pivot
            count += 1
    correct_block(s.panel, size, s.pivots, count, s.left, depth, steps, o.panel_width, o.block_width)
    for i in range(count):
        loss += _eliminate(s.pivots[i], places, depth, depth + i, steps, s, o)
    return loss, count


@_jit_inline
def _eliminate(pivot: int, places: int, first: int, step: int, steps: int, s: BlockScratch, o: BlockOptions) -> float:
    """Take one column out, gathered at ``step`` and corrected by the panel's columns before ``first``.

    Moves weights and diagonal blocks. Returns its loss, or -1 for a pivot that is bad.
    """
    stride = room(places)
    member, lane, team = pivot // stride, pivot % LANES, pivot % stride // LANES
    value = s.diagonal[entry(team, member, member, o.size) + lane]
    if not 0 < value < np.inf:
        return -o.one
    inverse_root = o.one / np.sqrt(value)
    z = s.weight[pivot] * inverse_root
    for chunk in range((stride * o.size + CHUNK - 1) // CHUNK):
        correct(s.panel, chunk, pivot, first, step, step, steps, o.panel_width)
    for other in range(stride // LANES):
        _advance(other, stride, s.panel, step, steps, s.weight, s.alive, s.diagonal, inverse_root, z, o.size)
    s.weight[pivot], s.alive[pivot], s.fixed[s.column[pivot]] = 0, 0, True
    for k in range(o.size):
        s.diagonal[entry(team, max(member, k), min(member, k), o.size) + lane] = o.one if k == member else o.zero
    return o.half * z * z


@_jit
def _advance(
    team: int,
    stride: int,
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
        start = i * stride + team * LANES
        line = panel_at(start, step, steps)
        times_scaled(inverse_root, panel, line, alive, start)
        less_scaled(z, weight, start, panel, line)
        for j in range(i + 1):
            other = panel_at(start - (i - j) * stride, step, steps)
            less_product(diagonal, entry(team, i, j, size), panel, line, panel, other)


@_jit
def _stay(places: int, s: BlockScratch, o: BlockOptions) -> int:
    """Close the gaps of blocks that left, but for ``G`` and the panel. Returns how many stay."""
    left, before = 0, room(places)
    for place in range(places):
        s.place[left] = place
        left += s.penalty[place] == 0
    after = room(left)
    for place in range(left, after):
        # The padding takes any numbers that are there.
        s.place[place] = max(s.place[left - 1], place)
    for member in range(o.size):
        for place in range(after):
            here, was = member * after + place, member * before + s.place[place]
            s.origin[here], s.reference[here] = was, s.reference[was]
            s.weight[here] = s.weight[was] if place < left else o.zero
            s.alive[here] = s.alive[was] if place < left else o.zero
            s.column[here] = s.column[was] if place < left else -1
    for place in range(after):
        s.block[place] = s.block[s.place[place]] if place < left else -1
        s.penalty[place] = o.zero if place < left else o.big
    return left


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
