"""The contract of every sweep backend.

Index legend (used in all files of this folder):

======  =====================================================================================
``g``   problems of one layer (groups of a convolution); each has its own ``H``
``R``   rows (output channels) of one problem
``d``   columns (inputs) of one problem
``T``   elimination steps recorded, ``T <= d``
======  =====================================================================================

A sweep fixes one weight of every row at a time: at 0 when pruning, at its nearest grid point when quantizing. Fixing
``p`` at ``q`` costs ``z²/2`` with ``z = (w_p - q)/√G_pp``, moves the others by ``w -= z v`` with ``v = G[:, p]/√G_pp``,
and leaves ``G -= v vᵀ`` (paper, equations 3, 4 and lemma 1). All backends see ``G``, the inverse of the damped Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A clipped weight is an outlier when its error exceeds half a step by more than this, relative. Symmetric min-max grids
# put the largest positive weight exactly half a step outside, where rounding must not decide.
OUTLIER_TOLERANCE = 1e-5

# A float32 sweep restarts a row from float64 before it takes a pivot that has shrunk by this factor since the row's
# last float64 start: one and a half of its seven digits are gone then. Where pivots collapse (fewer samples than
# columns) a few steps do it, so the check cannot wait for the end of a panel.
WORN_FLOAT32 = 30.0

# A row also starts anew from float64 once so many times fewer columns (or blocks) are free than at its last start: what
# rounding has left in ``G`` meets the last columns most, whose losses are the dearest.
REFRESH = 16


@dataclass(frozen=True)
class SweepInput:
    """One layer's elimination problem.

    Attributes:
        weight: ``[g, R, d]`` float32 or float64, the precision of the sweep.
        inverse: ``[g, d, d]`` same dtype: ``G``, symmetric, from a float64 factorisation, shared by a problem's rows.
        hessian: ``[g, d, d]`` float64: the *damped* ``H``, for refreshes in mid-sweep (``G_UU = H_UU⁻¹``).
        keep: ``[g, R, d]`` bool or None. Where False the weight is already zero: those columns are eliminated
            before anything else, at the target 0, in ascending column order, and stay zero.
    """

    weight: Tensor
    inverse: Tensor
    hessian: Tensor
    keep: Tensor | None = None


@dataclass(frozen=True)
class NMGroups:
    """Groups of columns in which only so many weights may be fixed at zero.

    Attributes:
        column_group: ``[d]`` int64, group of every column.
        quota: ``[G]`` int64, zeros to make in every group; zeros of ``keep`` count. A group closes when it has them:
            its other columns leave the candidates but stay free to move.
    """

    column_group: Tensor
    quota: Tensor


@dataclass(frozen=True)
class GridInput:
    """Grid of a quantization sweep, already spread over the columns.

    Attributes:
        scale: ``[g, R, d]`` dtype of the weight.
        zero_point: ``[g, R, d]`` dtype of the weight, integer valued.
        max_code: Largest code.
    """

    scale: Tensor
    zero_point: Tensor
    max_code: int


@dataclass(frozen=True)
class SweepPlan:
    """A checked problem, as every backend receives it.

    Attributes:
        problem: Contiguous or not; shapes, dtypes and devices belong together, all values finite.
        groups: Of an N:M sweep, otherwise None.
        grid: Of a quantization sweep, otherwise None.
        steps: ``T``: the most steps a row can make.
        memory_budget: Bytes of working memory above inputs and outputs. One row at a time is always allowed.
    """

    problem: SweepInput
    groups: NMGroups | None
    grid: GridInput | None
    steps: int
    memory_budget: int


def cheaper_to_invert(columns: int, zeros: int) -> bool:
    """Whether to start from the inverse of ``H`` on the kept columns rather than eliminate the zeros one by one.

    In float32 flop of the symmetric half: inverting ``k`` columns in float64 counts ``2k³``, eliminating the others
    ``(d³ - k³)/3``.
    """
    return zeros > 0 and 7 * (columns - zeros) ** 3 < columns**3


@dataclass(frozen=True)
class SweepOutput:
    """Elimination order and losses; no intermediate weights.

    Attributes:
        order: ``[g, R, T]`` int32, column (or block) eliminated at each step; -1 after a row has ended.
        losses: ``[g, R, T]`` dtype of the weight, ``z²/2`` of each step (0 after a row has ended).
        count: ``[g, R]`` int32, steps each row made.
        broken: ``[g, R]`` bool, True where a pivot was not finite or not positive and the row stopped.
        codes: ``[g, R, d]`` uint8 of a quantization sweep, else None. Columns of ``keep=False`` carry the zero point.
    """

    order: Tensor
    losses: Tensor
    count: Tensor
    broken: Tensor
    codes: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The fields that there are, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def any_broken(self) -> bool:
        return bool(torch.any(self.broken))
