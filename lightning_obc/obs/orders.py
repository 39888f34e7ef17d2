"""Orders in which the weights of a row go to their grid points, and the better of several for every row.

The paper's greedy order fixes the cheapest weight of a row first, so that the costly ones come last, when few free
weights are left to make up for them. A fixed order of columns (GPTQ, arXiv 2210.17323) looks at no weight at all, but
with the columns of largest ``H_jj`` first it fixes what matters while everything can still move. Which one loses less
differs from row to row, and beside a sweep a fixed order costs next to nothing: all rows share one factor.

Index legend: ``g`` problems, ``R`` rows, ``d`` columns.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_obc.grid_fitting import refit_scale
from lightning_obc.grids import Grid
from lightning_obc.obs.columns import ColumnOrder, GridRule, column_order, eliminate, upper_factor
from lightning_obc.obs.curves import Curve, column_curve
from lightning_obc.obs.problem import Problem, row_losses

LAZY = 128


def column_order_codes(problem: Problem, grid: Grid, keep: Tensor | None, *, act_order: bool) -> tuple[Tensor, Curve]:
    """Codes ``[g, R, d]`` by elimination of the columns in one order for all rows, and the losses of its steps.

    Args:
        problem: The prepared problem.
        grid: The fitted grid.
        keep: ``[g, R, d]`` bool, False where the weight is fixed at 0 when its column comes; or None.
        act_order: Columns by descending ``diag H`` (activation order), otherwise ascending.

    Raises:
        NotPositiveDefiniteError: The inverse Hessian cannot be factored.
    """
    columns = problem.weight.shape[-1]
    order = column_order(problem, [(column, column + 1) for column in range(columns)], act_order)
    rule = GridRule(grid, order, keep)
    fixed, losses = eliminate(upper_factor(problem, order), problem.weight, order, rule, LAZY)
    codes, curve = grid.encode(fixed), rounding_curve(losses, order, problem.weight, keep)
    if keep is not None:
        codes = torch.where(keep, codes, grid.expand(grid.zero_point, columns).to(torch.uint8))
    return codes, curve


def rounding_curve(losses: Tensor, order: ColumnOrder, weight: Tensor, keep: Tensor | None) -> Curve:
    """Losses ``[d]`` of the steps over the share of kept weights of ``[g, R, d]`` that are rounded."""
    kept = torch.ones_like(weight, dtype=torch.bool) if keep is None else keep
    made = order.take(kept).sum((0, 1))
    return column_curve(losses, made, int(made.sum()))


def ranked_by_row(problem: Problem, grid: Grid, candidates: list[Tensor]) -> tuple[Grid, list[Tensor]]:
    """Candidate codes sorted row by row, least damped loss first; ties keep the order of the list.

    With ``scale="hessian"`` every candidate is judged with scales refitted to it. Where that couples the rows (one
    scale per tensor), whole candidates are sorted.

    Args:
        problem: The prepared problem.
        grid: The grid that all candidates were rounded to.
        candidates: ``[g, R, d]`` uint8 each.

    Returns:
        The grid of the best codes, and the sorted codes.
    """
    dense = problem.original_batched()
    refits = grid.spec.scale == "hessian"
    grids = [refit_scale(grid, codes, dense, problem.damped) if refits else grid for codes in candidates]
    if len(candidates) == 1:
        return grids[0], candidates
    losses = torch.stack(
        [
            row_losses(fitted.dequantize(codes).double() - dense.double(), problem.damped)
            for fitted, codes in zip(grids, candidates, strict=True)
        ]
    )
    if refits and grid.spec.granularity == "tensor":
        losses = losses.sum((1, 2), keepdim=True).expand_as(losses)
    ranks = torch.sort(losses, dim=0, stable=True).indices[..., None]
    codes = torch.stack(candidates)
    codes = codes.gather(0, ranks.expand_as(codes))
    scales = torch.stack([fitted.scale for fitted in grids])
    scale = scales.gather(0, ranks[:1].expand_as(scales[:1]))[0]
    return replace(grid, scale=scale), list(codes)
