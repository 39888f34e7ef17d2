"""Quantized inputs as a step of a recipe: ranges found on the calibration data, then attached to the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from lightning_obc.activation_spec import MOST_BITS, ActivationGrid
from lightning_obc.activations.inputs import InputGrid, attach, detach
from lightning_obc.activations.quantizer import ActivationQuantizer
from lightning_obc.calibration import Collector
from lightning_obc.distributed import Ranks
from lightning_obc.errors import SpecError
from lightning_obc.grids import Grid
from lightning_obc.layers import is_lookup
from lightning_obc.layers.parts import LayerPart
from lightning_obc.specs import Stage

Visit = Callable[[Callable[[Iterable[Any]], Any]], Any]


def check_visits(stage: Stage, collect: object) -> None:
    """Refuse a stage that quantizes inputs where only Hessians are given, and no batches to find ranges on.

    Raises:
        SpecError: So it is.
    """
    if quantizes_inputs(stage) and not isinstance(collect, Collector):
        raise SpecError(
            f"{stage} needs batches to find activation ranges on",
            got="a function that returns Hessians",
            expected="a Collector, which also has the batches",
        )


def quantize_stage_inputs(
    model: nn.Module, layers: Mapping[str, tuple[nn.Module, Stage]], collect: object
) -> dict[str, Grid]:
    """Quantize the inputs of a stage's layers where it asks for that; their grids by name.

    Args:
        model: Its layers get hooks; nothing else changes.
        layers: The layers whose weights were quantized, each with its own settings; see ``Quantize.activations``.
        collect: The stage's :class:`~lightning_obc.calibration.Collector`.

    Raises:
        CalibrationError: A layer that no batch reached, or no batches. NonFiniteError: NaN or Inf in an input.
    """
    specs = {name: spec for name, (module, stage) in layers.items() if (spec := _spec(stage)) and not _misfit(module)}
    if not specs:
        return {}
    assert isinstance(collect, Collector)
    found = quantize_inputs(model, specs, collect.visit, forward=collect.forward, ranks=collect.ranks)
    return {name: inputs.grid for name, inputs in found.items()}


def input_note(stage: Stage, module: nn.Module) -> str:
    """Why a layer's input stays in floating point although its stage would quantize it; empty when it would not."""
    return f"; {_misfit(module)}" if _spec(stage) is not None else ""


def quantizes_inputs(stage: Stage) -> bool:
    """True when a stage, or one of its overrides, quantizes inputs of layers."""
    overrides = getattr(stage, "overrides", {}).values()
    return _spec(stage) is not None or any(getattr(one, "activations", None) is not None for one in overrides)


def _spec(stage: Stage) -> ActivationGrid | None:
    return getattr(stage, "inputs", None)


def _misfit(module: nn.Module) -> str:
    """Why no hook can quantize the input of a layer; empty when one can."""
    if is_lookup(module):
        return "input not quantized: it holds indices"
    return "input not quantized: it stays inside a larger module" if isinstance(module, LayerPart) else ""


def quantize_inputs(
    model: nn.Module,
    specs: Mapping[str, ActivationGrid],
    visit: Visit,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    ranks: Ranks | None = None,
) -> dict[str, InputGrid]:
    """Find the ranges of layers' inputs as the model now computes them, and quantize them from now on.

    Inputs of other layers that are quantized already stay so; ranges of the same layers are found anew.

    Args:
        model: Its layers get hooks; nothing else changes.
        specs: How ranges are found, by name of layers that are modules of their own.
        visit: ``visit(run)`` calls ``run`` with the calibration batches; once for each kind of range.
        forward: ``forward(model, batch)``; None means the default of calibration.
        ranks: The processes that share the batches; all get the same ranges.

    Raises:
        CalibrationError, NonFiniteError: As :func:`quantize_stage_inputs`; the model is as it was then.
    """
    before = detach(model, specs)
    found: dict[str, InputGrid] = {}
    try:
        for kind in dict.fromkeys(spec.with_bits(MOST_BITS) for spec in specs.values()):
            bits = {name: spec.bits for name, spec in specs.items() if spec.with_bits(MOST_BITS) == kind}
            quantizer = ActivationQuantizer(model, list(bits), bits, spec=kind)
            visit(partial(quantizer.observe, forward=forward, ranks=ranks))
            found |= quantizer.freeze().frozen()
    except BaseException:
        attach(model, before)
        raise
    attach(model, found)
    return found
