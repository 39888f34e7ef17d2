"""Figures of a model in the middle of a recipe, as the callback logs and prints them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_obc import metrics
from lightning_obc.callbacks.held import HeldLayer
from lightning_obc.layers import adapter_for, normalise_name, select_layers
from lightning_obc.report import StageReport, render


def model_figures(model: nn.Module, held: Mapping[str, HeldLayer]) -> dict[str, float]:
    """Sparsity and bits over all layers that could be compressed, and the compression ratio of all parameters."""
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    modules = {normalise_name(name): module for name, module in model.named_modules()}
    storage: dict[str, metrics.Storage] = {}
    for name, layer in held.items():
        bits, scales = (32, 0) if layer.grid is None else (layer.grid.spec.bits, layer.grid.scale.numel())
        storage[names[id(_weight(modules[name]))]] = metrics.Storage(bits, layer.pattern, scales)
    weights = {names[id(_weight(module))]: _weight(module) for module in select_layers(model).values()}
    sparsity, bits_metric, ratio = metrics.Sparsity(), metrics.AverageBits(), metrics.CompressionRatio()
    sparsity.update(weights)
    bits_metric.update(weights, {name: stored for name, stored in storage.items() if name in weights})
    ratio.update(parameters, storage)
    return {
        "obc/sparsity": float(sparsity.compute()),
        "obc/bits": float(bits_metric.compute()),
        "obc/compression_ratio": float(ratio.compute()),
    }


def _weight(module: nn.Module) -> Tensor:
    adapter = adapter_for(module)
    assert adapter is not None
    return adapter.weight(module)


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
    rows = [
        [name, f"{dense[name]:.4f}", f"{compressed[name]:.4f}", f"{compressed[name] - dense[name]:+.4f}"]
        for name in compressed
        if name in dense
    ]
    size = f"all parameters: {ratio:.2f}× smaller than dense float32"
    if not rows:
        return f"{size}; no validation figures: the model logs none, or there is no validation data"
    table = render("Dense against compressed, validation data", ("figure", "dense", "compressed", "change"), rows)
    return f"{table}\ndense: {measured[0]}\ncompressed: {measured[1]}\n{size}"
