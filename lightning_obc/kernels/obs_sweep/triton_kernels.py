"""The Triton kernel of the sweep: a panel of eliminations per launch.

A program holds ``ROWS`` rows (one on a GPU; more under Triton's interpreter, whose cost is per operation) and walks
over their working sets in tiles of ``COLS`` slots, so that registers do not grow with the number of columns; what lives
longer than a tile stays in global memory, where the caches find it. ``docs/gpu.md`` has the launch plan.

Index legend: ``P`` rows of a chunk, ``m`` slots of their working sets (``width`` is what their buffers were allocated
for), ``B`` steps of a panel, ``d``, ``T`` as in :mod:`.types`. A *slot* holds a column; it is dead (-1) once the column
was eliminated or its group closed.

Threads of a program see each other's writes to global memory only across a barrier. There are two in a step: one before
values at the pivot are read that the last step wrote, one before this step overwrites them.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

RUNNING, ENDED, BROKEN, WORN = 0, 1, 2, 3
_ENDED, _BROKEN, _WORN = tl.constexpr(ENDED), tl.constexpr(BROKEN), tl.constexpr(WORN)
_NONE = tl.constexpr(1 << 62)
_SLOT = tl.constexpr((1 << 32) - 1)
_VECTOR = tl.constexpr(16)


class Lines(NamedTuple):
    """Inputs and outputs by row of the whole sweep, contiguous; absent inputs are None."""

    scale: Tensor | None  # [g·R, d]
    zero_point: Tensor | None  # [g·R, d]
    keep: Tensor | None  # [g·R, d] uint8
    group: Tensor | None  # [d] int64, N:M group of every column, the same for all rows
    order: Tensor  # [g·R, T] int32
    losses: Tensor  # [g·R, T]
    done: Tensor  # [g·R] int32, steps made
    codes: Tensor | None  # [g·R, d] uint8


class Working(NamedTuple):
    """Working memory by row of the chunk."""

    row: Tensor  # [P] int64, row of the sweep
    owner: Tensor  # [P] int64, which matrix of ``G`` belongs to the row
    status: Tensor  # [P] int32
    weight: Tensor  # [P, width]
    diagonal: Tensor  # [P, width]; of a sweep over blocks: tile by tile, entry by entry
    column: Tensor  # [P, width] int32, -1 in a dead slot
    reference: Tensor  # [P, d] by column: its pivot (in its block) at the row's last float64 start
    quota: Tensor | None  # [P, groups] int64, zeros still to make
    panel: Tensor  # [P, steps, width], V


class Sizes(NamedTuple):
    """What stays the same in all launches on a matrix ``G``, so that a kernel may be specialised to it."""

    stride: int  # elements from one matrix to the next
    line: int  # elements from one line of a matrix to the next
    width: int
    panel: int  # elements from one row's panel to the next
    columns: int  # d
    length: int  # T
    groups: int


@triton.jit
def _divide(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _root(x: tl.tensor) -> tl.tensor:
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _rint(x: tl.tensor) -> tl.tensor:
    """Nearest integer, halves to even, wherever codes can lie: adding 1.5·2^(mantissa bits) rounds."""
    if x.dtype == tl.float64:
        return (x + 6755399441055744.0) - 6755399441055744.0
    else:
        return (x + 12582912.0) - 12582912.0


@triton.jit
def _codes(weight: tl.tensor, scale: tl.tensor, zero_point: tl.tensor, MAX_CODE: tl.constexpr) -> tl.tensor:
    """Nearest code, before and after clipping."""
    raw = _rint(_divide(weight, scale)) + zero_point
    return raw, tl.minimum(tl.maximum(raw, 0.0), MAX_CODE)


@triton.jit
def _rank(
    lines: tl.tensor,
    sizes: tl.tensor,
    row: tl.tensor,
    tile: tl.tensor,
    best: tl.tensor,
    key: tl.tensor,
    MAX_CODE: tl.constexpr,
    FAR: tl.constexpr,
) -> tl.tensor:
    """Let the slots of a tile compete with the best seen so far at the same place of earlier tiles.

    Outliers score below zero, the largest squared error lowest; weights that are zero already score -Inf, and so does
    NaN, which the check of the pivot then finds. The key orders equal scores by column.
    """
    slot, column, weight, diagonal = tile
    alive = column >= 0
    at = row * sizes.columns + column
    if lines.scale is not None:
        scale = tl.load(lines.scale + at, mask=alive, other=1.0)
        zero_point = tl.load(lines.zero_point + at, mask=alive, other=0.0)
        raw, code = _codes(weight, scale, zero_point, MAX_CODE)
        error = weight - (code - zero_point) * scale
        far = (raw != code) & (tl.abs(error) > FAR * scale)
        score = tl.where(far, -error * error, _divide(error * error, diagonal))
    else:
        score = _divide(weight * weight, diagonal)
    first = score != score
    if lines.keep is not None:
        first = first | (tl.load(lines.keep + at, mask=alive, other=1) == 0)
    score = tl.where(alive, tl.where(first, float("-inf"), score), float("inf"))
    mine = tl.where(alive, (column.to(tl.int64) << 32) + slot, _NONE)
    better = (score < best) | ((score == best) & (mine < key))
    return tl.where(better, score, best), tl.where(better, mine, key)


@triton.jit
def _slots(first: tl.tensor, size: tl.tensor, rows: tl.tensor, COLS: tl.constexpr) -> tl.tensor:
    """Slots of a tile, those that exist, and those up to the end of a vector: whole vectors keep loads wide."""
    slot = first + tl.arange(0, COLS)[None, :].to(tl.int64)
    return slot, rows & (slot < size), rows & (slot < (size + _VECTOR - 1) // _VECTOR * _VECTOR)


@triton.jit
def _open(
    lines: tl.tensor,
    working: tl.tensor,
    sizes: tl.tensor,
    matrix: tl.tensor,
    size: tl.tensor,
    at: tl.tensor,
    best: tl.tensor,
    key: tl.tensor,
    MAX_CODE: tl.constexpr,
    FAR: tl.constexpr,
    COLS: tl.constexpr,
) -> tl.tensor:
    """Read the diagonal from ``G`` and rank all slots."""
    row, here, owner, present = at
    for first in range(0, size, COLS):
        slot, inside, padded = _slots(first, size, present, COLS)
        place = here * sizes.width + slot
        diagonal = tl.load(matrix + owner * sizes.stride + slot * (sizes.line + 1), mask=inside, other=1.0)
        tl.store(working.diagonal + place, diagonal, mask=padded)
        weight = tl.load(working.weight + place, mask=padded, other=0.0)
        column = tl.load(working.column + place, mask=inside, other=-1)
        best, key = _rank(lines, sizes, row, (slot, column, weight, diagonal), best, key, MAX_CODE, FAR)
    return best, key


@triton.jit
def _choose(
    working: tl.tensor,
    sizes: tl.tensor,
    here: tl.tensor,
    state: tl.tensor,
    best: tl.tensor,
    key: tl.tensor,
    made: tl.tensor,
    WORN_RATIO: tl.constexpr,
) -> tl.tensor:
    """Slot, column and diagonal of the pivots, and which rows stop here.

    A pivot that is no good, or smaller than its reference by more than ``WORN_RATIO``, is rounding, for a restart to
    mend, unless ``made``, the steps since the last start, is 0.
    """
    lowest = tl.min(best, axis=1, keep_dims=True)
    winner = tl.min(tl.where(best == lowest, key, _NONE), axis=1, keep_dims=True)
    pivot = winner & _SLOT
    state = tl.where((state == 0) & (winner == _NONE), _ENDED, state)
    found = state == 0
    value = tl.load(working.diagonal + here * sizes.width + pivot, mask=found, other=1.0)
    column = winner >> 32
    reference = tl.load(working.reference + here * sizes.columns + column, mask=found, other=0.0)
    bad = found & ~((value > 0) & (value < float("inf")) & (reference <= WORN_RATIO * value))
    state = tl.where(bad, tl.where(made > 0, _WORN, _BROKEN), state)
    return pivot, column, tl.where(state == 0, value, 1.0), state


@triton.jit
def _fix(
    lines: tl.tensor,
    sizes: tl.tensor,
    row: tl.tensor,
    chosen: tl.tensor,
    weight: tl.tensor,
    root: tl.tensor,
    done: tl.tensor,
    going: tl.tensor,
    MAX_CODE: tl.constexpr,
) -> tl.tensor:
    """Record the pivots; returns ``z``."""
    error = weight
    if lines.scale is not None:
        at = row * sizes.columns + chosen
        scale = tl.load(lines.scale + at, mask=going, other=1.0)
        zero_point = tl.load(lines.zero_point + at, mask=going, other=0.0)
        _, code = _codes(weight, scale, zero_point, MAX_CODE)
        if lines.keep is not None:
            code = tl.where(tl.load(lines.keep + at, mask=going, other=1) == 0, zero_point, code)
        error = weight - (code - zero_point) * scale
        tl.store(lines.codes + at, code.to(tl.uint8), mask=going)
    z = _divide(error, root)
    tl.store(lines.order + row * sizes.length + done, chosen.to(tl.int32), mask=going)
    tl.store(lines.losses + row * sizes.length + done, 0.5 * z * z, mask=going)
    return z


@triton.jit
def _pivot_columns(
    working: tl.tensor,
    sizes: tl.tensor,
    value: tl.tensor,
    panel: tl.tensor,
    pivot: tl.tensor,
    slot: tl.tensor,
    going: tl.tensor,
    padded: tl.tensor,
    step: tl.tensor,
    DEPTH: tl.constexpr,
) -> tl.tensor:
    """``G_:p - V V_p:ᵀ`` on a tile whose ``value`` is ``G_:p``, the panel's earlier columns ``DEPTH`` at a time."""
    for first in range(0, step, DEPTH):
        k = first + tl.arange(0, DEPTH).to(tl.int64)[None, :]
        left = tl.load(working.panel + panel + k * sizes.width + pivot, mask=going & (k < step), other=0.0)
        earlier = working.panel + panel[:, :, None] + k[:, :, None] * sizes.width + slot[:, None, :]
        right = tl.load(earlier, mask=padded[:, None, :] & (k < step)[:, :, None], other=0.0)
        value -= tl.sum(left[:, :, None] * right, axis=1)
    return value


@triton.jit
def _eliminate(
    lines: tl.tensor,
    working: tl.tensor,
    sizes: tl.tensor,
    matrix: tl.tensor,
    size: tl.tensor,
    step: tl.tensor,
    at: tl.tensor,
    pivots: tl.tensor,
    best: tl.tensor,
    key: tl.tensor,
    MAX_CODE: tl.constexpr,
    FAR: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> tl.tensor:
    """One pass over the working set: ``v``, ``w -= z v``, ``diag -= v²``, who leaves, and the next scores.

    ``closing`` is the group that closes with this step, -1 when none does.
    """
    row, here, owner, going = at
    pivot, root, z, closing = pivots
    panel = here * sizes.panel
    for first in range(0, size, COLS):
        slot, inside, padded = _slots(first, size, going, COLS)
        place = here * sizes.width + slot
        value = tl.load(matrix + owner * sizes.stride + pivot * sizes.line + slot, mask=inside, other=0.0)
        value = _pivot_columns(working, sizes, value, panel, pivot, slot, going, padded, step, DEPTH)
        v = _divide(value, root)
        tl.store(working.panel + panel + step * sizes.width + slot, v, mask=padded)
        weight = tl.load(working.weight + place, mask=padded, other=0.0) - z * v
        diagonal = tl.load(working.diagonal + place, mask=padded, other=1.0) - v * v
        column = tl.load(working.column + place, mask=inside, other=-1)
        leaves = slot == pivot
        if lines.group is not None:
            member = tl.load(lines.group + column, mask=column >= 0, other=-2) == closing
            if lines.keep is not None:
                zero = tl.load(lines.keep + row * sizes.columns + column, mask=column >= 0, other=0) == 0
                member = member & ~zero
            leaves = leaves | member
        column = tl.where(leaves, -1, column)
        tl.store(working.weight + place, weight, mask=padded)
        tl.store(working.diagonal + place, diagonal, mask=padded)
        tl.store(working.column + place, column, mask=padded)
        best, key = _rank(lines, sizes, row, (slot, column, weight, diagonal), best, key, MAX_CODE, FAR)
    return best, key


@triton.jit(do_not_specialize=["rows", "size", "steps", "made"])
def panel_kernel(
    lines: tl.tensor,
    working: tl.tensor,
    sizes: tl.tensor,
    matrix: tl.tensor,  # G
    rows: tl.tensor,  # P
    size: tl.tensor,  # m
    steps: tl.tensor,  # B
    made: tl.tensor,  # steps since the chunk started
    MAX_CODE: tl.constexpr,
    FAR: tl.constexpr,
    WORN_RATIO: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """``B`` eliminations of each row that is running. Order, losses, codes, counts and status are written.

    A row stops when no slot is alive (``ENDED``) or its first pivot is not finite and positive (``BROKEN``). It is
    ``WORN`` when a later one is not, or is smaller than its reference by more than ``WORN_RATIO``.
    """
    here = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    state = tl.load(working.status + here, mask=here < rows, other=_ENDED)
    if tl.min(tl.min(state, axis=1), axis=0) > 0:
        return
    present = state == 0
    row = tl.load(working.row + here, mask=present, other=0)
    owner = tl.load(working.owner + here, mask=present, other=0)
    done = tl.load(lines.done + row, mask=present, other=0)
    none = tl.full((ROWS, COLS), float("inf"), matrix.dtype.element_ty)
    nobody = tl.full((ROWS, COLS), _NONE, tl.int64)
    at = (row, here, owner, present)
    best, key = _open(lines, working, sizes, matrix, size, at, none, nobody, MAX_CODE, FAR, COLS)
    for step in range(steps):
        tl.debug_barrier()
        pivot, chosen, value, state = _choose(working, sizes, here, state, best, key, made + step, WORN_RATIO)
        going = state == 0
        weight = tl.load(working.weight + here * sizes.width + pivot, mask=going, other=0.0)
        root = _root(value)
        z = _fix(lines, sizes, row, chosen, weight, root, done, going, MAX_CODE)
        closing = tl.full((ROWS, 1), -1, tl.int64)
        if lines.group is not None:
            group = tl.load(lines.group + chosen, mask=going, other=0)
            quota = working.quota + here * sizes.groups + group
            left = tl.load(quota, mask=going, other=2) - 1
            closing = tl.where(left <= 0, group, closing)
        tl.debug_barrier()
        if lines.group is not None:
            tl.store(quota, left, mask=going)
        at, pivots = (row, here, owner, going), (pivot, root, z, closing)
        best, key = _eliminate(
            lines, working, sizes, matrix, size, step, at, pivots, none, nobody, MAX_CODE, FAR, COLS, DEPTH
        )
        done += going.to(tl.int32)
    tl.store(lines.done + row, done, mask=present)
    tl.store(working.status + here, state, mask=present)
