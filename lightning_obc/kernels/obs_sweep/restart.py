"""A row starts from the float64 inverse of ``H`` on its free columns: where float32 has lost its digits (numba)."""

from __future__ import annotations

import numba
import numpy as np

from lightning_obc.kernels.obs_sweep.jit import STRICT
from lightning_obc.kernels.obs_sweep.packed import Array, at, invert_
from lightning_obc.kernels.obs_sweep.state import Options, Problem, Scratch

_jit = numba.njit(**STRICT)


@_jit
def along(moved: Array, line: Array) -> float:
    """What weights that moved are worth to a column with this line of ``H``; whole lines, which memory is quick at."""
    total = 0.0
    for column in range(len(line)):
        total += moved[column] * line[column]
    return total


@_jit
def restart(row: int, close: bool, p: Problem, s: Scratch, o: Options) -> int:
    """``G`` and the weights of the working set from the float64 inverse of ``H`` on the free columns.

    With ``F`` the fixed columns at their targets ``q``: ``w_U = w₀_U + H_UU⁻¹ H_UF (w₀_F - q_F)``.
    Returns the size of the working set, or -1 when ``H_UU`` is not positive definite.
    """
    size, count = _list_free(close, p, s)
    hessian = p.hessian[row // o.rows]
    for i in range(count):
        s.unit[i] = 1 / np.sqrt(hessian[s.free[i], s.free[i]])
    for j in range(count):
        line = hessian[s.free[j]]
        for i in range(j + 1):
            s.packed64[at(i, j)] = line[s.free[i]] * s.unit[i] * s.unit[j]
    if invert_(s.packed64, count, s.panel64, o.narrow_steps, o.flush_width64, o.panel_width64) > 0:
        return -1
    moves = False
    for column in range(p.weight.shape[1]):
        s.moved[column] = np.float64(p.weight[row, column]) - s.target[column] if s.fixed[column] else 0.0
        moves |= s.moved[column] != 0
    for i in range(count):
        s.right[i] = along(s.moved, hessian[s.free[i]]) * s.unit[i] if moves else 0.0
    for i in range(size):
        total = 0.0
        for j in range(count):
            total -= s.packed64[at(min(i, j), max(i, j))] * s.right[j]
        s.column[i] = s.free[i]
        s.weight[i] = p.weight[row, s.free[i]] + total * s.unit[i]
    for j in range(size):
        for i in range(j + 1):
            s.packed[at(i, j)] = -s.packed64[at(i, j)] * s.unit[i] * s.unit[j]
    place(row, size, p, s, o)
    return size


@_jit
def _list_free(close: bool, p: Problem, s: Scratch) -> tuple[int, int]:
    """Free columns, those of the working set first. Returns how many there are in the working set, and in all."""
    size, count = 0, 0
    for kind in range(2):
        for column in range(p.weight.shape[1]):
            closed = close and p.group.shape[0] > 0 and s.made[p.group[column]] >= p.quota[p.group[column]]
            if not s.fixed[column] and closed == (kind == 1):
                s.free[count] = column
                count += 1
        if kind == 0:
            size = count
    return size, count


@_jit
def place(row: int, size: int, p: Problem, s: Scratch, o: Options) -> None:
    """Fill what depends on which columns sit at the first ``size`` positions."""
    s.position[:] = -1
    for i in range(size):
        column = s.column[i]
        s.position[column] = i
        if o.quantize:
            s.scale[i] = p.scale[row, column]
            s.inverse_scale[i] = o.one / s.scale[i]
            s.zero_point[i] = p.zero_point[row, column]
