"""Sparsity patterns and integer grids: what the weights of a layer become. Frozen, validated, plain enough for YAML."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Literal, Union

from lightning_obc.errors import SpecError

Granularity = Literal["tensor", "channel", "group"]
RangeSearch = Literal["minmax", "mse", "hessian"]


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

    Raises:
        SpecError: ``sparsity`` outside [0, 1).
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

    Raises:
        SpecError: ``n`` and ``m`` are no integers with 1 <= n < m.
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

    Raises:
        SpecError: ``size`` below 1, or ``sparsity`` outside [0, 1).
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

    Raises:
        SpecError: ``sparsity`` outside [0, 1).
    """

    sparsity: float = 0.5

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)

    def __str__(self) -> str:
        return f"structured {self.sparsity:.4g}"


def _meant(value: float) -> str:
    """What a number outside of [0, 1) may have been: YAML reads ``n:m`` in base 60; others write percentages."""
    meant = []
    # NaN and infinity have no digits; 90 is hardly 1:30, so only groups of up to 16 count.
    n, m = divmod(int(value), 60) if 0 < value < 3600 and value == int(value) else (0, 0)
    if 0 < n < m <= 16:
        meant.append(f'YAML reads an unquoted {n}:{m} as the number {value:g}; write the pattern in quotes, "{n}:{m}"')
    if -1 < value < 0:
        meant.append(f"{-value:g} for {-100 * value:g} % of zeros")
    elif value == 1:
        meant.append("0.01 for 1 % of zeros; or 0.99 for 99 %, since 1 would leave no weight at all")
    elif 1 < value < 100:
        meant.append(f"{value:g} % of zeros is {value / 100:g}")
    elif value == 100:
        meant.append("100 % of zeros would leave no weight at all: less, such as 0.9 for 90 %, or exclude the layer")
    return "; or ".join(meant) or 'write N:M patterns in quotes, "2:4", and sparsity as a fraction, 0.5'


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
                remedy=_meant(value),
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

    Raises:
        SpecError: A value that is unknown or out of range, or a group size without groups.
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
