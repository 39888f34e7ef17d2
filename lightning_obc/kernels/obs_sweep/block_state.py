"""What the compiled block sweep of a row works on, and how blocks are laid out (numba).

Positions go member after member: the first columns of all blocks, then all second ones, each over the *room* of all
places, so that what is done to every block runs over whole vectors, and blocks that close a gap keep the order of their
positions. Blocks come in *teams* of ``LANES`` places; entry ``(i, j)``, ``j <= i``, of the diagonal blocks is stored
team after team.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from lightning_obc.kernels.obs_sweep.jit import STRICT
from lightning_obc.kernels.obs_sweep.lanes import LANES
from lightning_obc.kernels.obs_sweep.packed import Array, IntArray, Moves

_inline = numba.njit(inline="always", **STRICT)


class BlockProblem(NamedTuple):
    """Inputs, read only. ``P = g·R`` rows; ``n`` blocks; ``M`` positions of all teams."""

    weight: Array  # [P, d]
    packed: Array  # [g, packed_size(M)], G by position; the identity where there is no column
    hessian: Array  # [g, d, d] float64, damped
    zeros: NDArray[np.bool_]  # [P, d] or without rows
    members: IntArray  # [n, c], -1 where a block is short
    position: IntArray  # [d], where every column starts


class BlockResult(NamedTuple):
    """Outputs, see :class:`~lightning_obc.kernels.obs_sweep.types.SweepOutput`."""

    order: IntArray
    losses: Array
    steps: IntArray
    broken: NDArray[np.bool_]


class BlockScratch(NamedTuple):
    """Working memory of one thread."""

    packed: Array
    panel: Array
    packed64: Array
    panel64: Array
    weight: Array  # by position
    alive: Array  # by position: 1, or 0 once a column has left or where there is none
    reference: Array  # by position: conditional pivot at the start, or at the last restart
    diagonal: Array  # by team, entry and lane
    lower: Array  # one team's Cholesky factors
    solved: Array  # one team's L⁻¹ w
    score: Array  # by block
    penalty: Array  # by block: 0, or ``big`` once it has left
    best: Array  # by team
    right: Array  # by position, float64
    unit: Array  # by position, float64
    moved: Array  # by column, float64: the weight of a column that is fixed
    column: IntArray  # by position, -1 where there is none
    block: IntArray  # the block at a place, -1 where there is none
    place: IntArray  # by place: where a block that stays was
    pivots: IntArray  # positions of a block's columns
    left: Array  # the panel at these positions
    origin: IntArray  # by position: where one that stays was
    moves: Moves
    zeros: IntArray  # columns eliminated without a choice
    fixed: NDArray[np.bool_]  # by column
    gone: NDArray[np.bool_]  # by block


class BlockOptions(NamedTuple):
    """Scalars in the dtype of the sweep, so that nothing is promoted."""

    rows: int  # rows per problem
    size: int  # c
    big: Any
    zero: Any
    half: Any
    one: Any
    worn: Any  # reference / pivot that asks for a restart
    steps: int  # columns of a panel of a wide working set
    narrow_steps: int
    narrow: int
    flush_width: int
    panel_width: int
    block_width: int  # columns of a tile of a block's pivot columns
    flush_width64: int
    panel_width64: int


@_inline
def room(places: int) -> int:
    """Places rounded up to whole teams."""
    return (places + LANES - 1) // LANES * LANES


@_inline
def entry(team: int, i: int, j: int, size: int) -> int:
    """Where entry ``(i, j)``, ``j <= i``, of a team's diagonal blocks starts."""
    return (team * (size * (size + 1) // 2) + i * (i + 1) // 2 + j) * LANES
