"""The yardstick: optimal brain surgery as the paper describes it, one rank-1 update of the whole ``G`` per weight, or
one of rank ``c`` per block of ``c`` weights.

Batched over 32 rows in torch. Each row of the batch has its own copy of ``G``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_obc.kernels.obs_sweep import ColumnBlocks, GridInput, NMGroups, SweepInput

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


def sweep_blocks(problem: SweepInput, blocks: ColumnBlocks) -> tuple[Tensor, Tensor]:
    """Order and losses ``[R, n]`` of a single problem whose blocks are consecutive columns."""
    parts = [
        _batch_of_blocks(problem.weight[0, rows].clone(), problem.inverse[0], blocks.size)
        for rows in torch.arange(problem.weight.shape[1]).split(BATCH)
    ]
    return torch.cat([order for order, _ in parts]), torch.cat([losses for _, losses in parts])


def _batch_of_blocks(weight: Tensor, shared: Tensor, size: int) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    inverse = shared.expand(rows, columns, columns).clone()
    each = torch.arange(columns).view(-1, size)
    alive = torch.ones(rows, len(each), dtype=torch.bool)
    order, losses = torch.empty(rows, len(each), dtype=torch.int64), torch.empty(rows, len(each))
    row = torch.arange(rows)[:, None]
    for step in range(len(each)):
        small = inverse[:, each[:, :, None], each[:, None, :]]
        error = weight.view(rows, -1, size)
        cost = (torch.linalg.solve(small, error) * error).sum(-1) / 2
        block = torch.where(alive, cost, torch.inf).argmin(1, keepdim=True)
        order[:, step], losses[:, step] = block[:, 0], cost.gather(1, block)[:, 0]
        gone = each[block[:, 0]]
        lines = inverse[row, gone]
        solved = torch.linalg.solve(lines.gather(2, gone[:, None].expand(-1, size, -1)), lines)
        weight -= (solved * weight.gather(1, gone)[:, :, None]).sum(1)
        inverse -= lines.mT @ solved
        inverse[row, gone], inverse.mT[row, gone] = 0, 0
        inverse[row, gone, gone] = 1
        weight.scatter_(1, gone, 0)
        alive.scatter_(1, block, False)
    return order, losses
