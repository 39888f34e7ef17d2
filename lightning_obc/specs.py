"""What to do: calibration and stages, over patterns and grids. Frozen, validated, plain enough for YAML."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Optional, Union, get_args

from lightning_obc.activation_spec import ActivationGrid as ActivationGrid
from lightning_obc.activation_spec import parse_activations
from lightning_obc.calibration_spec import Calibration as Calibration
from lightning_obc.errors import SpecError
from lightning_obc.patterns import NM as NM
from lightning_obc.patterns import Block as Block
from lightning_obc.patterns import Granularity as Granularity
from lightning_obc.patterns import IntGrid as IntGrid
from lightning_obc.patterns import Pattern as Pattern
from lightning_obc.patterns import RangeSearch as RangeSearch
from lightning_obc.patterns import Structured as Structured
from lightning_obc.patterns import Unstructured as Unstructured
from lightning_obc.patterns import parse_grid as parse_grid
from lightning_obc.patterns import parse_pattern as parse_pattern
from lightning_obc.schedules import At, Gradual, check_at, times
from lightning_obc.solvers import Order, PruneSolver, QuantizeSolver, Refine, check_order, check_solver, parse_refine

Selection = Literal["heap", "sorted", "hull"]
Misfit = Literal["error", "skip", "pad"]
BACKENDS = ("auto", "naive", "torch", "numba", "triton")


class Stage(ABC):
    """One step of a compression recipe. Subclasses are frozen dataclasses with at least these fields."""

    at: At
    layers: list[str] | None
    exclude: list[str] | None


@dataclass(frozen=True)
class PruneOverride:
    """What a :class:`Prune` stage does differently in some layers; None leaves the stage's own setting.

    Args:
        pattern, damping, selection, misfit, backend, solver, refine: As for :class:`Prune`.
    """

    pattern: Union[str, float, NM, Pattern, None] = None
    damping: Union[str, float, None] = None
    selection: Optional[Selection] = None
    misfit: Optional[Misfit] = None
    backend: Optional[str] = None
    solver: Optional[PruneSolver] = None
    refine: Union[bool, Refine, None] = None


@dataclass(frozen=True)
class QuantizeOverride:
    """What a :class:`Quantize` stage does differently in some layers; None leaves the stage's own setting.

    Args:
        grid, damping, misfit, backend, after, solver, refine, activations, order: As for :class:`Quantize`.
    """

    grid: Union[int, IntGrid, None] = None
    damping: Union[str, float, None] = None
    misfit: Optional[Misfit] = None
    backend: Optional[str] = None
    after: Optional[Literal["freeze", "train"]] = None
    solver: Optional[QuantizeSolver] = None
    refine: Union[bool, Refine, None] = None
    order: Optional[Order] = None
    activations: Union[int, ActivationGrid, None] = None


def _check_overrides(stage: Any, kind: type[Any]) -> None:
    """Turn plain mappings into overrides, and see that every one makes a stage that can be meant."""
    known = [entry.name for entry in fields(kind)]
    if not isinstance(stage.overrides, Mapping):
        raise SpecError("overrides is no mapping", got=repr(stage.overrides), expected='{"stem.*": {...}}')
    for layers, override in stage.overrides.items():
        unknown = sorted(set(override) - set(known)) if isinstance(override, Mapping) else []
        if unknown or not isinstance(override, (Mapping, kind)):
            raise SpecError(
                f"The override of {layers!r} cannot be read",
                got=", ".join(map(str, unknown)) or repr(override),
                expected=f"a mapping or {kind.__name__} with {', '.join(known)}",
            )
    made = {key: x if isinstance(x, kind) else kind(**x) for key, x in stage.overrides.items()}
    object.__setattr__(stage, "overrides", made)
    for override in made.values():
        overridden(stage, override)


def overridden(stage: Any, override: Any) -> Any:
    """The stage as it is for the layers of one of its overrides."""
    given = {entry.name: getattr(override, entry.name) for entry in fields(override)}
    return replace(stage, overrides={}, **{name: value for name, value in given.items() if value is not None})


def _check_damping(damping: Union[str, float]) -> None:
    if isinstance(damping, str):
        if damping != "auto":
            raise SpecError("Unknown damping", got=repr(damping), expected='a number >= 0, or "auto"')
    elif (
        not isinstance(damping, (int, float))
        or isinstance(damping, bool)
        or not (math.isfinite(damping) and damping >= 0)
    ):
        raise SpecError("damping is not possible", got=damping, expected='a finite number >= 0, or "auto"')


def check_refinable(pattern: Pattern, refine: Refine | None) -> None:
    """Raise SpecError when masks of a pattern cannot be refined."""
    if refine is not None and not isinstance(pattern, (Unstructured, NM)):
        raise SpecError(
            "This pattern cannot be refined",
            got=str(pattern),
            expected="an unstructured or N:M pattern",
            remedy="drop refine",
        )


def _backends(pattern: Pattern) -> tuple[str, ...]:
    """Backends that solve a pattern."""
    large = isinstance(pattern, Block) and pattern.size > 8
    return tuple(name for name in BACKENDS if not (large and name == "triton"))


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SpecError(f"Unknown {name}", got=repr(value), expected=f"one of {allowed}")


def _check_schedule(stage: Prune) -> None:
    if stage.schedule is None:
        return
    pattern = stage.parsed
    if isinstance(pattern, NM):
        raise SpecError(
            "An N:M pattern cannot be reached gradually",
            got=f"{pattern} with {stage.schedule}",
            expected="an unstructured, block or structured sparsity",
            remedy="write one stage per pattern, from the milder to the stronger",
        )
    if not isinstance(stage.at, dict):
        raise SpecError(
            "A gradual stage needs a first epoch or step", got=stage.at, expected='{"epoch": k} or {"step": k}'
        )
    if stage.schedule.initial > getattr(pattern, "sparsity", 1.0):
        raise SpecError(
            "A gradual stage starts above its final sparsity",
            got=f"initial={stage.schedule.initial}, final {pattern}",
            expected="initial <= final",
        )


def _parsed(override: PruneOverride) -> Pattern:
    assert override.pattern is not None
    return parse_pattern(override.pattern)


def _at_step(final: Pattern, schedule: Gradual, step: int) -> Pattern:
    """The pattern of one step of a gradual schedule; the last step's is the final one itself."""
    assert isinstance(final, (Unstructured, Block, Structured))
    if step == schedule.steps - 1:
        return final
    return replace(final, sparsity=schedule.sparsities(final.sparsity)[step])


@dataclass(frozen=True)
class Prune(Stage):
    """Prune the selected layers to a sparsity pattern.

    Args:
        pattern: ``"2:4"``, ``0.5``, or a :class:`Pattern`.
        at: When the callback runs the stage (ignored by :func:`lightning_obc.compress`): ``"train_start"``,
            ``"train_end"``, ``"validate"``, ``{"epoch": k}`` (before epoch ``k``, counted from 0), ``{"step": k}``
            (after optimizer step ``k``), or a :class:`~lightning_obc.schedules.Plateau` of a metric.
        layers: Names, globs or type names of the layers; ``None`` means every supported layer.
        exclude: Names, globs or type names to leave out.
        damping: Share of ``mean(diag H)`` added to the diagonal, or ``"auto"``.
        selection: How an unstructured pattern spreads its zeros over the rows of a layer.
        misfit: What to do with a layer whose input channels do not divide by the pattern's group.
        backend: ``"auto"``, ``"naive"``, ``"torch"``, ``"numba"`` or ``"triton"``.
        schedule: Reach the pattern's sparsity in several steps. Needs ``at`` to be an epoch or a step.
        solver: ``"obs"``, or another method for comparison: ``"sparsegpt"`` (``"sparsegpt-act"``: columns in activation
            order), ``"adaprune"`` or ``"magnitude"``.
        refine: Swap kept for removed weights afterwards; ``True`` or a :class:`~lightning_obc.solvers.Refine`.
            Unstructured and N:M patterns only.
        edges: ``"skip"`` leaves the first and the last layer of the model alone: those that the first calibration
            batch reaches first and last (where there is no data yet, in the order of the modules). Embeddings are not
            counted.
        overrides: By name, glob or type name of layers: what is different there, as a :class:`PruneOverride` or a
            mapping of its fields, such as ``{"stem.*": {"pattern": 0.3}}``. Of several that match, later ones win.

    Raises:
        SpecError: A value that is unknown or out of range, or two that do not go together.
    """

    pattern: Union[str, float, NM, Pattern]
    at: At = "train_end"
    layers: list[str] | None = None
    exclude: list[str] | None = None
    damping: Union[str, float] = 0.01
    selection: Selection = "heap"
    misfit: Misfit = "error"
    backend: str = "auto"
    schedule: Gradual | None = None
    solver: PruneSolver = "obs"
    refine: Union[bool, Refine] = False
    edges: Literal["same", "skip"] = "same"
    overrides: dict[str, PruneOverride] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parse_pattern(self.pattern)
        check_at(self.at)
        _check_damping(self.damping)
        _check_choice("selection", self.selection, get_args(Selection))
        _check_choice("misfit", self.misfit, get_args(Misfit))
        _check_choice("backend", self.backend, BACKENDS)
        _check_schedule(self)
        names = _backends(self.parsed)
        if self.backend not in names:
            raise SpecError(
                "A backend cannot solve this pattern",
                got=f"backend={self.backend!r} for {self.parsed}",
                expected=f"one of {names}",
            )
        check_solver(self.solver, self.refine, quantize=False)
        check_refinable(self.parsed, parse_refine(self.refine))
        _check_choice("edges", self.edges, ("same", "skip"))
        _check_overrides(self, PruneOverride)

    @property
    def parsed(self) -> Pattern:
        return parse_pattern(self.pattern)

    def steps(self) -> list[Prune]:
        """The single prunings that this stage means: itself, or one per step of its schedule."""
        if self.schedule is None:
            return [self]
        unit, start = next(iter(times(self.at)))
        return [
            replace(
                self,
                pattern=_at_step(self.parsed, self.schedule, i),
                at={unit: start + i * self.schedule.every},
                schedule=None,
                overrides={
                    name: x if x.pattern is None else replace(x, pattern=_at_step(_parsed(x), self.schedule, i))
                    for name, x in self.overrides.items()
                },
            )
            for i in range(self.schedule.steps)
        ]

    def __str__(self) -> str:
        return f"Prune({self.parsed})"


@dataclass(frozen=True)
class Quantize(Stage):
    """Quantize the weights of the selected layers, and their inputs if wanted; zeros of pruned layers stay zeros.

    Args:
        grid: Bit width, or an :class:`IntGrid`.
        at: When the callback runs the stage, as for :class:`Prune`.
        layers: Names, globs or type names of the layers; ``None`` means every supported layer.
        exclude: Names, globs or type names to leave out.
        damping: Share of ``mean(diag H)`` added to the diagonal, or ``"auto"``.
        misfit: What to do with a layer whose input channels do not divide by the grid's group size.
        backend: ``"auto"``, ``"naive"``, ``"torch"``, ``"numba"`` or ``"triton"``.
        after: What training does with the weights once they are quantized: ``"freeze"`` keeps them as they are,
            ``"train"`` goes on training them with a straight-through estimator, always on their grid.
        solver: ``"obs"``, or another method for comparison: ``"gptq"`` (``"gptq-act"``: columns in activation order) or
            ``"rtn"``, round to nearest.
        refine: Coordinate descent on the codes afterwards; ``True`` or a :class:`~lightning_obc.solvers.Refine`.
        edges: Bit width of the first and the last layer of the model and of their inputs, or ``"skip"`` to leave them
            alone; see :class:`Prune`.
        overrides: By name, glob or type name of layers: what is different there, as a :class:`QuantizeOverride` or a
            mapping of its fields, such as ``{"head": {"grid": 8}}``. Of several that match, later ones win.
        activations: Bit width of the layers' inputs, or an :class:`ActivationGrid`; None leaves them in floating point.
            Their ranges are found on the calibration data behind the quantized weights, and inputs are rounded from
            then on, in training with a straight-through gradient. A layer that keeps its weights keeps its input.
        order: In which order OBS rounds the weights of a row: ``"greedy"``, the cheapest first (the paper),
            ``"activation"`` or ``"ascending"`` (one order of columns for all rows), or ``"auto"``: all three, and every
            row keeps the best.

    Raises:
        SpecError: A value that is unknown or out of range, or two that do not go together.
    """

    grid: Union[int, IntGrid] = field(default_factory=IntGrid)
    at: At = "train_end"
    layers: list[str] | None = None
    exclude: list[str] | None = None
    damping: Union[str, float] = 0.01
    misfit: Misfit = "error"
    backend: str = "auto"
    after: Literal["freeze", "train"] = "freeze"
    solver: QuantizeSolver = "obs"
    refine: Union[bool, Refine] = False
    edges: Union[Literal["same", "skip"], int] = "same"
    overrides: dict[str, QuantizeOverride] = field(default_factory=dict)
    activations: Union[int, ActivationGrid, None] = None
    order: Order = "auto"

    def __post_init__(self) -> None:
        parse_grid(self.grid)
        parse_activations(self.activations)
        check_at(self.at)
        _check_damping(self.damping)
        _check_choice("misfit", self.misfit, get_args(Misfit))
        _check_choice("backend", self.backend, BACKENDS)
        check_solver(self.solver, self.refine, quantize=True)
        check_order(self.order)
        if self.order != "auto" and self.solver != "obs":
            raise SpecError(
                "order is for OBS", got=f"order={self.order!r} with solver={self.solver!r}", expected='solver="obs"'
            )
        if self.after not in ("freeze", "train"):
            raise SpecError("Quantize.after is unknown", got=repr(self.after), expected='"freeze" or "train"')
        if isinstance(self.edges, str):
            _check_choice("edges", self.edges, ("same", "skip"))
        else:
            replace(self.parsed, bits=self.edges)
        _check_overrides(self, QuantizeOverride)

    @property
    def parsed(self) -> IntGrid:
        return parse_grid(self.grid)

    @property
    def inputs(self) -> ActivationGrid | None:
        """How the layers' inputs are quantized; None where they stay in floating point."""
        return parse_activations(self.activations)

    def __str__(self) -> str:
        return f"Quantize({self.parsed})" if self.inputs is None else f"Quantize({self.parsed}; {self.inputs})"
