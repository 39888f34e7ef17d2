"""A row of the block sweep starts from the float64 inverse of ``H`` on its free columns (numba)."""

from __future__ import annotations

import numba
import numpy as np

from lightning_obc.kernels.obs_sweep.block_state import BlockOptions, BlockProblem, BlockScratch, room
from lightning_obc.kernels.obs_sweep.jit import STRICT
from lightning_obc.kernels.obs_sweep.packed import at, invert_
from lightning_obc.kernels.obs_sweep.restart import along

_jit = numba.njit(**STRICT)


@_jit
def restart(row: int, p: BlockProblem, s: BlockScratch, o: BlockOptions) -> int:
    """``G`` and the weights of the blocks that are left: ``w_U = w₀_U + H_UU⁻¹ H_UF w₀_F``, ``F`` the fixed columns.

    Returns how many blocks there are, or -1 when ``H_UU`` is not positive definite.
    """
    places = _place(p, s, o)
    size = room(places) * o.size
    hessian = p.hessian[row // o.rows]
    for i in range(size):
        column = s.column[i]
        s.unit[i] = 1 / np.sqrt(hessian[column, column]) if column >= 0 else 1
    for j in range(size):
        for i in range(j):
            both = s.column[i] >= 0 and s.column[j] >= 0
            s.packed64[at(i, j)] = hessian[s.column[j], s.column[i]] * s.unit[i] * s.unit[j] if both else 0
        s.packed64[at(j, j)] = 1
    if invert_(s.packed64, size, s.panel64, o.narrow_steps, o.flush_width64, o.panel_width64) > 0:
        return -1
    moves = False
    for column in range(p.weight.shape[1]):
        s.moved[column] = np.float64(p.weight[row, column]) if s.fixed[column] else 0.0
        moves |= s.moved[column] != 0
    for i in range(size):
        column = s.column[i]
        s.right[i] = along(s.moved, hessian[column]) * s.unit[i] if moves and column >= 0 else 0.0
    for i in range(size):
        s.weight[i] = 0
        if s.column[i] >= 0:
            total = 0.0
            for j in range(size):
                total -= s.packed64[at(min(i, j), max(i, j))] * s.right[j]
            s.weight[i] = p.weight[row, s.column[i]] + total * s.unit[i]
    for j in range(size):
        for i in range(j + 1):
            s.packed[at(i, j)] = -s.packed64[at(i, j)] * s.unit[i] * s.unit[j]
    return places


@_jit
def _place(p: BlockProblem, s: BlockScratch, o: BlockOptions) -> int:
    """The blocks that are left, in order; columns that are fixed leave holes."""
    places = 0
    for block in range(p.members.shape[0]):
        if not s.gone[block]:
            s.block[places], s.penalty[places] = block, o.zero
            places += 1
    for place in range(places, room(places)):
        s.block[place], s.penalty[place] = -1, o.big
    for place in range(room(places)):
        for member in range(o.size):
            i = member * room(places) + place
            column = p.members[s.block[place], member] if place < places else -1
            free = column >= 0 and not s.fixed[column]
            s.column[i], s.alive[i] = column if free else -1, o.one if free else o.zero
    return places
