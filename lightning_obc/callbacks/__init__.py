"""Lightning callbacks."""

from __future__ import annotations

from lightning_obc.callbacks.batch_norm import BatchNormReset
from lightning_obc.callbacks.checkpoint import CompressedCheckpoint
from lightning_obc.callbacks.guard import MaskGuard
from lightning_obc.callbacks.monitor import CompressionMonitor
from lightning_obc.callbacks.obc import OBCCallback

__all__ = ["BatchNormReset", "CompressedCheckpoint", "CompressionMonitor", "MaskGuard", "OBCCallback"]
