"""Quantize one layer problem (OBQ; paper, section 5): every weight goes to its grid point in OBS order."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_obc import linalg
from lightning_obc.errors import NotPositiveDefiniteError, ShapeError
from lightning_obc.grid_fitting import fit_grid
from lightning_obc.grids import Grid
from lightning_obc.kernels import obs_sweep
from lightning_obc.obs.curves import Curve, step_curve
from lightning_obc.obs.damping import resolve_damping, sample_rows
from lightning_obc.obs.orders import column_order_codes, ranked_by_row
from lightning_obc.obs.problem import HessianLike, Problem, check_channels, full_hessian, prepare
from lightning_obc.obs.refine import GreedyCodes, refine_codes
from lightning_obc.obs.refit import refit_on_mask
from lightning_obc.obs.running import run_with_retries
from lightning_obc.obs.solution import LayerSolution
from lightning_obc.obs.sweep import in_units
from lightning_obc.solvers import Order, Refine, check_order, parse_refine
from lightning_obc.specs import IntGrid, parse_grid


def quantize(
    weight: Tensor,
    hessian: HessianLike,
    grid: IntGrid | int,
    *,
    mask: Tensor | None = None,
    channels: int | None = None,
    damping: float | str = 0.01,
    order: Order = "auto",
    refine: bool | Refine = False,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> LayerSolution:
    """Round every weight to its grid in OBS order, the others compensating.

    Args:
        weight: ``[R, d]`` or ``[g, R, d]``.
        hessian: Undamped ``[d, d]``, ``[g, d, d]``, or the two-half statistic.
        grid: Bit width or grid; its scales are fitted to the weight first (paper: per channel, before the sweep).
        mask: Same shape as ``weight``, bool, True = kept. The rest is eliminated first and stays exactly ``+0.0``.
        channels: Input channels per kernel position; default ``d``. Grid groups never straddle a kernel position.
        damping: Share of ``mean(diag H)`` added to the diagonal, or ``"auto"`` (needs the two-half statistic).
        order: Which weight of a row goes next. ``"greedy"``, the cheapest (the paper); ``"activation"``, the column of
            largest ``diag H``, or ``"ascending"``, in both of which all rows share one order (GPTQ); ``"auto"``, all
            three, and every row keeps the result of least damped loss, which is never above that of ``"greedy"``.
        refine: Coordinate descent on codes and scales afterwards. With the two-half statistic each row is refined only
            as far as the other half agrees.
        backend: ``"auto"``, ``"naive"``, ``"torch"``, ``"numba"`` or ``"triton"``.
        memory_budget: Bytes of working memory above the inputs; None takes a share of what is free.

    Returns:
        A solution with ``codes``, ``scale`` and ``zero_point`` (``[g, R, C]``); ``weight`` is their dequantization.

    Raises:
        SpecError: An unknown order.
        PatternError: The grid's group size does not divide ``channels``.
        ShapeError, NonFiniteError, NotPositiveDefiniteError, BackendError: The problem cannot be solved.
    """
    spec = parse_grid(grid)
    check_order(order)
    backend = obs_sweep.resolve_backend(backend, weight.device.type)
    channels = check_channels(weight.shape[-1], channels)
    check_mask(mask, weight)

    def choose(problem: Problem, keep: Tensor | None) -> GreedyCodes:
        return choose_codes(problem, spec, keep, channels, backend, memory_budget, order)

    def solve(rows: Tensor, half: HessianLike, damping: float) -> LayerSolution:
        keep = rows_of_mask(mask, weight, rows)
        return choose(prepare(rows, half, damping), keep).solution(keep, backend)

    share, held_out = resolve_damping(weight, hessian, damping, solve)
    keep = rows_of_mask(mask, weight, weight)
    greedy = choose(prepare(weight, full_hessian(hessian), share), keep)
    solution = greedy.solution(keep, backend).with_held_out(held_out).marked(hessian)
    refinement = parse_refine(refine)
    if refinement is None:
        return solution
    return refine_codes(solution, greedy, hessian, lambda problem: choose(problem, keep), refinement, keep)


def check_mask(mask: Tensor | None, weight: Tensor) -> None:
    """Raise ShapeError unless ``mask`` is None or a bool tensor of the shape of ``weight``."""
    if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool or mask.is_meta):
        raise ShapeError(
            "A mask does not belong to its weight",
            got=f"{tuple(mask.shape)} {mask.dtype} on {mask.device}",
            expected=f"{tuple(weight.shape)} torch.bool",
        )


def rows_of_mask(mask: Tensor | None, weight: Tensor, rows: Tensor) -> Tensor | None:
    """The mask ``[g, R', d]`` for ``rows``, which may be a sample of the weight's rows."""
    if mask is None or bool(mask.all()):
        return None
    batched = (mask if mask.dim() == 3 else mask[None]).to(weight.device)
    whole = rows.shape == weight.shape
    return batched if whole else sample_rows(batched)


def choose_codes(
    problem: Problem,
    spec: IntGrid,
    keep: Tensor | None,
    channels: int,
    backend: str,
    memory_budget: int | None = None,
    order: Order = "auto",
) -> GreedyCodes:
    """Codes by OBS steps, on a problem that is prepared and checked already; ``backend`` is resolved."""
    start = _on_mask(problem, keep, memory_budget)
    grid = fit_grid(start, spec, channels=channels, hessian=problem.damped)
    candidates: list[Tensor] = []
    curve: Curve = ()
    if linalg.is_diagonal(problem.damped):
        # No weight can make up for another: every order ends at the nearest points, which zeros are already.
        candidates, order = [grid.encode(start)], "greedy"
    elif order in ("greedy", "auto"):
        problem, codes, curve = _greedy_codes(problem, start, grid, keep, backend, memory_budget)
        candidates.append(codes)
    for fixed in ("activation", "ascending"):
        if order == fixed or (order == "auto" and start.shape[-1] > 1):
            try:
                codes, steps = column_order_codes(problem, grid, keep, act_order=fixed == "activation")
                candidates.append(codes)
                curve = curve or steps
            except NotPositiveDefiniteError:
                if not candidates:
                    raise
    fitted, ranked = ranked_by_row(problem, grid, candidates)
    return GreedyCodes(problem, fitted, ranked[0], tuple(ranked[1:2]), curve)


def _greedy_codes(
    problem: Problem, start: Tensor, grid: Grid, keep: Tensor | None, backend: str, memory_budget: int | None
) -> tuple[Problem, Tensor, Curve]:
    """The problem that was finally solved; codes of the greedy order from ``start [g, R, d]``; its loss curve."""

    def kernel(problem: Problem) -> obs_sweep.SweepOutput:
        dtype, columns = problem.weight.dtype, start.shape[-1]
        scale, zero = (grid.expand(part, columns).to(dtype).contiguous() for part in (grid.scale, grid.zero_point))
        table = obs_sweep.GridInput(scale, zero, grid.max_code)
        swept = problem.sweep_input(keep, start)
        return obs_sweep.sweep_quantize(swept, table, backend=backend, memory_budget=memory_budget)

    problem, output = run_with_retries(problem, kernel)
    assert output.codes is not None
    count = output.count.flatten()
    zeros = torch.zeros_like(count) if keep is None else (~keep).sum(-1).flatten().to(count.dtype)
    losses = in_units(output.losses, problem.units()).flatten(0, 1)
    return problem, output.codes, step_curve(losses, count, zeros, int((count - zeros).sum()))


def _on_mask(problem: Problem, keep: Tensor | None, memory_budget: int | None) -> Tensor:
    """The weights to start from: those passed in, refitted exactly if the mask removes any that are not zero yet."""
    if keep is None or not bool((problem.weight[~keep] != 0).any()):
        return problem.weight
    return refit_on_mask(problem, keep, memory_budget).to(problem.weight.dtype)
