"""Cyclic coordinate descent on the codes of a quantized layer, alternated with a least-squares refit of its scales.

Index legend: ``g`` problems, ``R`` rows, ``d`` columns. For one row ``q`` of grid values, ``s = H (q - w)`` is the
gradient of ``½ (q - w) H (q - w)ᵀ``. Alone, column ``j`` would go to ``q_j - s_j / H_jj``; the best grid point is
the one nearest to that. All rows take the step of a column together; columns go in blocks, so that the gradient of
the others is updated by one matrix product per block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_obc.grid_fitting import refit_scale
from lightning_obc.grids import Grid
from lightning_obc.obs.problem import row_losses
from lightning_obc.obs.refine.judge import Deadline

BLOCK = 64


@dataclass(frozen=True)
class CodesState:
    """Codes ``[g, R, d]`` uint8 and their grid after ``depth`` sweeps."""

    depth: int
    grid: Grid
    codes: Tensor

    @property
    def weight(self) -> Tensor:
        return self.grid.dequantize(self.codes)


def descend(
    dense: Tensor,
    hessian: Tensor,
    grid: Grid,
    codes: Tensor,
    *,
    keep: Tensor | None = None,
    sweeps: int = 10,
    depth: Tensor | None = None,
    deadline: Deadline | None = None,
) -> Iterator[CodesState]:
    """The path of coordinate descent; the damped loss of a row (per tensor: of the layer) never rises along it.

    Args:
        dense: ``[g, R, d]`` target weights.
        hessian: ``[g, d, d]`` float64, damped.
        grid: Grid to start from.
        codes: ``[g, R, d]`` uint8 to start from.
        keep: ``[g, R, d]`` bool; where False the code stays on the zero point.
        sweeps: Passes over the columns, at most.
        depth: ``[g, R]``; row ``r`` takes only so many sweeps.
        deadline: No sweep starts after it.

    Yields:
        The start (depth 0) and the state after each sweep and its scale refit, until nothing changes.
    """
    deadline = deadline or Deadline(None)
    yield CodesState(0, grid, codes)
    active = torch.ones(dense.shape[:2], dtype=torch.bool, device=dense.device)
    for sweep in range(1, sweeps + 1):
        if depth is not None:
            active = depth >= sweep
        if not bool(active.any()) or deadline.passed():
            return
        free = active[..., None].expand(dense.shape)
        moved = _sweep(dense, hessian, grid, codes, free if keep is None else free & keep)
        refitted = _refit_rows(grid, moved, dense, hessian, active)
        if torch.equal(moved, codes) and torch.equal(refitted.scale, grid.scale):
            return
        grid, codes = refitted, moved
        yield CodesState(sweep, grid, codes)


def better_of(one: CodesState, two: CodesState, dense: Tensor, hessian: Tensor, allowed: Tensor) -> CodesState:
    """Of every row (per tensor: of the layer) the state of lower damped loss, ``two`` only where ``allowed [g, R]``.

    Both have the zero points of one grid. The depth is one more than that of ``one``.
    """
    losses = [row_losses(state.weight.double() - dense.double(), hessian) for state in (one, two)]
    better = losses[1] < losses[0]
    if one.grid.spec.granularity == "tensor":
        better = (losses[1].sum() < losses[0].sum()).expand_as(better) & allowed.all()
    chosen = (better & allowed)[..., None]
    scale = torch.where(chosen, two.grid.scale, one.grid.scale)
    codes = torch.where(chosen, two.codes, one.codes)
    return CodesState(one.depth + 1, replace(one.grid, scale=scale), codes)


def _refit_rows(grid: Grid, codes: Tensor, dense: Tensor, hessian: Tensor, active: Tensor) -> Grid:
    """Least-squares scales of the active rows; the others keep theirs."""
    fitted = refit_scale(grid, codes, dense, hessian)
    return Grid(grid.spec, torch.where(active[..., None], fitted.scale, grid.scale), grid.zero_point, grid.column_group)


def _sweep(dense: Tensor, hessian: Tensor, grid: Grid, codes: Tensor, free: Tensor) -> Tensor:
    """New codes after one pass over all columns."""
    columns = dense.shape[-1]
    scale, zero, allowed = (
        _columns_first(part)
        for part in (grid.expand(grid.scale, columns).double(), grid.expand(grid.zero_point, columns).double(), free)
    )
    current = _columns_first(codes.double())
    value = (current - zero) * scale
    gradient = hessian @ (value - _columns_first(dense.double()))
    for start in range(0, columns, BLOCK):
        inside = slice(start, min(start + BLOCK, columns))
        before = value[:, inside].clone()
        local = _Local(gradient[:, inside].clone(), hessian[:, inside, inside], value[:, inside], current[:, inside])
        for column in range(before.shape[1]):
            local.step_(column, scale[:, start + column], zero[:, start + column], allowed[:, start + column], grid)
        gradient += hessian[:, :, inside] @ (value[:, inside] - before)
    return current.mT.to(torch.uint8).contiguous()


def _columns_first(tensor: Tensor) -> Tensor:
    """``[g, R, d]`` as contiguous ``[g, d, R]``: a column's rows lie side by side."""
    return tensor.mT.contiguous()


@dataclass(frozen=True)
class _Local:
    """One block of columns: gradient, Hessian block, values and codes; the last two are views and change in place."""

    gradient: Tensor
    hessian: Tensor
    value: Tensor
    codes: Tensor

    def step_(self, column: int, scale: Tensor, zero: Tensor, allowed: Tensor, grid: Grid) -> None:
        """Move one column of all rows to its best grid point where that lowers the loss."""
        value, slope = self.value[:, column], self.gradient[:, column]
        curvature = self.hessian[:, column, column, None]
        codes = torch.clamp(torch.round((value - slope / curvature) / scale) + zero, 0, grid.max_code)
        target = (codes - zero) * scale
        change = target - value
        better = allowed & (change * (slope + 0.5 * curvature * change) < 0)
        change = torch.where(better, change, 0.0)
        self.gradient.add_(self.hessian[:, :, column, None] * change[:, None])
        self.codes[:, column] = torch.where(better, codes, self.codes[:, column])
        self.value[:, column] = torch.where(better, target, value)
