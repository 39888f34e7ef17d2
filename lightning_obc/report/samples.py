"""Weights of a model before anything changes them, as many as a histogram needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_obc.layers import adapter_for, select_layers

MOST = 1 << 16


@dataclass(frozen=True)
class WeightSample:
    """Whole rows of one layer's weight.

    Attributes:
        rows: ``[n]`` int64, which of the ``g * R`` rows of all problems of the layer.
        values: ``[n, d]`` float32 on the CPU.
    """

    rows: Tensor
    values: Tensor

    @classmethod
    def of(cls, matrix: Tensor, most: int = MOST) -> WeightSample:
        """Evenly spaced rows of ``[g, R, d]``, at most ``most`` weights but at least one row."""
        flat = matrix.reshape(-1, matrix.shape[-1])
        count = min(len(flat), max(1, most // max(1, flat.shape[1])))
        rows = torch.linspace(0, len(flat) - 1, count, dtype=torch.float64, device="cpu").round().long()
        return cls(rows, flat[rows.to(flat.device)].detach().float().cpu())

    def state_dict(self, most: int = 1 << 13) -> dict[str, Tensor]:
        """Fewer rows, rounded to bfloat16: what a checkpoint keeps."""
        fewer = WeightSample.of(self.values, most)
        return {"rows": self.rows[fewer.rows], "values": fewer.values.bfloat16()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> WeightSample:
        return cls(state["rows"], state["values"].float())

    def select(self, matrix: Tensor) -> Tensor:
        """The same rows of another ``[g, R, d]``, as ``[n, d]`` float64 on the CPU."""
        flat = matrix.detach().reshape(-1, matrix.shape[-1])
        return flat[self.rows.to(flat.device)].double().cpu()


def weight_samples(model: nn.Module) -> dict[str, WeightSample]:
    """A sample of the weights of every layer that can be compressed, by name; a few hundred KiB per layer at most."""
    found = {}
    for name, module in select_layers(model).items():
        adapter = adapter_for(module)
        if adapter is not None:
            found[name] = WeightSample.of(adapter.weight_matrix(module))
    return found
