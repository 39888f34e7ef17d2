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
    factor: Tensor  # [g·P, programs, 1 or 2 (with A), s, s]
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
def _price(
    c: tl.tensor,
    p: tl.tensor,
    slot: tl.tensor,
    lives: tl.tensor,
    count: tl.tensor,
    size: tl.tensor,
    SHARED: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """Costs of a tile's channels; infinite for those that do not live, which count as the identity."""
    i, columns = tl.arange(0, SIZE), count * size
    inside = lives[:, None] & (i < size)[None, :]
    both = inside[:, :, None] & (i < size)[None, None, :]
    first = p * count * size * size
    entry = slot[:, None, None] * size * size + i[None, :, None] * size + i[None, None, :]
    same = (i[:, None] == i[None, :])[None, :, :]
    blocks = tl.load(c.blocks + first + entry, mask=both, other=0.0)
    blocks = tl.where(both, blocks, tl.where(same, 1.0, 0.0))
    if SHARED:
        right = tl.load(c.shares + first + entry, mask=both, other=0.0)
    else:
        right = tl.load(c.weight + p * columns + slot[:, None] * size + i[None, :], mask=inside, other=0.0)
    cost, least = _costs(blocks, right, size, SHARED, SIZE)
    tl.store(c.score + p * count + slot, tl.where(lives, cost, float("inf")), mask=slot < count)
    tl.store(c.broken + p + slot * 0, tl.full(slot.shape, 1, tl.int32), mask=lives & ~(least > 0))


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
    first = p * count * size * size
    entry = slot[:, None, None] * size * size + i[None, :, None] * size + i[None, None, :]
    tl.store(c.blocks + first + entry, tl.load(c.inverse + here, mask=both, other=0.0), mask=both)
    SHARED: tl.constexpr = c.products is not None
    if SHARED:
        tl.store(c.shares + first + entry, tl.load(c.products + here, mask=both, other=0.0), mask=both)
    tl.debug_barrier()
    _price(c, p, slot, slot < count, count, size, SHARED, SIZE)


@triton.jit
def _factorise(
    c: tl.tensor,
    block_at: tl.tensor,
    factor: tl.tensor,
    size: tl.tensor,
    SHARED: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """Write what the columns of a leaving channel do to each other; its block is at ``block_at``.

    Line ``k`` holds the values of the new line ``v`` at the channel's later columns, and ``1/√G_pp`` at ``k``; in the
    second half, if ``SHARED``, those of ``u``, and ``t/2`` at ``k``.
    """
    i = tl.arange(0, SIZE)
    square = (i < size)[:, None] & (i < size)[None, :]
    entry = block_at + i[:, None] * size + i[None, :]
    block = tl.load(c.blocks + entry, mask=square, other=0.0)[None, :, :]
    if SHARED:
        share = tl.load(c.shares + entry, mask=square, other=0.0)[None, :, :]
    for k in range(size):
        later, here = (i > k)[None, :], (i == k)[None, :]
        first = _column(block, k, SIZE)
        root = 1.0 / tl.sqrt(tl.sum(_element(first, k, SIZE), 0))
        low = tl.where(later, first * root, 0.0)
        tl.store(c.factor + factor + k * size + i, tl.sum(tl.where(here, root, low), 0), mask=i < size)
        if SHARED:
            first = _column(share, k, SIZE)
            half = 0.5 * tl.sum(_element(first, k, SIZE), 0) * root * root
            pull = tl.where(later, first * root - half * low, 0.0)
            line = c.factor + factor + (size + k) * size
            tl.store(line + i, tl.sum(tl.where(here, half, pull), 0), mask=i < size)
            share -= low[:, :, None] * pull[:, None, :] + pull[:, :, None] * low[:, None, :]
        block -= low[:, :, None] * low[:, None, :]


@triton.jit
def _form_v(
    c: tl.tensor,
    p: tl.tensor,
    place: tl.tensor,
    factor: tl.tensor,
    base: tl.tensor,
    sizes: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    SHARED: tl.constexpr,
    SIZE: tl.constexpr,
) -> tl.tensor:
    """Write a tile's part of the lines ``v`` of a channel whose columns start at ``place``, from ``base`` on.

    ``at`` are the tile's columns ``[TILE, SIZE]``. Returns what they do to its weights; of no use if ``SHARED``.
    """
    done, limit, columns, size = sizes
    i = tl.arange(0, SIZE)
    real, row = i < size, place + i
    # The rows of G at the channel [SIZE, TILE, SIZE], less what the panel's lines have taken from them.
    whole = real[:, None, None] & inside[None, :, :]
    here = p * columns * columns + (row * columns)[:, None, None] + at[None, :, :]
    x = tl.load(c.inverse + here, mask=whole, other=0.0)
    for line in range(done):
        earlier = (p * limit + line) * columns
        v = tl.load(c.lines + earlier + at, mask=inside, other=0.0)
        v_pivot = tl.load(c.lines + earlier + row, mask=real, other=0.0)
        x -= v_pivot[:, None, None] * v[None, :, :]
    moved = inside.to(tl.float64) * 0.0
    if not SHARED:
        own = tl.load(c.weight + p * columns + row, mask=real, other=0.0)
    for k in range(size):
        root = tl.load(c.factor + factor + k * size + k)
        low = tl.load(c.factor + factor + k * size + i, mask=(i > k) & real, other=0.0)
        v = _line(x, k, SIZE) * root
        tl.store(c.lines + base + k * columns + at, v, mask=inside)
        if not SHARED:
            z = tl.sum(tl.where(i == k, own, 0.0), 0) * root
            own -= z * low
            moved -= z * v
        x -= low[:, None, None] * v[None, :, :]
    return moved


@triton.jit
def _form_u(
    c: tl.tensor,
    p: tl.tensor,
    place: tl.tensor,
    factor: tl.tensor,
    base: tl.tensor,
    sizes: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    """Write a tile's part of the lines ``u``, as :func:`_form_v` did of ``v``, which are read."""
    done, limit, columns, size = sizes
    i = tl.arange(0, SIZE)
    real, row = i < size, place + i
    whole = real[:, None, None] & inside[None, :, :]
    here = p * columns * columns + (row * columns)[:, None, None] + at[None, :, :]
    y = tl.load(c.products + here, mask=whole, other=0.0)
    for line in range(done):
        earlier = (p * limit + line) * columns
        v = tl.load(c.lines + earlier + at, mask=inside, other=0.0)
        v_pivot = tl.load(c.lines + earlier + row, mask=real, other=0.0)
        u = tl.load(c.pulls + earlier + at, mask=inside, other=0.0)
        u_pivot = tl.load(c.pulls + earlier + row, mask=real, other=0.0)
        y -= v_pivot[:, None, None] * u[None, :, :] + u_pivot[:, None, None] * v[None, :, :]
    for k in range(size):
        root = tl.load(c.factor + factor + k * size + k)
        low = tl.load(c.factor + factor + k * size + i, mask=(i > k) & real, other=0.0)
        second = c.factor + factor + (size + k) * size
        half = tl.load(second + k)
        pull = tl.load(second + i, mask=(i > k) & real, other=0.0)
        v = tl.load(c.lines + base + k * columns + at, mask=inside, other=0.0)
        u = _line(y, k, SIZE) * root - half * v
        tl.store(c.pulls + base + k * columns + at, u, mask=inside)
        y -= low[:, None, None] * u[None, :, :] + pull[:, None, None] * v[None, :, :]


@triton.jit
def _less_lines(
    c: tl.tensor,
    base: tl.tensor,
    columns: tl.tensor,
    size: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    blocks: tl.tensor,
    right: tl.tensor,
    SHARED: tl.constexpr,
) -> tl.tensor:
    """Take the lines from ``base`` on out of a tile's diagonal blocks of ``G`` (and of ``A``)."""
    for k in range(size):
        v = tl.load(c.lines + base + k * columns + at, mask=inside, other=0.0)
        blocks -= v[:, :, None] * v[:, None, :]
        if SHARED:
            u = tl.load(c.pulls + base + k * columns + at, mask=inside, other=0.0)
            right -= v[:, :, None] * u[:, None, :] + u[:, :, None] * v[:, None, :]
    return blocks, right


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
    alive, real = (slot < count) & (slot != gone), i < size
    inside = (slot < count)[:, None] & real[None, :]
    at = slot[:, None] * size + i[None, :]
    base = (p * limit + done) * columns
    SHARED: tl.constexpr = c.products is not None
    # Stages need registers one after the other: what one hands to the next goes through memory, where other threads
    # have written it. Programs write nothing that another reads: each has a factor of its own.
    factor = (p * tl.num_programs(1) + tl.program_id(1)) * (2 if SHARED else 1) * size * size
    _factorise(c, (p * count + gone) * size * size, factor, size, SHARED, SIZE)
    tl.debug_barrier()
    sizes = (done, limit, columns, size)
    moved = _form_v(c, p, gone * size, factor, base, sizes, at, inside, SHARED, SIZE)
    tl.debug_barrier()
    if SHARED:
        _form_u(c, p, gone * size, factor, base, sizes, at, inside, SIZE)
        tl.debug_barrier()
    both = inside[:, :, None] & real[None, None, :]
    first = p * count * size * size
    entry = slot[:, None, None] * size * size + i[None, :, None] * size + i[None, None, :]
    keeps = both & alive[:, None, None]
    blocks = tl.load(c.blocks + first + entry, mask=both, other=0.0)
    if SHARED:
        right = tl.load(c.shares + first + entry, mask=both, other=0.0)
    else:
        right = tl.load(c.weight + p * columns + at, mask=inside, other=0.0) + moved
        tl.store(c.weight + p * columns + at, right, mask=inside & alive[:, None])
    blocks, right = _less_lines(c, base, columns, size, at, inside, blocks, right, SHARED)
    tl.store(c.blocks + first + entry, blocks, mask=keeps)
    if SHARED:
        tl.store(c.shares + first + entry, right, mask=keeps)
    before = tl.load(c.score + p * count + slot, mask=slot < count, other=float("inf"))
    tl.debug_barrier()
    _price(c, p, slot, alive & (before < float("inf")), count, size, SHARED, SIZE)
