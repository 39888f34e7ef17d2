"""Corrections as stages of a recipe: what to take of the dense model before it changes, and what to call afterwards."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_obc.correction.batch_norm import reset_batch_norm, tracking_layers
from lightning_obc.correction.moments import NormStatistics, record_statistics
from lightning_obc.correction.norms import norm_layers
from lightning_obc.correction.passes import Forward, Progress
from lightning_obc.correction.result import CorrectionReport
from lightning_obc.correction.statistics import correct_bias, correct_statistics
from lightning_obc.correction.tuning import tune_global, tune_vectors
from lightning_obc.correction_spec import Correct
from lightning_obc.distributed import Ranks, exchange
from lightning_obc.errors import ScheduleError
from lightning_obc.layers import select_layers
from lightning_obc.specs import Stage

DenseReference = nn.Module | NormStatistics


def check_correction(model: nn.Module, stage: Correct) -> None:
    """Find out without data what would stop a correction.

    Raises:
        LayerNotFoundError: The model has no layer of the kind, or an entry matches none.
    """
    if stage.method == "batch_norm":
        tracking_layers(norm_layers(model, stage.layers, stage.exclude))
    elif stage.method == "statistics":
        norm_layers(model, stage.layers, stage.exclude)
    else:
        select_layers(model, stage.layers, stage.exclude)


def dense_references(
    model: nn.Module,
    stages: Sequence[Stage],
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> dict[int, DenseReference]:
    """What the corrections of a recipe need of the dense model. Call it before the first weight changes.

    Statistics where they are enough; tuning needs a copy of the model, made once for all stages.

    Args:
        model: The dense model.
        stages: The recipe; stages that are no :class:`~lightning_obc.correction_spec.Correct` are passed over.
        batches: Re-iterable calibration batches, later used for the corrections too.
        forward: ``forward(model, batch)`` runs one batch; None means the model's own way.
        progress: Called as ``progress(description, completed, total)``.
        ranks: Processes that share the batches; None for a single process.

    Returns:
        References by index into ``stages``, for :func:`run_correction`.
    """
    references: dict[int, DenseReference] = {}
    twin: nn.Module | None = None
    for index, stage in enumerate(stages):
        if not isinstance(stage, Correct) or not stage.needs_dense:
            continue
        if stage.tuning_method:
            if twin is None:
                with torch.inference_mode(False):
                    twin = copy.deepcopy(model)
            references[index] = twin
            continue
        choose = norm_layers if stage.method == "statistics" else select_layers
        references[index] = record_statistics(
            model,
            batches,
            layers=choose(model, stage.layers, stage.exclude),
            batches_limit=stage.batches_limit,
            forward=forward,
            progress=progress,
            ranks=ranks,
        )
    return references


def run_correction(
    model: nn.Module,
    stage: Correct,
    batches: Iterable[Any],
    dense: DenseReference | None = None,
    *,
    compressed: Collection[str] = (),
    quantized: Collection[str] = (),
    forward: Forward | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> CorrectionReport:
    """Run one correction stage in place. After an error the model is as it was before.

    Args:
        model: The compressed model.
        stage: What to do.
        batches: The batches that :func:`dense_references` had.
        dense: What :func:`dense_references` returned for the stage; None for ``"batch_norm"``.
        compressed: Names of the layers that were pruned or quantized; they are what ``"bias"``, ``"global"`` and
            ``"vectors"`` look at when the stage names no layers.
        quantized: Names of the quantized layers, whose weights stay.
        forward: ``forward(model, batch)`` runs one batch; None means the model's own way.
        progress: Called as ``progress(description, completed, total)``.
        ranks: Processes that share the batches; None for a single process. Tuning runs on all batches on every rank,
            and what rank 0 has found goes to the others.

    Raises:
        ScheduleError: The method needs the dense model, and there is none.
        LayerNotFoundError, CalibrationError, NonFiniteError, ShapeError: As the functions behind the methods.
    """
    layers = stage.layers if stage.layers is not None or not compressed else list(compressed)
    shared: dict[str, Any] = {"forward": forward, "progress": progress, "batches_limit": stage.batches_limit}
    if stage.method == "batch_norm":
        chosen: dict[str, Any] = {"layers": stage.layers, "exclude": stage.exclude, "momentum": stage.momentum}
        return reset_batch_norm(model, batches, ranks=ranks, **chosen, **shared)
    if dense is None:
        raise _no_dense(stage)
    if stage.method == "statistics":
        chosen = {"layers": stage.layers, "exclude": stage.exclude, "ranks": ranks}
        return correct_statistics(model, dense, batches, **chosen, **shared)
    if stage.method == "bias":
        chosen = {"layers": layers, "exclude": stage.exclude, "ranks": ranks}
        return correct_bias(model, dense, batches, **chosen, **shared)
    if not isinstance(dense, nn.Module):
        raise _no_dense(stage)
    chosen = {"layers": layers, "exclude": stage.exclude} | stage.tuning
    if stage.method == "vectors":
        report = tune_vectors(model, dense, batches, **chosen, **shared)
    else:
        report = tune_global(model, dense, batches, fixed=quantized, **chosen, **shared)
    return _as_on_first(model, report, ranks)


@torch.no_grad()
def _as_on_first(model: nn.Module, report: CorrectionReport, ranks: Ranks | None) -> CorrectionReport:
    """What rank 0 has tuned; a time limit, or another processor, may have ended elsewhere on other ranks."""
    if ranks is None or ranks.size == 1:
        return report
    found = exchange(ranks, report)
    for parameter in model.parameters():
        ranks.broadcast_(parameter, 0)
    return found[0]


def _no_dense(stage: Correct) -> ScheduleError:
    return ScheduleError(
        f"{stage} needs the dense model",
        got="none",
        expected="what dense_references recorded before the first stage",
        remedy="run it in one recipe with the stages that it corrects",
    )
