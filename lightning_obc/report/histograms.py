"""Histograms of the weights of compressed layers, before and after, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Union

import torch
from torch import Tensor, nn

from lightning_obc.layers import adapter_for
from lightning_obc.obs.solution import LayerSolution
from lightning_obc.report.samples import WeightSample

BINS = 48


def histograms(
    solutions: Mapping[str, LayerSolution],
    dense: Mapping[str, Union[Tensor, WeightSample]],
    layers: Mapping[str, nn.Module] = MappingProxyType({}),
) -> dict[str, dict[str, Any]]:
    """Histograms of the weights of every compressed layer, before (where known) and after.

    Quantized layers are drawn in units of their grid: ``weight / scale + zero_point``, so that grid points of all rows
    lie on the integers.

    Args:
        solutions: What the solver returned, by layer.
        dense: Weights before: samples by name of the layer, or a state dict.
        layers: The layers, to find their weights in a state dict.
    """
    found = {}
    for name, solution in solutions.items():
        sample = dense.get(name)
        if not isinstance(sample, WeightSample):
            sample = _sample(layers.get(name), dense.get(f"{name}.weight"))
        before = None if sample is None else sample.values.double()
        select = WeightSample.of(solution.weight).select if sample is None else sample.select
        after = select(solution.weight)
        if solution.grid is not None:
            columns = solution.weight.shape[-1]
            scale, zero = (
                select(solution.grid.expand(part, columns)) for part in (solution.grid.scale, solution.grid.zero_point)
            )
            after = after / scale + zero
            before = None if before is None else before / scale + zero
        found[name] = _histogram(before, after, None if solution.grid is None else solution.grid.max_code)
    return found


def _sample(module: Any, weight: Any) -> WeightSample | None:
    adapter = None if module is None else adapter_for(module)
    if adapter is None or weight is None:
        return None
    return WeightSample.of(adapter.to_matrix_layout(module, weight.detach()))


def _histogram(before: Tensor | None, after: Tensor, max_code: int | None) -> dict[str, Any]:
    values = after if before is None else torch.cat([before.flatten(), after.flatten()])
    low, high = float(values.min()), float(values.max())
    bins = BINS
    if max_code is not None:
        low, high, bins = _grid_bins(low, high, max_code)
    elif not high > low:
        low, high = low - 0.5, high + 0.5

    def counts(tensor: Tensor) -> list[int]:
        return [int(count) for count in torch.histc(tensor.flatten().clamp(low, high), bins, low, high)]

    return {
        "low": low,
        "high": high,
        "after": counts(after),
        "before": None if before is None else counts(before),
        "levels": None if max_code is None else max_code + 1,
    }


def _grid_bins(low: float, high: float, max_code: int) -> tuple[float, float, int]:
    """Range and number of bins: every code in the middle of a bin, or whole codes in a bin when there are many.

    Weights farther from the grid than its own width are counted in the outermost bins.
    """
    first = math.floor(max(min(low, 0.0), -max_code - 1.0) + 0.5)
    last = math.ceil(min(max(high, max_code), 2.0 * max_code + 1) - 0.5)
    codes = last - first + 1
    if codes <= BINS:
        return first - 0.5, last + 0.5, (3 if codes <= BINS // 2 else 1) * codes
    width = math.ceil(codes / BINS)
    bins = math.ceil(codes / width)
    return first - 0.5, first - 0.5 + bins * width, bins
