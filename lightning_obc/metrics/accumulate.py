"""The figures of :mod:`lightning_obc.metrics.functional` as torchmetrics.

Counts over weights are reduced over ranks with ``max``: every rank holds the same weights (sharded ones are
gathered first), so adding the counts up would count each weight once per rank. Errors over data are summed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_obc.errors import LayerNotFoundError
from lightning_obc.metrics.functional import DENSE_BITS, count_zeros, squared_errors, stored_bytes
from lightning_obc.metrics.storage import Storage


class _WeightMetric(Metric):
    """Two float64 counts over replicated weights."""

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False
    counts: Tensor

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(size, 2, dtype=torch.float64), dist_reduce_fx="max")

    def _ratio(self) -> Tensor:
        return self.counts[:, 0] / self.counts[:, 1].clamp(min=1)


class Sparsity(_WeightMetric):
    """Fraction of zeros in all the weights given, 0-d float64. ``update(weights)`` takes tensors by name."""

    def update(self, weights: Mapping[str, Tensor]) -> None:
        for weight in weights.values():
            self.counts[0] += count_zeros(weight).to(self.counts.device)

    def compute(self) -> Tensor:
        return self._ratio()[0]


class LayerSparsity(_WeightMetric):
    """Fraction of zeros by layer. ``update(weights)`` takes tensors by the names given at construction.

    Raises:
        LayerNotFoundError: ``update`` meets a name that was not given.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(len(names))
        self.names = list(names)

    def update(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            self.counts[_index(self.names, name)] += count_zeros(weight).to(self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self._ratio(), strict=True))


class AverageBits(_WeightMetric):
    """Mean bit width over the entries of the weights, 0-d float64; ``storage`` as in the functional twin."""

    def update(self, weights: Mapping[str, Tensor], storage: Mapping[str, Storage]) -> None:
        for name, weight in weights.items():
            bits = storage[name].bits if name in storage else DENSE_BITS
            self.counts[0] += torch.tensor([bits * weight.numel(), weight.numel()], device=self.counts.device)

    def compute(self) -> Tensor:
        return self._ratio()[0]


class CompressionRatio(_WeightMetric):
    """Dense float32 bytes of all the parameters over their compressed bytes, 0-d float64."""

    higher_is_better = True

    def update(self, parameters: Mapping[str, Tensor], storage: Mapping[str, Storage]) -> None:
        self.counts[0] += stored_bytes(parameters, storage).to(self.counts.device)

    def compute(self) -> Tensor:
        dense, compressed = self.counts[0]
        return dense / compressed if compressed > 0 else torch.ones_like(dense)


class RelativeError(Metric):
    """Squared error of every layer's output relative to the dense output, 0-d float64 by name.

    ``update(name, compressed, dense)`` takes the outputs of one batch; they may differ from rank to rank.

    Raises:
        LayerNotFoundError: ``update`` meets a name that was not given.
        ShapeError: The two outputs have different shapes.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    sums: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        self.add_state("sums", torch.zeros(len(names), 2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, name: str, compressed: Tensor, dense: Tensor) -> None:
        self.sums[_index(self.names, name)] += squared_errors(compressed, dense).to(self.sums.device)

    def compute(self) -> dict[str, Tensor]:
        error, reference = self.sums.unbind(1)
        ratio = torch.where(error > 0, error / reference, error)
        return dict(zip(self.names, ratio, strict=True))


def _index(names: Sequence[str], name: str) -> int:
    try:
        return names.index(name)
    except ValueError:
        raise LayerNotFoundError(
            "A metric was not made for this layer", got=name, expected=f"one of {', '.join(names)}"
        ) from None
