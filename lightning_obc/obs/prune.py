"""Prune one layer problem to a pattern (ExactOBS; paper, section 4)."""

from __future__ import annotations

import math
from functools import singledispatch

import torch
from torch import Tensor

from lightning_obc.errors import PatternError, SpecError
from lightning_obc.kernels import obs_sweep
from lightning_obc.obs.block_sweep import sweep_blocks_prepared
from lightning_obc.obs.curves import line, step_curve
from lightning_obc.obs.damping import resolve_damping
from lightning_obc.obs.problem import HessianLike, Problem, check_channels, full_hessian, prepare
from lightning_obc.obs.refine import GreedyMask, refine_mask
from lightning_obc.obs.running import run_with_retries
from lightning_obc.obs.solution import LayerSolution
from lightning_obc.obs.structured import sweep_structured_prepared
from lightning_obc.obs.sweep import existing_zeros, in_units, sweep_prepared
from lightning_obc.solvers import Refine, parse_refine
from lightning_obc.specs import (
    NM,
    Block,
    Misfit,
    Pattern,
    Selection,
    Structured,
    Unstructured,
    check_refinable,
    parse_pattern,
)


def prune(
    weight: Tensor,
    hessian: HessianLike,
    pattern: Pattern | str | float,
    *,
    selection: Selection = "heap",
    channels: int | None = None,
    misfit: Misfit = "error",
    damping: float | str = 0.01,
    refine: bool | Refine = False,
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
        refine: Swap kept for removed weights afterwards (unstructured and N:M). With the two-half statistic each row
            is refined only as far as the other half agrees.
        backend: ``"auto"``, ``"naive"``, ``"torch"``, ``"numba"`` or ``"triton"``; ``"triton"`` has blocks of at most
            8 and channels of at most 64 kernel positions.
        memory_budget: Bytes of working memory above the inputs; None takes a share of what is free.

    Raises:
        SpecError: ``refine`` with a pattern whose masks cannot be refined.
        PatternError: The pattern does not divide ``channels`` and ``misfit`` is ``"error"``.
        ShapeError, NonFiniteError, NotPositiveDefiniteError, BackendError: The problem cannot be solved.
    """
    pattern = parse_pattern(pattern)
    channels = check_channels(weight.shape[-1], channels)
    backend = backend_for(backend, weight.device.type, pattern, weight.shape[-1] // channels)
    check_fit(pattern, channels, misfit)

    refinement = parse_refine(refine)
    check_refinable(pattern, refinement)

    def choose(problem: Problem) -> GreedyMask:
        return choose_mask(pattern, problem, selection, channels, backend, memory_budget)

    def solve(rows: Tensor, half: HessianLike, damping: float) -> LayerSolution:
        return choose(prepare(rows, half, damping)).solution(memory_budget)

    share, held_out = resolve_damping(weight, hessian, damping, solve)
    greedy = choose(prepare(weight, full_hessian(hessian), share))
    solution = greedy.solution(memory_budget).with_held_out(held_out).marked(hessian)
    if refinement is None:
        return solution
    groups = nm_groups(weight.shape[-1], channels, pattern, weight.device) if isinstance(pattern, NM) else None
    column_group = None if groups is None else groups.column_group
    return refine_mask(
        solution, greedy, hessian, choose, refinement, column_group=column_group, memory_budget=memory_budget
    )


def backend_for(backend: str, device_type: str, pattern: Pattern | None, positions: int = 1) -> str:
    """The backend that solves a pattern (None: codes) on a device, in a layer of so many kernel positions.

    ``"auto"`` stays what it is for whole channels: which is faster depends on zeros that their sweep looks at.

    Raises:
        BackendError: It is unknown, cannot run there, or lacks the pattern.
    """
    if isinstance(pattern, Block):
        return obs_sweep.block_backend(backend, device_type, pattern.size)
    if isinstance(pattern, Structured):
        obs_sweep.channel_backend(backend, device_type, positions)
        return backend
    return obs_sweep.resolve_backend(backend, device_type)


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
def choose_mask(
    pattern: Pattern, problem: Problem, selection: Selection, channels: int, backend: str, budget: int | None
) -> GreedyMask:
    """The mask of a pattern by OBS steps, on a problem that is prepared and checked; ``backend`` is resolved."""
    raise SpecError("This pattern has no solver", got=type(pattern).__name__, expected="a pattern of lightning_obc")


@choose_mask.register
def _unstructured(
    pattern: Unstructured, problem: Problem, selection: Selection, channels: int, backend: str, budget: int | None
) -> GreedyMask:
    sweep = sweep_prepared(problem, backend, budget)
    return GreedyMask(sweep.problem, sweep.mask(pattern.sparsity, selection), backend, curve=sweep.loss_curve())


@choose_mask.register
def _nm(
    pattern: NM, problem: Problem, selection: Selection, channels: int, backend: str, budget: int | None
) -> GreedyMask:
    groups = nm_groups(problem.weight.shape[-1], channels, pattern, problem.weight.device)
    keep = existing_zeros(problem)

    def kernel(problem: Problem) -> obs_sweep.SweepOutput:
        return obs_sweep.sweep_prune(problem.sweep_input(keep), groups=groups, backend=backend, memory_budget=budget)

    problem, output = run_with_retries(problem, kernel)
    mask = _mask_of_steps(output, problem)
    short = channels % pattern.m
    notes = (f"padded: last group of each kernel position has {short} of {pattern.m}",) if short else ()
    losses, count = in_units(output.losses, problem.units()).flatten(0, 1), output.count.flatten()
    curve = step_curve(losses, count, torch.zeros_like(count), mask.numel())
    return GreedyMask(problem, mask, backend, notes, curve)


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


@choose_mask.register
def _block(
    pattern: Block, problem: Problem, selection: Selection, channels: int, backend: str, budget: int | None
) -> GreedyMask:
    swept = sweep_blocks_prepared(problem, pattern.size, channels, backend, budget)
    short = channels % pattern.size
    notes = (f"padded: last block of each kernel position has {short} of {pattern.size}",) if short else ()
    return GreedyMask(swept.problem, swept.mask(pattern.sparsity, selection), swept.backend, notes, swept.loss_curve())


@choose_mask.register
def _structured(
    pattern: Structured, problem: Problem, selection: Selection, channels: int, backend: str, budget: int | None
) -> GreedyMask:
    swept = sweep_structured_prepared(problem, channels, pattern.sparsity, backend, budget)
    curve = line(swept.losses, whole=problem.weight.shape[0] * channels)
    return GreedyMask(swept.problem, swept.mask(pattern.sparsity), swept.backend, swept.notes, curve)
