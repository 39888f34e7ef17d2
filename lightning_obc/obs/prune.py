"""Prune one layer problem to a pattern (ExactOBS; paper, section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import singledispatch

import torch
from torch import Tensor

from lightning_obc.errors import PatternError, SpecError
from lightning_obc.kernels import obs_sweep
from lightning_obc.obs.damping import choose_damping
from lightning_obc.obs.problem import HessianLike, Problem, full_hessian, prepare
from lightning_obc.obs.running import run_with_retries
from lightning_obc.obs.select import zeros_for
from lightning_obc.obs.solution import LayerSolution
from lightning_obc.obs.structured import structured_order
from lightning_obc.obs.sweep import existing_zeros, solve_mask, sweep_prepared
from lightning_obc.specs import NM, Block, Misfit, Pattern, Selection, Structured, Unstructured, parse_pattern


def prune(
    weight: Tensor,
    hessian: HessianLike,
    pattern: Pattern | str | float,
    *,
    selection: Selection = "heap",
    channels: int | None = None,
    misfit: Misfit = "error",
    damping: float | str = 0.01,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> LayerSolution:
    """Choose which weights go by exact OBS steps, then solve for the rest exactly.

    Args:
        weight: ``[R, d]`` or ``[g, R, d]``. Weights that are zero already count and stay zero.
        hessian: Undamped ``[d, d]``, ``[g, d, d]``, or the two-half statistic.
        pattern: A pattern or its shorthand (``"2:4"``, ``0.5``).
        selection: How unstructured zeros spread over rows; see :func:`lightning_obc.obs.select.row_counts`.
        channels: Input channels per kernel position; default ``d``. Groups never straddle a kernel position.
        misfit: ``"error"``, or ``"pad"`` to let the last group of every kernel position be short (missing weights count
            as zeros).
        damping: Share of ``mean(diag H)`` added to the diagonal, or ``"auto"`` (needs the two-half statistic).
        backend: ``"auto"``, ``"naive"``, ``"torch"``, ``"numba"`` or ``"triton"``.
        memory_budget: Bytes of working memory above the inputs; None takes a share of what is free.

    Raises:
        PatternError: The pattern does not divide ``channels`` and ``misfit`` is ``"error"``.
        ShapeError, NonFiniteError, NotPositiveDefiniteError, BackendError: The problem cannot be solved.
    """
    pattern = parse_pattern(pattern)
    backend = obs_sweep.resolve_backend(backend, weight.device.type)
    channels = check_channels(weight.shape[-1], channels)
    check_fit(pattern, channels, misfit)

    def solve(rows: Tensor, half: HessianLike, damping: float) -> LayerSolution:
        problem = prepare(rows, half, damping)
        return prune_prepared(problem, pattern, selection, channels, backend, memory_budget)

    return with_damping(weight, hessian, damping, solve)


def with_damping(
    weight: Tensor, hessian: HessianLike, damping: float | str, solve: Callable[..., LayerSolution]
) -> LayerSolution:
    """Run ``solve`` with a damping that is given, or chosen by the two halves of the statistic."""
    if not isinstance(damping, str):
        return solve(weight, full_hessian(hessian), damping)
    if damping != "auto":
        raise SpecError("Unknown damping", got=repr(damping), expected='a number >= 0, or "auto"')
    chosen, held_out = choose_damping(weight, hessian, solve)
    return solve(weight, full_hessian(hessian), chosen).with_held_out(held_out)


def check_channels(columns: int, channels: int | None) -> int:
    """``channels``, or ``columns`` when None.

    Raises:
        PatternError: ``columns`` is not a multiple of ``channels``.
    """
    if channels is None:
        return columns
    if channels < 1 or columns % channels:
        raise PatternError(
            "channels does not divide the columns", got=channels, expected=f"a divisor of {columns} columns"
        )
    return channels


def group_size(pattern: Pattern) -> int:
    """Consecutive input channels that a pattern ties together."""
    if isinstance(pattern, NM):
        return pattern.m
    return pattern.size if isinstance(pattern, Block) else 1


def check_fit(pattern: Pattern, channels: int, misfit: Misfit) -> None:
    """Raise when groups of the pattern do not fit the input channels.

    Raises:
        PatternError: With ``misfit="error"`` or ``"skip"``; the caller of ``"skip"`` leaves the layer alone.
    """
    size = group_size(pattern)
    if misfit != "pad" and channels % size:
        raise PatternError(
            f"The pattern {pattern} does not fit the layer",
            got=f"{channels} input channels per group and kernel position",
            expected=f"a multiple of {size}",
            remedy='exclude the layer, or set misfit="skip" (leave it dense) or misfit="pad" (short last groups)',
        )


@singledispatch
def _prune(
    pattern: Pattern, problem: Problem, selection: Selection, channels: int, backend: str, budget: int | None
) -> LayerSolution:
    raise SpecError("This pattern has no solver", got=type(pattern).__name__, expected="a pattern of lightning_obc")


def prune_prepared(
    problem: Problem,
    pattern: Pattern,
    selection: Selection,
    channels: int,
    backend: str,
    memory_budget: int | None = None,
) -> LayerSolution:
    """:func:`prune` of a problem that is prepared and checked already; ``backend`` is resolved."""
    return _prune(pattern, problem, selection, channels, backend, memory_budget)


@_prune.register
def _unstructured(
    pattern: Unstructured, problem: Problem, selection: Selection, channels: int, backend: str, budget: int | None
) -> LayerSolution:
    return sweep_prepared(problem, backend, budget).solution(pattern.sparsity, selection)


@_prune.register
def _nm(
    pattern: NM, problem: Problem, selection: Selection, channels: int, backend: str, budget: int | None
) -> LayerSolution:
    groups = nm_groups(problem.weight.shape[-1], channels, pattern, problem.weight.device)
    keep = existing_zeros(problem)

    def kernel(problem: Problem) -> obs_sweep.SweepOutput:
        return obs_sweep.sweep_prune(problem.sweep_input(keep), groups=groups, backend=backend, memory_budget=budget)

    problem, output = run_with_retries(problem, kernel)
    mask = _mask_of_steps(output, problem)
    short = channels % pattern.m
    notes = (f"padded: last group of each kernel position has {short} of {pattern.m}",) if short else ()
    return solve_mask(problem, mask, backend, budget, notes)


def nm_groups(columns: int, channels: int, pattern: NM, device: torch.device) -> obs_sweep.NMGroups:
    """Groups of ``m`` consecutive input channels within a kernel position, and the zeros each must get.

    A short last group counts its missing weights as zeros, so it must make ``max(0, size - n)``.
    """
    per_position = math.ceil(channels / pattern.m)
    column = torch.arange(columns, device=device)
    group = (column // channels) * per_position + (column % channels) // pattern.m
    sizes = torch.bincount(group, minlength=per_position * (columns // channels))
    return obs_sweep.NMGroups(group, (sizes - pattern.n).clamp(min=0))


def _mask_of_steps(output: obs_sweep.SweepOutput, problem: Problem) -> Tensor:
    """Keep-mask ``[g, R, d]`` of everything a sweep eliminated."""
    order = output.order.long()
    # Steps after a row's end carry -1; they are sent to a spare column that is cut off again.
    columns = problem.weight.shape[-1]
    keep = torch.ones(*problem.weight.shape[:2], columns + 1, dtype=torch.bool, device=order.device)
    keep.scatter_(2, torch.where(order < 0, columns, order), False)
    return keep[..., :columns]


@_prune.register
def _structured(
    pattern: Structured, problem: Problem, selection: Selection, channels: int, backend: str, budget: int | None
) -> LayerSolution:
    mask = torch.ones_like(problem.weight, dtype=torch.bool)
    groups, _, columns = mask.shape
    order, _ = structured_order(problem, channels, zeros_for(pattern.sparsity, groups * channels))
    by_channel = mask.view(groups, mask.shape[1], columns // channels, channels)
    by_channel[order[:, 0], :, :, order[:, 1]] = False
    keep = existing_zeros(problem)
    return solve_mask(problem, mask if keep is None else mask & keep, "torch", budget)
