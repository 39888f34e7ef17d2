"""Compress a model without a Trainer: select, check, calibrate, solve, apply, report. In this order, in this file.

model ─► layers ─► calibration (H per layer) ─► OBS engine ─► solutions ─► apply ─► report
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import singledispatch
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lightning_obc.baselines import adaprune, gptq, magnitude, round_to_nearest, sparsegpt
from lightning_obc.calibration import calibration_batches, collect_hessians
from lightning_obc.correction import CorrectionReport, dense_references, run_correction
from lightning_obc.correction_spec import Correct
from lightning_obc.errors import NonFiniteError, OBCError, SpecError
from lightning_obc.hessian import Hessian
from lightning_obc.layers import adapter_for, unsupported_layers
from lightning_obc.obs import LayerSolution, prune, quantize
from lightning_obc.planning import LayerPlan, StagePlan, check_schedule, plan_stage, weight_matrix, weight_shape
from lightning_obc.report import CompressionReport, LayerReport, StageReport
from lightning_obc.report.progress import shown
from lightning_obc.specs import Calibration, Prune, Quantize, Stage

OnFailure = Literal["keep", "raise"]
Collect = Callable[[Mapping[str, nn.Module]], Mapping[str, Hessian]]
Progress = Callable[[str, float, float], None]

PRUNERS: dict[str, Callable[..., LayerSolution]] = {
    "sparsegpt": sparsegpt,
    "adaprune": adaprune,
    "magnitude": magnitude,
}
QUANTIZERS: dict[str, Callable[..., LayerSolution]] = {"gptq": gptq, "rtn": round_to_nearest}


class LayerStore(Protocol):
    """Durable solutions of single layers, so that an interrupted stage goes on where it stopped."""

    def load(self, name: str) -> LayerSolution | None: ...

    def save(self, name: str, solution: LayerSolution) -> None: ...


@singledispatch
def solve_layer(stage: Stage, weight: Tensor, hessian: Hessian, channels: int) -> LayerSolution:
    """Run the engine on one layer, ``weight [g, R, d]``. One implementation per stage type."""
    raise SpecError("This stage has no solver", got=type(stage).__name__, expected="Prune or Quantize")


@solve_layer.register
def _solve_prune(stage: Prune, weight: Tensor, hessian: Hessian, channels: int) -> LayerSolution:
    options: dict[str, Any] = {"channels": channels, "misfit": stage.misfit, "damping": stage.damping}
    if stage.solver != "obs":
        return PRUNERS[stage.solver](weight, hessian, stage.parsed, **options)
    options |= {"selection": stage.selection, "backend": stage.backend, "refine": stage.refine}
    return prune(weight, hessian, stage.parsed, **options)


@solve_layer.register
def _solve_quantize(stage: Quantize, weight: Tensor, hessian: Hessian, channels: int) -> LayerSolution:
    mask = weight != 0
    kept = None if bool(mask.all()) else mask
    options: dict[str, Any] = {"mask": kept, "channels": channels, "damping": stage.damping}
    if stage.solver != "obs":
        return QUANTIZERS[stage.solver](weight, hessian, stage.parsed, **options)
    return quantize(weight, hessian, stage.parsed, backend=stage.backend, refine=stage.refine, **options)


def run_stage(
    model: nn.Module,
    stage: Stage,
    collect: Collect,
    *,
    on_failure: OnFailure = "keep",
    progress: Progress | None = None,
    store: LayerStore | None = None,
    plan: StagePlan | None = None,
) -> StageReport:
    """Compress the layers of one stage in place.

    Args:
        model: Changed in place; parameters are copied into, never replaced.
        stage: What to do.
        collect: Returns the Hessians of the modules it is given; called once, before any weight changes.
        on_failure: ``"keep"`` leaves a layer that cannot be solved as it is and says so; ``"raise"`` stops at it.
        progress: Called as ``progress(description, completed, total)``.
        store: Where solved layers are kept, to go on after an interruption.
        plan: The plan of this stage, if it was made already.

    Raises:
        LayerNotFoundError, PatternError, NonFiniteError, CalibrationError: Before any weight is changed.
        SpecError: The stage is a correction, which :func:`correct_after` runs.
    """
    if isinstance(stage, Correct):
        raise SpecError(f"{stage} solves no layers", got="run_stage", expected="correct_after")
    started = time.perf_counter()
    plan = plan_stage(model, stage) if plan is None else plan
    hessians = collect(plan.modules)
    _check_hessians(plan, hessians)
    total = sum(layer.sweep_flops for layer in plan.layers)
    done = 0.0
    rows: list[LayerReport] = []
    solutions: dict[str, LayerSolution] = {}
    for layer in plan.layers:
        if progress is not None:
            progress(f"{stage}: {layer.name}", done, total)
        row, solution = _run_layer(stage, layer, hessians[layer.name], on_failure, store)
        rows.append(row)
        if solution is not None:
            solutions[layer.name] = solution
        done += layer.sweep_flops
    if progress is not None:
        progress(str(stage), total, total)
    samples = sum(hessians[plan.layers[0].name].samples)
    return StageReport(str(stage), rows, plan.skipped, solutions, samples, time.perf_counter() - started)


def _check_hessians(plan: StagePlan, hessians: Mapping[str, Hessian]) -> None:
    bad = [layer.name for layer in plan.layers if not bool(torch.isfinite(hessians[layer.name].halves).all())]
    if bad:
        raise NonFiniteError(
            "Calibration statistics hold NaN or Inf",
            got=f"layers {', '.join(bad)}",
            expected="finite activations",
            remedy="check the calibration data and the model's outputs in evaluation mode",
        )


def _run_layer(
    stage: Stage, layer: LayerPlan, hessian: Hessian, on_failure: OnFailure, store: LayerStore | None
) -> tuple[LayerReport, LayerSolution | None]:
    started = time.perf_counter()
    adapter = adapter_for(layer.module)
    assert adapter is not None
    solution = store.load(layer.name) if store is not None else None
    try:
        if solution is None:
            weight = adapter.weight_matrix(layer.module)
            solution = solve_layer(stage, weight, hessian, layer.shape.channels)
            if store is not None:
                store.save(layer.name, solution)
        adapter.write_weight_(layer.module, solution.weight)
    except Exception as error:
        # One bad layer must not lose the run; what is not an error of the layer (interrupts) still passes.
        if on_failure == "raise":
            raise
        return _report(stage, layer, None, time.perf_counter() - started, f"kept: {error}"), None
    return _report(stage, layer, solution, time.perf_counter() - started, str(solution.status)), solution


def _report(stage: Stage, layer: LayerPlan, solution: LayerSolution | None, seconds: float, status: str) -> LayerReport:
    weight = weight_matrix(layer.module)
    bits = weight.element_size() * 8
    return LayerReport(
        name=layer.name,
        type=type(layer.module).__name__,
        shape=tuple(weight_shape(layer.module)),
        stage=str(stage),
        sparsity=float((weight == 0).double().mean()),
        bits=bits if solution is None or solution.grid is None else solution.grid.spec.bits,
        loss=0.0 if solution is None else solution.loss,
        damping_loss=0.0 if solution is None else solution.damping_loss,
        relative_error=0.0 if solution is None else solution.relative_error,
        held_out=None if solution is None else solution.status.held_out,
        status=status,
        seconds=seconds,
        compressed=solution is not None,
    )


def correct_after(
    model: nn.Module,
    stage: Correct,
    batches: Any,
    reports: Sequence[StageReport],
    *,
    on_failure: OnFailure = "keep",
    **options: Any,
) -> CorrectionReport:
    """Run a correction on what earlier stages compressed; after a failure the model is as it was before.

    Args:
        model: The compressed model, changed in place.
        stage: The correction.
        batches: Calibration batches.
        reports: Reports of the stages before.
        on_failure: ``"keep"`` goes on without the correction and says so in its report; ``"raise"`` stops.
        options: ``dense``, ``forward``, ``progress`` and ``reduce`` of
            :func:`~lightning_obc.correction.run_correction`.
    """
    compressed = {row.name: None for report in reports for row in report.layers if row.compressed}
    quantized = {name for report in reports for name, found in report.solutions.items() if found.grid is not None}
    try:
        return run_correction(model, stage, batches, compressed=list(compressed), quantized=quantized, **options)
    except OBCError as error:
        if on_failure == "raise":
            raise
        return CorrectionReport(stage.method, notes=(f"not corrected: {error}",))


def compress(
    model: nn.Module,
    batches: Any,
    stages: Sequence[Stage] | Stage,
    *,
    calibration: Calibration | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    on_failure: OnFailure = "keep",
    progress: Progress | bool = False,
    metrics: Mapping[str, Callable[[nn.Module], float]] | None = None,
) -> CompressionReport:
    """Compress a trained model in place, without a Trainer.

    Args:
        model: Any module; evaluation mode is used for calibration and restored afterwards.
        batches: A DataLoader, a Dataset, a list of batches or any iterable of batches.
        stages: One stage or several, run in order; ``at`` is ignored.
        calibration: How much data to use and how; default ``Calibration()``.
        forward: ``forward(model, batch)`` runs one batch; by default ``model.calibration_step(batch)`` if there is
            one, else the model on the batch's inputs.
        on_failure: ``"keep"`` leaves a layer that cannot be solved dense and says so; ``"raise"`` stops at it.
        progress: True shows a bar; a callable gets ``(description, completed, total)``.
        metrics: Named functions of the model, measured before and after.

    Returns:
        The report; ``report.model`` is ``model``.

    Raises:
        SpecError, PatternError, LayerNotFoundError, NonFiniteError, CalibrationError: Before any weight is changed
            by the stage concerned.
    """
    stages = [stages] if isinstance(stages, Stage) else list(stages)
    spec = calibration or Calibration()
    check_schedule(model, stages)
    for stage in stages:
        plan_stage(model, stage)
    source = calibration_batches(batches, spec)
    before = {name: float(metric(model)) for name, metric in (metrics or {}).items()}
    reports: list[StageReport] = []
    corrections: list[CorrectionReport] = []
    with shown(progress) as report_progress:
        dense = dense_references(model, stages, source, forward=forward, progress=report_progress)
        for index, stage in enumerate(stages):
            if isinstance(stage, Correct):
                options: dict[str, Any] = {"dense": dense.get(index), "forward": forward, "progress": report_progress}
                corrections.append(correct_after(model, stage, source, reports, on_failure=on_failure, **options))
                continue

            def collect(modules: Mapping[str, nn.Module]) -> Mapping[str, Hessian]:
                return collect_hessians(
                    model, modules, source, forward=forward, rounds=spec.rounds, progress=report_progress
                )

            reports.append(run_stage(model, stage, collect, on_failure=on_failure, progress=report_progress))
    figures = {name: (before[name], float(metric(model))) for name, metric in (metrics or {}).items()}
    return CompressionReport(model, reports, unsupported_layers(model), figures, corrections)
