"""SparseGPT (Frantar & Alistarh, arXiv 2301.00774): pruning in one fixed column order, masks chosen on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_obc.baselines.rounding import quantized_solution, zero_codes
from lightning_obc.baselines.units import units_of
from lightning_obc.errors import SpecError
from lightning_obc.grid_fitting import fit_grid
from lightning_obc.kernels.column_elimination import Targets
from lightning_obc.obs.columns import GridRule, Unit, column_order, eliminate, upper_factor
from lightning_obc.obs.curves import column_curve, with_curve
from lightning_obc.obs.damping import with_damping
from lightning_obc.obs.orders import rounding_curve
from lightning_obc.obs.problem import HessianLike, Problem, check_channels, prepare
from lightning_obc.obs.prune import check_fit, group_size
from lightning_obc.obs.select import zeros_for
from lightning_obc.obs.solution import LayerSolution
from lightning_obc.specs import NM, Block, IntGrid, Misfit, Pattern, Unstructured, parse_grid, parse_pattern


class MaskRule:
    """Chooses the mask of a block of columns, or of one group of N:M, when the elimination reaches it.

    The score of a unit ``B`` is ``w_Bᵀ (G_BB)⁻¹ w_B`` with all columns before it eliminated, ``w²/G_jj`` for single
    weights. Unstructured and block patterns spread their zeros evenly over the blocks of columns.

    Args:
        pattern: What to choose.
        factor: ``[g, d, d]``, ``U`` of :func:`~lightning_obc.baselines.columns.upper_factor`.
        alive: ``[g, d, R]`` bool, False where the weight is zero already, in the order of elimination.
        units: Runs of positions, in order.
        grid: Rounds what is kept, or None.
    """

    def __init__(
        self, pattern: Pattern, factor: Tensor, alive: Tensor, units: Sequence[Unit], grid: GridRule | None
    ) -> None:
        self.pattern, self.factor, self.alive = pattern, factor, alive
        self.keep = alive.clone()
        self.targets = replace(Targets() if grid is None else grid.targets, keep=self.keep)
        self.by_unit = isinstance(pattern, NM)
        self.alive_units = {unit: alive[:, slice(*unit)].any(1) for unit in units}
        total = sum(flags.numel() for flags in self.alive_units.values())
        living = sum(int(flags.sum()) for flags in self.alive_units.values())
        sparsity = getattr(pattern, "sparsity", 0.0)
        self.to_remove, self.living = max(0, zeros_for(sparsity, total) - (total - living)), living
        self.passed = self.removed = 0

    def begin_block(self, units: Sequence[Unit], weight: Tensor) -> None:
        if isinstance(self.pattern, NM):
            return
        alive = torch.stack([self.alive_units[unit] for unit in units], 1)
        scores = torch.stack([self._score(unit, weight) for unit in units], 1).masked_fill(~alive, torch.inf)
        self.passed += int(alive.sum())
        # Integer arithmetic, so that the last block brings the layer's total to the very weight.
        wanted = -(-self.to_remove * self.passed // max(self.living, 1)) - self.removed
        self.removed += wanted
        gone = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        gone[torch.sort(scores.flatten(), stable=True).indices[:wanted]] = True
        gone = gone.reshape(scores.shape)
        for index, unit in enumerate(units):
            self.keep[:, slice(*unit)] &= ~gone[:, index, None]

    def begin_unit(self, unit: Unit, weight: Tensor) -> None:
        if not isinstance(self.pattern, NM):
            return
        inside = slice(*unit)
        diagonal = self.factor[:, inside, inside].diagonal(dim1=-2, dim2=-1)
        scores = (weight[:, inside] / diagonal[..., None]).abs().masked_fill(~self.alive[:, inside], -torch.inf)
        ranks = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, : self.pattern.n]
        largest = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, ranks, True)
        self.keep[:, inside] &= largest

    def _score(self, unit: Unit, weight: Tensor) -> Tensor:
        inside = slice(*unit)
        lower = self.factor[:, inside, inside].mT
        return torch.linalg.solve_triangular(lower, weight[:, inside], upper=False).square().sum(1)


def sparsegpt(
    weight: Tensor,
    hessian: HessianLike,
    pattern: Pattern | str | float,
    *,
    grid: IntGrid | int | None = None,
    channels: int | None = None,
    misfit: Misfit = "error",
    damping: float | str = 0.01,
    act_order: bool = False,
    block: int = 128,
) -> LayerSolution:
    """Prune column after column, the later columns compensating; with ``grid``, quantize what is kept in the same pass.

    Args:
        weight: ``[R, d]`` or ``[g, R, d]``. Weights that are zero already count and stay zero.
        hessian: Undamped ``[d, d]``, ``[g, d, d]``, or the two-half statistic.
        pattern: Unstructured, N:M or blocks, or their shorthand.
        grid: Bit width or grid for joint quantization.
        channels, misfit, damping: As in :func:`lightning_obc.obs.prune`.
        act_order: Columns (groups, blocks) by descending ``diag H``.
        block: Columns whose unstructured mask is chosen together, and per lazy update.

    Raises:
        SpecError: A structured pattern, which has no column order.
        PatternError, ShapeError, NonFiniteError, NotPositiveDefiniteError: See :func:`lightning_obc.obs.prune`.
    """
    pattern = parse_pattern(pattern)
    spec = None if grid is None else parse_grid(grid)
    channels = check_channels(weight.shape[-1], channels)
    check_fit(pattern, channels, misfit)
    if not isinstance(pattern, (Unstructured, NM, Block)):
        raise SpecError(
            "SparseGPT has no column order for this pattern",
            got=str(pattern),
            expected="an unstructured, N:M or block pattern",
            remedy='solver="obs"',
        )

    def solve(rows: Tensor, half: HessianLike, damping: float) -> LayerSolution:
        return _solve(prepare(rows, half, damping), pattern, spec, channels, act_order, block)

    return with_damping(weight, hessian, damping, solve)


def _solve(
    problem: Problem, pattern: Pattern, spec: IntGrid | None, channels: int, act_order: bool, block: int
) -> LayerSolution:
    start = problem.weight
    units = units_of(start.shape[-1], channels, group_size(pattern))
    order = column_order(problem, units, act_order)
    fitted = None if spec is None else fit_grid(start, spec, channels=channels, hessian=problem.damped)
    grid_rule = None if fitted is None else GridRule(fitted, order, None)
    alive = order.take(start != 0).mT.contiguous()
    factor = upper_factor(problem, order)
    rule = MaskRule(pattern, factor, alive, order.units, grid_rule)
    fixed, losses = eliminate(factor, start, order, rule, block)
    keep = order.restore(rule.keep.mT.contiguous())
    if fitted is None:
        solution = problem.solution(torch.where(keep, fixed, 0.0), keep, problem.status("sparsegpt"))
        gone = (~rule.keep).sum((0, 2))
        return with_curve(solution, problem, column_curve(losses, gone, keep.numel()))
    codes = zero_codes(fitted, fitted.encode(fixed), keep)
    solution = quantized_solution(problem, fitted, codes, keep, "sparsegpt")
    return with_curve(solution, problem, rounding_curve(losses, order, start, keep))
