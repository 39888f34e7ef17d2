"""Round-to-nearest quantization of one layer: every weight goes to its nearest grid point, nothing compensates."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_obc.grid_fitting import fit_grid, refit_scale
from lightning_obc.grids import Grid
from lightning_obc.obs.damping import with_damping
from lightning_obc.obs.problem import HessianLike, Problem, check_channels, prepare
from lightning_obc.obs.quantize import check_mask, rows_of_mask
from lightning_obc.obs.solution import LayerSolution
from lightning_obc.specs import IntGrid, parse_grid


def round_to_nearest(
    weight: Tensor,
    hessian: HessianLike,
    grid: IntGrid | int,
    *,
    mask: Tensor | None = None,
    channels: int | None = None,
    damping: float | str = 0.01,
) -> LayerSolution:
    """Round every weight to the nearest point of its fitted grid.

    Args:
        weight: ``[R, d]`` or ``[g, R, d]``.
        hessian: Undamped ``[d, d]``, ``[g, d, d]``, or the two-half statistic; measures the error, and fits the scale
            of ``scale="hessian"`` grids.
        grid: Bit width or grid.
        mask: Same shape as ``weight``, True = kept; the rest becomes exactly ``+0.0``.
        channels: Input channels per kernel position.
        damping: Only enters ``damping_loss`` and the fit of ``scale="hessian"``; ``"auto"`` adds the held-out error.

    Raises:
        PatternError, ShapeError, NonFiniteError, NotPositiveDefiniteError: See :func:`lightning_obc.obs.quantize`.
    """
    spec = parse_grid(grid)
    channels = check_channels(weight.shape[-1], channels)
    check_mask(mask, weight)

    def solve(rows: Tensor, half: HessianLike, damping: float) -> LayerSolution:
        problem = prepare(rows, half, damping)
        keep = rows_of_mask(mask, weight, rows)
        start = problem.weight if keep is None else problem.weight * keep
        fitted = fit_grid(start, spec, channels=channels, hessian=problem.damped)
        codes = zero_codes(fitted, fitted.encode(start), keep)
        return quantized_solution(problem, fitted, codes, keep, "rtn")

    return with_damping(weight, hessian, damping, solve)


def zero_codes(grid: Grid, codes: Tensor, keep: Tensor | None) -> Tensor:
    """``codes [g, R, d]`` with the zero point wherever ``keep`` is False."""
    if keep is None:
        return codes
    return torch.where(keep, codes, grid.expand(grid.zero_point, codes.shape[-1]).to(torch.uint8))


def quantized_solution(problem: Problem, grid: Grid, codes: Tensor, keep: Tensor | None, solver: str) -> LayerSolution:
    """The solution of final codes ``[g, R, d]``; ``scale="hessian"`` refits the scale to them by least squares."""
    if grid.spec.scale == "hessian":
        grid = refit_scale(grid, codes, problem.original_batched(), problem.damped)
    weight = grid.dequantize(codes)
    mask = torch.ones_like(codes, dtype=torch.bool) if keep is None else keep
    return problem.solution(weight, mask, problem.status(solver), grid=grid, codes=problem.shaped(codes))
