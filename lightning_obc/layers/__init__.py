"""Modules as matrix problems: adapters, their registry, and the selection of layers."""

from __future__ import annotations

from lightning_obc.layers.base import LayerAdapter, ProblemShape
from lightning_obc.layers.registry import adapter_for, reason_unsupported, register_adapter
from lightning_obc.layers.selection import normalise_name, select_layers, unsupported_layers

__all__ = [
    "LayerAdapter",
    "ProblemShape",
    "adapter_for",
    "normalise_name",
    "reason_unsupported",
    "register_adapter",
    "select_layers",
    "unsupported_layers",
]
