"""Ranges of quantized activations, in the form that runtimes take: one scale, one zero point, unsigned 8-bit codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_obc.errors import ExportError, SpecError
from lightning_obc.grids import Grid

LEVELS = 255


@dataclass(frozen=True)
class ActivationRange:
    """Quantization of one tensor of activations: ``(code - zero_point) * scale`` with codes ``0 .. max_code``.

    Codes above ``max_code`` are clipped; 255 leaves that to the type.
    """

    scale: float
    zero_point: int
    max_code: int = LEVELS

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf") or not 0 <= self.zero_point <= self.max_code <= LEVELS:
            raise SpecError(
                "An activation range is not possible",
                got=f"scale {self.scale}, zero point {self.zero_point}, largest code {self.max_code}",
                expected="a positive scale and 0 <= zero point <= largest code <= 255",
            )

    @classmethod
    def between(cls, low: float, high: float, bits: int = 8) -> ActivationRange:
        """The range of 0, ``low`` and ``high`` in the first ``2**bits`` codes; values above it are not clipped."""
        low, high = min(low, 0.0), max(high, 0.0)
        # The scale is stored in float32; a zero point from any other scale would be off at the ends of the range.
        scale = float(torch.tensor((high - low) / (2**bits - 1) or 1.0, dtype=torch.float32))
        return cls(scale, min(max(round(-low / scale), 0), 2**bits - 1))

    def with_bits(self, bits: int) -> ActivationRange:
        """The same interval in the first ``2**bits`` codes, unless it has no more of them already."""
        if self.max_code < 2**bits:
            return self
        return self.between(-self.zero_point * self.scale, (LEVELS - self.zero_point) * self.scale, bits)


Ranges = Mapping[str, Any]


def as_range(name: str, value: Any) -> ActivationRange:
    """A range from a :class:`~lightning_obc.grids.Grid` of one scale, or from ``(scale, zero_point)``.

    Raises:
        ExportError: One scale per channel, which quantized operators do not take.
    """
    if isinstance(value, ActivationRange):
        return value
    largest = value.max_code if isinstance(value, Grid) else LEVELS
    scale, zero = (value.scale, value.zero_point) if isinstance(value, Grid) else value
    scale, zero = torch.as_tensor(scale).flatten(), torch.as_tensor(zero).flatten()
    if len(scale) != 1 or len(zero) != 1:
        raise ExportError(
            f"The activation range of layer {name!r} is not one scale and one zero point",
            got=f"{len(scale)} scales",
            expected="ranges per tensor",
            remedy='observe activations with granularity="tensor"',
        )
    return ActivationRange(float(scale), int(zero), largest)
