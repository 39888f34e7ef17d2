"""The calibration Hessian, as the engine receives it.

Notation: ``H = 2 X Xᵀ / n`` (paper, section 3), with ``n`` the number of calibration samples. ``g`` is the number
of independent problems of one layer (groups of a convolution), ``d`` the number of input columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_obc.brief import Brief
from lightning_obc.errors import ShapeError


@dataclass(frozen=True, repr=False)
class Hessian(Brief):
    """Two half-sums of ``X Xᵀ``, split by calibration sample.

    The halves make it possible to choose (damping, refinement, scales) on one and to judge on the other.

    Attributes:
        halves: ``[2, g, d, d]`` float64, ``Σ x xᵀ`` over the samples of each half, both triangles filled.
        samples: ``[2]`` numbers of samples in each half (Python ints).
        estimate: True when positions were sub-sampled, so that losses are estimates.
        rows: ``[2, g, R]`` float64, how often each row of the weight is looked up in each half, of embeddings; None
            elsewhere. Row ``r`` then has a Hessian of its own, ``H + h_r I`` with ``h_r = 2 c_r / n``.

    Raises:
        ShapeError: The halves or the row counts have the wrong shape.
    """

    halves: Tensor
    samples: tuple[int, int]
    estimate: bool = False
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.halves.shape)
        if len(shape) != 4 or shape[0] != 2 or shape[2] != shape[3]:
            raise ShapeError("The halves of a Hessian have the wrong shape", got=shape, expected="[2, g, d, d]")
        if self.rows is not None and tuple(self.rows.shape[:2]) != shape[:2]:
            raise ShapeError(
                "The row counts do not belong to the Hessian",
                got=tuple(self.rows.shape),
                expected=f"[2, {shape[1]}, R]",
            )

    @property
    def groups(self) -> int:
        return self.halves.shape[1]

    @property
    def columns(self) -> int:
        return self.halves.shape[2]

    def full(self) -> Tensor:
        """``H = 2 Σ x xᵀ / n`` over all samples, ``[g, d, d]`` float64; where rows are counted, the mean over rows."""
        return self._scaled(self.halves.sum(0), None if self.rows is None else self.rows.sum(0), sum(self.samples))

    def half(self, index: int) -> Tensor:
        """``H`` of one half alone, ``[g, d, d]`` float64, with that half's own ``n``."""
        rows = None if self.rows is None else self.rows[index]
        return self._scaled(self.halves[index], rows, self.samples[index])

    def row_weights(self) -> Tensor | None:
        """``h_r`` over all samples, ``[g, R]`` float64, where rows are counted."""
        return None if self.rows is None else self.rows.sum(0) * (2.0 / max(sum(self.samples), 1))

    @staticmethod
    def _scaled(total: Tensor, rows: Tensor | None, samples: int) -> Tensor:
        scale = 2.0 / max(samples, 1)
        hessian = total * scale
        if rows is not None:
            hessian.diagonal(dim1=-2, dim2=-1).add_(rows.mean(-1, keepdim=True) * scale)
        return hessian

    def pooled(self) -> Hessian:
        """The mean over the groups, as the statistic of each of them."""
        halves = self.halves.mean(1, keepdim=True).expand_as(self.halves).contiguous()
        return replace(self, halves=halves)

    @property
    def has_both_halves(self) -> bool:
        return min(self.samples) > 0

    def to(self, device: torch.device | str) -> Hessian:
        """The same statistic on another device."""
        rows = None if self.rows is None else self.rows.to(device)
        return Hessian(self.halves.to(device), self.samples, self.estimate, rows)


@dataclass(frozen=True, repr=False)
class PairedHessian(Brief):
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
