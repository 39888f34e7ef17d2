"""Positions that stay move inside the flush: against plain indexing, however far apart their sources are."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from lightning_obc.kernels.obs_sweep.jit import aligned
from lightning_obc.kernels.obs_sweep.moving_tile import FAR, NEAR, SCATTERED, permutes
from lightning_obc.kernels.obs_sweep.packed import (
    CHUNK,
    at,
    move_and_flush,
    move_panel,
    moves,
    pack,
    packed_size,
    padded,
    panel_at,
    plan_moves,
)
from lightning_obc.kernels.obs_sweep.tile import FLUSH_VECTORS, flush_columns

STEPS, DEPTH = 32, 19


def stays(size: int, kind: str, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Positions that stay: all, most, after a long gap, every third, one."""
    stay = np.ones(size, np.bool_)
    if kind == "most":
        stay[rng.permutation(size)[: min(STEPS, size - 1)]] = False
    elif kind == "gap":
        stay[size // 4 : size // 4 + size // 2] = False
    elif kind == "third":
        stay[np.arange(size) % 3 > 0] = False
    elif kind == "one":
        stay[: size - 1] = False
    return stay


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["all", "most", "gap", "third", "one"])
@pytest.mark.parametrize("size", [1, 31, 65, 200])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "elsewhere"])
def test_moves_within_the_flush(size: int, kind: str, in_place: bool, dtype: type) -> None:
    rng = np.random.default_rng(size)
    matrix = rng.standard_normal((size, size)).astype(dtype)
    matrix += matrix.T
    columns = rng.standard_normal((DEPTH, size)).astype(dtype)
    origin = np.flatnonzero(stays(size, kind, rng)).astype(np.int32)
    source, panel = aligned(packed_size(size), np.dtype(dtype)), aligned(STEPS * padded(size), np.dtype(dtype))
    target = source if in_place else aligned(packed_size(size), np.dtype(dtype))
    pack(matrix, source)
    panel[:], target[:] = 0, target if in_place else np.nan
    for step in range(DEPTH):
        for position in range(size):
            panel[panel_at(position, step, STEPS)] = columns[step, position]
    width = flush_columns(np.dtype(dtype))
    lanes, count = width // FLUSH_VECTORS, len(origin)
    plan, places = moves(size, lanes), np.zeros(padded(size), np.int32)
    places[:count] = origin
    plan_moves(count, places, plan, lanes)
    move_panel(panel, DEPTH, STEPS, count, places, plan, lanes)
    move_and_flush(source, target, count, places, plan, panel, DEPTH, STEPS, width)
    moved = columns[:, origin].astype(np.float64)
    expected = matrix[np.ix_(origin, origin)].astype(np.float64) - moved.T @ moved
    got = np.array([[target[at(min(i, j), max(i, j))] for j in range(count)] for i in range(count)])
    limit = 4 * DEPTH * np.finfo(dtype).eps * (np.abs(matrix).max() + (np.abs(columns) ** 2).sum(0).max())
    assert np.abs(got - expected).max() <= limit
    for step in range(DEPTH):
        assert [panel[panel_at(k, step, STEPS)] for k in range(count)] == list(columns[step, origin])


def test_sources_are_spread_as_far_as_they_say() -> None:
    lanes = flush_columns(np.dtype(np.float32)) // FLUSH_VECTORS
    size = 8 * CHUNK
    plan, places = moves(size, lanes), np.zeros(padded(size), np.int32)
    # The first vector has its sources side by side, the second in three vectors, the third further apart.
    near = np.arange(lanes)
    far = np.r_[2 * lanes - 1, 2 * lanes + 2 * np.arange(lanes - 1)]
    apart = 8 * lanes + 5 * np.arange(lanes)
    origin = np.r_[near, far, apart]
    assert (np.diff(origin) > 0).all()
    places[: len(origin)] = origin
    plan_moves(len(origin), places, plan, lanes)
    expected = [NEAR, FAR, SCATTERED] if permutes(4) else [SCATTERED] * 3
    assert plan.reach[:3].tolist() == expected
