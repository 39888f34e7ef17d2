"""Figures of a model in the middle of a recipe, as the callback logs and prints them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_obc import metrics
from lightning_obc.callbacks.held import HeldLayer
from lightning_obc.layers import adapter_for, select_layers
from lightning_obc.report import StageReport, render
from lightning_obc.report.tables import figure_cells


def model_figures(model: nn.Module, held: Mapping[str, HeldLayer]) -> dict[str, float]:
    """Sparsity and bits over all layers that could be compressed, and the compression ratio of all parameters."""
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    layers = select_layers(model)
    weights = {name: _current(layer) for name, layer in layers.items()}
    storage = {name: _storage(layer) for name, layer in held.items() if name in layers}
    # A weight that a parametrization computes is no parameter; in the size of the model its sources count as dense.
    own = {name: names[id(weight)] for name, weight in weights.items() if id(weight) in names}
    sparsity, bits_metric, ratio = metrics.Sparsity(), metrics.AverageBits(), metrics.CompressionRatio()
    sparsity.update(weights)
    bits_metric.update(weights, storage)
    ratio.update(parameters, {own[name]: stored for name, stored in storage.items() if name in own})
    return {
        "obc/sparsity": float(sparsity.compute()),
        "obc/bits": float(bits_metric.compute()),
        "obc/compression_ratio": float(ratio.compute()),
    }


def _storage(layer: HeldLayer) -> metrics.Storage:
    if layer.grid is None:
        return metrics.Storage(32, layer.pattern, 0)
    return metrics.Storage(layer.grid.spec.bits, layer.pattern, layer.grid.scale.numel())


def _current(layer: nn.Module) -> Tensor:
    adapter = adapter_for(layer)
    assert adapter is not None
    return adapter.current(layer)


def stage_figures(report: StageReport) -> dict[str, float]:
    """Loss of a stage, and sparsity, bits, loss and relative error of each of its layers."""
    values = {"obc/loss": report.loss}
    for layer in report.layers:
        for key in ("sparsity", "bits", "loss", "relative_error"):
            values[f"obc/{layer.name}/{key}"] = float(getattr(layer, key))
    return values


def comparison(
    dense: Mapping[str, float], compressed: Mapping[str, float], measured: tuple[str, str], ratio: float
) -> str:
    """Dense against compressed validation figures as a table that says when each was measured."""
    rows = [[name, *figure_cells(dense[name], compressed[name])] for name in compressed if name in dense]
    size = f"all parameters: {ratio:.2f}× smaller than dense float32"
    if not rows:
        return f"{size}; no validation figures: the model logs none, or there is no validation data"
    table = render("Dense against compressed, validation data", ("figure", "dense", "compressed", "change"), rows)
    return f"{table}\ndense: {measured[0]}\ncompressed: {measured[1]}\n{size}"
