"""Symmetric matrices in packed column blocks, and the panel steps on them (numba).

Layout. Only the upper triangle of ``G`` is kept, in column blocks of ``WIDTH``: block ``k`` holds the columns
``k·WIDTH …`` for the rows ``0 … (k+1)·WIDTH``, row after row. Walking down a column, and updating a column block tile
by tile, both read memory forwards, at half the size of the full matrix. A panel of pivot columns ``V`` is kept in
chunks of ``CHUNK`` positions, ``[chunk][step][CHUNK]``, the shape in which the tiles read it.

Offsets in inner loops are unsigned: numba lets a signed index count from the end, which keeps loops from being
vectorised.

Steps of a panel: :func:`gather` a column, :func:`correct` it by the panel's earlier columns. At the panel's end
:func:`flush`, ``G -= V Vᵀ``; where positions leave, :func:`plan_moves`, :func:`move_panel` and :func:`move_and_flush`
instead.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from lightning_obc.kernels.obs_sweep.jit import STRICT, STRIP, cached, make_strip
from lightning_obc.kernels.obs_sweep.lanes import LANES, copy
from lightning_obc.kernels.obs_sweep.moving_tile import FAR, NEAR, SCATTERED, SOURCES, move_run, moving_tile, permutes
from lightning_obc.kernels.obs_sweep.tile import (
    BLOCK_ROWS,
    FLUSH_ROWS,
    FLUSH_VECTORS,
    VECTOR_BYTES,
    block_tile,
    flush_tile,
    panel_tile,
)

Array = NDArray[np.floating]
IntArray = NDArray[np.int32]
WIDTH = 32
_SHIFT = 5  # WIDTH as a shift: dividing signed integers takes longer
CHUNK = 128

_jit = numba.njit(**STRICT)
_inline = numba.njit(inline="always", **STRICT)


class Moves(NamedTuple):
    """Where the vectors of positions that stay come from; with ``origin [positions]`` ascending, the old positions.

    A vector of positions reads from at most ``SOURCES`` aligned vectors of old ones, ``group`` and the next, unless it
    is scattered.
    """

    relative: IntArray  # [positions], origin less the start of the first of those vectors
    group: IntArray  # [vectors · SOURCES], their numbers
    start: NDArray[np.int64]  # [vectors · SOURCES], where they start in the first row of a packed matrix
    reach: IntArray  # [vectors], how far sources are spread


def moves(positions: int, lanes: int) -> Moves:
    """Memory for so many positions, in vectors of ``lanes``."""
    vectors = padded(positions) // lanes
    return Moves(
        np.zeros(padded(positions), np.int32),
        np.zeros(vectors * SOURCES, np.int32),
        np.zeros(vectors * SOURCES, np.int64),
        np.zeros(vectors, np.int32),
    )


def packed_size(columns: int) -> int:
    """Elements of a packed symmetric matrix."""
    blocks = -(-columns // WIDTH)
    return WIDTH * WIDTH * blocks * (blocks + 1) // 2


def padded(columns: int) -> int:
    """Columns rounded up to whole chunks."""
    return -(-columns // CHUNK) * CHUNK


@_inline
def at(row: int, column: int) -> int:
    """Offset of the element ``row <= column``."""
    block = column >> _SHIFT
    return WIDTH * WIDTH // 2 * block * (block + 1) + row * WIDTH + (column & (WIDTH - 1))


@_inline
def panel_at(position: int, step: int, steps: int) -> int:
    """Offset in a panel of ``steps`` columns."""
    return ((position & -CHUNK) * steps) + step * CHUNK + (position & (CHUNK - 1))


@cached
def pack_positions(matrix: Array, column: NDArray[np.int64], packed: Array) -> None:
    """Pack ``[d, d]`` by position: ``column`` of every position, the identity where there is none (-1)."""
    size = len(column)
    for first in range(0, size, WIDTH):
        for row in range(min(first + WIDTH, size)):
            start, here = np.uint64(at(row, first)), column[row]
            for k in range(min(WIDTH, size - first)):
                there = column[first + k]
                if here >= 0 and there >= 0:
                    packed[start + np.uint64(k)] = matrix[here, there]
                else:
                    packed[start + np.uint64(k)] = row == first + k


@cached
def pack(matrix: Array, packed: Array) -> None:
    """Copy the upper triangle of ``[d, d]`` into its packed form; the padding becomes 0."""
    size = matrix.shape[0]
    for first in range(0, size, WIDTH):
        count = min(WIDTH, size - first)
        for row in range(first + WIDTH):
            start = np.uint64(at(row, first))
            inside = count if row < size else 0
            for k in range(inside):
                packed[start + np.uint64(k)] = matrix[row, first + k]
            for k in range(inside, WIDTH):
                packed[start + np.uint64(k)] = 0


_strip_to_line = make_strip(1, WIDTH)


@_jit
def _column_to_line(packed: Array, source: int, line: Array, target: int, count: int) -> None:
    """``count`` elements down a column block, one after the other."""
    whole = count & -STRIP
    for k in range(0, whole, STRIP):
        _strip_to_line(line, target + k, packed, source + k * WIDTH)
    for k in range(whole, count):
        line[np.uint64(target + k)] = packed[np.uint64(source + k * WIDTH)]


@_jit
def gather(packed: Array, size: int, pivot: int, panel: Array, step: int, steps: int) -> None:
    """Column ``pivot`` of the leading ``size`` rows into the panel, zeros behind it up to the end of its chunk."""
    for first in range(0, pivot, CHUNK):
        # A strip may reach beyond the pivot, into what is overwritten next.
        count = (min(CHUNK, pivot - first) + STRIP - 1) & -STRIP
        _column_to_line(packed, at(first, pivot), panel, panel_at(first, step, steps), count)
    behind = (pivot + LANES - 1) & -LANES
    source, target = np.uint64(at(pivot, pivot)), np.uint64(panel_at(pivot, step, steps))
    for k in range(behind - pivot):
        panel[target + np.uint64(k)] = packed[source + np.uint64(k)]
    for first in range(behind, size, LANES):
        copy(panel, panel_at(first, step, steps), packed, at(pivot, first))
    target = np.uint64(panel_at(size, step, steps))
    for k in range(-size % CHUNK):
        panel[target + np.uint64(k)] = 0


@_inline
def correct(panel: Array, chunk: int, pivot: int, first: int, last: int, step: int, steps: int, tile: int) -> None:
    """Subtract what the panel's columns ``first …`` before ``last`` hold of the column at ``step``, in one chunk."""
    if last > first:
        own, left = panel_at(chunk * CHUNK, step, steps), panel_at(pivot, first, steps)
        right, depth = panel_at(chunk * CHUNK, first, steps), last - first
        for k in range(0, CHUNK, tile):
            panel_tile(panel, own + k, 0, panel, own + k, 0, panel, left, CHUNK, panel, right + k, CHUNK, depth)


@_jit
def correct_block(
    panel: Array, size: int, pivots: IntArray, count: int, left: Array, step: int, steps: int, width: int, tile: int
) -> None:
    """:func:`correct` of ``count`` columns at ``step …`` by all that are before ``step``, which are read once for all.

    Args:
        pivots: The columns' positions.
        left: Memory for ``BLOCK_ROWS · step`` numbers.
        width: Columns of a panel tile.
        tile: Columns of a block tile.
    """
    if step == 0:
        return
    whole = count // BLOCK_ROWS * BLOCK_ROWS
    for first in range(0, whole, BLOCK_ROWS):
        for k in range(step):
            for i in range(BLOCK_ROWS):
                left[k * BLOCK_ROWS + i] = panel[panel_at(pivots[first + i], k, steps)]
        for column in range(0, size, tile):
            own, right = panel_at(column, step + first, steps), panel_at(column, 0, steps)
            block_tile(panel, own, CHUNK, panel, own, CHUNK, left, 0, BLOCK_ROWS, panel, right, CHUNK, step)
    for i in range(whole, count):
        for chunk in range((size + CHUNK - 1) // CHUNK):
            correct(panel, chunk, pivots[i], 0, step, step + i, steps, width)


@_jit
def flush(source: Array, target: Array, size: int, panel: Array, depth: int, steps: int, tile: int) -> None:
    """``target = source - V Vᵀ`` on the leading ``size`` rows, with the first ``depth`` columns of the panel."""
    for first in range(0, size, WIDTH):
        for column in range(first, size, tile):
            start, right = at(0, column), panel_at(column, 0, steps)
            for row in range(first, min(column + tile, first + WIDTH), FLUSH_ROWS):
                here, left = start + row * WIDTH, panel_at(row, 0, steps)
                flush_tile(target, here, WIDTH, source, here, WIDTH, panel, left, CHUNK, panel, right, CHUNK, depth)


_moving_tile = moving_tile(WIDTH)
_PERMUTES_4, _PERMUTES_8 = permutes(4), permutes(8)


@_jit
def plan_moves(size: int, origin: IntArray, m: Moves, lanes: int) -> None:
    """Where the vectors of ``size`` positions come from, of ``origin`` (see :class:`Moves`), which is padded here."""
    able = _PERMUTES_4 if VECTOR_BYTES // lanes == 4 else _PERMUTES_8
    whole = (size + WIDTH - 1) & -WIDTH
    for i in range(size, whole):
        origin[i] = origin[size - 1]
    final = origin[size - 1] // lanes
    for group in range(whole // lanes):
        first = origin[group * lanes] // lanes
        behind = origin[(group + 1) * lanes - 1] // lanes - first
        m.reach[group] = SCATTERED if behind > 2 or not able else FAR if behind == 2 else NEAR
        for k in range(SOURCES):
            m.group[group * SOURCES + k] = min(first + k, final)
            m.start[group * SOURCES + k] = at(0, min(first + k, final) * lanes)
        for i in range(group * lanes, (group + 1) * lanes):
            m.relative[np.uint64(i)] = origin[np.uint64(i)] - first * lanes


@_jit
def move_panel(panel: Array, depth: int, steps: int, size: int, origin: IntArray, m: Moves, lanes: int) -> None:
    """The panel's ``depth`` columns at the positions that stay."""
    for group in range((size + lanes - 1) // lanes):
        target, far = panel_at(group * lanes, 0, steps), m.reach[group] == FAR
        low = panel_at(m.group[group * SOURCES] * lanes, 0, steps)
        high = panel_at(m.group[group * SOURCES + 1] * lanes, 0, steps)
        third = panel_at(m.group[group * SOURCES + 2] * lanes, 0, steps)
        if m.reach[group] == SCATTERED:
            for i in range(group * lanes, (group + 1) * lanes):
                for step in range(depth):
                    panel[panel_at(i, step, steps)] = panel[panel_at(origin[i], step, steps)]
        else:
            for step in range(0, depth * CHUNK, CHUNK):
                move_run(panel, target + step, low + step, high + step, third + step, m.relative, group * lanes, far)


@_jit
def move_and_flush(
    source: Array, target: Array, size: int, origin: IntArray, m: Moves, panel: Array, depth: int, steps: int, tile: int
) -> None:
    """``target[i, j] = (source - V Vᵀ)[origin[i], origin[j]]`` for ``i <= j < size``; ``V`` has moved already.

    ``target`` may be ``source``: origins ascend and no position lies before its origin, so that what is written has
    been read. The padding up to whole tiles is written too.
    """
    lanes = tile // FLUSH_VECTORS
    for first in range(0, size, WIDTH):
        for column in range(first, size, tile):
            start, right, group = at(0, column), panel_at(column, 0, steps), column // lanes
            reach = max(m.reach[group], m.reach[group + 1])
            for row in range(first, min(column + tile, first + WIDTH), FLUSH_ROWS):
                left = panel_at(row, 0, steps)
                _moving_tile(
                    target,
                    start + row * WIDTH,
                    source,
                    origin,
                    m.relative,
                    m.start,
                    reach,
                    row,
                    column,
                    panel,
                    left,
                    CHUNK,
                    panel,
                    right,
                    CHUNK,
                    depth,
                )


@_jit
def invert_(packed: Array, size: int, panel: Array, steps: int, flush_width: int, panel_width: int) -> int:
    """Replace a packed positive definite matrix of unit diagonal by *minus* its inverse (Gauss-Jordan, in panels).

    Pivot ``p`` turns ``a_pp`` into ``-1/a_pp``, its column into ``a_ip/a_pp`` and the rest into
    ``a_ij - a_ip a_pj/a_pp``. Putting ``√a_pp - 1/√a_pp`` at ``p`` of the scaled pivot column makes one symmetric
    rank-1 update do all of it, but for ``a_pp``, which ends 2 too high.

    Returns:
        0, or 1 + the first pivot that is not positive.
    """
    for first in range(0, size, steps):
        depth = min(steps, size - first)
        for step in range(depth):
            pivot = first + step
            gather(packed, size, pivot, panel, step, steps)
            for chunk in range((size + CHUNK - 1) // CHUNK):
                correct(panel, chunk, pivot, 0, step, step, steps, panel_width)
            here = panel_at(pivot, step, steps)
            if not panel[here] > 0:
                return 1 + pivot
            root = np.sqrt(panel[here])
            for row in range(size):
                panel[panel_at(row, step, steps)] /= root
            panel[here] = root - 1 / root
        flush(packed, packed, size, panel, depth, steps, flush_width)
        for pivot in range(first, first + depth):
            packed[at(pivot, pivot)] -= 2
    return 0
