"""Costs of the blocks of a working set, and the choice of the next one (numba)."""

from __future__ import annotations

import numba
import numpy as np

from lightning_obc.kernels.obs_sweep.block_state import BlockOptions, BlockScratch, entry, room
from lightning_obc.kernels.obs_sweep.jit import STRICT, lower
from lightning_obc.kernels.obs_sweep.lanes import LANES, copy, less_product, over, plus_square, root
from lightning_obc.kernels.obs_sweep.packed import Array
from lightning_obc.kernels.obs_sweep.step_tile import find

_jit = numba.njit(**STRICT)
_jit_inline = numba.njit(forceinline=True, **STRICT)


@_jit_inline
def choose(teams: int, s: BlockScratch, o: BlockOptions) -> int:
    """Place of the cheapest block, the lowest among equals, which is the lowest block; -1 when there is none."""
    best = o.big
    for team in range(teams):
        best = min(best, s.best[team])
    return find(s.score, best, teams * LANES) if best < o.big else -1


@_jit_inline
def score(team: int, places: int, s: BlockScratch, o: BlockOptions) -> None:
    """``|L⁻¹ w_B|²`` of a team's blocks. A block that is not positive definite wins, so that it is seen."""
    _factor(team, s.diagonal, s.lower, o.size)
    s.best[team] = _cost(team, room(places), s.weight, s.lower, s.solved, s.penalty, s.score, o.size, o.big, o.zero)


@_jit
def start_pivots(team: int, places: int, s: BlockScratch, o: BlockOptions) -> None:
    """Remember every column's pivot, given the columns before it in its block."""
    _factor(team, s.diagonal, s.lower, o.size)
    for i in range(o.size):
        for lane in range(LANES):
            pivot = s.lower[entry(0, i, i, o.size) + lane]
            s.reference[i * room(places) + team * LANES + lane] = pivot * pivot


@_jit
def weakest(place: int, places: int, s: BlockScratch, o: BlockOptions) -> float:
    """The smallest ratio of a block's pivots to what they started from; NaN or at most 0 where there is no factor."""
    _factor(place // LANES, s.diagonal, s.lower, o.size)
    ratio = o.one
    for i in range(o.size):
        here = i * room(places) + place
        if s.alive[here] > 0:
            pivot = s.lower[entry(0, i, i, o.size) + place % LANES]
            share = pivot * pivot / s.reference[here]
            if not share >= ratio:
                ratio = share
    return ratio


@_jit
def _factor(team: int, diagonal: Array, low: Array, size: int) -> None:
    """Cholesky factors of a team's diagonal blocks, side by side; NaN behind a pivot that is negative."""
    for j in range(size):
        for i in range(j, size):
            target = entry(0, i, j, size)
            copy(low, target, diagonal, entry(team, i, j, size))
            for k in range(j):
                less_product(low, target, low, entry(0, i, k, size), low, entry(0, j, k, size))
            if i == j:
                root(low, target)
            else:
                over(low, target, low, entry(0, j, j, size))


@_jit
def _cost(
    team: int,
    stride: int,
    weight: Array,
    low: Array,
    solved: Array,
    penalty: Array,
    score: Array,
    size: int,
    big: float,
    zero: float,
) -> float:
    total, first = np.uint64(size * LANES), np.uint64(team * LANES)
    for lane in range(LANES):
        solved[total + np.uint64(lane)] = zero
    for i in range(size):
        here = i * LANES
        copy(solved, here, weight, i * stride + team * LANES)
        for k in range(i):
            less_product(solved, here, low, entry(0, i, k, size), solved, k * LANES)
        over(solved, here, low, entry(0, i, i, size))
        plus_square(solved, size * LANES, solved, here)
    best = big
    for lane in range(LANES):
        value = solved[total + np.uint64(lane)]
        value = value if value >= zero else -big
        value = value if penalty[first + np.uint64(lane)] == zero else big
        score[first + np.uint64(lane)] = value
        best = lower(best, value)
    return best
