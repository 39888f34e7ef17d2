"""What a recipe will do to a model and what it will cost, found out before anything is changed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_obc.calibration import Collector, DenseWeights, batch_size_of, execution_device
from lightning_obc.errors import LayerNotFoundError
from lightning_obc.layers import adapter_for, by_reason, is_lookup, select_layers, unsupported_layers
from lightning_obc.layerwise import reached_edges
from lightning_obc.planning import StagePlan, check_schedule, plan_stage
from lightning_obc.specs import Calibration, Prune, Quantize, Stage
from lightning_obc.timing import SolveTime, layer_flops, measured_time

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class StageForecast:
    """One stage of a plan, and its cost.

    Attributes:
        plan: Layers, shapes, what is skipped, calibration passes and the memory of their statistics.
        flops: Floating point operations of the sweeps; 0 where the stage sweeps nothing.
        solve_seconds: Time of the stage's solver on all layers (:mod:`~lightning_obc.timing`); None for corrections.
        calibration_seconds: Time of one batch through all passes, times the batches; None when there was no batch.
    """

    plan: StagePlan
    flops: float
    solve_seconds: float | None
    calibration_seconds: float | None

    def __str__(self) -> str:
        if not self.plan.layers:
            return str(self.plan)
        solving = "not estimated" if self.solve_seconds is None else _duration(self.solve_seconds)
        parts = [f"{self.flops / 1e9:.3g} Gflop of sweeps", f"solving {solving}"]
        if self.calibration_seconds is not None:
            parts.append(f"calibration {_duration(self.calibration_seconds)}")
        parts.append(f"{self.plan.statistics_bytes / 2**20:.1f} MiB of statistics at once")
        return f"{self.plan}\nestimate: {', '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return {
            "stage": str(self.plan.stage),
            "layers": [
                {
                    "name": layer.name,
                    "type": type(layer.module).__name__,
                    "adapter": type(adapter_for(layer.module)).__name__,
                    "groups": layer.shape.groups,
                    "rows": layer.shape.rows,
                    "columns": layer.shape.columns,
                    "hessian_bytes": layer.hessian_bytes,
                    "sweep_flops": layer.sweep_flops,
                }
                for layer in self.plan.layers
            ],
            "skipped": dict(self.plan.skipped),
            "passes": [[layer.name for layer in part] for part in self.plan.passes],
            "device": [asdict(need) | {"layers": list(need.layers)} for need in self.plan.needs],
            "statistics_bytes": self.plan.statistics_bytes,
            "flops": self.flops,
            "solve_seconds": self.solve_seconds,
            "calibration_seconds": self.calibration_seconds,
        }


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found out. ``print`` shows it as tables.

    Attributes:
        stages: One forecast per stage, in order.
        left_dense: Modules with weights that no stage will compress, with the reason.
        speeds: Measured flop per second of sweeps by backend, as the stages name it.
    """

    stages: list[StageForecast]
    left_dense: Mapping[str, str]
    speeds: Mapping[str, float]

    def __str__(self) -> str:
        parts = [str(stage) for stage in self.stages]
        left = by_reason(self.left_dense, "left dense", "left dense")
        speeds = [
            f"times are estimates from small problems solved on this machine, sweeps at {speed / 1e9:.3g} Gflop/s "
            f"(backend {name!r})"
            for name, speed in self.speeds.items()
        ]
        return "\n\n".join([*parts, *(["\n".join([*left, *speeds])] if left or speeds else [])])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return {
            "stages": [stage.to_dict() for stage in self.stages],
            "left_dense": dict(self.left_dense),
            "flops_per_second": dict(self.speeds),
        }


def plan(
    model: nn.Module,
    stages: Sequence[Stage] | Stage,
    batch: Any = None,
    *,
    calibration: Calibration | None = None,
    forward: Forward | None = None,
) -> Plan:
    """Find out what a recipe will do, and about how long it will take, without changing anything.

    Args:
        model: The model.
        stages: One stage or several.
        batch: One calibration batch. It runs through every calibration pass once, so that their time can be estimated
            and layers that it does not reach are found. None leaves the time of the calibration open.
        calibration: How the statistics will be collected; default ``Calibration()``.
        forward: ``forward(model, batch)`` runs the batch; None means the model's own way.

    Raises:
        LayerNotFoundError, PatternError, NonFiniteError, ScheduleError: What would stop the run before it starts.
        LayerNotReachedError, CalibrationError: The batch does not reach a layer, or cannot be used.
    """
    stages = [stages] if isinstance(stages, Stage) else list(stages)
    spec = calibration or Calibration()
    probe = None if batch is None else [batch]
    edges = None if probe is None else reached_edges(model, stages, lambda: Collector(model, probe, spec, forward))
    check_schedule(model, stages, edges)
    plans = [plan_stage(model, stage, spec, edges) for stage in stages]
    times = _measured(model, plans, spec)
    forecasts = [_forecast(model, found, batch, spec, forward, times) for found in plans]
    speeds = {time.stage.backend: speed for time in times.values() if (speed := time.flops_per_second) is not None}
    return Plan(forecasts, _left_dense(model, plans), speeds)


def _measured(model: nn.Module, plans: Sequence[StagePlan], spec: Calibration) -> dict[str, SolveTime]:
    """Times of the stages of all layers, each kind of stage measured once."""
    device = execution_device(spec.execution_device)
    device = device or next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    layers = [layer for found in plans for layer in found.layers]
    looked_up = {_kind(layer.stage) for layer in layers if is_lookup(layer.module)}
    kinds = {_kind(layer.stage): layer.stage for layer in layers if isinstance(layer.stage, (Prune, Quantize))}
    return {kind: measured_time(stage, device, lookups=kind in looked_up) for kind, stage in kinds.items()}


def _kind(stage: Stage) -> str:
    """Stages of one kind take the same time: all that matters for a single layer."""
    assert isinstance(stage, (Prune, Quantize))
    if isinstance(stage, Prune):
        stage = replace(stage, schedule=None)
    return repr(replace(stage, layers=None, exclude=None, at="train_end"))


def _forecast(
    model: nn.Module,
    plan: StagePlan,
    batch: Any,
    spec: Calibration,
    forward: Forward | None,
    times: Mapping[str, SolveTime],
) -> StageForecast:
    if not plan.layers:
        return StageForecast(plan, 0.0, None, None)
    flops = seconds = 0.0
    for layer in plan.layers:
        shape, found = layer.shape, times[_kind(layer.stage)]
        if is_lookup(layer.module):
            seconds += found.lookup_seconds(shape.rows, shape.columns)
        else:
            flops += layer_flops(found.stage, shape.groups, shape.rows, shape.columns)
            seconds += found.seconds(shape.groups, shape.rows, shape.columns)
    calibration = None if batch is None else _calibration_seconds(model, plan, batch, spec, forward)
    return StageForecast(plan, flops, seconds, calibration)


def _calibration_seconds(
    model: nn.Module, plan: StagePlan, batch: Any, spec: Calibration, forward: Forward | None
) -> float:
    collect = Collector(model, [batch], replace(spec, rounds=1), forward)
    with collect.executing():
        order = collect.order(plan.modules)  # Also warms up what the first forward pass prepares.
        collect.keep_blocks({name: plan.modules[name] for name in order})
        started, left = time.perf_counter(), set(order)
        for part in plan.passes:
            # As in a run: blocks whose outputs are kept cost nothing.
            collect.advance([name for name in order if name in left])
            modules = {layer.name: layer.module for layer in part}
            left -= set(modules)
            if spec.paired:
                collect.paired(modules, DenseWeights())
            else:
                collect(modules)
    batches = math.ceil(spec.samples / max(1, batch_size_of(batch)))
    return (time.perf_counter() - started) * batches * spec.rounds


def _left_dense(model: nn.Module, plans: Sequence[StagePlan]) -> dict[str, str]:
    handled = {layer.name for plan in plans for layer in plan.layers}
    skipped = {name: reason for plan in plans for name, reason in plan.skipped.items()}
    try:
        possible = set(select_layers(model))
    except LayerNotFoundError:
        possible = set()
    left = {name: skipped.get(name, "no stage selects it") for name in sorted(possible - handled)}
    return left | unsupported_layers(model)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"about {seconds:.2g} s" if seconds < 10 else f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 7200 else f"about {seconds / 3600:.1f} h"
