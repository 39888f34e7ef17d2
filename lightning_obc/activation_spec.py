"""How the inputs of layers are quantized. Frozen and validated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Union

from lightning_obc.errors import SpecError

LEAST_BITS, MOST_BITS = 2, 8


@dataclass(frozen=True)
class ActivationGrid:
    """How the input of a layer is quantized.

    Args:
        bits: Bit width, 2 to 8.
        symmetric: Range symmetric around zero. The default, asymmetric, gives non-negative inputs all codes.
        granularity: One range per ``"tensor"`` or per input ``"channel"``.
        range: ``"minmax"``, ``"mse"`` (the shrunk range of least error) or ``"percentile"``.
        percentile: Share of the values inside the range of ``"percentile"``, in percent; what is left out is split
            evenly between both ends.

    Raises:
        SpecError: A value that is unknown or out of range.
    """

    bits: int = 8
    symmetric: bool = False
    granularity: Literal["tensor", "channel"] = "tensor"
    range: Literal["minmax", "mse", "percentile"] = "mse"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        whole = isinstance(self.bits, int) and not isinstance(self.bits, bool)
        if not whole or not LEAST_BITS <= self.bits <= MOST_BITS:
            raise SpecError(
                "A bit width of activations is not supported", got=self.bits, expected="an integer from 2 to 8"
            )
        if self.granularity not in ("tensor", "channel"):
            raise SpecError("Unknown granularity", got=repr(self.granularity), expected='"tensor" or "channel"')
        if self.range not in ("minmax", "mse", "percentile"):
            raise SpecError("Unknown range", got=repr(self.range), expected='"minmax", "mse" or "percentile"')
        if not 50 < self.percentile <= 100:
            raise SpecError("A percentile is not possible", got=self.percentile, expected="a number in (50, 100]")

    def with_bits(self, bits: int) -> ActivationGrid:
        """The same with another bit width."""
        return replace(self, bits=bits)

    def __str__(self) -> str:
        return f"a{self.bits} {'sym' if self.symmetric else 'asym'} per {self.granularity}, {self.range}"


def parse_activations(value: Union[int, ActivationGrid, None]) -> ActivationGrid | None:
    """``8`` is ``ActivationGrid(8)``; None leaves inputs in floating point."""
    return value if value is None or isinstance(value, ActivationGrid) else ActivationGrid(value)
