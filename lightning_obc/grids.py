"""Integer grids with their fitted scales: the one owner of codes, scale, zero point and dequantization.

Index legend: ``g`` problems of a layer, ``R`` rows (output channels), ``d`` columns, ``C`` column groups
(1 unless the granularity is ``"group"``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_obc.brief import Brief
from lightning_obc.specs import IntGrid


@dataclass(frozen=True, repr=False)
class Grid(Brief):
    """A fitted grid. Weight value ``(code - zero_point) * scale``.

    Attributes:
        spec: The specification it was fitted for.
        scale: ``[g, R, C]`` positive, floating point of the weight's dtype (per tensor: equal entries).
        zero_point: ``[g, R, C]`` integers in ``0 .. max_code``, stored in the dtype of ``scale``.
        column_group: ``[d]`` int64, the column group of every column; None when ``C`` is 1.
    """

    spec: IntGrid
    scale: Tensor
    zero_point: Tensor
    column_group: Tensor | None = None

    @property
    def max_code(self) -> int:
        return self.spec.max_code

    def expand(self, tensor: Tensor, columns: int) -> Tensor:
        """Spread ``[g, R, C]`` over the columns: ``[g, R, columns]`` (a view when ``C`` is 1)."""
        if self.column_group is None:
            return tensor.expand(*tensor.shape[:-1], columns)
        return tensor[..., self.column_group]

    def encode(self, weight: Tensor) -> Tensor:
        """Nearest codes of ``[g, R, d]`` weights, uint8, same shape. Halves round to even."""
        columns = weight.shape[-1]
        scale, zero = self.expand(self.scale, columns), self.expand(self.zero_point, columns)
        return torch.clamp(torch.round(weight / scale) + zero, 0, self.max_code).to(torch.uint8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Weights ``[g, R, d]`` of uint8 codes of the same shape, in the dtype of ``scale``; zeros are ``+0.0``."""
        columns = codes.shape[-1]
        scale, zero = self.expand(self.scale, columns), self.expand(self.zero_point, columns)
        return (codes.to(scale.dtype) - zero) * scale + 0.0

    def quantize(self, weight: Tensor) -> Tensor:
        """The nearest grid points of ``[g, R, d]`` weights."""
        return self.dequantize(self.encode(weight))
