"""The yardstick: optimal brain surgery as the paper describes it, one rank-1 update of the whole ``G`` per weight.

Batched over 32 rows in torch. Each row of the batch has its own copy of ``G``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_obc.kernels.obs_sweep import GridInput, NMGroups, SweepInput

BATCH = 32


def sweep(
    problem: SweepInput, *, groups: NMGroups | None = None, grid: GridInput | None = None
) -> tuple[Tensor, Tensor]:
    """Order and losses ``[R, T]`` of a single problem."""
    parts = [
        _batch(problem.weight[0, rows].clone(), problem.inverse[0], groups, _rows(grid, rows))
        for rows in torch.arange(problem.weight.shape[1]).split(BATCH)
    ]
    return torch.cat([order for order, _ in parts]), torch.cat([losses for _, losses in parts])


def _rows(grid: GridInput | None, rows: Tensor) -> GridInput | None:
    return None if grid is None else GridInput(grid.scale[0, rows], grid.zero_point[0, rows], grid.max_code)


def _batch(weight: Tensor, shared: Tensor, groups: NMGroups | None, grid: GridInput | None) -> tuple[Tensor, Tensor]:
    size, columns = weight.shape
    row = torch.arange(size)
    inverse = shared.expand(size, columns, columns).clone()
    alive = torch.ones(size, columns, dtype=torch.bool)
    quota = None if groups is None else groups.quota.expand(size, -1).clone()
    steps = columns if groups is None else int(groups.quota.sum())
    order, losses = torch.empty(size, steps, dtype=torch.int64), torch.empty(size, steps)
    for step in range(steps):
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        error = weight - _targets(weight, grid)
        candidate = alive
        if groups is not None and quota is not None:
            candidate = alive & (quota > 0)[:, groups.column_group]
        score = torch.where(candidate, error.square() / diagonal, torch.inf)
        if grid is not None:
            score = torch.where(candidate & _outliers(weight, error, grid), -error.square(), score)
        pivot = score.argmin(1)
        value, distance = diagonal[row, pivot], error[row, pivot]
        column = inverse[row, pivot]
        order[:, step], losses[:, step] = pivot, distance.square() / value / 2
        weight -= column * (distance / value)[:, None]
        inverse -= column[:, :, None] * (column / value[:, None])[:, None, :]
        inverse[row, pivot, pivot] = 1
        alive[row, pivot] = False
        if groups is not None and quota is not None:
            quota[row, groups.column_group[pivot]] -= 1
    return order, losses


def _targets(weight: Tensor, grid: GridInput | None) -> Tensor:
    if grid is None:
        return torch.zeros_like(weight)
    code = torch.clamp(torch.round(weight / grid.scale) + grid.zero_point, 0, grid.max_code)
    return (code - grid.zero_point) * grid.scale


def _outliers(weight: Tensor, error: Tensor, grid: GridInput) -> Tensor:
    raw = torch.round(weight / grid.scale) + grid.zero_point
    return ((raw < 0) | (raw > grid.max_code)) & (error.abs() > 0.5 * grid.scale * (1 + 1e-5))
