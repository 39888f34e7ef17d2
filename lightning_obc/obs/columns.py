"""Elimination in a fixed column order: GPTQ, SparseGPT, and a second start for refinement.

Index legend: ``g`` problems, ``R`` rows, ``d`` columns. With one order for all rows the rows share every ``G``, and the
pivot columns of the whole elimination are the rows of one upper Cholesky factor: ``G = UᵀU`` (GPTQ, arXiv 2210.17323,
section 3; SparseGPT, arXiv 2301.00774, section 3). Fixing column ``j`` at ``q`` gives ``z = (w_j - q) / U_jj``, costs
``z²/2`` and moves the later columns by ``-z U_j``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_obc.errors import NotPositiveDefiniteError
from lightning_obc.grids import Grid
from lightning_obc.kernels.column_elimination import Targets, fix_columns
from lightning_obc.obs.problem import Problem

Unit = tuple[int, int]


class ColumnRule(Protocol):
    """Decides the values at which columns are fixed. ``weight`` is ``[g, d, R]``, current up to the block's end.

    Attributes:
        targets: Where columns are fixed. Its mask is filled by the two methods.
        by_unit: Whether :meth:`begin_unit` chooses anything; otherwise a block is fixed in one go.
    """

    @property
    def targets(self) -> Targets: ...

    @property
    def by_unit(self) -> bool: ...

    def begin_block(self, units: Sequence[Unit], weight: Tensor) -> None: ...

    def begin_unit(self, unit: Unit, weight: Tensor) -> None: ...


@dataclass(frozen=True)
class ColumnOrder:
    """Columns of every problem in the order of their elimination.

    Attributes:
        columns: ``[g, d]`` int64, the column at each position.
        units: Runs of positions that a pattern ties together, in order; they cover all positions.
    """

    columns: Tensor
    units: list[Unit]

    def take(self, tensor: Tensor) -> Tensor:
        """``[g, R, d]`` with its columns in this order."""
        return tensor.gather(-1, self.columns[:, None, :].expand(tensor.shape))

    def restore(self, tensor: Tensor) -> Tensor:
        """Inverse of :meth:`take`."""
        return torch.empty_like(tensor).scatter_(-1, self.columns[:, None, :].expand(tensor.shape), tensor)


class GridRule:
    """Fixes every column at its nearest grid point, and at 0 where ``keep`` is False.

    Args:
        grid: The fitted grid, in the original order of the columns.
        order: The order of elimination.
        keep: ``[g, R, d]`` bool in the original order, or None.
    """

    def __init__(self, grid: Grid, order: ColumnOrder, keep: Tensor | None) -> None:
        columns = order.columns.shape[1]

        def ordered(tensor: Tensor) -> Tensor:
            return order.take(tensor).mT.contiguous()

        self.targets = Targets(
            ordered(grid.expand(grid.scale, columns)),
            ordered(grid.expand(grid.zero_point, columns)),
            grid.max_code,
            None if keep is None else ordered(keep),
        )
        self.by_unit = False

    def begin_block(self, units: Sequence[Unit], weight: Tensor) -> None:
        """Nothing to choose."""

    def begin_unit(self, unit: Unit, weight: Tensor) -> None:
        """Nothing to choose."""


def column_order(problem: Problem, units: list[Unit], act_order: bool) -> ColumnOrder:
    """Ascending columns, or units by descending mean of their ``diag H`` (activation order); units stay together.

    Units of unequal length keep the ascending order among lengths: the long ones come first.
    """
    groups, columns = problem.hessian.shape[:2]
    device = problem.hessian.device
    ascending = torch.arange(columns, device=device).expand(groups, columns)
    if not act_order:
        return ColumnOrder(ascending, units)
    parts: list[Tensor] = []
    runs: list[Unit] = []
    diagonal = problem.hessian.diagonal(dim1=-2, dim2=-1)
    for length in sorted({stop - start for start, stop in units}, reverse=True):
        starts = torch.tensor([start for start, stop in units if stop - start == length], device=device)
        members = starts[:, None] + torch.arange(length, device=device)
        ranks = torch.sort(diagonal[:, members].mean(-1), dim=1, descending=True, stable=True).indices
        parts.append(members[ranks].reshape(groups, -1))
        base = runs[-1][1] if runs else 0
        runs += [(base + length * i, base + length * (i + 1)) for i in range(len(starts))]
    return ColumnOrder(torch.cat(parts, 1), runs)


def eliminate(factor: Tensor, start: Tensor, order: ColumnOrder, rule: ColumnRule, block: int) -> tuple[Tensor, Tensor]:
    """Fix all columns in order, block by block, later blocks updated lazily by one matrix product.

    Args:
        factor: ``[g, d, d]``, ``U`` of :func:`upper_factor` for this order.
        start: ``[g, R, d]`` weights to start from, dtype of ``factor``.
        order: The order.
        rule: Where the columns are fixed.
        block: Columns per lazy update; a block ends with a unit.

    Returns:
        ``[g, R, d]``, the values at which the columns were fixed, in the original order of the columns; and ``[d]``
        float64, the damped loss that each step added over all problems and rows, in the order of the steps.
    """
    losses = []
    weight = order.take(start).mT.contiguous()
    for units in _blocks(order.units, block):
        first, last = units[0][0], units[-1][1]
        rule.begin_block(units, weight)
        errors = torch.empty_like(weight[:, first:last])
        for unit in units if rule.by_unit else [(first, last)]:
            rule.begin_unit(unit, weight)
            fix_columns(weight, errors, factor, rule.targets, first, unit, last)
        weight[:, last:] -= factor[:, first:last, last:].mT @ errors
        losses.append(errors.double().square().sum((0, 2)) / 2)
    return order.restore(weight.mT.contiguous()), torch.cat(losses)


def upper_factor(problem: Problem, order: ColumnOrder) -> Tensor:
    """``U`` of ``G = UᵀU`` with rows and columns of ``G`` in the given order.

    Returns:
        ``[g, d, d]``, factored in float64, in the precision of ``problem.weight``.

    Raises:
        NotPositiveDefiniteError: The inverse Hessian cannot be factored.
    """
    columns = order.columns
    which = torch.arange(len(columns), device=columns.device)[:, None, None]
    factor, info = torch.linalg.cholesky_ex(problem.inverse[which, columns[:, :, None], columns[:, None, :]])
    if bool(torch.any(info > 0)):
        raise NotPositiveDefiniteError(
            "The inverse Hessian cannot be factored",
            got=f"{int((info > 0).sum())} of {len(info)} problems fail",
            expected="a positive definite inverse",
            remedy="raise damping",
        )
    return factor.mT.to(problem.weight.dtype).contiguous()


def _blocks(units: Sequence[Unit], block: int) -> list[list[Unit]]:
    """Consecutive units in blocks of at most ``block`` positions (one unit at least)."""
    blocks: list[list[Unit]] = []
    for unit in units:
        if blocks and unit[1] - blocks[-1][0][0] <= block:
            blocks[-1].append(unit)
        else:
            blocks.append([unit])
    return blocks
