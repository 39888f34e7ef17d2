"""How bad a level is: by the error of its layer, by the loss of the model with it alone, or by SPDY's prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_obc.activations import ActivationQuantizer, fake_quantize
from lightning_obc.allocation.costs import CostTable
from lightning_obc.allocation.database import Database
from lightning_obc.allocation.levels import Level
from lightning_obc.calibration import HessianAccumulator, batch_size_of, call_forward
from lightning_obc.calibration.collect import eager_forward, undisturbed
from lightning_obc.calibration.rng import preserved_rng
from lightning_obc.errors import NonFiniteError
from lightning_obc.layers import LayerAdapter, adapter_for
from lightning_obc.obs.problem import quadratic


def layer_errors(database: Database, activation_losses: Mapping[str, Mapping[int, float]] | None = None) -> CostTable:
    """Relative error of every level: squared output error over the squared output of the dense layer.

    The error of quantized inputs, where it is given, is added to that of the weights, as if both were uncorrelated.

    Args:
        database: The levels.
        activation_losses: ``{layer: {bits: squared output error per sample}}``; see :func:`activation_losses`.
    """
    losses, references = database.losses(), database.references()
    scores: CostTable = {}
    for name in database.layers:
        extra = {} if activation_losses is None else activation_losses.get(name, {})
        scores[name] = {}
        for level in database.levels(name):
            total = losses[name][level.name] + (extra.get(level.activations, 0.0) if level.activations else 0.0)
            scores[name][level.name] = total / max(references[name], 1e-300)
    return scores


def swap_losses(
    database: Database, evaluate: Callable[[dict[str, str]], float], *, levels: Sequence[Level] | None = None
) -> CostTable:
    """Increase of the model's loss when one layer takes a level and all others stay dense, never below 0.

    Args:
        database: The levels.
        evaluate: ``evaluate(profile)``, the loss of the model with ``profile`` stitched in, on calibration data.
        levels: Levels to look at; None means all. Those of other layers are evaluated once for each layer and level.

    Raises:
        NonFiniteError: The loss of the dense model is not finite. A level's own loss may be: it scores infinity.
    """
    dense = dict.fromkeys(database.layers, Level().name)
    base = _finite_base(evaluate(dense))
    chosen = None if levels is None else {level.name for level in levels}
    scores: CostTable = {}
    for name in database.layers:
        names = [level.name for level in database.levels(name) if chosen is None or level.name in chosen]
        scores[name] = {}
        for level in names:
            value = 0.0 if level == Level().name else float(evaluate(dense | {name: level})) - base
            scores[name][level] = math.inf if math.isnan(value) else max(0.0, value)
    return scores


def sensitivity_scores(
    errors: CostTable, evaluate: Callable[[dict[str, str]], float], *, share: float = 0.5
) -> CostTable:
    """Layer errors scaled by what they do to the model's loss, measured at one level of every layer.

    A layer's relative error says nothing about how much the model minds it. To second order its effect on the loss is
    proportional to it, so one evaluation per layer, with that layer alone at a middling level, gives the factor.

    Args:
        errors: ``{layer: {level: relative error}}``; see :func:`layer_errors`.
        evaluate: ``evaluate(profile)``, the loss of the model with ``profile`` stitched in, on calibration data.
        share: Which level is measured: the one this far along the layer's levels in ascending order of error.

    Raises:
        NonFiniteError: The loss of the dense model, or of every single change, is not finite.
    """
    dense = dict.fromkeys(errors, Level().name)
    base = _finite_base(evaluate(dense))
    factors: dict[str, float] = {}
    for name, row in errors.items():
        ordered = sorted((error, level) for level, error in row.items() if error > 0)
        if ordered:
            error, level = ordered[min(len(ordered) - 1, int(share * len(ordered)))]
            factors[name] = (float(evaluate(dense | {name: level})) - base) / error
    known = [factor for factor in factors.values() if math.isfinite(factor)]
    if factors and not known:
        raise NonFiniteError("No single change of a layer has a finite loss", expected="finite losses")
    # A layer that the model seems not to mind still costs something; one that breaks it costs the most.
    low, high = 1e-3 * max([*known, 0.0]), max([*known, 0.0])
    scaled = {name: max(factor, low) if math.isfinite(factor) else high for name, factor in factors.items()}
    return {
        name: {level: scaled.get(name, 1.0) * error for level, error in row.items()} for name, row in errors.items()
    }


def _finite_base(value: float) -> float:
    base = float(value)
    if not math.isfinite(base):
        raise NonFiniteError("The loss of the dense model is not finite", got=base, expected="a finite loss")
    return base


def activation_losses(
    model: nn.Module,
    quantizer: ActivationQuantizer,
    layers: Mapping[str, nn.Module],
    bits: Sequence[int],
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, dict[int, float]]:
    """Squared output error per sample of every layer when only its input is quantized: ``½ tr(W E Wᵀ)``.

    ``E = 2 Σ (x̂ - x)(x̂ - x)ᵀ / n`` is gathered like a Hessian, so that every type of layer is measured exactly.

    Args:
        model: The dense model.
        quantizer: Observed ranges of (at least) ``layers``.
        layers: Layers by name.
        bits: Bit widths to measure.
        batches: Re-iterable; one pass for each bit width.
        forward: ``forward(model, batch)``; None means the default of calibration.
    """
    before = quantizer.bits
    result: dict[str, dict[int, float]] = {name: {} for name in layers}
    try:
        for width in bits:
            quantizer.set_bits(dict.fromkeys(layers, width))
            quantizer.freeze()
            for name, loss in _one_width(model, quantizer, layers, batches, forward).items():
                result[name][width] = loss
    finally:
        quantizer.set_bits(before)
    return result


def _one_width(
    model: nn.Module,
    quantizer: ActivationQuantizer,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
) -> dict[str, float]:
    errors = {name: HessianAccumulator(module, name=name) for name, module in layers.items()}
    grids, handles = quantizer.grids, []
    with preserved_rng(), undisturbed(model), eager_forward(), torch.no_grad():
        try:
            for name, module in layers.items():
                grid, axis = grids[name], quantizer.axis(name)

                def round_off(x: Tensor, grid: Any = grid, axis: int | None = axis) -> Tensor:
                    quantized = fake_quantize(x, grid.scale.flatten(), grid.zero_point.flatten(), grid.max_code, axis)
                    return quantized - x

                hook = _ErrorHook(errors[name], round_off)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            for index, batch in enumerate(batches):
                for error in errors.values():
                    error.begin_batch(batch_size_of(batch), batch_index=index)
                (forward or call_forward)(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    return {
        name: quadratic(_adapter(module).weight_matrix(module).double(), errors[name].finalise().full())
        for name, module in layers.items()
    }


def _adapter(module: nn.Module) -> LayerAdapter:
    adapter = adapter_for(module)
    assert adapter is not None
    return adapter


class _ErrorHook:
    """A pre-hook that adds what rounding does to the input to a statistic."""

    def __init__(self, statistic: HessianAccumulator, round_off: Callable[[Tensor], Tensor]) -> None:
        self._statistic, self._round_off = statistic, round_off

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is not None:
            adapter = self._statistic.adapter
            self._statistic.update(adapter.normalise_inputs(module, self._round_off(x.detach())))
