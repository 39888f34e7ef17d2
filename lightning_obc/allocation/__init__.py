"""Non-uniform compression: levels, their costs, and the best level for every layer under a budget."""

from __future__ import annotations

from lightning_obc.allocation.build import build_database
from lightning_obc.allocation.costs import count_positions
from lightning_obc.allocation.curve import CurvePoint, SearchResult
from lightning_obc.allocation.database import Database
from lightning_obc.allocation.latency import LatencyTable, measure_latency
from lightning_obc.allocation.levels import Level, block_ladder, product, unstructured_ladder
from lightning_obc.allocation.recipe import ProfileRecipe, apply_recipe, read_recipe, run_recipe, write_recipe
from lightning_obc.allocation.solve import Recipe
from lightning_obc.allocation.spdy import SPDY
from lightning_obc.allocation.stitch import stitch

__all__ = [
    "SPDY",
    "CurvePoint",
    "Database",
    "LatencyTable",
    "Level",
    "ProfileRecipe",
    "Recipe",
    "SearchResult",
    "apply_recipe",
    "block_ladder",
    "build_database",
    "count_positions",
    "measure_latency",
    "product",
    "read_recipe",
    "run_recipe",
    "stitch",
    "unstructured_ladder",
    "write_recipe",
]
