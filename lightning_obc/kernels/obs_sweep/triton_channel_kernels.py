"""The Triton kernels of the sweep over channels: one launch chooses, one eliminates; no step waits for the host.

A channel leaves column after column, by the formulas of :mod:`.channel_panel`. Columns lie slot after slot, ``s`` to a
channel; a program holds ``TILE`` channels of one inverse, all their diagonal blocks and their part of the new lines.
The block of the channel that leaves is read by all programs and written by none. ``docs/gpu.md`` has the launch plan.

Index legend: ``g`` problems, ``P`` inverses of each, ``C`` slots, ``s`` columns a channel, ``n`` lines of a panel;
``SIZE`` is the power of two from ``s``. All numbers are float64.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Channels(NamedTuple):
    """Working memory of all problems; absent parts are None."""

    inverse: Tensor  # [g·P, C·s, C·s], both triangles
    products: Tensor | None  # [g, C·s, C·s], A = WᵀW, where the rows of a problem share an inverse
    weight: Tensor | None  # [g·P, C·s], where they do not
    lines: Tensor  # [g·P, n, C·s], v
    pulls: Tensor | None  # [g, n, C·s], u
    blocks: Tensor  # [g·P, C, s, s], diagonal blocks of G
    shares: Tensor | None  # [g, C, s, s], of A
    score: Tensor  # [g, P, C], infinite in slots that are dead
    channel: Tensor  # [g, C] int64, ascending
    broken: Tensor  # [g·P] int32


@triton.jit
def choose_kernel(
    score: tl.tensor,  # [g, P, C]
    channel: tl.tensor,  # [g, C]
    pivot: tl.tensor,  # [g] int64
    order: tl.tensor,  # [g, T] int64, at this step
    losses: tl.tensor,  # [g, T], at this step
    length: tl.tensor,
    parts: tl.tensor,
    count: tl.tensor,
    COLS: tl.constexpr,
) -> None:
    """The cheapest slot of a problem, the lowest among equals: costs of all inverses added."""
    g = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, COLS)
    total = tl.full([COLS], 0.0, tl.float64)
    for part in range(parts):
        total += tl.load(score + (g * parts + part) * count + slot, mask=slot < count, other=float("inf"))
    best = tl.min(total, 0)
    # NaN is equal to nothing: the first slot goes, and the block that made it has raised its flag.
    found = tl.min(tl.where(total == best, slot, COLS), 0)
    found = tl.where(found < count, found, 0).to(tl.int64)
    tl.store(pivot + g, found)
    tl.store(order + g * length, tl.load(channel + g * count + found))
    tl.store(losses + g * length, best)


@triton.jit
def _column(matrix: tl.tensor, k: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """Column ``k`` of small matrices ``[TILE, SIZE, SIZE]``: ``[TILE, SIZE]``."""
    return tl.sum(tl.where((tl.arange(0, SIZE) == k)[None, None, :], matrix, 0.0), 2)


@triton.jit
def _element(vector: tl.tensor, k: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """Element ``k`` of ``[TILE, SIZE]``: ``[TILE]``."""
    return tl.sum(tl.where((tl.arange(0, SIZE) == k)[None, :], vector, 0.0), 1)


@triton.jit
def _line(tile: tl.tensor, k: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """Row ``k`` of ``[SIZE, TILE, SIZE]``: ``[TILE, SIZE]``."""
    return tl.sum(tl.where((tl.arange(0, SIZE) == k)[:, None, None], tile, 0.0), 0)


@triton.jit
def _costs(blocks: tl.tensor, right: tl.tensor, size: tl.tensor, SHARED: tl.constexpr, SIZE: tl.constexpr) -> tl.tensor:
    """``½ Σ_r w_rS (G_SS)⁻¹ w_rSᵀ`` of a tile's channels, and their smallest pivots, ``[TILE]`` each.

    ``right`` are blocks of ``A`` (``SHARED``), or the weights of the one row ``[TILE, SIZE]``.
    """
    i = tl.arange(0, SIZE)
    cost = tl.sum(tl.sum(blocks, 2), 1) * 0.0
    least = cost + float("inf")
    for k in range(size):
        column = _column(blocks, k, SIZE)
        pivot = _element(column, k, SIZE)
        least = tl.where(pivot > least, least, pivot)
        column = tl.where((i > k)[None, :], column, 0.0)
        times = column / pivot[:, None]
        blocks -= times[:, :, None] * column[:, None, :]
        if SHARED:
            pull = _column(right, k, SIZE)
            ratio = _element(pull, k, SIZE) / pivot
            cost += 0.5 * ratio
            pull = tl.where((i > k)[None, :], pull - 0.5 * ratio[:, None] * column, 0.0)
            right -= times[:, :, None] * pull[:, None, :] + pull[:, :, None] * times[:, None, :]
        else:
            here = _element(right, k, SIZE)
            cost += 0.5 * here * here / pivot
            right -= times * here[:, None]
    return cost, least


@triton.jit
def start_kernel(
    c: tl.tensor, parts: tl.tensor, count: tl.tensor, size: tl.tensor, TILE: tl.constexpr, SIZE: tl.constexpr
) -> None:
    """Diagonal blocks and costs of a tile's channels at the beginning."""
    p = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * TILE + tl.arange(0, TILE)
    i, columns = tl.arange(0, SIZE), count * size
    inside = (slot < count)[:, None] & (i < size)[None, :]
    both = inside[:, :, None] & (i < size)[None, None, :]
    at = slot[:, None] * size + i[None, :]
    here = (
        p * columns * columns + at[:, :, None].to(tl.int64) * columns + (slot[:, None, None] * size + i[None, None, :])
    )
    entry = (p * count + slot[:, None, None]) * size * size + i[None, :, None] * size + i[None, None, :]
    # What is missing in a tile is the identity, and costs nothing.
    same = (i[:, None] == i[None, :])[None, :, :]
    blocks = tl.load(c.inverse + here, mask=both, other=0.0)
    tl.store(c.blocks + entry, blocks, mask=both)
    blocks = tl.where(both, blocks, tl.where(same, 1.0, 0.0))
    SHARED: tl.constexpr = c.products is not None
    if SHARED:
        right = tl.load(c.products + here, mask=both, other=0.0)
        tl.store(c.shares + entry, right, mask=both)
    else:
        right = tl.load(c.weight + p * columns + at, mask=inside, other=0.0)
    cost, least = _costs(blocks, right, size, SHARED, SIZE)
    tl.store(c.score + p * count + slot, cost, mask=slot < count)
    tl.store(c.broken + p + slot * 0, tl.full([TILE], 1, tl.int32), mask=(slot < count) & ~(least > 0))


@triton.jit(do_not_specialize=["done", "count"])
def eliminate_kernel(
    c: tl.tensor,
    pivot: tl.tensor,  # [g] int64
    done: tl.tensor,
    limit: tl.tensor,  # n
    parts: tl.tensor,
    count: tl.tensor,
    size: tl.tensor,
    TILE: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """A channel leaves under one inverse: what that does to a tile's lines, blocks, weights and costs."""
    p = tl.program_id(0).to(tl.int64)
    gone = tl.load(pivot + p // parts)
    slot = tl.program_id(1) * TILE + tl.arange(0, TILE)
    i, columns = tl.arange(0, SIZE), count * size
    alive = (slot < count) & (slot != gone)
    inside = (slot < count)[:, None] & (i < size)[None, :]
    at = slot[:, None] * size + i[None, :]
    row = gone * size + i
    real = i < size
    SHARED: tl.constexpr = c.products is not None
    # The rows of G (and A) at the channel, [SIZE, TILE, SIZE], less what the panel's lines have taken from them.
    whole = real[:, None, None] & inside[None, :, :]
    place = p * columns * columns + (row * columns)[:, None, None] + at[None, :, :]
    x = tl.load(c.inverse + place, mask=whole, other=0.0)
    y = x
    if SHARED:
        y = tl.load(c.products + place, mask=whole, other=0.0)
    for line in range(done):
        base = (p * limit + line) * columns
        v = tl.load(c.lines + base + at, mask=inside, other=0.0)
        v_pivot = tl.load(c.lines + base + row, mask=real, other=0.0)
        x -= v_pivot[:, None, None] * v[None, :, :]
        if SHARED:
            u = tl.load(c.pulls + base + at, mask=inside, other=0.0)
            u_pivot = tl.load(c.pulls + base + row, mask=real, other=0.0)
            y -= v_pivot[:, None, None] * u[None, :, :] + u_pivot[:, None, None] * v[None, :, :]
    # The channel's own block, as a tile of one.
    small = (p * count + gone) * size * size + i[:, None] * size + i[None, :]
    square = real[:, None] & real[None, :]
    block = tl.load(c.blocks + small, mask=square, other=0.0)[None, :, :]
    if SHARED:
        share = tl.load(c.shares + small, mask=square, other=0.0)[None, :, :]
    else:
        own = tl.load(c.weight + p * columns + row, mask=real, other=0.0)[None, :]
        weight = tl.load(c.weight + p * columns + at, mask=inside, other=0.0)
    both = inside[:, :, None] & real[None, None, :]
    entry = (p * count + slot[:, None, None]) * size * size + i[None, :, None] * size + i[None, None, :]
    blocks = tl.load(c.blocks + entry, mask=both, other=0.0)
    if SHARED:
        right = tl.load(c.shares + entry, mask=both, other=0.0)
    for k in range(size):
        root = 1.0 / tl.sqrt(tl.sum(_element(_column(block, k, SIZE), k, SIZE), 0))
        # Of this line: its values at the channel's later columns [1, SIZE], and at the tile's columns [TILE, SIZE].
        later = (i > k)[None, :]
        low = tl.where(later, _column(block, k, SIZE) * root, 0.0)
        v = _line(x, k, SIZE) * root
        tl.store(c.lines + (p * limit + done + k) * columns + at, v, mask=inside)
        column = tl.sum(low, 0)
        if SHARED:
            first = _column(share, k, SIZE)
            half = 0.5 * tl.sum(_element(first, k, SIZE), 0) * root * root
            pull = tl.where(later, first * root - half * low, 0.0)
            u = _line(y, k, SIZE) * root - half * v
            tl.store(c.pulls + (p * limit + done + k) * columns + at, u, mask=inside)
            share -= low[:, :, None] * pull[:, None, :] + pull[:, :, None] * low[:, None, :]
            y -= column[:, None, None] * u[None, :, :] + tl.sum(pull, 0)[:, None, None] * v[None, :, :]
            right -= v[:, :, None] * u[:, None, :] + u[:, :, None] * v[:, None, :]
        else:
            z = tl.sum(_element(own, k, SIZE), 0) * root
            own -= z * low
            weight -= z * v
        block -= low[:, :, None] * low[:, None, :]
        x -= column[:, None, None] * v[None, :, :]
        blocks -= v[:, :, None] * v[:, None, :]
    keeps = both & alive[:, None, None]
    tl.store(c.blocks + entry, blocks, mask=keeps)
    if SHARED:
        tl.store(c.shares + entry, right, mask=keeps)
    else:
        tl.store(c.weight + p * columns + at, weight, mask=inside & alive[:, None])
        right = weight
    # Slots that are dead or not there count as the identity, so that nothing they hold is divided by.
    before = tl.load(c.score + p * count + slot, mask=slot < count, other=float("inf"))
    lives = alive & (before < float("inf"))
    same = (i[:, None] == i[None, :])[None, :, :]
    blocks = tl.where(both & lives[:, None, None], blocks, tl.where(same, 1.0, 0.0))
    cost, least = _costs(blocks, right, size, SHARED, SIZE)
    tl.store(c.score + p * count + slot, tl.where(lives, cost, float("inf")), mask=slot < count)
    tl.store(c.broken + p + slot * 0, tl.full([TILE], 1, tl.int32), mask=lives & ~(least > 0))
