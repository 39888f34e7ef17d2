"""Activation quantization at layer inputs: observe, freeze, switch on and off. The model's keys stay as they are."""

from __future__ import annotations

from lightning_obc.activations.fake import fake_quantize
from lightning_obc.activations.quantizer import ActivationQuantizer
from lightning_obc.activations.ranges import ActivationGrid, RangeObserver

__all__ = ["ActivationGrid", "ActivationQuantizer", "RangeObserver", "fake_quantize"]
