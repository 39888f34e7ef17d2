"""Columns fixed in one order for all rows: the steps inside a block of columns."""

from __future__ import annotations

from lightning_obc.kernels.column_elimination.fix import Targets, fix_columns

__all__ = ["Targets", "fix_columns"]
