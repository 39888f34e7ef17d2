"""Solve the levels of one layer: all unstructured, and all block levels from one sweep; others by their own."""

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
from lightning_obc.obs import BlockSweep, LayerSolution, Sweep, prune, quantize, sweep, sweep_blocks
from lightning_obc.obs.problem import quadratic
from lightning_obc.obs.prune import check_fit
from lightning_obc.specs import Block, IntGrid, Pattern, Selection, Unstructured

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
    layer = _Layer(weight, hessian, channels, record.damping, recipe)
    _solve_masks_(record, layer, [level for level in todo if level.grid is None])
    for level in todo:
        if level.grid is not None:
            _solve_codes_(record, layer, level)


@dataclass(frozen=True)
class _Layer:
    weight: Tensor
    hessian: Tensor
    channels: int
    damping: float
    recipe: Recipe

    def prune(self, pattern: Pattern) -> LayerSolution:
        return prune(
            self.weight,
            self.hessian,
            pattern,
            selection=self.recipe.selection,
            channels=self.channels,
            damping=self.damping,
            backend=self.recipe.backend,
            memory_budget=MEMORY_BUDGET,
        )

    def quantize(self, grid: IntGrid, mask: Tensor | None) -> LayerSolution:
        return quantize(
            self.weight,
            self.hessian,
            grid,
            mask=mask,
            channels=self.channels,
            damping=self.damping,
            backend=self.recipe.backend,
            memory_budget=MEMORY_BUDGET,
        )

    def sweep(self) -> Sweep:
        return sweep(
            self.weight,
            self.hessian,
            damping=self.damping,
            backend=self.recipe.backend,
            memory_budget=MEMORY_BUDGET,
        )

    def sweep_blocks(self, size: int) -> BlockSweep:
        return sweep_blocks(
            self.weight,
            self.hessian,
            size,
            channels=self.channels,
            damping=self.damping,
            backend=self.recipe.backend,
            memory_budget=MEMORY_BUDGET,
        )


def _solve_codes_(record: LayerRecord, layer: _Layer, level: Level) -> None:
    assert level.grid is not None
    mask = record.mask(level)
    solution = layer.quantize(level.grid, None if level.pattern is None else mask.to(layer.weight.device))
    assert solution.grid is not None
    assert solution.codes is not None
    record.add_codes(level, mask, solution.grid, solution.codes)
    record.levels[level.name] = _record_of(solution)


def _solve_masks_(record: LayerRecord, layer: _Layer, levels: Sequence[Level]) -> None:
    """Levels without a grid: all of a ladder from one sweep, the others one by one."""
    kinds: dict[str, list[Level]] = {}
    for level in levels:
        if level.pattern is not None:
            kinds.setdefault(_kind(level.pattern), []).append(level)
    for kind in kinds.values():
        pattern = kind[0].pattern
        if isinstance(pattern, Unstructured):
            _solve_ladder_(record, layer, layer.sweep(), kind)
        elif isinstance(pattern, Block):
            _solve_ladder_(record, layer, layer.sweep_blocks(pattern.size), kind)
        else:
            _solve_singly_(record, layer, kind)


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


def _solve_ladder_(record: LayerRecord, layer: _Layer, swept: Sweep | BlockSweep, ladder: Sequence[Level]) -> None:
    check_ladder(ladder)
    masks = {level.name: swept.mask(_sparsity(level), layer.recipe.selection) for level in ladder}
    losses = _ladder_losses(swept, torch.stack(list(masks.values())))
    for (name, mask), (loss, damping_loss) in zip(masks.items(), losses, strict=True):
        kept, notes = int(mask.sum()), swept.problem.notes
        record.levels[name] = LevelRecord(loss, damping_loss, kept, 0, swept.backend, notes)
    record.add_masks(masks)


def _sparsity(level: Level) -> float:
    assert isinstance(level.pattern, (Unstructured, Block))
    return level.pattern.sparsity


def _ladder_losses(sweep: Sweep | BlockSweep, masks: Tensor) -> list[tuple[float, float]]:
    """Loss and damping loss of every level, from nested keep-masks ``[K, g, R, d]``."""
    problem = sweep.problem
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
