"""Compress a model without a Trainer: check the recipe, run its stages in order, correct, measure, report.

What one stage does is in :mod:`lightning_obc.stage_run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, get_args

from torch import nn

from lightning_obc.calibration import Collector, calibration_batches, offloading, rereadable
from lightning_obc.correction import CorrectionReport, dense_references, run_correction
from lightning_obc.correction_spec import Correct
from lightning_obc.distributed import Ranks, SingleProcess, all_or_none
from lightning_obc.errors import OBCError, SpecError
from lightning_obc.files import PathLike
from lightning_obc.layers import unsupported_layers
from lightning_obc.layerwise import reached_edges
from lightning_obc.origins import Origins
from lightning_obc.planning import check_execution, check_schedule, plan_stage
from lightning_obc.rehearsal import rehearse
from lightning_obc.report import CompressionReport, StageReport, weight_samples
from lightning_obc.report.progress import shown
from lightning_obc.specs import Calibration, Stage
from lightning_obc.stage_run import OnFailure, Progress, run_stage
from lightning_obc.store import SolutionStore
from lightning_obc.team import begin_together, same_on_all


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
        options: ``dense``, ``forward``, ``progress`` and ``ranks`` of
            :func:`~lightning_obc.correction.run_correction`.
    """
    compressed = {row.name: None for report in reports for row in report.layers if row.compressed}
    # From the rows, not the solutions: a resumed run has only the rows of its earlier stages.
    quantized = {row.name for report in reports for row in report.layers if row.compressed and row.bits <= 8}
    try:
        with same_on_all(model, options.get("ranks")):
            return run_correction(model, stage, batches, compressed=list(compressed), quantized=quantized, **options)
    except OBCError as error:
        if on_failure == "raise":
            raise
        return CorrectionReport(stage.method, notes=(f"not corrected: {error}",))


def _checked_recipe(stages: Any, on_failure: str) -> list[Stage]:
    recipe = [stages] if isinstance(stages, Stage) else stages
    if isinstance(recipe, str) or not all(isinstance(stage, Stage) for stage in recipe):
        raise SpecError(
            "A recipe is made of stages", got=repr(stages), expected="Prune, Quantize or Correct", remedy='Prune("2:4")'
        )
    if on_failure not in get_args(OnFailure):
        raise SpecError("Unknown on_failure", got=repr(on_failure), expected=f"one of {get_args(OnFailure)}")
    return list(recipe)


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
    store: PathLike | None = None,
    ranks: Ranks | None = None,
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
        store: A folder that gets every solved layer at once. The same call on the same dense model then goes on behind
            the last of them after an interruption, with the same result.
        ranks: Processes that compress the model together, :func:`~lightning_obc.all_ranks` for those of
            ``torch.distributed``; each calls this function with the same model, data and stages, and gets the same
            result. They share the batches and the layers. None: this process works alone.

    Returns:
        The report; ``report.model`` is ``model``.

    Raises:
        SpecError, PatternError, LayerNotFoundError, NonFiniteError, CalibrationError: Before any weight is changed
            by the stage concerned. Calls that the model does not take, and layers that no batch reaches, are found
            with one batch before the first stage; not in iterable data sets, which may be readable only once.
        FingerprintError: The store holds layers of another model, recipe or calibration.
        DeviceMemoryError: A block of the model does not fit ``calibration.execution_device``.
        RankError: The ranks hold different models, or one of them failed.
    """
    stages = _checked_recipe(stages, on_failure)
    spec = calibration or Calibration()
    source = calibration_batches(batches, spec)
    edges = reached_edges(model, stages, lambda: Collector(model, source, spec, forward))
    check_schedule(model, stages, edges)
    check_execution(model, stages, spec)
    planned = [plan_stage(model, stage, spec, edges) for stage in stages]
    team = ranks or SingleProcess()
    if rereadable(source):
        rehearse(Collector(model, source, spec, forward, ranks=team), planned)
    plans = [str(plan) for plan in planned]
    samples = weight_samples(model)
    solved = None if store is None else SolutionStore(store)
    before = {name: float(metric(model)) for name, metric in (metrics or {}).items()}
    reports: list[StageReport] = []
    corrections: list[CorrectionReport] = []
    origins = Origins()
    origins.expect([plan.modules for plan in planned if not isinstance(plan.stage, Correct)])
    with ExitStack() as stack:
        report_progress = stack.enter_context(shown(progress if team.rank == 0 else False))
        stack.enter_context(all_or_none(team))
        offload = stack.enter_context(offloading(model, spec))
        begin_together(model, team)
        shared: dict[str, Any] = {"forward": forward, "progress": report_progress, "ranks": team}
        dense = dense_references(model, stages, source, **shared)
        for index, stage in enumerate(stages):
            if isinstance(stage, Correct):
                options = {"dense": dense.get(index), "on_failure": on_failure, **shared}
                corrections.append(correct_after(model, stage, source, reports, **options))
                continue

            collect = Collector(model, source, spec, forward, report_progress, team, offload=offload)
            found = plan_stage(model, stage, spec, edges)
            kept = None if solved is None else solved.stage(index)
            how: dict[str, Any] = {"on_failure": on_failure, "progress": report_progress, "store": kept, "plan": found}
            reports.append(run_stage(model, stage, collect, origins=origins, **how))
    figures = {name: (before[name], float(metric(model))) for name, metric in (metrics or {}).items()}
    left = unsupported_layers(model)
    return CompressionReport(model, reports, left, figures, corrections, stages, plans, samples)
