"""Solutions taken apart into plain values and tensors, to be stored or sent, and put together again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import Tensor

from lightning_obc.grids import Grid
from lightning_obc.obs.solution import LayerSolution, Refinement, Status
from lightning_obc.specs import IntGrid


def solution_parts(solution: LayerSolution) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Plain values, fit for JSON, and CPU tensors of their own: what :func:`solution_from_parts` takes."""
    scalars: dict[str, Any] = {name: getattr(solution, name) for name in ("loss", "damping_loss", "reference")}
    scalars |= {
        "status": asdict(solution.status),
        "refinement": None if solution.refinement is None else asdict(solution.refinement),
        "grid": None if solution.grid is None else asdict(solution.grid.spec),
        "curve": [list(point) for point in solution.curve],
    }
    tensors = {"weight": solution.weight, "mask": solution.mask}
    if solution.codes is not None:
        tensors["codes"] = solution.codes
    if solution.grid is not None:
        tensors |= {"scale": solution.grid.scale, "zero_point": solution.grid.zero_point}
        if solution.grid.column_group is not None:
            tensors["column_group"] = solution.grid.column_group
    # Tensors of one solution may be views of each other, which the format does not take.
    return scalars, {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}


def solution_from_parts(
    scalars: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device
) -> LayerSolution:
    """The solution that :func:`solution_parts` took apart, on a device."""
    placed = {key: value.to(device) for key, value in tensors.items()}
    grid = None
    if scalars["grid"] is not None:
        grid = Grid(IntGrid(**scalars["grid"]), placed["scale"], placed["zero_point"], placed.get("column_group"))
    status = _rebuilt(Status, scalars["status"])
    refinement = None if scalars["refinement"] is None else _rebuilt(Refinement, scalars["refinement"])
    figures = {name: scalars[name] for name in ("loss", "damping_loss", "reference")}
    return LayerSolution(
        placed["weight"],
        placed["mask"],
        **figures,
        status=status,
        grid=grid,
        codes=placed.get("codes"),
        refinement=refinement,
        curve=tuple((share, loss) for share, loss in scalars.get("curve", ())),
    )


def solution_on(solution: LayerSolution, device: torch.device) -> LayerSolution:
    """The same solution on a device."""
    return replace(solution_from_parts(*solution_parts(solution), device), curve=solution.curve)


def _rebuilt(kind: type[Any], values: Mapping[str, Any]) -> Any:
    known = {entry.name for entry in fields(kind)}
    lists = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key in known}
    return kind(**lists)
