"""Scores of the columns of a working set, and the choice of the next pivot (numba)."""

from __future__ import annotations

from typing import Any

import numba

from lightning_obc.kernels.obs_sweep.jit import STRICT, lower
from lightning_obc.kernels.obs_sweep.lanes import LANES
from lightning_obc.kernels.obs_sweep.packed import CHUNK, panel_at
from lightning_obc.kernels.obs_sweep.state import Options, Scratch
from lightning_obc.kernels.obs_sweep.step_tile import (
    find,
    half_step_prune,
    half_step_quantize,
    scores_prune,
    scores_quantize,
    step_prune,
    step_quantize,
)
from lightning_obc.kernels.obs_sweep.tile import PANEL_VECTORS

# Passing a whole Scratch costs more than a chunk's arithmetic, so what runs every step is inlined.
_jit_inline = numba.njit(forceinline=True, **STRICT)


@_jit_inline
def choose(size: int, s: Scratch, o: Options) -> int:
    """Position of the smallest score, the lowest among equals, which has the lowest column; -1 when there is none."""
    best = s.best[0]
    for lane in range(1, LANES):
        best = lower(best, s.best[lane])
    return find(s.score, best, size) if best < o.big else -1


@_jit_inline
def score(size: int, s: Scratch, o: Options) -> None:
    """The scores of all positions."""
    s.best[:] = o.big
    for start in range(0, size, o.panel_width // PANEL_VECTORS):
        if o.quantize:
            scores_quantize(start, s, o)
        else:
            scores_prune(start, s, o)


@_jit_inline
def eliminate(size: int, pivot: int, inverse_root: Any, z: Any, step: int, steps: int, s: Scratch, o: Options) -> None:
    """Correct the gathered column at ``step``, move weights and diagonal by it, and score all positions again."""
    left = panel_at(pivot, 0, steps)
    s.best[:] = o.big
    for start in range(0, size, o.panel_width):
        own, first = panel_at(start, step, steps), panel_at(start, 0, steps)
        half = size - start <= o.panel_width // 2
        if o.quantize:
            if half:
                half_step_quantize(own, first, left, CHUNK, step, inverse_root, z, start, s, o)
            else:
                step_quantize(own, first, left, CHUNK, step, inverse_root, z, start, s, o)
        elif half:
            half_step_prune(own, first, left, CHUNK, step, inverse_root, z, start, s, o)
        else:
            step_prune(own, first, left, CHUNK, step, inverse_root, z, start, s, o)
