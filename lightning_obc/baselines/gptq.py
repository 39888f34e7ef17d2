"""GPTQ (Frantar et al., arXiv 2210.17323): quantization in one fixed column order for all rows."""

from __future__ import annotations

from torch import Tensor

from lightning_obc.baselines.rounding import quantized_solution, zero_codes
from lightning_obc.baselines.units import units_of
from lightning_obc.grid_fitting import fit_grid
from lightning_obc.obs.columns import GridRule, column_order, eliminate, upper_factor
from lightning_obc.obs.curves import with_curve
from lightning_obc.obs.damping import with_damping
from lightning_obc.obs.orders import rounding_curve
from lightning_obc.obs.problem import HessianLike, check_channels, prepare
from lightning_obc.obs.quantize import check_mask, rows_of_mask
from lightning_obc.obs.solution import LayerSolution
from lightning_obc.specs import IntGrid, parse_grid


def gptq(
    weight: Tensor,
    hessian: HessianLike,
    grid: IntGrid | int,
    *,
    mask: Tensor | None = None,
    channels: int | None = None,
    damping: float | str = 0.01,
    act_order: bool = False,
    block: int = 128,
) -> LayerSolution:
    """Round column after column, the later columns compensating.

    Args:
        weight: ``[R, d]`` or ``[g, R, d]``.
        hessian: Undamped ``[d, d]``, ``[g, d, d]``, or the two-half statistic.
        grid: Bit width or grid; its scales are fitted to ``weight`` first, as in :func:`lightning_obc.obs.quantize`.
        mask: Same shape as ``weight``, True = kept. The rest is fixed at exactly ``+0.0`` when its column comes.
        channels: Input channels per kernel position.
        damping: Share of ``mean(diag H)`` added to the diagonal, or ``"auto"``.
        act_order: Columns by descending ``diag H`` instead of ascending index.
        block: Columns per lazy update.

    Raises:
        PatternError, ShapeError, NonFiniteError, NotPositiveDefiniteError: See :func:`lightning_obc.obs.quantize`.
    """
    spec = parse_grid(grid)
    channels = check_channels(weight.shape[-1], channels)
    check_mask(mask, weight)

    def solve(rows: Tensor, half: HessianLike, damping: float) -> LayerSolution:
        problem = prepare(rows, half, damping)
        keep = rows_of_mask(mask, weight, rows)
        start = problem.weight
        fitted = fit_grid(start if keep is None else start * keep, spec, channels=channels, hessian=problem.damped)
        order = column_order(problem, units_of(start.shape[-1], channels, 1), act_order)
        fixed, losses = eliminate(upper_factor(problem, order), start, order, GridRule(fitted, order, keep), block)
        # The fixed values are grid points, so encoding them again is exact.
        codes = zero_codes(fitted, fitted.encode(fixed), keep)
        solution = quantized_solution(problem, fitted, codes, keep, "gptq")
        return with_curve(solution, problem, rounding_curve(losses, order, start, keep))

    return with_damping(weight, hessian, damping, solve)
