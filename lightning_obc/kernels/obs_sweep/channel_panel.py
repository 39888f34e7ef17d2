"""A panel of channel eliminations on a CPU, compiled by numba (see :mod:`.channel_compiled`).

A channel leaves column after column. With ``p`` its next column, ``v = G[:, p]/√G_pp`` and ``A = WᵀW`` (the weights of
all rows enter as their products alone), ``t = A_pp/G_pp`` and ``u = A[:, p]/√G_pp - ½ t v``,

    loss += t/2        G -= v vᵀ        A -= v uᵀ + u vᵀ

A panel keeps its ``v`` and ``u`` as *lines*, and of ``G`` and ``A`` only the diagonal blocks current, which the choice
needs. Where rows have inverses of their own, each keeps its weights instead: ``w -= (w_p/√G_pp) v``.

Channels come in *slots*, ``LANES`` slots make a team; columns lie by position as in :mod:`.block_state`, and so do the
entries ``(i, j)``, ``j <= i``, of the diagonal blocks. Matrices are square with their lower triangle filled. All memory
is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from lightning_obc.kernels.obs_sweep.jit import STRICT, cached, source_digest
from lightning_obc.kernels.obs_sweep.lanes import LANES, copy, less_product, less_scaled, over, times_scaled

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]
# Positions whose lines are formed together: what they read of the panel stays in the cache for all of a channel.
CHUNK = 512

_jit = numba.njit(**STRICT)
_jit_inline = numba.njit(forceinline=True, **STRICT)


class Channels(NamedTuple):
    """One problem: ``P`` inverses, ``M`` positions, ``n`` lines of a panel, ``s`` columns a channel."""

    inverse: Array  # [P, M, M]
    products: Array  # [1, M, M], A; without elements where rows have inverses of their own
    weight: Array  # [P, M], or without elements where the rows share one
    lines: Array  # [P·n, M], v
    pulls: Array  # [n, M], u
    blocks: Array  # flat [P, teams, s, s, LANES], diagonal blocks of G
    shares: Array  # flat [teams, s, s, LANES], of A
    score: Array  # by slot
    alive: NDArray[np.bool_]  # by slot
    channel: IntArray  # by slot
    at_pivot: Array  # [n, s], of every line its values at the channel that is leaving
    pull_at_pivot: Array  # [n, s]
    block: Array  # [s, s]
    share: Array  # [s, s]
    scale: Array  # [4, s]: 1/√G_pp, t/2 and w_p/√G_pp of the leaving columns, and their weights
    team: Array  # flat [4, s, s, LANES], a team's working memory
    ones: Array  # [LANES]
    moved: Array  # [s, M]


@_jit_inline
def _position(slot: int, member: int, size: int) -> int:
    return (slot // LANES) * LANES * size + member * LANES + slot % LANES


@_jit
def _cheapest(teams: int, c: Channels) -> int:
    """The slot of least cost, the lower channel among equals; NaN before all, so that it is seen."""
    best, found = np.inf, -1
    for slot in range(teams * LANES):
        if c.alive[slot]:
            score = c.score[slot]
            if np.isnan(score):
                return slot
            if found < 0 or score < best or (score == best and c.channel[slot] < c.channel[found]):
                best, found = score, slot
    return found


@_jit
def _pivots(part: int, slot: int, done: int, size: int, teams: int, c: Channels) -> None:
    """What a leaving channel's columns do to each other: scales, and the lines' values at the channel."""
    own, limit = c.products.size == 0, len(c.pulls)
    for k in range(size):
        p = _position(slot, k, size)
        for i in range(done):
            c.at_pivot[i, k] = c.lines[part * limit + i, p]
            if not own:
                c.pull_at_pivot[i, k] = c.pulls[i, p]
        if own:
            c.scale[3, k] = c.weight[part, p]
        for j in range(k + 1):
            entry = ((slot // LANES * size + k) * size + j) * LANES + slot % LANES
            c.block[k, j] = c.blocks[part * teams * size * size * LANES + entry]
            if not own:
                c.share[k, j] = c.shares[entry]
    for k in range(size):
        root = 1 / np.sqrt(c.block[k, k])
        half = 0.0 if own else 0.5 * c.share[k, k] * root * root
        c.scale[0, k], c.scale[1, k] = root, half
        c.scale[2, k] = c.scale[3, k] * root
        for i in range(k, size):
            v = c.block[i, k] * root
            c.at_pivot[done + k, i] = v
            if own:
                c.scale[3, i] -= c.scale[2, k] * v
            else:
                c.pull_at_pivot[done + k, i] = c.share[i, k] * root - half * v
        for i in range(k + 1, size):
            vi, ui = c.at_pivot[done + k, i], c.pull_at_pivot[done + k, i]
            for j in range(k + 1, i + 1):
                c.block[i, j] -= vi * c.at_pivot[done + k, j]
                if not own:
                    c.share[i, j] -= vi * c.pull_at_pivot[done + k, j] + ui * c.at_pivot[done + k, j]


@_jit
def _symmetric(matrix: Array, p: int, first: int, last: int, out: Array) -> None:
    """Elements ``first … last`` of column ``p``, of a matrix whose lower triangle is filled."""
    for j in range(first, min(last, p + 1)):
        out[j] = matrix[p, j]
    for j in range(max(first, p + 1), last):
        out[j] = matrix[j, p]


@_jit
def _less(out: Array, lines: Array, base: int, factors: Array, k: int, count: int, first: int, last: int) -> None:
    """``out -= Σ_i factors[i, k]·lines[base + i]``, four lines at a time."""
    i = 0
    while i + 4 <= count:
        a, b, c, d = factors[i, k], factors[i + 1, k], factors[i + 2, k], factors[i + 3, k]
        la, lb, lc, ld = lines[base + i], lines[base + i + 1], lines[base + i + 2], lines[base + i + 3]
        for j in range(first, last):
            out[j] -= a * la[j] + b * lb[j] + c * lc[j] + d * ld[j]
        i += 4
    while i < count:
        a, la = factors[i, k], lines[base + i]
        for j in range(first, last):
            out[j] -= a * la[j]
        i += 1


@_jit
def _extend(part: int, slot: int, done: int, size: int, first: int, last: int, c: Channels) -> None:
    """The lines of a leaving channel between two positions."""
    own, base = c.products.size == 0, part * len(c.pulls)
    for k in range(size):
        p, line = _position(slot, k, size), c.lines[base + done + k]
        root, half = c.scale[0, k], c.scale[1, k]
        _symmetric(c.inverse[part], p, first, last, line)
        _less(line, c.lines, base, c.at_pivot, k, done + k, first, last)
        for j in range(first, last):
            line[j] *= root
        if own:
            weight, z = c.weight[part], c.scale[2, k]
            for j in range(first, last):
                weight[j] -= z * line[j]
            continue
        pull = c.pulls[done + k]
        _symmetric(c.products[0], p, first, last, pull)
        _less(pull, c.pulls, 0, c.at_pivot, k, done + k, first, last)
        _less(pull, c.lines, 0, c.pull_at_pivot, k, done + k, first, last)
        for j in range(first, last):
            pull[j] = pull[j] * root - half * line[j]


@_jit
def _update(part: int, team: int, done: int, size: int, teams: int, c: Channels) -> None:
    """Take a channel's new lines out of a team's diagonal blocks."""
    own, length = c.products.size == 0, c.lines.shape[1]
    lines, pulls = c.lines.reshape(-1), c.pulls.reshape(-1)
    here = team * size * size * LANES
    target = part * teams * size * size * LANES + here
    for k in range(size):
        v = (part * len(c.pulls) + done + k) * length + team * size * LANES
        u = (done + k) * length + team * size * LANES
        for i in range(size):
            for j in range(i + 1):
                entry = (i * size + j) * LANES
                less_product(c.blocks, target + entry, lines, v + i * LANES, lines, v + j * LANES)
                if not own:
                    less_product(c.shares, here + entry, lines, v + i * LANES, pulls, u + j * LANES)
                    less_product(c.shares, here + entry, pulls, u + i * LANES, lines, v + j * LANES)


@_jit
def _add_cost(part: int, team: int, size: int, teams: int, c: Channels) -> bool:
    """Add ``½ Σ_r w_rS (G_SS)⁻¹ w_rSᵀ`` of a team's channels to their scores; False where a block is not definite."""
    own, one, half = c.products.size == 0, 1.0, 0.5
    area, work, good = size * size * LANES, c.team, True
    source, here = (part * teams + team) * area, team * area
    # In ``work``: what is left of the blocks, and of A (or of the weights); then multipliers, and two vectors.
    right, multiplier = area, 2 * area
    inverse, ratio, spare, total = 3 * area, 3 * area + LANES, 3 * area + 2 * LANES, 3 * area + 3 * LANES
    weight = c.weight.reshape(-1)
    for lane in range(LANES):
        work[total + lane] = 0.0
    for i in range(size):
        if own:
            copy(work, right + i * LANES, weight, part * c.weight.shape[1] + (team * size + i) * LANES)
        for j in range(i + 1):
            entry = (i * size + j) * LANES
            copy(work, entry, c.blocks, source + entry)
            if not own:
                copy(work, right + entry, c.shares, here + entry)
    for k in range(size):
        pivot = (k * size + k) * LANES
        for lane in range(LANES):
            good &= (work[pivot + lane] > 0) | (not c.alive[team * LANES + lane])
        copy(work, inverse, c.ones, 0)
        over(work, inverse, work, pivot)
        if own:
            copy(work, spare, work, right + k * LANES)
            times_scaled(one, work, spare, work, inverse)
            copy(work, ratio, work, right + k * LANES)
            times_scaled(one, work, ratio, work, spare)
        else:
            copy(work, ratio, work, right + pivot)
            times_scaled(one, work, ratio, work, inverse)
        less_scaled(-half, work, total, work, ratio)
        for i in range(k + 1, size):
            below, row = (i * size + k) * LANES, multiplier + i * LANES
            copy(work, row, work, below)
            times_scaled(one, work, row, work, inverse)
            if own:
                less_product(work, right + i * LANES, work, row, work, right + k * LANES)
            else:
                # In place of A_ip: it is not needed any more.
                copy(work, spare, work, below)
                times_scaled(half, work, spare, work, ratio)
                less_scaled(one, work, right + below, work, spare)
            for j in range(k + 1, i + 1):
                entry = (i * size + j) * LANES
                less_product(work, entry, work, row, work, (j * size + k) * LANES)
                if not own:
                    less_product(work, right + entry, work, row, work, right + (j * size + k) * LANES)
                    less_product(work, right + entry, work, right + below, work, multiplier + j * LANES)
    for lane in range(LANES):
        c.score[team * LANES + lane] += work[total + lane]
    return good


@_jit
def _remove(part: int, slot: int, done: int, teams: int, size: int, all_teams: int, c: Channels) -> bool:
    """A leaving channel under one inverse: its lines, the blocks, and what the other channels cost afterwards."""
    _pivots(part, slot, done, size, all_teams, c)
    together, good = max(1, CHUNK // (size * LANES)), True
    for start in range(0, teams, together):
        stop = min(teams, start + together)
        _extend(part, slot, done, size, start * size * LANES, stop * size * LANES, c)
        for team in range(start, stop):
            _update(part, team, done, size, all_teams, c)
            good &= _add_cost(part, team, size, all_teams, c)
    return good


@_jit
def _copy_slot(hole: int, mover: int, size: int, length: int, teams: int, c: Channels) -> None:
    """Give a channel another slot; the old one is not read again."""
    for part in range(len(c.inverse)):
        _copy_symmetric(c.inverse[part], hole, mover, size, length, c.moved)
        if c.weight.size:
            for k in range(size):
                c.weight[part, _position(hole, k, size)] = c.weight[part, _position(mover, k, size)]
        _copy_entries(c.blocks, part * teams * size * size * LANES, hole, mover, size)
    if c.products.size:
        _copy_symmetric(c.products[0], hole, mover, size, length, c.moved)
        _copy_entries(c.shares, 0, hole, mover, size)
    for k in range(size):
        into, out_of = _position(hole, k, size), _position(mover, k, size)
        for i in range(len(c.lines)):
            c.lines[i, into] = c.lines[i, out_of]
        if c.pulls.size:
            for i in range(len(c.pulls)):
                c.pulls[i, into] = c.pulls[i, out_of]
    c.score[hole], c.alive[hole], c.channel[hole] = c.score[mover], True, c.channel[mover]


@_jit
def _copy_entries(blocks: Array, base: int, hole: int, mover: int, size: int) -> None:
    for i in range(size):
        for j in range(i + 1):
            into = ((hole // LANES * size + i) * size + j) * LANES + hole % LANES
            out_of = ((mover // LANES * size + i) * size + j) * LANES + mover % LANES
            blocks[base + into] = blocks[base + out_of]


@_jit
def _copy_symmetric(matrix: Array, hole: int, mover: int, size: int, length: int, moved: Array) -> None:
    for k in range(size):
        _symmetric(matrix, _position(mover, k, size), 0, length, moved[k])
    for k in range(size):
        for other in range(size):
            moved[k, _position(hole, other, size)] = moved[k, _position(mover, other, size)]
        p = _position(hole, k, size)
        for j in range(p):
            matrix[p, j] = moved[k, j]
        for j in range(p, length):
            matrix[j, p] = moved[k, j]


@_jit
def _blank(slot: int, size: int, length: int, teams: int, c: Channels) -> None:
    """A slot without a channel: coupled with nothing, definite, never chosen."""
    c.alive[slot] = False
    for k in range(size):
        p = _position(slot, k, size)
        for i in range(len(c.lines)):
            c.lines[i, p] = 0.0
        if c.pulls.size:
            for i in range(len(c.pulls)):
                c.pulls[i, p] = 0.0
        for matrix in (c.inverse, c.products):
            for part in range(len(matrix)):
                matrix[part, p, :p] = 0.0
                matrix[part, p:length, p] = 0.0
        for part in range(len(c.weight)):
            c.weight[part, p] = 0.0
        for j in range(k + 1):
            entry = ((slot // LANES * size + k) * size + j) * LANES + slot % LANES
            for part in range(len(c.inverse)):
                c.blocks[part * teams * size * size * LANES + entry] = 1.0 if j == k else 0.0
            if c.products.size:
                c.shares[entry] = 0.0


def _begin(teams: int, size: int, c: Channels, digest: int) -> bool:
    """Diagonal blocks and costs at the start; False where a block is not positive definite."""
    area, good = size * size * LANES, digest >= 0
    for part in range(len(c.inverse)):
        for slot in range(teams * LANES):
            for i in range(size):
                for j in range(i + 1):
                    entry = ((slot // LANES * size + i) * size + j) * LANES + slot % LANES
                    row, column = _position(slot, i, size), _position(slot, j, size)
                    c.blocks[part * teams * area + entry] = c.inverse[part, row, column]
                    if c.products.size:
                        c.shares[entry] = c.products[part, row, column]
        for team in range(teams):
            good &= _add_cost(part, team, size, teams, c)
    return good


def _panel(
    steps: int, teams: int, size: int, all_teams: int, order: IntArray, losses: Array, c: Channels, digest: int
) -> bool:
    """Take the cheapest ``steps`` channels out, one after the other; False where a block was not positive definite."""
    good = digest >= 0
    for step in range(steps):
        slot = _cheapest(teams, c)
        order[step], losses[step] = c.channel[slot], c.score[slot]
        c.alive[slot] = False
        c.score[: teams * LANES] = 0.0
        for part in range(len(c.inverse)):
            good &= _remove(part, slot, step * size, teams, size, all_teams, c)
    return good


def _compact(alive: int, teams: int, size: int, all_teams: int, c: Channels, digest: int) -> int:
    """Move the living channels into the first slots; how many teams they take."""
    length, mover = teams * size * LANES, teams * LANES
    for hole in range(alive + min(digest, 0)):
        if not c.alive[hole]:
            mover -= 1
            while not c.alive[mover]:
                mover -= 1
            _copy_slot(hole, mover, size, length, all_teams, c)
            c.alive[mover] = False
    smaller = (alive + LANES - 1) // LANES
    for slot in range(alive, smaller * LANES):
        _blank(slot, size, length, all_teams, c)
    return smaller


def _entries(digest: int) -> tuple[Callable[..., bool], Callable[..., bool], Callable[..., int]]:
    """Compile the entries; ``digest`` makes the sources of all of it part of the key of numba's cache on disk."""
    jitted = [_jit(function) for function in (_begin, _panel, _compact)]
    inner_begin, inner_panel, inner_compact = jitted

    def begin(teams: int, size: int, c: Channels) -> bool:
        return bool(inner_begin(teams, size, c, digest))

    def panel(steps: int, teams: int, size: int, all_teams: int, order: IntArray, losses: Array, c: Channels) -> bool:
        return bool(inner_panel(steps, teams, size, all_teams, order, losses, c, digest))

    def compact(alive: int, teams: int, size: int, all_teams: int, c: Channels) -> int:
        return int(inner_compact(alive, teams, size, all_teams, c, digest))

    return cached(begin), cached(panel), cached(compact)


begin, panel, compact = _entries(source_digest(__file__))
