"""Refine the greedy solution of one layer: judge depths on the halves, search on all samples, keep what is better."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from lightning_obc.errors import NotPositiveDefiniteError
from lightning_obc.grids import Grid
from lightning_obc.hessian import Hessian
from lightning_obc.obs.curves import Curve, relative
from lightning_obc.obs.orders import column_order_codes
from lightning_obc.obs.problem import HessianLike, Problem, prepare, row_losses
from lightning_obc.obs.refine.codes import CodesState, better_of, descend
from lightning_obc.obs.refine.judge import Deadline, Judgement, judge
from lightning_obc.obs.refine.masks import MaskState, SwapProblem, swap
from lightning_obc.obs.refit import refit_on_mask
from lightning_obc.obs.solution import LayerSolution, Refinement
from lightning_obc.obs.sweep import solve_mask
from lightning_obc.solvers import Refine

State = TypeVar("State")


@dataclass(frozen=True)
class GreedyMask:
    """Masks ``[g, R, d]`` that a greedy solver chose, the problem it finally solved, and the losses of its steps."""

    problem: Problem
    mask: Tensor
    backend: str
    notes: tuple[str, ...] = ()
    curve: Curve = ()

    def solution(self, memory_budget: int | None = None) -> LayerSolution:
        """Optimal weights on the mask."""
        solution = solve_mask(self.problem, self.mask, self.backend, memory_budget, self.notes)
        return replace(solution, curve=relative(self.curve, self.problem, solution.reference))


@dataclass(frozen=True)
class GreedyCodes:
    """Codes ``[g, R, d]`` of a greedy solver, their grid, and the problem it finally solved.

    Attributes:
        others: Other codes to start from: those of every row's second best order, where several were tried.
        curve: Losses of the greedy order's steps where it was tried, otherwise those of the fixed order.
    """

    problem: Problem
    grid: Grid
    codes: Tensor
    others: tuple[Tensor, ...] = ()
    curve: Curve = ()

    def solution(self, keep: Tensor | None, backend: str) -> LayerSolution:
        """The solution of these codes; ``keep [g, R, d]`` is its mask, None when nothing is masked."""
        weight = self.grid.dequantize(self.codes)
        mask = torch.ones_like(weight, dtype=torch.bool) if keep is None else keep
        codes = self.problem.shaped(self.codes)
        solution = self.problem.solution(weight, mask, self.problem.status(backend), grid=self.grid, codes=codes)
        return replace(solution, curve=relative(self.curve, self.problem, solution.reference))


def refine_mask(
    solution: LayerSolution,
    greedy: GreedyMask,
    hessian: HessianLike,
    choose: Callable[[Problem], GreedyMask],
    spec: Refine,
    *,
    column_group: Tensor | None = None,
    memory_budget: int | None = None,
) -> LayerSolution:
    """Swap kept for removed weights, row by row.

    Args:
        solution: The greedy solution.
        greedy: Its mask.
        hessian: As passed to the solver; the two-half statistic lets the halves judge.
        choose: The greedy solver, for the halves.
        spec: Limits.
        column_group: ``[d]`` groups that swaps stay inside (N:M), or None.
        memory_budget: Bytes of working memory.

    Returns:
        A solution whose damped loss is not above the greedy one's in any row, with ``refinement`` on record.
    """
    deadline = Deadline(spec.seconds)

    def search(start: GreedyMask, limit: Deadline, depth: Tensor | None = None) -> Iterator[MaskState]:
        problem = start.problem
        dense = problem.original_batched()
        layer = SwapProblem(dense, problem.damped, problem.inverse, start.mask, dense != 0, column_group)
        return swap(layer, swaps=spec.swaps, depth=depth, deadline=limit, memory_budget=memory_budget)

    def path(half: Tensor, limit: Deadline) -> Iterator[tuple[int, Tensor]]:
        start = choose(prepare(greedy.problem.original, half, greedy.problem.damping))
        return ((state.depth, state.weight) for state in search(start, limit))

    try:
        verdict = _judged(greedy.problem, hessian, path, spec, deadline)
    except NotPositiveDefiniteError as error:
        return _unrefined(solution, error)
    mask = _last(search(greedy, deadline, None if verdict is None else verdict.depth)).mask
    problem = greedy.problem
    weight = refit_on_mask(problem, mask, memory_budget)
    better, gain = _better_rows(problem, solution, weight, coupled=False)
    kept = torch.where(better, mask, greedy.mask)
    final = torch.where(better, weight, _batched(solution.weight).double())
    refined = problem.solution(final, kept, solution.status)
    return _recorded(replace(refined, curve=solution.curve), better, gain, verdict, deadline)


def refine_codes(
    solution: LayerSolution,
    greedy: GreedyCodes,
    hessian: HessianLike,
    choose: Callable[[Problem], GreedyCodes],
    spec: Refine,
    keep: Tensor | None,
) -> LayerSolution:
    """Coordinate descent on codes and scales, row by row (per tensor: all rows or none).

    Args:
        solution: The greedy solution.
        greedy: Its codes and grid.
        hessian: As passed to the solver; the two-half statistic lets the halves judge.
        choose: The greedy solver, for the halves.
        spec: Limits.
        keep: ``[g, R, d]`` bool, False where the code stays on the zero point, or None.

    Returns:
        A solution whose damped loss is not above the greedy one's in any row, with ``refinement`` on record.
    """
    deadline = Deadline(spec.seconds)
    coupled = greedy.grid.spec.granularity == "tensor"

    def search(start: GreedyCodes, limit: Deadline, depth: Tensor | None = None) -> Iterator[CodesState]:
        return _from_all_starts(start, spec, keep, limit, depth)

    def path(half: Tensor, limit: Deadline) -> Iterator[tuple[int, Tensor]]:
        start = choose(prepare(greedy.problem.original, half, greedy.problem.damping))
        return ((state.depth, state.weight) for state in search(start, limit))

    try:
        verdict = _judged(greedy.problem, hessian, path, spec, deadline, coupled)
    except NotPositiveDefiniteError as error:
        return _unrefined(solution, error)
    state = _last(search(greedy, deadline, None if verdict is None else verdict.depth))
    better, gain = _better_rows(greedy.problem, solution, state.weight, coupled)
    codes = torch.where(better, state.codes, greedy.codes)
    scale = torch.where(better, state.grid.scale, greedy.grid.scale)
    final = replace(greedy, grid=replace(greedy.grid, scale=scale), codes=codes)
    refined = final.solution(keep, solution.status.backend)
    return _recorded(replace(refined, curve=solution.curve), better, gain, verdict, deadline)


def _from_all_starts(
    start: GreedyCodes, spec: Refine, keep: Tensor | None, limit: Deadline, depth: Tensor | None
) -> Iterator[CodesState]:
    """The path from the greedy codes; at depth ``sweeps + 1`` each row has the best of that and the other starts."""
    problem = start.problem
    dense = problem.original_batched()

    def run(codes: Tensor, depth: Tensor | None) -> Iterator[CodesState]:
        return descend(
            dense, problem.damped, start.grid, codes, keep=keep, sweeps=spec.sweeps, depth=depth, deadline=limit
        )

    last = None
    for last in run(start.codes, depth):
        yield last
    assert last is not None
    allowed = (
        torch.ones(dense.shape[:2], dtype=torch.bool, device=dense.device) if depth is None else depth > spec.sweeps
    )
    if not spec.restart or limit.passed() or not bool(allowed.any()):
        return
    others = start.others or (column_order_codes(problem, start.grid, keep, act_order=True)[0],)
    for codes in others:
        if not limit.passed():
            other = _last(run(codes, None))
            last = better_of(replace(last, depth=spec.sweeps), other, dense, problem.damped, allowed)
    yield last


def _judged(
    problem: Problem,
    hessian: HessianLike,
    path: Callable[[Tensor, Deadline], Iterator[tuple[int, Tensor]]],
    spec: Refine,
    deadline: Deadline,
    coupled: bool = False,
) -> Judgement | None:
    if not spec.judge or not isinstance(hessian, Hessian) or not hessian.has_both_halves:
        return None
    return judge(problem.original_batched(), hessian, path, deadline, coupled)


def _unrefined(solution: LayerSolution, error: NotPositiveDefiniteError) -> LayerSolution:
    """The greedy solution with a note: without a judge, refinement may fit noise."""
    note = f"not refined, because half of the samples cannot be solved alone: {error.message}"
    return replace(solution, status=replace(solution.status, notes=(*solution.status.notes, note)))


def _last(path: Iterator[State]) -> State:
    return deque(path, maxlen=1)[0]


def _batched(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 3 else tensor[None]


def _better_rows(problem: Problem, solution: LayerSolution, candidate: Tensor, coupled: bool) -> tuple[Tensor, float]:
    """Rows ``[g, R, 1]`` whose damped loss falls, measured on weights as they are returned; and the share saved."""
    dense = problem.original_batched().double()
    before = row_losses(_batched(solution.weight).double() - dense, problem.damped)
    after = row_losses(candidate.to(problem.original.dtype).double() - dense, problem.damped)
    better = (after.sum() < before.sum()).expand_as(after) if coupled else after < before
    total = float(before.sum())
    gain = float((before - after)[better].sum()) / total if total > 0 else 0.0
    return better[..., None], gain


def _recorded(
    refined: LayerSolution, better: Tensor, gain: float, verdict: Judgement | None, deadline: Deadline
) -> LayerSolution:
    rows = float(better.double().mean())
    if verdict is None:
        return replace(refined, refinement=Refinement(gain, None, rows, deadline.hit))
    # Where no row of the whole layer became better, its weights are greedy's, and so is what is held out.
    seen, held_out = (verdict.gain, verdict.held_out) if rows else (0.0, verdict.greedy)
    return replace(refined, refinement=Refinement(gain, seen, rows, deadline.hit)).with_held_out(held_out)
