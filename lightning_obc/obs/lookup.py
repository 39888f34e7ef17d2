"""Layers whose rows are looked up: every row has a Hessian of its own, ``H_r = H + h_r I``.

An embedding alone has ``H = 0``; one that is tied to an output layer has the ``H`` of that layer's inputs.

Index legend: ``g`` problems of a layer, ``R`` rows, ``d`` columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lightning_obc.errors import ShapeError
from lightning_obc.grids import Grid
from lightning_obc.hessian import Hessian
from lightning_obc.obs.solution import LayerSolution, Status

# Rows share a Hessian when their h_r are as near as a factor of 10; beyond 10^±3 of mean diag(H) they all do.
_DECADES = 3

Solve = Callable[[Tensor, Hessian], LayerSolution]


def row_excess(delta: Tensor, hessian: Hessian) -> float:
    """What ``½ Σ_r δ_r H_r δ_rᵀ`` has above ``½ Σ_r δ_r H̄ δ_rᵀ`` with the mean ``H̄`` of :meth:`Hessian.full`.

    Args:
        delta: ``[g, R, d]``.
        hessian: The statistic; 0 where it counts no rows.
    """
    weights = hessian.row_weights()
    if weights is None:
        return 0.0
    if weights.shape != delta.shape[:2]:
        raise ShapeError("Rows and their counts differ", got=tuple(delta.shape), expected=f"{list(weights.shape)} rows")
    weights = weights.to(delta.device)
    excess = weights - weights.mean(-1, keepdim=True)
    return float((excess * delta.double().square().sum(-1)).sum() / 2)


def solve_by_rows(weight: Tensor, hessian: Hessian, solve: Solve, *, together: bool) -> LayerSolution:
    """Solve a layer whose rows have Hessians of their own, and measure its loss row by row.

    Args:
        weight: ``[1, R, d]``.
        hessian: The statistic, with counts of rows.
        solve: Solves rows that share one Hessian, the mean over them.
        together: Solve all rows at once, with the mean over all: where rows depend on each other (one grid for all, one
            choice of what is pruned), or where the Hessian couples no weights.
    """
    if together or not bool(hessian.halves.any()):
        return _measured(solve(weight, hessian), weight, hessian)
    classes = _classes(hessian)
    parts = []
    for index in classes:
        assert hessian.rows is not None
        mine = replace(hessian, rows=hessian.rows[:, :, index.to(hessian.rows.device)])
        parts.append(_measured(solve(weight[:, index.to(weight.device)], mine), weight[:, index], mine))
    return _joined(parts, torch.cat(classes).argsort().to(weight.device))


def _measured(solution: LayerSolution, weight: Tensor, hessian: Hessian) -> LayerSolution:
    delta = solution.weight.double() - weight.double()
    loss, reference = solution.loss + row_excess(delta, hessian), solution.reference + row_excess(weight, hessian)
    return replace(solution, loss=max(loss, 0.0), reference=max(reference, 0.0))


def _classes(hessian: Hessian) -> list[Tensor]:
    """Indices of the rows by the order of magnitude of their ``h_r`` beside ``H``."""
    weights = hessian.row_weights()
    assert weights is not None
    diagonal = replace(hessian, rows=None).full().diagonal(dim1=-2, dim2=-1).mean()
    decade = torch.log10(weights[0] / diagonal).clamp(-_DECADES, _DECADES).round()
    return [(decade == value).nonzero()[:, 0] for value in decade.unique()]


def _joined(parts: list[LayerSolution], order: Tensor) -> LayerSolution:
    """One solution of rows that were solved in parts; ``order`` puts them back."""

    def rows(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors, 1)[:, order]

    first = parts[0]
    grids = [part.grid for part in parts if part.grid is not None]
    codes = [part.codes for part in parts if part.codes is not None]
    scale, zero = (rows([getattr(grid, name) for grid in grids]) if grids else None for name in ("scale", "zero_point"))
    notes = tuple(dict.fromkeys(note for part in parts for note in part.status.notes))
    damping = max(part.status.damping for part in parts)
    return LayerSolution(
        weight=rows([part.weight for part in parts]),
        mask=rows([part.mask for part in parts]),
        loss=sum(part.loss for part in parts),
        damping_loss=sum(part.damping_loss for part in parts),
        reference=sum(part.reference for part in parts),
        status=Status(first.status.backend, damping, first.status.dead, first.status.held_out, notes),
        grid=None if scale is None or zero is None else Grid(grids[0].spec, scale, zero, grids[0].column_group),
        codes=rows(codes) if codes else None,
    )
