"""How many bytes a compressed weight needs: one convention, used by every figure that this package prints.

* Dense: 4 bytes (float32) for every parameter, whatever the precision of the training was.
* A quantized weight: ``bits`` per stored value, plus 4 bytes per scale and ``bits`` per zero point.
* An N:M weight stores ``n`` values of every group of ``m``; ``ceil(log2(m choose n))`` bits a group say which.
* A weight with other zeros stores its non-zeros and one bit per weight (or per block) that says where they
  are; a bitmap that costs more than it saves is left out.
* Every other parameter stays dense. Buffers are not counted, on neither side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lightning_obc.metrics.functional import count_zeros
from lightning_obc.obs.solution import LayerSolution
from lightning_obc.specs import NM, Block, Pattern


@dataclass(frozen=True)
class Storage:
    """How the weight of one layer is stored.

    Attributes:
        bits: Bits of one stored value.
        pattern: The sparsity pattern the zeros obey; None when nothing is known about them.
        scales: Number of scales (and of zero points) of the weight's grid; 0 without one.
    """

    bits: int = 32
    pattern: Pattern | None = None
    scales: int = 0

    @classmethod
    def of(cls, solution: LayerSolution, pattern: Pattern | None = None) -> Storage:
        """The storage of a solved layer whose zeros obey ``pattern``."""
        if solution.grid is None:
            return cls(pattern=pattern)
        return cls(solution.grid.spec.bits, pattern, solution.grid.scale.numel())

    def size(self, weight: Tensor) -> float:
        """Bytes that ``weight`` (any shape) needs under this storage."""
        total = weight.numel()
        grid = self.scales * (32 + self.bits)
        if isinstance(self.pattern, NM):
            groups = total / self.pattern.m
            index = groups * math.ceil(math.log2(math.comb(self.pattern.m, self.pattern.n)))
            return (groups * self.pattern.n * self.bits + index + grid) / 8
        zeros = int(count_zeros(weight)[0])
        block = self.pattern.size if isinstance(self.pattern, Block) else 1
        sparse = (total - zeros) * self.bits + total / block
        return (min(sparse, total * self.bits) + grid) / 8
