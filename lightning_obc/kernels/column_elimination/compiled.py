"""The steps of some rows, compiled. Nothing is contracted or reordered: every row has the bits that torch gives it."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_obc.kernels.obs_sweep.jit import cached_as

_EXACT: dict[str, Any] = {"error_model": "numpy", "nogil": True, "_nrt": False}


def _fix_rows(
    weight: Any,
    errors: Any,
    factor: Any,
    scale: Any,
    zero_point: Any,
    keep: Any,
    max_code: Any,
    gridded: bool,
    masked: bool,
    first: int,
    begin: int,
    end: int,
    last: int,
    start: int,
    stop: int,
) -> None:
    """One problem, arrays as in :func:`.fix.fix_columns`; columns ``begin … end`` of the rows ``start … stop``."""
    nothing = max_code - max_code
    for column in range(begin, end):
        pivot, line = factor[column, column], column - first
        for row in range(start, stop):
            value = weight[column, row]
            fixed = value
            if gridded:
                zero = zero_point[column, row]
                code = np.rint(value / scale[column, row]) + zero
                # NaN passes both comparisons, as it passes torch's clamp.
                code = nothing if code < nothing else code
                code = max_code if code > max_code else code
                fixed = (code - zero) * scale[column, row]
            if masked:
                fixed = fixed if keep[column, row] else nothing
            errors[line, row] = (value - fixed) / pivot
            weight[column, row] = fixed
        for later in range(column + 1, last):
            pull = factor[column, later]
            for row in range(start, stop):
                weight[later, row] -= pull * errors[line, row]


fix_rows = cached_as(_fix_rows, _EXACT)
