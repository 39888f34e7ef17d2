"""Solve the levels of one layer: one inverse for all, and one elimination for all levels of a kind.

Unstructured, block (of one size) and structured levels are prefixes of one elimination each. N:M levels are not: what
a group loses last at one quota depends on when the other groups close, so that no quota's result is part of another's.
Nor are codes: every grid and every mask has an elimination of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Union

import torch
from torch import Tensor

from lightning_obc.allocation.levels import Level, unique
from lightning_obc.allocation.prefixes import prefix_losses
from lightning_obc.allocation.record import LayerRecord, LevelRecord, check_ladder
from lightning_obc.errors import NotPositiveDefiniteError, PatternError, SpecError
from lightning_obc.hessian import Hessian
from lightning_obc.obs import BlockSweep, LayerSolution, Problem, StructuredSweep, Sweep, prepare, prune
from lightning_obc.obs.block_sweep import sweep_blocks_prepared
from lightning_obc.obs.problem import quadratic
from lightning_obc.obs.prune import backend_for, check_fit, choose_mask
from lightning_obc.obs.quantize import choose_codes
from lightning_obc.obs.structured import sweep_structured_prepared
from lightning_obc.obs.sweep import sweep_prepared
from lightning_obc.specs import Block, IntGrid, Pattern, Selection, Structured, Unstructured

Swept = Sweep | BlockSweep | StructuredSweep

# One bound for solving and rebuilding, so that chunks, and with them the last bits, are the same both times.
MEMORY_BUDGET = 2**29


@dataclass(frozen=True)
class Recipe:
    """How the levels of a database are solved.

    Args:
        damping: Share of ``mean(diag H)`` added to the diagonal; ``"auto"`` chooses it for each layer by the two halves
            of its statistic, at half of the weights.
        selection: How unstructured zeros spread over the rows of a layer; all are nested.
        backend: The sweep's backend; not part of what makes two databases different.
    """

    damping: Union[str, float] = 0.01
    selection: Selection = "heap"
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.selection not in ("heap", "sorted", "hull"):
            raise SpecError("Unknown selection", got=repr(self.selection), expected='"heap", "sorted" or "hull"')
        if self.damping != "auto" and (isinstance(self.damping, str) or not 0 <= self.damping < float("inf")):
            raise SpecError("Unknown damping", got=repr(self.damping), expected='a number >= 0, or "auto"')

    def identity(self) -> dict[str, Any]:
        """What two databases must share to belong together."""
        values = asdict(self)
        del values["backend"]
        return values


def infeasible(level: Level, channels: int) -> str | None:
    """Why a layer with so many input channels per kernel position cannot have a level; None if it can."""
    try:
        if level.pattern is not None:
            check_fit(level.pattern, channels, "error")
        size = None if level.grid is None else level.grid.group_size
        if size is not None and channels % size:
            raise PatternError("The grid's groups do not fit the layer", got=f"{channels} channels, groups of {size}")
    except PatternError as error:
        return f"{error.message}: {error.got}"
    return None


def choose_damping(weight: Tensor, hessian: Hessian, recipe: Recipe) -> float:
    """The damping of one layer: the number itself, or what the two halves of the statistic prefer at 50 % zeros."""
    if not isinstance(recipe.damping, str):
        return float(recipe.damping)
    return prune(
        weight, hessian, 0.5, damping="auto", backend=recipe.backend, memory_budget=MEMORY_BUDGET
    ).status.damping


def new_record(weight: Tensor, hessian: Tensor, damping: float) -> LayerRecord:
    """A record without levels for ``weight [g, R, d]`` and ``hessian [g, d, d]``."""
    groups, rows, columns = weight.shape
    reference = quadratic(weight.double(), hessian)
    record = LayerRecord((groups, rows, columns), reference, damping)
    record.levels[Level().name] = LevelRecord(0.0, 0.0, weight.numel())
    return record


def solve_levels_(
    record: LayerRecord, weight: Tensor, hessian: Tensor, channels: int, levels: Sequence[Level], recipe: Recipe
) -> None:
    """Add levels to the record of a layer. Those it has already are left alone.

    Args:
        record: Changed in place.
        weight: Dense ``[g, R, d]``.
        hessian: ``[g, d, d]`` float64, undamped, as it is stored.
        channels: Input channels per kernel position.
        levels: Levels without activations.
        recipe: How to solve.

    Raises:
        NotPositiveDefiniteError: No bounded damping makes ``H`` positive definite.
    """
    wanted = unique([part for level in levels for part in (level.mask, level.weights)])
    todo = [level for level in wanted if level.name not in record.levels and level.name not in record.missing]
    reasons = {level.name: infeasible(level, channels) for level in todo}
    record.missing |= {name: reason for name, reason in reasons.items() if reason is not None}
    todo = [level for level in todo if reasons[level.name] is None]
    if not todo:
        return
    layer = _Layer(prepare(weight, hessian, record.damping), channels, recipe)
    _solve_masks_(record, layer, [level for level in todo if level.grid is None])
    for level in todo:
        if level.grid is not None:
            _solve_codes_(record, layer, level)


@dataclass(frozen=True)
class _Layer:
    """A layer whose Hessian is inverted once for all levels."""

    problem: Problem
    channels: int
    recipe: Recipe

    def backend(self, pattern: Pattern | None = None) -> str:
        weight = self.problem.weight
        return backend_for(self.recipe.backend, weight.device.type, pattern, weight.shape[-1] // self.channels)

    def prune(self, pattern: Pattern) -> LayerSolution:
        selection, backend = self.recipe.selection, self.backend(pattern)
        greedy = choose_mask(pattern, self.problem, selection, self.channels, backend, MEMORY_BUDGET)
        return greedy.solution(MEMORY_BUDGET)

    def quantize(self, grid: IntGrid, mask: Tensor | None) -> LayerSolution:
        keep, backend = None if mask is None or bool(mask.all()) else mask, self.backend()
        return choose_codes(self.problem, grid, keep, self.channels, backend, MEMORY_BUDGET).solution(keep, backend)

    def sweep(self, ladder: Sequence[Pattern]) -> Swept | None:
        """The one elimination that all these patterns, which are of one kind, follow from; None where there is none."""
        first = ladder[0]
        if isinstance(first, Unstructured):
            return sweep_prepared(self.problem, self.backend(first), MEMORY_BUDGET)
        if isinstance(first, Block):
            return sweep_blocks_prepared(self.problem, first.size, self.channels, self.backend(first), MEMORY_BUDGET)
        if isinstance(first, Structured):
            strongest = max(map(_sparsity, ladder))
            backend = self.backend(first)
            return sweep_structured_prepared(self.problem, self.channels, strongest, backend, MEMORY_BUDGET)
        return None


def _solve_codes_(record: LayerRecord, layer: _Layer, level: Level) -> None:
    assert level.grid is not None
    mask = record.mask(level)
    solution = layer.quantize(level.grid, None if level.pattern is None else mask.to(layer.problem.weight.device))
    assert solution.grid is not None
    assert solution.codes is not None
    record.add_codes(level, mask, solution.grid, solution.codes)
    record.levels[level.name] = _record_of(solution)


def _solve_masks_(record: LayerRecord, layer: _Layer, levels: Sequence[Level]) -> None:
    """Levels without a grid: all of a kind from one elimination, N:M one by one."""
    kinds: dict[str, list[Level]] = {}
    for level in levels:
        if level.pattern is not None:
            kinds.setdefault(_kind(level.pattern), []).append(level)
    for kind in kinds.values():
        swept = layer.sweep([level.pattern for level in kind if level.pattern is not None])
        if swept is None:
            _solve_singly_(record, layer, kind)
        else:
            _solve_ladder_(record, layer, swept, kind)


def _kind(pattern: Pattern) -> str:
    """Patterns of one kind may be nested; different ones are stored apart."""
    return f"{type(pattern).__name__} {getattr(pattern, 'size', getattr(pattern, 'm', ''))}"


def _solve_singly_(record: LayerRecord, layer: _Layer, levels: Sequence[Level]) -> None:
    masks: dict[str, Tensor] = {}
    for level in levels:
        assert level.pattern is not None
        solution = layer.prune(level.pattern)
        masks[level.name] = solution.mask
        record.levels[level.name] = _record_of(solution)
    record.add_masks(masks)


def _solve_ladder_(record: LayerRecord, layer: _Layer, swept: Swept, ladder: Sequence[Level]) -> None:
    check_ladder(ladder)
    masks = {level.name: _mask(swept, _sparsity(level.pattern), layer.recipe.selection) for level in ladder}
    losses = _ladder_losses(swept.problem, torch.stack(list(masks.values())))
    for (name, mask), (loss, damping_loss) in zip(masks.items(), losses, strict=True):
        kept, notes = int(mask.sum()), swept.problem.notes + getattr(swept, "notes", ())
        record.levels[name] = LevelRecord(loss, damping_loss, kept, 0, swept.backend, notes)
    record.add_masks(masks)


def _mask(swept: Swept, sparsity: float, selection: Selection) -> Tensor:
    if isinstance(swept, StructuredSweep):
        return swept.mask(sparsity)
    return swept.mask(sparsity, selection)


def _sparsity(pattern: Pattern | None) -> float:
    assert isinstance(pattern, (Unstructured, Block, Structured))
    return pattern.sparsity


def _ladder_losses(problem: Problem, masks: Tensor) -> list[tuple[float, float]]:
    """Loss and damping loss of every level, from nested keep-masks ``[K, g, R, d]``."""
    # What the strongest levels keep goes last; within one level the order does not matter.
    order = masks.sum(0).argsort(dim=-1, stable=True)
    try:
        found = prefix_losses(
            problem.damped,
            problem.lam_bar,
            problem.original_batched(),
            order,
            (~masks).sum(-1),
            memory_budget=MEMORY_BUDGET,
        )
    except NotPositiveDefiniteError as error:
        raise NotPositiveDefiniteError(
            "The levels of a sweep cannot be solved", got=error.got, remedy="a larger damping"
        ) from error
    return list(zip(found.loss.tolist(), found.damping_loss.tolist(), strict=True))


def _record_of(solution: LayerSolution) -> LevelRecord:
    return LevelRecord(
        loss=solution.loss,
        damping_loss=solution.damping_loss,
        kept=int(solution.mask.sum()),
        scales=0 if solution.grid is None else solution.grid.scale.numel(),
        backend=solution.status.backend,
        notes=solution.status.notes,
    )
