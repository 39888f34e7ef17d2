"""A level's weights from what is stored about it: a mask and the Hessian, or codes and their grid."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_obc.allocation.levels import Level
from lightning_obc.allocation.record import LayerRecord, check_mask
from lightning_obc.allocation.solve import MEMORY_BUDGET
from lightning_obc.grids import Grid
from lightning_obc.obs import LayerSolution, Problem, Status
from lightning_obc.obs.sweep import solve_mask


def rebuild(
    name: str, record: LayerRecord, level: Level, dense: Tensor, channels: int, problem: Callable[[], Problem]
) -> LayerSolution:
    """The solution of a stored level.

    Args:
        name: Name of the layer in errors.
        record: What is stored.
        level: A level that is in the record.
        dense: Dense weight ``[g, R, d]``.
        channels: Input channels per kernel position.
        problem: Prepares the layer's problem; called only when weights must be solved for.

    Raises:
        DatabaseError: The level is not stored.
        PatternError: What is stored does not obey the level's pattern.
    """
    stored = record.levels[level.weights.name]
    mask = record.mask(level).to(dense.device)
    if level.pattern is not None:
        check_mask(mask, dense, level.pattern, channels, name)
    grid: Grid | None = None
    codes: Tensor | None = None
    if level.grid is not None:
        stored_grid, stored_codes = record.codes(level, mask.cpu())
        grid, codes = _on(stored_grid, dense), stored_codes.to(dense.device)
        weight = grid.dequantize(codes).to(dense)
    elif level.pattern is None:
        weight = dense.clone()
    else:
        weight = solve_mask(problem(), mask, stored.backend, MEMORY_BUDGET).weight
    return LayerSolution(
        weight=weight,
        mask=mask,
        loss=stored.loss,
        damping_loss=stored.damping_loss,
        reference=record.reference,
        status=Status(stored.backend, record.damping, notes=stored.notes),
        grid=grid,
        codes=codes,
    )


def _on(grid: Grid, like: Tensor) -> Grid:
    group = None if grid.column_group is None else grid.column_group.to(like.device)
    return Grid(grid.spec, grid.scale.to(like.device), grid.zero_point.to(like.device), group)
