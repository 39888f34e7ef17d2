"""The Triton kernel of the sweep over blocks: a panel of block eliminations per launch (paper, section 4).

A step takes the ``c`` columns of a block together. With ``G_BB = L Lᵀ`` it costs ``½ |L⁻¹ w_B|²`` and adds the ``c``
columns ``G_:B L⁻ᵀ`` to the panel. One pass keeps the diagonal blocks of ``G`` current and ranks them; a second forms
the new columns, and reads the panel's earlier ones once for all of them.

Index legend as in :mod:`.triton_kernels`; besides, ``c`` columns of a block (``SIZE``; ``C`` is the next power of two)
and ``b = m/c`` places. A *place* is where a block is: its slots are ``place·c`` to ``place·c + c - 1``.

Three barriers a step: between the passes, before and after the chosen block is read.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from lightning_obc.kernels.obs_sweep.triton_kernels import (
    _BROKEN,
    _ENDED,
    _NONE,
    _SLOT,
    _WORN,
    _divide,
    _root,
    _slots,
)


class BlockSizes(NamedTuple):
    """What stays the same in all launches on a matrix ``G``, so that a kernel may be specialised to it."""

    stride: int  # elements from one matrix to the next
    line: int  # elements from one line of a matrix to the next
    width: int
    panel: int  # elements from one row's panel to the next
    blocks: int  # elements from one row's diagonal blocks to the next
    columns: int  # c·T
    length: int  # T


@triton.jit
def _solve(block: tl.tensor, weight: tl.tensor, SIZE: tl.constexpr, C: tl.constexpr) -> tl.tensor:
    """``|L⁻¹ w|²`` ``[ROWS, N]``, ``L`` ``[ROWS, C, C, N]``, ``L⁻¹ w`` ``[ROWS, C, N]`` of ``N`` blocks side by side.

    A pivot that is not positive makes everything after it NaN. Above its diagonal ``L`` holds rounding errors.
    """
    i = tl.arange(0, C)[None, :, None]
    low, solved, cost = block * 0.0, weight * 0.0, tl.sum(weight, axis=1) * 0.0
    for k in tl.static_range(SIZE):
        line = tl.sum(tl.where(i[:, :, :, None] == k, block, 0.0), axis=1)
        root = _root(tl.sum(tl.where(i == k, line, 0.0), axis=1))
        line = _divide(line, root[:, None, :])
        z = _divide(tl.sum(tl.where(i == k, weight, 0.0), axis=1), root)
        cost += z * z
        weight -= z[:, None, :] * line
        block -= line[:, :, None, :] * line[:, None, :, :]
        low = tl.where(i[:, None, :, :] == k, line[:, :, None, :], low)
        solved = tl.where(i == k, z[:, None, :], solved)
    return cost, low, solved


@triton.jit
def _rank_blocks(
    working: tl.tensor,
    sizes: tl.tensor,
    matrix: tl.tensor,
    size: tl.tensor,
    taken: tl.tensor,
    at: tl.tensor,
    best: tl.tensor,
    key: tl.tensor,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    PLACES: tl.constexpr,
) -> tl.tensor:
    """Read the diagonal blocks from ``G``, or take the last ``c`` of ``taken`` columns out of them, and rank them all.

    NaN scores -Inf, which the check of the pivots then finds. The key orders equal scores by block.
    """
    here, owner, going = at
    i = tl.arange(0, C)[None, :, None]
    eye = (i[:, :, None, :] == i[:, None, :, :]) & (i[:, :, None, :] >= 0)
    for first in range(0, size // SIZE, PLACES):
        place = first + tl.arange(0, PLACES)[None, :].to(tl.int64)
        inside = going & (place < size // SIZE)
        slot = place[:, None, :] * SIZE + i
        there = inside[:, None, :] & (i < SIZE)
        both = there[:, :, None, :] & (i < SIZE)[:, None, :, :]
        lane = (i[:, :, None, :] * SIZE + i[:, None, :, :]) * PLACES + tl.arange(0, PLACES)[None, None, None, :]
        diagonal = working.diagonal + (here * sizes.blocks + first * SIZE * SIZE)[:, :, None, None] + lane
        if taken == 0:
            start = matrix + (owner * sizes.stride)[:, :, None, None]
            block = tl.load(start + slot[:, :, None, :] * sizes.line + slot[:, None, :, :], mask=both, other=0.0)
        else:
            block = tl.load(diagonal, mask=both, other=0.0)
            panel = working.panel + (here * sizes.panel)[:, :, None] + slot
            for k in range(SIZE):
                v = tl.load(panel + (taken - SIZE + k) * sizes.width, mask=there, other=0.0)
                block -= v[:, :, None, :] * v[:, None, :, :]
        tl.store(diagonal, block, mask=both)
        weight = tl.load(working.weight + (here * sizes.width)[:, :, None] + slot, mask=there, other=0.0)
        column = tl.load(working.column + here * sizes.width + place * SIZE, mask=inside, other=-1)
        alive = column >= 0
        cost, _, _ = _solve(tl.where(both, block, tl.where(eye, 1.0, 0.0).to(block.dtype)), weight, SIZE, C)
        score = tl.where(alive, tl.where(cost == cost, cost, float("-inf")), float("inf"))
        mine = tl.where(alive, ((column // SIZE).to(tl.int64) << 32) + place, _NONE)
        better = (score < best) | ((score == best) & (mine < key))
        best, key = tl.where(better, score, best), tl.where(better, mine, key)
    return best, key


@triton.jit
def _choose_block(
    working: tl.tensor,
    sizes: tl.tensor,
    here: tl.tensor,
    state: tl.tensor,
    best: tl.tensor,
    key: tl.tensor,
    made: tl.tensor,
    WORN_RATIO: tl.constexpr,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    PLACES: tl.constexpr,
) -> tl.tensor:
    """Place and number of the cheapest block, its cost, ``L`` and ``L⁻¹ w_B``, and which rows stop here.

    The pivots of a block are the squares on the diagonal of ``L``; see ``_choose`` for when one stops a row.
    """
    lowest = tl.min(best, axis=1, keep_dims=True)
    winner = tl.min(tl.where(best == lowest, key, _NONE), axis=1, keep_dims=True)
    place, chosen = winner & _SLOT, winner >> 32
    state = tl.where((state == 0) & (winner == _NONE), _ENDED, state)
    found = state == 0
    i = tl.arange(0, C)[None, :]
    there = found & (i < SIZE)
    both = there[:, :, None] & (i < SIZE)[:, None, :]
    eye = (i[:, :, None] == i[:, None, :]) & (i[:, :, None] >= 0)
    entry = here * sizes.blocks + place // PLACES * (SIZE * SIZE * PLACES) + place % PLACES
    entry = entry[:, :, None] + (i[:, :, None] * SIZE + i[:, None, :]) * PLACES
    block = tl.load(working.diagonal + entry, mask=both, other=0.0)
    block = tl.where(both, block, tl.where(eye, 1.0, 0.0).to(block.dtype))
    weight = tl.load(working.weight + here * sizes.width + place * SIZE + i, mask=there, other=0.0)
    cost, low, solved = _solve(block[:, :, :, None], weight[:, :, None], SIZE, C)
    low, solved = tl.sum(low, axis=3), tl.sum(solved, axis=2)
    root = tl.sum(tl.where(eye, low, 0.0), axis=2)
    reference = tl.load(working.reference + here * sizes.columns + chosen * SIZE + i, mask=there, other=0.0)
    sound = (root > 0) & (root < float("inf")) & (reference <= WORN_RATIO * root * root)
    sound = tl.min((sound | (i >= SIZE)).to(tl.int32), axis=1, keep_dims=True) > 0
    state = tl.where(found & (sound == 0), tl.where(made > 0, _WORN, _BROKEN), state)
    return place, chosen, cost, low, solved, state


@triton.jit
def _eliminate_block(
    working: tl.tensor,
    sizes: tl.tensor,
    matrix: tl.tensor,
    size: tl.tensor,
    taken: tl.tensor,
    at: tl.tensor,
    pivots: tl.tensor,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> tl.tensor:
    """One pass over the slots: ``V = (G_:B - V' V'_Bᵀ) L⁻ᵀ`` after ``taken`` columns ``V'``, ``w -= V z``, who goes."""
    here, owner, going = at
    place, low, solved = pivots
    k = tl.arange(0, C)[None, :].to(tl.int64)
    pivot, wanted = place * SIZE + k, going & (k < SIZE)
    panel = working.panel + here * sizes.panel
    for first in range(0, size, COLS):
        slot, inside, padded = _slots(first, size, going, COLS)
        lines = matrix + (owner * sizes.stride + pivot * sizes.line)[:, :, None]
        value = tl.load(lines + slot[:, None, :], mask=wanted[:, :, None] & inside[:, None, :], other=0.0)
        for start in range(0, taken, DEPTH):
            t = start + tl.arange(0, DEPTH)[None, :].to(tl.int64)
            earlier = (panel + t * sizes.width)[:, :, None]
            left = tl.load(earlier + pivot[:, None, :], mask=(t < taken)[:, :, None] & wanted[:, None, :], other=0.0)
            right = tl.load(earlier + slot[:, None, :], mask=(t < taken)[:, :, None] & padded[:, None, :], other=0.0)
            value -= tl.sum(left[:, :, :, None] * right[:, :, None, :], axis=1)
        weight = tl.load(working.weight + here * sizes.width + slot, mask=padded, other=0.0)
        for n in tl.static_range(SIZE):
            below = tl.sum(tl.where(k[:, None, :] == n, low, 0.0), axis=2)
            root = tl.sum(tl.where(k == n, below, 0.0), axis=1, keep_dims=True)
            z = tl.sum(tl.where(k == n, solved, 0.0), axis=1, keep_dims=True)
            v = _divide(tl.sum(tl.where(k[:, :, None] == n, value, 0.0), axis=1), root)
            tl.store(panel + (taken + n) * sizes.width + slot, v, mask=padded)
            weight -= z * v
            value -= below[:, :, None] * v[:, None, :]
        tl.store(working.weight + here * sizes.width + slot, weight, mask=padded)
        column = tl.load(working.column + here * sizes.width + slot, mask=inside, other=-1)
        column = tl.where(slot // SIZE == place, -1, column)
        tl.store(working.column + here * sizes.width + slot, column, mask=padded)


@triton.jit(do_not_specialize=["rows", "size", "steps", "made"])
def block_panel_kernel(
    lines: tl.tensor,
    working: tl.tensor,
    sizes: tl.tensor,
    matrix: tl.tensor,  # G
    rows: tl.tensor,  # P
    size: tl.tensor,  # m, a multiple of c
    steps: tl.tensor,  # blocks of the panel
    made: tl.tensor,  # steps since the chunk started
    WORN_RATIO: tl.constexpr,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PLACES: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """``steps`` block eliminations of each row that is running. Order, losses, counts and status are written.

    Rows stop as in :func:`~lightning_obc.kernels.obs_sweep.triton_kernels.panel_kernel`.
    """
    here = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    state = tl.load(working.status + here, mask=here < rows, other=_ENDED)
    if tl.min(tl.min(state, axis=1), axis=0) > 0:
        return
    present = state == 0
    row = tl.load(working.row + here, mask=present, other=0)
    owner = tl.load(working.owner + here, mask=present, other=0)
    done = tl.load(lines.done + row, mask=present, other=0)
    none = tl.full((ROWS, PLACES), float("inf"), matrix.dtype.element_ty)
    nobody = tl.full((ROWS, PLACES), _NONE, tl.int64)
    for step in range(steps):
        taken = step * SIZE
        at = (here, owner, state == 0)
        best, key = _rank_blocks(working, sizes, matrix, size, taken, at, none, nobody, SIZE, C, PLACES)
        tl.debug_barrier()
        place, chosen, cost, low, solved, state = _choose_block(
            working, sizes, here, state, best, key, made + step, WORN_RATIO, SIZE, C, PLACES
        )
        going = state == 0
        tl.store(lines.order + row * sizes.length + done, chosen.to(tl.int32), mask=going)
        tl.store(lines.losses + row * sizes.length + done, 0.5 * cost, mask=going)
        tl.debug_barrier()
        at, pivots = (here, owner, going), (place, low, solved)
        _eliminate_block(working, sizes, matrix, size, taken, at, pivots, SIZE, C, COLS, DEPTH)
        tl.debug_barrier()
        done += going.to(tl.int32)
    tl.store(lines.done + row, done, mask=present)
    tl.store(working.status + here, state, mask=present)
