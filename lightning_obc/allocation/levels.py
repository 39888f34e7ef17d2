"""Levels: what a layer can become. A pattern of zeros, a grid for the weights, a bit width for its inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning_obc.errors import SpecError
from lightning_obc.specs import NM, Block, IntGrid, Pattern, Structured, Unstructured, parse_grid, parse_pattern

FLOAT_BITS = 32
LADDER_FACTOR = 0.9


@dataclass(frozen=True)
class Level:
    """One way to compress a layer. ``Level()`` is the dense float32 layer.

    Args:
        pattern: Zeros of the weight; None keeps every weight.
        grid: Grid of the weight; None leaves it floating point.
        activations: Bits of the layer's input, 2 to 8; None leaves it floating point.

    Raises:
        SpecError: Bits that are out of range.
    """

    pattern: Pattern | None = None
    grid: IntGrid | None = None
    activations: int | None = None

    def __post_init__(self) -> None:
        bits = self.activations
        if bits is not None and (not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8):
            raise SpecError("A bit width of activations is not supported", got=bits, expected="an integer from 2 to 8")

    @property
    def weight_bits(self) -> int:
        return FLOAT_BITS if self.grid is None else self.grid.bits

    @property
    def activation_bits(self) -> int:
        return FLOAT_BITS if self.activations is None else self.activations

    @property
    def weights(self) -> Level:
        """The level without its activations: all that the weight depends on."""
        return replace(self, activations=None)

    @property
    def mask(self) -> Level:
        """The level's zeros alone."""
        return Level(self.pattern)

    @property
    def name(self) -> str:
        """A short unique name: ``dense``, ``0.5``, ``2:4+w8+a8``, ``block4@0.75+w4``."""
        parts = [] if self.pattern is None else [_pattern_name(self.pattern)]
        if self.grid is not None:
            parts.append(_grid_name(self.grid))
        if self.activations is not None:
            parts.append(f"a{self.activations}")
        return "+".join(parts) or "dense"

    def __str__(self) -> str:
        return self.name

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON and YAML, defaults left out; read back by :meth:`from_dict`."""
        values: dict[str, Any] = {}
        if self.pattern is not None:
            values["pattern"] = _pattern_value(self.pattern)
        if self.grid is not None:
            values["grid"] = _grid_value(self.grid)
        if self.activations is not None:
            values["activations"] = self.activations
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Level:
        """Read :meth:`to_dict`.

        Raises:
            SpecError: Unknown keys or values.
        """
        unknown = sorted(set(values) - {"pattern", "grid", "activations"})
        if unknown:
            raise SpecError("A level has unknown entries", got=unknown, expected="pattern, grid and activations")
        pattern, grid = values.get("pattern"), values.get("grid")
        return cls(
            pattern=None if pattern is None else _read_pattern(pattern),
            grid=None if grid is None else (IntGrid(**grid) if isinstance(grid, Mapping) else parse_grid(grid)),
            activations=values.get("activations"),
        )


def _pattern_name(pattern: Pattern) -> str:
    if isinstance(pattern, Unstructured):
        return f"{pattern.sparsity:.6g}"
    if isinstance(pattern, NM):
        return str(pattern)
    if isinstance(pattern, Block):
        return f"block{pattern.size}@{pattern.sparsity:.6g}"
    if isinstance(pattern, Structured):
        return f"structured@{pattern.sparsity:.6g}"
    raise SpecError("A pattern has no name", got=type(pattern).__name__, expected="a pattern of lightning_obc")


def _pattern_value(pattern: Pattern) -> Any:
    if isinstance(pattern, Unstructured):
        return pattern.sparsity
    if isinstance(pattern, NM):
        return str(pattern)
    return {"type": type(pattern).__name__} | asdict(pattern)  # type: ignore[call-overload]


def _grid_value(grid: IntGrid) -> Any:
    values = {key: value for key, value in asdict(grid).items() if value != getattr(IntGrid(grid.bits), key)}
    return {"bits": grid.bits} | values if values else grid.bits


def _read_pattern(value: Any) -> Pattern:
    if not isinstance(value, Mapping):
        return parse_pattern(value)
    kinds = {kind.__name__: kind for kind in (Unstructured, NM, Block, Structured)}
    arguments = dict(value)
    kind = kinds.get(arguments.pop("type", ""))
    if kind is None:
        raise SpecError("A level's pattern has an unknown type", got=value.get("type"), expected=", ".join(kinds))
    try:
        return kind(**arguments)
    except TypeError as error:
        raise SpecError("A level's pattern cannot be read", got=dict(value), expected=str(error)) from None


def _grid_name(grid: IntGrid) -> str:
    name = f"w{grid.bits}"
    if grid.symmetric:
        name += "sym"
    if grid.granularity != "channel":
        name += grid.granularity + (str(grid.group_size) if grid.group_size else "")
    return name + ("" if grid.scale == "mse" else grid.scale)


def density_ladder(minimum: float, factor: float = LADDER_FACTOR) -> list[float]:
    """Densities 1, ``factor``, ``factor²``, … down to the first at or below ``minimum`` (paper, section 6).

    ``minimum=0.01`` gives 45 densities, ``0.05`` gives 30.
    """
    if not (0 < minimum < 1 and 0 < factor < 1):
        raise SpecError("A ladder is not possible", got=(minimum, factor), expected="both numbers in (0, 1)")
    steps = math.ceil(round(math.log(minimum) / math.log(factor), 9))
    return [factor**k for k in range(steps + 1)]


def unstructured_ladder(minimum: float = 0.01, factor: float = LADDER_FACTOR) -> list[Level]:
    """Unstructured levels of :func:`density_ladder`, the dense one first.

    Args:
        minimum: Smallest density, in (0, 1).
        factor: Density of a level over that of the one before, in (0, 1).

    Raises:
        SpecError: One of them is out of range.
    """
    return [Level(), *(Level(Unstructured(1 - density)) for density in density_ladder(minimum, factor)[1:])]


def block_ladder(size: int = 4, minimum: float = 0.05, factor: float = LADDER_FACTOR) -> list[Level]:
    """Block levels of :func:`density_ladder`, the dense one first.

    Args:
        size: Consecutive input channels of a block.
        minimum: Smallest density, in (0, 1).
        factor: Density of a level over that of the one before, in (0, 1).

    Raises:
        SpecError: One of them is out of range.
    """
    return [Level(), *(Level(Block(size, 1 - density)) for density in density_ladder(minimum, factor)[1:])]


def product(
    patterns: Iterable[Pattern | str | float | None], bits: Iterable[tuple[int | IntGrid | None, int | None]]
) -> list[Level]:
    """Every pattern with every pair of weight grid and activation bits.

    Args:
        patterns: Patterns or their shorthand; None keeps all weights.
        bits: Pairs such as ``(8, 8)``; None in a pair leaves that side floating point.
    """
    parsed = [None if pattern is None else parse_pattern(pattern) for pattern in patterns]
    pairs = [(None if grid is None else parse_grid(grid), activations) for grid, activations in bits]
    return unique(Level(pattern, grid, activations) for pattern in parsed for grid, activations in pairs)


def unique(levels: Iterable[Level]) -> list[Level]:
    """The levels without repetitions, in order.

    Raises:
        SpecError: Two different levels share a name, so that a profile could not tell them apart.
    """
    named: dict[str, Level] = {}
    for level in levels:
        if named.setdefault(level.name, level) != level:
            raise SpecError(
                "Two levels have the same name",
                got=f"{level.name}: {named[level.name].to_dict()} and {level.to_dict()}",
                expected="levels that differ by more than the sixth digit",
            )
    return list(named.values())


def check_levels(levels: Sequence[Level]) -> list[Level]:
    """The levels of a database: :func:`unique`, the dense one among them.

    Raises:
        SpecError: No levels, or something that is not a level.
    """
    wrong = [level for level in levels if not isinstance(level, Level)]
    if wrong or not levels:
        raise SpecError("Levels cannot be used", got=wrong or "none", expected="a list of Level")
    return unique([Level(), *levels])
