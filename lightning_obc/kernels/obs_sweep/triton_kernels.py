"""Triton kernels of the sweep: a panel of eliminations per launch, and the compaction between panels.

A program holds ``ROWS`` rows (one on a GPU; more under Triton's interpreter, whose cost is per operation) and walks over
their working sets in tiles of ``COLS`` slots, so that registers do not grow with the number of columns; what lives
longer than a tile stays in global memory, where the caches find it. ``docs/gpu.md`` has the launch plan.

Index legend: ``P`` rows of a chunk, ``m`` slots of their working sets (``width`` is what their buffers were allocated
for), ``B`` steps of a panel, ``d``, ``T`` as in :mod:`.types`. A *slot* holds a column; it is dead (-1) once the column
was eliminated or its group closed.

Threads of a program see each other's writes to global memory only across a barrier. There are two in a step: one before
values at the pivot are read that the last step wrote, one before this step overwrites them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

RUNNING, ENDED, BROKEN, WORN = 0, 1, 2, 3
_ENDED, _BROKEN, _WORN = tl.constexpr(ENDED), tl.constexpr(BROKEN), tl.constexpr(WORN)
_NONE = tl.constexpr(1 << 62)
_SLOT = tl.constexpr((1 << 32) - 1)


class Lines(NamedTuple):
    """Inputs and outputs by row of the whole sweep, contiguous; absent inputs are None."""

    scale: Tensor | None  # [g·R, d]
    zero_point: Tensor | None  # [g·R, d]
    keep: Tensor | None  # [g·R, d] uint8
    group: Tensor | None  # [d] int64, N:M group of every column, the same for all rows
    order: Tensor  # [g·R, T] int32
    losses: Tensor  # [g·R, T]
    count: Tensor  # [g·R] int32
    codes: Tensor | None  # [g·R, d] uint8


class Working(NamedTuple):
    """Working memory by row of the chunk."""

    row: Tensor  # [P] int64, row of the sweep
    owner: Tensor  # [P] int64, which matrix of ``G`` belongs to the row
    status: Tensor  # [P] int32
    weight: Tensor  # [P, width]
    diagonal: Tensor  # [P, width]
    column: Tensor  # [P, width] int32, -1 in a dead slot
    reference: Tensor  # [P, d] by column: the diagonal at the row's last float64 start
    quota: Tensor | None  # [P, groups] int64, zeros still to make
    panel: Tensor  # [P, steps, width], V


@triton.jit
def _divide(a: Any, b: Any) -> Any:
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _root(x: Any) -> Any:
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _rint(x: Any) -> Any:
    """Nearest integer, halves to even, wherever codes can lie: adding 1.5·2^(mantissa bits) rounds."""
    if x.dtype == tl.float64:
        return (x + 6755399441055744.0) - 6755399441055744.0
    else:
        return (x + 12582912.0) - 12582912.0


@triton.jit
def _codes(weight: Any, scale: Any, zero_point: Any, MAX_CODE: tl.constexpr) -> Any:
    """Nearest code, before and after clipping."""
    raw = _rint(_divide(weight, scale)) + zero_point
    return raw, tl.minimum(tl.maximum(raw, 0.0), MAX_CODE)


@triton.jit
def _rank(
    lines: Any,
    row: Any,
    column: Any,
    slot: Any,
    weight: Any,
    diagonal: Any,
    columns: Any,
    best: Any,
    key: Any,
    MAX_CODE: tl.constexpr,
    FAR: tl.constexpr,
) -> Any:
    """Let the slots of a tile compete with the best seen so far at the same place of earlier tiles.

    Outliers score below zero, the largest squared error lowest; weights that are zero already score -Inf, and so does
    NaN, which the check of the pivot then finds. The key orders equal scores by column.
    """
    alive = column >= 0
    if lines.scale is not None:
        at = row * columns + column
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
        first = first | (tl.load(lines.keep + row * columns + column, mask=alive, other=1) == 0)
    score = tl.where(alive, tl.where(first, float("-inf"), score), float("inf"))
    mine = tl.where(alive, (column.to(tl.int64) << 32) + slot, _NONE)
    better = (score < best) | ((score == best) & (mine < key))
    return tl.where(better, score, best), tl.where(better, mine, key)


@triton.jit
def _open(
    lines: Any,
    working: Any,
    matrix: Any,
    stride: Any,
    line: Any,
    row: Any,
    here: Any,
    owner: Any,
    present: Any,
    size: Any,
    width: Any,
    columns: Any,
    best: Any,
    key: Any,
    MAX_CODE: tl.constexpr,
    FAR: tl.constexpr,
    COLS: tl.constexpr,
) -> Any:
    """Read the diagonal from ``G`` and rank all slots."""
    for first in range(0, size, COLS):
        slot = first + tl.arange(0, COLS)[None, :].to(tl.int64)
        inside = present & (slot < size)
        at = here * width + slot
        diagonal = tl.load(matrix + owner * stride + slot * (line + 1), mask=inside, other=1.0)
        tl.store(working.diagonal + at, diagonal, mask=inside)
        weight = tl.load(working.weight + at, mask=inside, other=0.0)
        column = tl.load(working.column + at, mask=inside, other=-1)
        best, key = _rank(lines, row, column, slot, weight, diagonal, columns, best, key, MAX_CODE, FAR)
    return best, key


@triton.jit
def _fix(
    lines: Any,
    row: Any,
    chosen: Any,
    weight: Any,
    root: Any,
    done: Any,
    going: Any,
    columns: Any,
    length: Any,
    MAX_CODE: tl.constexpr,
) -> Any:
    """Record the pivots; returns ``z``, and whether the loss is a number."""
    error = weight
    if lines.scale is not None:
        at = row * columns + chosen
        scale = tl.load(lines.scale + at, mask=going, other=1.0)
        zero_point = tl.load(lines.zero_point + at, mask=going, other=0.0)
        raw, code = _codes(weight, scale, zero_point, MAX_CODE)
        if lines.keep is not None:
            code = tl.where(tl.load(lines.keep + at, mask=going, other=1) == 0, zero_point, code)
        error = weight - (code - zero_point) * scale
        tl.store(lines.codes + at, code.to(tl.uint8), mask=going)
    z = _divide(error, root)
    tl.store(lines.order + row * length + done, chosen.to(tl.int32), mask=going)
    tl.store(lines.losses + row * length + done, 0.5 * z * z, mask=going)
    return z


@triton.jit
def _pivot_columns(
    working: Any,
    matrix: Any,
    first_of_panel: Any,
    line_of_pivot: Any,
    pivot: Any,
    slot: Any,
    inside: Any,
    going: Any,
    width: Any,
    step: Any,
    DEPTH: tl.constexpr,
) -> Any:
    """``G_:p - V V_p:ᵀ`` on a tile, the panel's earlier columns ``DEPTH`` at a time."""
    value = tl.load(matrix + line_of_pivot + slot, mask=inside, other=0.0)
    for first in range(0, step, DEPTH):
        k = first + tl.arange(0, DEPTH).to(tl.int64)[None, :]
        left = tl.load(working.panel + first_of_panel + k * width + pivot, mask=going & (k < step), other=0.0)
        earlier = working.panel + first_of_panel[:, :, None] + k[:, :, None] * width + slot[:, None, :]
        right = tl.load(earlier, mask=inside[:, None, :] & (k < step)[:, :, None], other=0.0)
        value -= tl.sum(left[:, :, None] * right, axis=1)
    return value


@triton.jit
def _eliminate(
    lines: Any,
    working: Any,
    matrix: Any,
    line_of_pivot: Any,
    first_of_panel: Any,
    row: Any,
    here: Any,
    pivot: Any,
    going: Any,
    root: Any,
    z: Any,
    closing: Any,
    step: Any,
    size: Any,
    width: Any,
    columns: Any,
    best: Any,
    key: Any,
    MAX_CODE: tl.constexpr,
    FAR: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> Any:
    """One pass over the working set: ``v``, ``w -= z v``, ``diag -= v²``, who leaves, and the next scores.

    ``closing`` is the group that closes with this step, -1 when none does.
    """
    for first in range(0, size, COLS):
        slot = first + tl.arange(0, COLS)[None, :].to(tl.int64)
        inside = going & (slot < size)
        at = here * width + slot
        v = _divide(
            _pivot_columns(
                working, matrix, first_of_panel, line_of_pivot, pivot, slot, inside, going, width, step, DEPTH
            ),
            root,
        )
        tl.store(working.panel + first_of_panel + step * width + slot, v, mask=inside)
        weight = tl.load(working.weight + at, mask=inside, other=0.0) - z * v
        diagonal = tl.load(working.diagonal + at, mask=inside, other=1.0) - v * v
        column = tl.load(working.column + at, mask=inside, other=-1)
        leaves = slot == pivot
        if lines.group is not None:
            member = tl.load(lines.group + column, mask=column >= 0, other=-2) == closing
            if lines.keep is not None:
                member = member & (tl.load(lines.keep + row * columns + column, mask=column >= 0, other=0) != 0)
            leaves = leaves | member
        column = tl.where(leaves, -1, column)
        tl.store(working.weight + at, weight, mask=inside)
        tl.store(working.diagonal + at, diagonal, mask=inside)
        tl.store(working.column + at, column, mask=inside)
        best, key = _rank(lines, row, column, slot, weight, diagonal, columns, best, key, MAX_CODE, FAR)
    return best, key


@triton.jit(do_not_specialize=["rows", "size", "steps", "length", "groups"])
def panel_kernel(
    lines: Any,
    working: Any,
    matrix: Any,  # G, [n, m, line]
    stride: Any,
    line: Any,
    rows: Any,  # P
    size: Any,  # m
    steps: Any,  # B
    width: Any,
    panel_stride: Any,
    columns: Any,  # d
    length: Any,  # T
    groups: Any,
    MAX_CODE: tl.constexpr,
    FAR: tl.constexpr,
    WORN_RATIO: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """``B`` eliminations of each row that is running. Order, losses, codes, counts and status are written.

    A row stops when no slot is alive (``ENDED``) or its pivot is not finite and positive (``BROKEN``); a pivot smaller
    than its reference by more than ``WORN_RATIO`` marks it ``WORN`` at the panel's end.
    """
    here = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    state = tl.load(working.status + here, mask=here < rows, other=_ENDED)
    if tl.min(tl.min(state, axis=1), axis=0) > 0:
        return
    present = state == 0
    row = tl.load(working.row + here, mask=present, other=0)
    owner = tl.load(working.owner + here, mask=present, other=0)
    done = tl.load(lines.count + row, mask=present, other=0)
    worn = present & False
    nothing = tl.full((ROWS, COLS), float("inf"), matrix.dtype.element_ty)
    nobody = tl.full((ROWS, COLS), _NONE, tl.int64)
    best, key = _open(
        lines,
        working,
        matrix,
        stride,
        line,
        row,
        here,
        owner,
        present,
        size,
        width,
        columns,
        nothing,
        nobody,
        MAX_CODE,
        FAR,
        COLS,
    )
    for step in range(steps):
        tl.debug_barrier()
        lowest = tl.min(best, axis=1, keep_dims=True)
        winner = tl.min(tl.where(best == lowest, key, _NONE), axis=1, keep_dims=True)
        pivot, chosen = winner & _SLOT, winner >> 32
        state = tl.where((state == 0) & (winner == _NONE), _ENDED, state)
        found = state == 0
        value = tl.load(working.diagonal + here * width + pivot, mask=found, other=1.0)
        state = tl.where(found & ~((value > 0) & (value < float("inf"))), _BROKEN, state)
        going = state == 0
        weight = tl.load(working.weight + here * width + pivot, mask=going, other=0.0)
        reference = tl.load(working.reference + here * columns + chosen, mask=going, other=0.0)
        worn = worn | (going & (reference > WORN_RATIO * value))
        root = _root(tl.where(going, value, 1.0))
        z = _fix(lines, row, chosen, weight, root, done, going, columns, length, MAX_CODE)
        closing = tl.full((ROWS, 1), -1, tl.int64)
        if lines.group is not None:
            group = tl.load(lines.group + chosen, mask=going, other=0)
            left = tl.load(working.quota + here * groups + group, mask=going, other=2) - 1
            closing = tl.where(left <= 0, group, closing)
        tl.debug_barrier()
        if lines.group is not None:
            tl.store(working.quota + here * groups + group, left, mask=going)
        best, key = _eliminate(
            lines,
            working,
            matrix,
            owner * stride + pivot * line,
            here * panel_stride,
            row,
            here,
            pivot,
            going,
            root,
            z,
            closing,
            step,
            size,
            width,
            columns,
            nothing,
            nobody,
            MAX_CODE,
            FAR,
            COLS,
            DEPTH,
        )
        done += going.to(tl.int32)
    unfinished = tl.min(key, axis=1, keep_dims=True) < _NONE
    state = tl.where((state == 0) & worn & unfinished, _WORN, state)
    tl.store(lines.count + row, done, mask=present)
    tl.store(working.status + here, state, mask=present)


@triton.jit(do_not_specialize=["rows", "size", "holes"])
def move_kernel(
    source: Any,  # [n, ·, source_line]
    source_stride: Any,
    source_line: Any,
    owner: Any,  # [P] int64
    target: Any,  # [P, ·, target_line]
    target_stride: Any,
    target_line: Any,
    hole: Any,  # [P, holes] int64, lines to write; those of size or more are left out
    origin: Any,  # [P, width] int64, the slot of the source that each slot of the target takes
    rows: Any,
    size: Any,
    holes: Any,
    width: Any,
    MIRROR: tl.constexpr,
    ROWS: tl.constexpr,
    LINES: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """``target[h, j] = source[origin[h], origin[j]]`` for the holes ``h`` and all ``j < size``.

    With ``MIRROR``, source and target are one symmetric matrix, compacted in place, and ``target[j, h]`` is written too
    where ``j`` is no hole itself. Nothing is read that another program writes: an origin that differs from its slot is
    at ``size`` or beyond.
    """
    here = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    k = tl.program_id(1) * LINES + tl.arange(0, LINES)[None, :]
    h = tl.load(hole + here * holes + k, mask=(here < rows) & (k < holes), other=1 << 40)
    moves = h < size
    s = tl.load(origin + here * width + h, mask=moves, other=0)
    matrix = tl.load(owner + here, mask=here < rows, other=0) * source_stride
    for first in range(0, size, COLS):
        j = first + tl.arange(0, COLS)[None, :].to(tl.int64)
        inside = (here < rows) & (j < size)
        o = tl.load(origin + here * width + j, mask=inside, other=0)
        both = moves[:, :, None] & inside[:, None, :]
        value = tl.load(source + (matrix + s * source_line)[:, :, None] + o[:, None, :], mask=both)
        at = here[:, :, None] * target_stride
        tl.store(target + at + h[:, :, None] * target_line + j[:, None, :], value, mask=both)
        if MIRROR:
            stays = both & (o == j)[:, None, :]
            tl.store(target + at + j[:, None, :] * target_line + h[:, :, None], value, mask=stays)
