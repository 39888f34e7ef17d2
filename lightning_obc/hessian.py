"""The calibration Hessian, as the engine receives it.

Notation: ``H = 2 X Xᵀ / n`` (paper, section 3), with ``n`` the number of calibration samples. ``g`` is the number
of independent problems of one layer (groups of a convolution), ``d`` the number of input columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_obc.errors import ShapeError


@dataclass(frozen=True)
class Hessian:
    """Two half-sums of ``X Xᵀ``, split by calibration sample.

    The halves make it possible to choose (damping, refinement, scales) on one and to judge on the other.

    Attributes:
        halves: ``[2, g, d, d]`` float64, ``Σ x xᵀ`` over the samples of each half, both triangles filled.
        samples: ``[2]`` numbers of samples in each half (Python ints).
        estimate: True when positions were sub-sampled, so that losses are estimates.
    """

    halves: Tensor
    samples: tuple[int, int]
    estimate: bool = False

    def __post_init__(self) -> None:
        shape = tuple(self.halves.shape)
        if len(shape) != 4 or shape[0] != 2 or shape[2] != shape[3]:
            raise ShapeError("The halves of a Hessian have the wrong shape", got=shape, expected="[2, g, d, d]")

    @property
    def groups(self) -> int:
        return self.halves.shape[1]

    @property
    def columns(self) -> int:
        return self.halves.shape[2]

    def full(self) -> Tensor:
        """``H = 2 Σ x xᵀ / n`` over all samples, ``[g, d, d]`` float64."""
        return self.halves.sum(0) * (2.0 / max(sum(self.samples), 1))

    def half(self, index: int) -> Tensor:
        """``H`` of one half alone, ``[g, d, d]`` float64, with that half's own ``n``."""
        return self.halves[index] * (2.0 / max(self.samples[index], 1))

    @property
    def has_both_halves(self) -> bool:
        return min(self.samples) > 0

    def to(self, device: torch.device | str) -> Hessian:
        return Hessian(self.halves.to(device), self.samples, self.estimate)


@dataclass(frozen=True)
class PairedHessian:
    """What a layer sees behind compressed layers, ``X'``, beside what it saw before, ``X``.

    Attributes:
        hessian: Statistic of ``X'``.
        cross: ``D = 2 (X - X') X'ᵀ / n``, ``[g, d, d]`` float64, not symmetric. Accumulated directly, so that it is
            exactly zero where nothing has changed.
        difference: ``2 (X - X') (X - X')ᵀ / n``, ``[g, d, d]`` float64, both triangles filled.
    """

    hessian: Hessian
    cross: Tensor
    difference: Tensor

    def __post_init__(self) -> None:
        for name in ("cross", "difference"):
            got, expected = tuple(getattr(self, name).shape), tuple(self.hessian.halves.shape[1:])
            if got != expected:
                raise ShapeError(f"{name} does not belong to the Hessian", got=got, expected=str(expected))

    @property
    def samples(self) -> tuple[int, int]:
        return self.hessian.samples

    def before(self) -> Tensor:
        """``H = 2 X Xᵀ / n`` of the inputs before, ``[g, d, d]`` float64."""
        return self.hessian.full() + self.cross + self.cross.mT + self.difference
