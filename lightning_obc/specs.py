"""What to do: patterns, grids, calibration and stages. Frozen, validated, plain enough for YAML."""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import dataclass, field, replace
from typing import Literal, Union, get_args

from lightning_obc.calibration_spec import Calibration as Calibration
from lightning_obc.errors import SpecError
from lightning_obc.schedules import At, Gradual, check_at, times
from lightning_obc.solvers import PruneSolver, QuantizeSolver, Refine, check_solver, parse_refine

Granularity = Literal["tensor", "channel", "group"]
RangeSearch = Literal["minmax", "mse", "hessian"]
Selection = Literal["heap", "sorted", "hull"]
Misfit = Literal["error", "skip", "pad"]
BACKENDS = ("auto", "naive", "torch", "numba", "triton")


class Pattern(ABC):  # noqa: B024 (a common type for annotations and YAML)
    """A sparsity pattern. Subclasses are frozen dataclasses."""


def _check_sparsity(sparsity: float) -> None:
    if not isinstance(sparsity, (int, float)) or isinstance(sparsity, bool) or not 0 <= sparsity < 1:
        raise SpecError(
            "A sparsity lies outside [0, 1)",
            got=sparsity,
            expected="the fraction of zeros, 0 <= sparsity < 1",
            remedy='write 0.5 for half of the weights, or an N:M pattern in quotes, "2:4"',
        )


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any weight may go. One choice over all rows of a layer (paper, section 4, algorithm 2).

    Args:
        sparsity: Fraction of zeros in the layer, in [0, 1).
    """

    sparsity: float

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)

    def __str__(self) -> str:
        return f"{self.sparsity:.4g}"


@dataclass(frozen=True)
class NM(Pattern):
    """At most ``n`` non-zeros in every ``m`` consecutive weights along the input channels (paper, section 4).

    Args:
        n: Weights kept of each group, 1 <= n < m.
        m: Size of a group.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        ok = all(isinstance(x, int) and not isinstance(x, bool) for x in (self.n, self.m))
        if not ok or not 1 <= self.n < self.m:
            raise SpecError(
                "An N:M pattern is not possible",
                got=f"{self.n}:{self.m}",
                expected="integers n:m with 1 <= n < m, n non-zeros kept of every m weights",
                remedy='for example "2:4"',
            )

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of ``size`` consecutive input channels leave together (paper, section 4, "block-sparsity").

    Args:
        size: Weights per block.
        sparsity: Fraction of blocks that become zero, in [0, 1).
    """

    size: int = 4
    sparsity: float = 0.5

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1:
            raise SpecError("A block size is not possible", got=self.size, expected="an integer of at least 1")

    def __str__(self) -> str:
        return f"block{self.size} {self.sparsity:.4g}"


@dataclass(frozen=True)
class Structured(Pattern):
    """Whole input channels leave, for all rows and kernel positions together (as in ZipLM, arXiv 2302.04089).

    Args:
        sparsity: Fraction of input channels that become zero, in [0, 1).
    """

    sparsity: float = 0.5

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)

    def __str__(self) -> str:
        return f"structured {self.sparsity:.4g}"


def parse_pattern(value: Union[str, float, Pattern]) -> Pattern:
    """Turn the shorthand of a stage into a pattern: ``"2:4"`` is ``NM(2, 4)``, ``0.5`` is ``Unstructured(0.5)``.

    Raises:
        SpecError: The value is neither a pattern, a fraction, nor two integers with a colon.
    """
    if isinstance(value, Pattern):
        return value
    if isinstance(value, str):
        head, colon, tail = value.partition(":")
        try:
            return NM(int(head), int(tail)) if colon else Unstructured(float(value))
        except ValueError as error:
            if isinstance(error, SpecError):
                raise
            raise SpecError(
                "A pattern cannot be read",
                got=repr(value),
                expected='"n:m" such as "2:4", or a fraction such as 0.5',
                remedy="use NM(n, m) or Unstructured(sparsity) to be explicit",
            ) from None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not 0 <= value < 1:
            raise SpecError(
                "A pattern given as a number lies outside [0, 1)",
                got=value,
                expected="a fraction of zeros such as 0.5",
                remedy='YAML reads an unquoted 2:4 as the number 124; write the pattern in quotes, "2:4"',
            )
        return Unstructured(float(value))
    raise SpecError("A pattern has the wrong type", got=type(value).__name__, expected="str, float or Pattern")


@dataclass(frozen=True)
class IntGrid:
    """An integer quantization grid (paper, section 5 and appendix).

    Args:
        bits: Bit width, 1 to 8. Symmetric grids need at least 2.
        symmetric: Range symmetric around zero, with the zero point fixed in the middle of the codes.
        granularity: One scale per ``"tensor"``, per output ``"channel"`` or per ``"group"`` of input channels.
        group_size: Input channels per group; needed by, and only by, ``granularity="group"``.
        scale: Range search: ``"minmax"``, ``"mse"`` (shrink factors, error norm 2.4) or ``"hessian"``
            (least squares refit of the scale under the layer's Hessian).
    """

    bits: int = 4
    symmetric: bool = False
    granularity: Granularity = "channel"
    group_size: int | None = None
    scale: RangeSearch = "mse"

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 1 <= self.bits <= 8:
            raise SpecError("A bit width is not supported", got=self.bits, expected="an integer from 1 to 8")
        if self.symmetric and self.bits < 2:
            raise SpecError(
                "A symmetric grid has too few bits", got=self.bits, expected="at least 2", remedy="symmetric=False"
            )
        if (self.granularity == "group") != (self.group_size is not None):
            raise SpecError(
                "granularity and group_size do not belong together",
                got=f"granularity={self.granularity!r}, group_size={self.group_size}",
                expected='group_size with granularity="group", and only there',
            )
        if self.group_size is not None and self.group_size < 1:
            raise SpecError("group_size is too small", got=self.group_size, expected="at least 1")
        for name, value, allowed in (
            ("granularity", self.granularity, ("tensor", "channel", "group")),
            ("scale", self.scale, ("minmax", "mse", "hessian")),
        ):
            if value not in allowed:
                raise SpecError(f"Unknown {name}", got=repr(value), expected=f"one of {allowed}")

    @property
    def max_code(self) -> int:
        """Largest code, ``2**bits - 1``; codes are unsigned."""
        return 2**self.bits - 1

    def __str__(self) -> str:
        return f"int{self.bits} {'sym' if self.symmetric else 'asym'} per {self.granularity}"


def parse_grid(value: Union[int, IntGrid]) -> IntGrid:
    """``4`` is ``IntGrid(4)``."""
    return value if isinstance(value, IntGrid) else IntGrid(value)


class Stage(ABC):
    """One step of a compression recipe. Subclasses are frozen dataclasses with at least these fields."""

    at: At
    layers: list[str] | None
    exclude: list[str] | None


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


@dataclass(frozen=True)
class Prune(Stage):
    """Prune the selected layers to a sparsity pattern.

    Args:
        pattern: ``"2:4"``, ``0.5``, or a :class:`Pattern`.
        at: When the callback runs the stage (ignored by :func:`lightning_obc.compress`): ``"train_start"``,
            ``"train_end"``, ``"validate"``, ``{"epoch": k}`` (before epoch ``k``, counted from 0), ``{"step": k}``
            (after optimizer step ``k``).
        layers: Names, globs or type names of the layers; ``None`` means every supported layer.
        exclude: Names, globs or type names to leave out.
        damping: Share of ``mean(diag H)`` added to the diagonal, or ``"auto"``.
        selection: How an unstructured pattern spreads its zeros over the rows of a layer.
        misfit: What to do with a layer whose input channels do not divide by the pattern's group.
        backend: ``"auto"``, ``"naive"``, ``"torch"``, ``"numba"`` or ``"triton"``.
        schedule: Reach the pattern's sparsity in several steps. Needs ``at`` to be an epoch or a step.
        solver: ``"obs"``, or another method for comparison.
        refine: Swap kept for removed weights afterwards; ``True`` or a :class:`~lightning_obc.solvers.Refine`.
            Unstructured and N:M patterns only.
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

    def __post_init__(self) -> None:
        parse_pattern(self.pattern)
        check_at(self.at)
        _check_damping(self.damping)
        _check_choice("selection", self.selection, get_args(Selection))
        _check_choice("misfit", self.misfit, get_args(Misfit))
        _check_choice("backend", self.backend, BACKENDS)
        _check_schedule(self)
        check_solver(self.solver, self.refine, quantize=False)
        check_refinable(self.parsed, parse_refine(self.refine))

    @property
    def parsed(self) -> Pattern:
        return parse_pattern(self.pattern)

    def steps(self) -> list[Prune]:
        """The single prunings that this stage means: itself, or one per step of its schedule."""
        if self.schedule is None:
            return [self]
        final, (unit, start) = self.parsed, next(iter(times(self.at)))
        assert isinstance(final, (Unstructured, Block, Structured))
        return [
            replace(
                self,
                pattern=final if i == self.schedule.steps - 1 else replace(final, sparsity=sparsity),
                at={unit: start + i * self.schedule.every},
                schedule=None,
            )
            for i, sparsity in enumerate(self.schedule.sparsities(final.sparsity))
        ]

    def __str__(self) -> str:
        return f"Prune({self.parsed})"


@dataclass(frozen=True)
class Quantize(Stage):
    """Quantize the weights of the selected layers; zeros of pruned layers stay zeros.

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
        solver: ``"obs"``, or another method for comparison.
        refine: Coordinate descent on the codes afterwards; ``True`` or a :class:`~lightning_obc.solvers.Refine`.
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

    def __post_init__(self) -> None:
        parse_grid(self.grid)
        check_at(self.at)
        _check_damping(self.damping)
        _check_choice("misfit", self.misfit, get_args(Misfit))
        _check_choice("backend", self.backend, BACKENDS)
        check_solver(self.solver, self.refine, quantize=True)
        if self.after not in ("freeze", "train"):
            raise SpecError("Quantize.after is unknown", got=repr(self.after), expected='"freeze" or "train"')

    @property
    def parsed(self) -> IntGrid:
        return parse_grid(self.grid)

    def __str__(self) -> str:
        return f"Quantize({self.parsed})"
