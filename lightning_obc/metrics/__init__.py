"""Sparsity, bits, size and error of compressed models: torchmetrics, and functions of the same meaning."""

from __future__ import annotations

from lightning_obc.metrics.accumulate import (
    AverageBits,
    CompressionRatio,
    LayerSparsity,
    RelativeError,
    Sparsity,
)
from lightning_obc.metrics.functional import (
    average_bits,
    compression_ratio,
    layer_sparsity,
    relative_error,
    sparsity,
    stored_bytes,
)
from lightning_obc.metrics.inspection import LayerInspection, ModelInspection, inspect_model
from lightning_obc.metrics.storage import Storage

__all__ = [
    "AverageBits",
    "CompressionRatio",
    "LayerInspection",
    "LayerSparsity",
    "ModelInspection",
    "RelativeError",
    "Sparsity",
    "Storage",
    "average_bits",
    "compression_ratio",
    "inspect_model",
    "layer_sparsity",
    "relative_error",
    "sparsity",
    "stored_bytes",
]
