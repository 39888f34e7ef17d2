"""Exact weights on a mask, for many rows at once."""

from __future__ import annotations

from lightning_obc.kernels.masked_refit.refit import masked_refit

__all__ = ["masked_refit"]
