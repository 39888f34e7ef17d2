"""Scores of the columns of a working set, and the choice of the next pivot (numba)."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from lightning_obc.kernels.obs_sweep.jit import STRICT, lower
from lightning_obc.kernels.obs_sweep.packed import CHUNK, Array, IntArray
from lightning_obc.kernels.obs_sweep.state import Options, Scratch

_jit = numba.njit(**STRICT)
# Passing a whole Scratch costs more than a chunk's arithmetic, so what runs every step is inlined.
_jit_inline = numba.njit(forceinline=True, **STRICT)
_NONE = np.iinfo(np.int32).max


@_jit_inline
def choose(size: int, s: Scratch, o: Options) -> int:
    """Position of the smallest score, the lowest column among equals; -1 when there is none."""
    chunks = (size + CHUNK - 1) // CHUNK
    best = o.big
    for chunk in range(chunks):
        best = min(best, s.chunk_best[chunk])
    if not best < o.big:
        return -1
    column = _NONE
    for chunk in range(chunks):
        if s.chunk_best[chunk] == best:
            column = min(column, _lowest_column(s.score, s.column, chunk * CHUNK, best))
    return -1 if column == _NONE else s.position[column]


@_jit
def _lowest_column(score: Array, column: IntArray, start: int, best: Any) -> int:
    lowest: Any = np.int32(_NONE)
    for k in range(CHUNK):
        i = np.uint64(start) + np.uint64(k)
        lowest = min(lowest, column[i] if score[i] == best else np.int32(_NONE))
    return lowest


@_jit_inline
def score(chunk: int, s: Scratch, o: Options) -> None:
    start = chunk * CHUNK
    if o.quantize:
        s.chunk_best[chunk] = _score_quantize(
            s.weight, s.diagonal, s.penalty, s.scale, s.inverse_scale, s.zero_point, s.score, start, o
        )
    else:
        s.chunk_best[chunk] = _score_prune(s.weight, s.diagonal, s.penalty, s.score, start, o.big)


@_jit
def _score_prune(weight: Array, diagonal: Array, penalty: Array, score: Array, start: int, big: Any) -> Any:
    best = big
    for k in range(CHUNK):
        i = np.uint64(start) + np.uint64(k)
        value = weight[i] * weight[i] / diagonal[i] + penalty[i]
        score[i] = value
        best = lower(best, value)
    return best


@_jit
def _score_quantize(
    weight: Array,
    diagonal: Array,
    penalty: Array,
    scale: Array,
    inverse_scale: Array,
    zero_point: Array,
    score: Array,
    start: int,
    o: Options,
) -> Any:
    """Clipped outliers score below zero, the largest squared error lowest, so that one minimum finds both."""
    best = o.big
    for k in range(CHUNK):
        i = np.uint64(start) + np.uint64(k)
        nearest = np.rint(weight[i] * inverse_scale[i]) + zero_point[i]
        code = min(max(nearest, o.zero), o.max_code)
        error = weight[i] - (code - zero_point[i]) * scale[i]
        square = error * error
        far = nearest != code and square > o.outlier * scale[i] * scale[i]
        value = (-square if far else square / diagonal[i]) + penalty[i]
        score[i] = value
        best = lower(best, value)
    return best
