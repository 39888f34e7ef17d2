"""The steps of a column order inside a block of columns: on torch, and compiled on a CPU, with the same bits.

Index legend: ``g`` problems, ``d`` columns in the order of their elimination, ``R`` rows, ``b`` columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_obc.kernels.threads import run_blocks

# Rows of a thread's turn: a block of 128 columns of them is 32 KiB of float32.
ROWS = 64
# Below so many updates of a weight a second thread costs more than it takes over.
_WORTH_A_THREAD = 1 << 22


@dataclass(frozen=True)
class Targets:
    """Where columns are fixed: at the nearest grid point, or where they are; at 0 where ``keep`` is False.

    Attributes:
        scale: ``[g, d, R]`` of the weights' type, or None without a grid.
        zero_point: ``[g, d, R]`` integers of the same type, or None.
        max_code: Largest code of the grid.
        keep: ``[g, d, R]`` bool, or None.
    """

    scale: Tensor | None = None
    zero_point: Tensor | None = None
    max_code: int = 0
    keep: Tensor | None = None

    def at(self, column: int, current: Tensor) -> Tensor:
        """``[g, R]``, the values at which a column of current weights ``[g, R]`` is fixed."""
        point = current
        if self.scale is not None and self.zero_point is not None:
            scale, zero = self.scale[:, column], self.zero_point[:, column]
            point = (torch.clamp(torch.round(current / scale) + zero, 0, self.max_code) - zero) * scale
        return point if self.keep is None else torch.where(self.keep[:, column], point, 0.0)


def fix_columns(
    weight: Tensor, errors: Tensor, factor: Tensor, targets: Targets, first: int, columns: tuple[int, int], last: int
) -> None:
    """Fix some columns of a block in order, and let those after them in the block compensate.

    Args:
        weight: ``[g, d, R]`` float32 or float64, contiguous; changed in place.
        errors: ``[g, b, R]``, changed in place: what was fixed, divided by the pivot.
        factor: ``[g, d, d]``, ``U`` of ``G = UᵀU`` in this order.
        targets: Where columns are fixed.
        first: First column of the block.
        columns: First and last (exclusive) column to fix.
        last: End of the block.
    """
    compiled = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
    (_compiled if compiled else _torch)(weight, errors, factor, targets, first, columns, last)


def _torch(
    weight: Tensor, errors: Tensor, factor: Tensor, targets: Targets, first: int, columns: tuple[int, int], last: int
) -> None:
    for column in range(*columns):
        fixed = targets.at(column, weight[:, column])
        error = (weight[:, column] - fixed) / factor[:, column, column, None]
        weight[:, column] = fixed
        weight[:, column + 1 : last] -= factor[:, column, column + 1 : last, None] * error[:, None]
        errors[:, column - first] = error


def _compiled(
    weight: Tensor, errors: Tensor, factor: Tensor, targets: Targets, first: int, columns: tuple[int, int], last: int
) -> None:
    from lightning_obc.kernels.column_elimination.compiled import fix_rows

    groups, _, rows = weight.shape
    if rows == 0:
        return
    gridded, masked = targets.scale is not None, targets.keep is not None
    # What is absent is never read: any array of its type and shape takes the place.
    scale, zero = (weight if part is None else part for part in (targets.scale, targets.zero_point))
    arrays = [part.detach().numpy() for part in (weight, errors, factor, scale, zero)]
    arrays.append(np.empty((groups, 0, 0), np.bool_) if targets.keep is None else targets.keep.numpy())
    highest = arrays[0].dtype.type(targets.max_code)

    def begin() -> Callable[[int, int], None]:
        def do(start: int, stop: int) -> None:
            for problem in range(groups):
                fix_rows(
                    *(array[problem] for array in arrays), highest, gridded, masked, first, *columns, last, start, stop
                )

        return do

    updates = groups * rows * (columns[1] - columns[0]) * (last - columns[0]) // 2
    threads = torch.get_num_threads() if updates >= _WORTH_A_THREAD else 1
    run_blocks(rows, ROWS, min(threads, -(-rows // ROWS)), begin)
