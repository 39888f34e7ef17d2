"""Lightning callbacks."""

from __future__ import annotations

from lightning_obc.callbacks.obc import OBCCallback

__all__ = ["OBCCallback"]
