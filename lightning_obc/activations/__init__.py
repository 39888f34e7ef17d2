"""Activation quantization at layer inputs: observe, freeze, switch on and off. The model's keys stay as they are."""

from __future__ import annotations

from lightning_obc.activation_spec import ActivationGrid
from lightning_obc.activations.fake import fake_quantize
from lightning_obc.activations.inputs import (
    InputGrid,
    attach,
    attached,
    detach,
    inputs_from_state,
    inputs_state,
    unquantized,
)
from lightning_obc.activations.quantizer import ActivationQuantizer
from lightning_obc.activations.ranges import RangeObserver
from lightning_obc.activations.stage import (
    check_visits,
    input_note,
    quantize_inputs,
    quantize_stage_inputs,
    quantizes_inputs,
)

__all__ = [
    "ActivationGrid",
    "ActivationQuantizer",
    "InputGrid",
    "RangeObserver",
    "attach",
    "attached",
    "check_visits",
    "detach",
    "fake_quantize",
    "input_note",
    "inputs_from_state",
    "inputs_state",
    "quantize_inputs",
    "quantize_stage_inputs",
    "quantizes_inputs",
    "unquantized",
]
