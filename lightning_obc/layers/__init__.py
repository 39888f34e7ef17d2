"""Modules as matrix problems: adapters, their registry, and the selection of layers."""

from __future__ import annotations

from lightning_obc.layers.base import LayerAdapter, ProblemShape
from lightning_obc.layers.blocks import block_of, blocks_of, modules_outside_blocks
from lightning_obc.layers.listing import by_reason, first_of
from lightning_obc.layers.parts import LayerPart, PartAdapter
from lightning_obc.layers.registry import (
    adapter_for,
    is_lookup,
    parts_of,
    reason_unsupported,
    register_adapter,
    register_parts,
    weight_key,
)
from lightning_obc.layers.selection import normalise_name, select_layers, sharing_modules, unsupported_layers

__all__ = [
    "LayerAdapter",
    "LayerPart",
    "PartAdapter",
    "ProblemShape",
    "adapter_for",
    "block_of",
    "blocks_of",
    "by_reason",
    "first_of",
    "is_lookup",
    "modules_outside_blocks",
    "normalise_name",
    "parts_of",
    "reason_unsupported",
    "register_adapter",
    "register_parts",
    "select_layers",
    "sharing_modules",
    "unsupported_layers",
    "weight_key",
]
