"""What a report shows of a search besides its curve: the layers of one profile, the loss curves of the sweeps."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_obc.allocation.costs import BASELINE
from lightning_obc.allocation.curve import CurvePoint, SearchResult
from lightning_obc.allocation.database import Database
from lightning_obc.allocation.plot import COST_NAMES, LABELS
from lightning_obc.layers import adapter_for, select_layers, unsupported_layers
from lightning_obc.obs import LayerSolution
from lightning_obc.report import CompressionReport, LayerReport, StageReport
from lightning_obc.specs import Block, Unstructured


def point_report(
    result: SearchResult, model: nn.Module, point: CurvePoint, solutions: Mapping[str, LayerSolution]
) -> CompressionReport:
    """The report of one point of a curve.

    Args:
        result: The curve.
        model: The model with the point applied.
        point: The point.
        solutions: What :meth:`SearchResult.apply_` returned for it.
    """
    modules = select_layers(model)
    cost = COST_NAMES.get(result.cost_name, result.cost_name)
    stage = f"{LABELS[point.method]} at {point.budget:g} of the {cost} of {BASELINE}"
    levels = {name: point.profile.get(name, "dense") for name in solutions}
    grids = {} if result.quantizer is None else result.quantizer.grids
    inputs = {name: grid.spec.bits for name, grid in grids.items()}
    rows = [_row(name, modules[name], levels[name], one, inputs.get(name)) for name, one in solutions.items()]
    samples = int(result.database.calibration.get("samples", 0))
    chosen = {name: solution for name, solution in solutions.items() if levels[name] != "dense"}
    metric = result.metric_name
    figures = {metric: (result.dense_metric, point.metric), f"share of {cost}": (1.0, point.cost)}
    stages = [StageReport(stage, rows, {}, chosen, samples, activations=grids)]
    return CompressionReport(model, stages, unsupported_layers(model), figures)


def _row(name: str, module: nn.Module, level: str, solution: LayerSolution, inputs: int | None) -> LayerReport:
    adapter = adapter_for(module)
    assert adapter is not None
    weight = adapter.current(module)
    bits = weight.element_size() * 8 if solution.grid is None else solution.grid.spec.bits
    return LayerReport(
        name=name,
        type=type(module).__name__,
        shape=tuple(weight.shape),
        stage=level,
        sparsity=float((weight == 0).double().mean()),
        bits=bits,
        loss=solution.loss,
        damping_loss=solution.damping_loss,
        relative_error=solution.relative_error,
        held_out=solution.status.held_out,
        status=level if solution.status.ok else f"{level}; {solution.status}",
        seconds=0.0,
        compressed=level != "dense",
        input_bits=inputs,
        total_error=solution.relative_error,
    )


def loss_curves(database: Database) -> dict[str, list[tuple[float, float]]]:
    """Relative error over sparsity of every layer with several unstructured levels, or blocks of one size."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for name in database.layers:
        record = database.record(name)
        found: dict[str, list[tuple[float, float]]] = {}
        for level in database.levels(name):
            if isinstance(level.pattern, (Unstructured, Block)) and level == level.mask:
                kept = record.levels[level.name]
                kind = f", blocks of {level.pattern.size}" if isinstance(level.pattern, Block) else ""
                point = (1 - kept.kept / record.weights, kept.loss / max(record.reference, 1e-300))
                found.setdefault(f"{name}{kind}", []).append(point)
        curves |= {title: sorted(points) for title, points in found.items() if len(points) > 1}
    return curves
