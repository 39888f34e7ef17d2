"""What the compiled sweep of a row works on: inputs, outputs, one thread's memory, and scalars."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_obc.kernels.obs_sweep.packed import Array, IntArray, Moves


class Problem(NamedTuple):
    """Inputs, read only. ``P = g·R`` rows; an absent input has no elements."""

    weight: Array  # [P, d]
    packed: Array  # [g, packed_size(d)], G
    hessian: Array  # [g, d, d] float64, damped
    zeros: NDArray[np.bool_]  # [P, d], weights that are zero already
    scale: Array  # [P, d]
    zero_point: Array  # [P, d]
    group: IntArray  # [d], N:M group of every column
    members: IntArray  # [d], columns sorted by group
    first_member: IntArray  # [groups + 1], where a group starts in ``members``
    quota: IntArray  # [groups], zeros to make


class Result(NamedTuple):
    """Outputs, see :class:`~lightning_obc.kernels.obs_sweep.types.SweepOutput`."""

    order: IntArray
    losses: Array
    steps: IntArray
    broken: NDArray[np.bool_]
    codes: NDArray[np.uint8]


class Scratch(NamedTuple):
    """Working memory of one thread. Flat arrays, by position where not said otherwise."""

    packed: Array
    panel: Array
    packed64: Array
    panel64: Array
    weight: Array
    diagonal: Array
    reference: Array  # diagonal at the start, or at the last restart
    penalty: Array  # 0, or ``big`` once a position leaves
    score: Array
    best: Array  # smallest scores, by lane
    scale: Array
    inverse_scale: Array
    zero_point: Array
    right: Array  # float64
    unit: Array  # float64
    moved: Array  # by column, float64: how far a column that is fixed is from where it was
    column: IntArray  # column at a position
    position: IntArray  # by column, -1 outside the working set
    leaving: IntArray
    origin: IntArray  # where a position that stays was
    moves: Moves
    zeros: IntArray  # columns eliminated without a choice
    free: IntArray
    fixed: NDArray[np.bool_]  # by column
    target: Array  # by column, float64: value a column was fixed at
    made: IntArray  # by group: zeros so far


class Options(NamedTuple):
    """Scalars. ``big``, ``outlier`` … are in the dtype of the sweep, so that nothing is promoted."""

    rows: int  # rows per problem
    quantize: bool
    max_code: Any
    outlier: Any  # squared error, in squared steps, above which a clipped weight goes first
    big: Any
    zero: Any
    half: Any
    one: Any
    worn: Any  # reference / diagonal at a pivot that asks for a restart
    steps: int  # panel of a wide working set
    narrow_steps: int  # panel of a narrow one
    narrow: int
    flush_width: int
    panel_width: int
    flush_width64: int
    panel_width64: int
