"""The oracle: the sweep as the paper writes it, in float64, one weight at a time (paper, algorithms 1 and 3).

It inverts the damped Hessian itself, so that it also judges the ``inverse`` that the other backends start from.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_obc.kernels.obs_sweep.types import OUTLIER_TOLERANCE, SweepOutput, SweepPlan

Floats = NDArray[np.float64]


def sweep(plan: SweepPlan) -> SweepOutput:
    """Run the plan; results come back in the weight's dtype and on its device."""
    problem = plan.problem
    groups, rows, columns = problem.weight.shape
    order = np.full((groups, rows, plan.steps), -1, np.int32)
    losses = np.zeros((groups, rows, plan.steps))
    count = np.zeros((groups, rows), np.int32)
    broken = np.zeros((groups, rows), bool)
    codes = np.zeros((groups, rows, columns), np.uint8)
    for g in range(groups):
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(problem.hessian[g])).cpu().numpy()
        for r in range(rows):
            row = Row(plan, g, r, inverse)
            row.run()
            count[g, r], broken[g, r] = len(row.order), row.broken
            order[g, r, : len(row.order)], losses[g, r, : len(row.order)] = row.order, row.losses
            codes[g, r] = row.codes
    device, dtype = problem.weight.device, problem.weight.dtype
    return SweepOutput(
        torch.from_numpy(order).to(device),
        torch.from_numpy(losses).to(device, dtype),
        torch.from_numpy(count).to(device),
        torch.from_numpy(broken).to(device),
        None if plan.grid is None else torch.from_numpy(codes).to(device),
    )


class Row:
    """The elimination of one row."""

    def __init__(self, plan: SweepPlan, g: int, r: int, inverse: Floats) -> None:
        problem, grid = plan.problem, plan.grid
        self.weight = problem.weight[g, r].double().cpu().numpy().copy()
        self.inverse = inverse.copy()
        columns = len(self.weight)
        self.alive = np.ones(columns, bool)
        self.kept = np.ones(columns, bool) if problem.keep is None else problem.keep[g, r].cpu().numpy()
        self.grid = None
        if grid is not None:
            scale, zero = grid.scale[g, r].double().cpu().numpy(), grid.zero_point[g, r].double().cpu().numpy()
            self.grid = (scale, zero, grid.max_code)
        self.groups = None
        if plan.groups is not None:
            self.groups = (plan.groups.column_group.cpu().numpy(), plan.groups.quota.cpu().numpy().copy())
        self.order: list[int] = []
        self.losses: list[float] = []
        self.codes = np.zeros(columns, np.uint8)
        self.broken = False

    def run(self) -> None:
        for column in np.flatnonzero(~self.kept).tolist():
            self.eliminate(column, 0.0)
        while not self.broken and self.candidates().any():
            best = self.choose()
            self.eliminate(best, float(self.targets()[best]))

    def candidates(self) -> NDArray[np.bool_]:
        """Columns that may still be fixed: alive, and in a group that has zeros to make."""
        if self.groups is None:
            return self.alive
        column_group, quota = self.groups
        return self.alive & (quota[column_group] > 0)

    def targets(self) -> Floats:
        """What every weight would be fixed at: 0, or its nearest grid point."""
        if self.grid is None:
            return np.zeros_like(self.weight)
        scale, zero, max_code = self.grid
        return (np.clip(np.rint(self.weight / scale) + zero, 0, max_code) - zero) * scale

    def choose(self) -> int:
        """The cheapest candidate; of a quantization, the worst clipped outlier before any other."""
        error = self.weight - self.targets()
        if self.grid is not None:
            scale, zero, max_code = self.grid
            raw = np.rint(self.weight / scale) + zero
            clipped = (raw < 0) | (raw > max_code)
            outlier = self.candidates() & clipped & (np.abs(error) > 0.5 * scale * (1 + OUTLIER_TOLERANCE))
            if outlier.any():
                return int(np.argmax(np.where(outlier, error**2, -1)))
        score = error**2 / (2 * np.diag(self.inverse))
        return int(np.argmin(np.where(self.candidates(), score, np.inf)))

    def eliminate(self, column: int, target: float) -> None:
        """Fix one weight, move the others to their optimum, and take its row and column out of ``G``."""
        pivot = self.inverse[column, column]
        if not (np.isfinite(pivot) and pivot > 0):
            self.broken = True
            return
        v = self.inverse[:, column] / np.sqrt(pivot)
        z = (self.weight[column] - target) / np.sqrt(pivot)
        self.weight -= z * v
        self.inverse -= np.outer(v, v)
        self.inverse[column, :] = self.inverse[:, column] = 0
        self.inverse[column, column] = 1
        self.alive[column] = False
        self.weight[column] = target
        self.order.append(column)
        self.losses.append(z * z / 2)
        if self.grid is not None:
            scale, zero, _ = self.grid
            self.codes[column] = int(np.rint(target / scale[column]) + zero[column])
        if self.groups is not None:
            self.groups[1][self.groups[0][column]] -= 1
