"""Connects stages with a Trainer: what is checked before a fit, and how Hessians are collected in one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_obc.activations import attach, attached, detach, quantizes_inputs
from lightning_obc.calibration import Collector, calibration_batches, call_forward, offload_of, preserved_rng
from lightning_obc.callbacks import compat
from lightning_obc.callbacks.display import Display
from lightning_obc.callbacks.held import is_computed
from lightning_obc.callbacks.plateau import PlateauWatch, monitored
from lightning_obc.callbacks.timetable import Timetable
from lightning_obc.correction import DenseReference, dense_references
from lightning_obc.correction_spec import Correct
from lightning_obc.distributed import all_or_none, exchange, is_sharded
from lightning_obc.errors import ExportError, ScheduleError, StrategyError, UnsupportedLayerError
from lightning_obc.layers import LayerPart, select_layers
from lightning_obc.layerwise import Edges, reached_edges, stage_layers
from lightning_obc.planning import check_execution, check_schedule, plan_stage
from lightning_obc.schedules import Plateau
from lightning_obc.specs import Calibration, Stage
from lightning_obc.team import begin_together


class Staged(Protocol):
    """What is asked of a callback here."""

    stages: list[Any]
    calibration: Calibration


def edges(
    trainer: Trainer, module: LightningModule, spec: Calibration, stages: Sequence[Stage], source: Any = None
) -> Edges | None:
    """The layers that calibration batches reach first and last, where a stage treats them apart."""
    return reached_edges(module, stages, lambda: collector(trainer, module, spec, Display(trainer), source))


def checked_plans(
    trainer: Trainer, module: LightningModule, callback: Staged, stages: Sequence[Stage], edges: Edges | None
) -> None:
    """Find out now, not after an hour of training, what would stop a stage.

    Raises:
        LayerNotFoundError, PatternError, NonFiniteError: As :func:`lightning_obc.planning.plan_stage`.
        ScheduleError: Two callbacks would compress the same layers.
    """
    if not stages:
        return
    check_schedule(module, stages, edges)
    check_sharded(module, stages, callback.calibration)
    check_execution(module, stages, callback.calibration)
    compat.check_precision(trainer, offload_of(module, callback.calibration) is not None)
    for stage in stages:
        plan_stage(module, stage, callback.calibration, edges)
    _check_holdable(module, stages, edges)
    mine = _layers(module, stages, edges)
    for other in compat.callbacks(trainer):
        if isinstance(other, type(callback)) and other is not callback:
            shared = sorted(mine & _layers(module, other.stages, edges))
            if shared:
                raise ScheduleError(
                    "Two callbacks compress the same layers",
                    got=", ".join(shared),
                    expected="each layer in one callback",
                    remedy="put all stages into one OBCCallback, or choose different layers",
                )


def check_sharded(module: nn.Module, stages: Sequence[Stage], spec: Calibration) -> None:
    """Refuse what is not possible while every rank holds only parts of the parameters.

    Raises:
        StrategyError: A calibration mode, correction or way to train on that needs whole parameters.
    """
    sharded = {id(parameter) for parameter in module.parameters() if is_sharded(parameter)}
    if not sharded:
        return
    found = [f"Calibration(mode={spec.mode!r})"] if spec.paired else []
    found += ["Calibration(bias=True)"] if spec.bias else []
    for stage in stages:
        if isinstance(stage, Correct) and stage.method != "batch_norm":
            found.append(str(stage))
        elif not isinstance(stage, Correct):
            layers = select_layers(module, stage.layers, stage.exclude).items()
            found += [name for name, layer in layers if isinstance(layer, LayerPart) and id(layer.weight) in sharded]
            found += [f'{stage} with after="train"'] if getattr(stage, "after", "") == "train" else []
    if found:
        raise StrategyError(
            "Not possible while the parameters are sharded over ranks",
            got=", ".join(dict.fromkeys(found)),
            expected='independent calibration of whole weights, frozen grids, Correct("batch_norm")',
            remedy='Trainer(strategy="ddp"), or compress the trained checkpoint on one device',
        )


def _layers(module: nn.Module, stages: Sequence[Stage], edges: Edges | None) -> set[str]:
    return {name for stage in _compressing(stages) for name in stage_layers(module, stage, edges)}


def _compressing(stages: Sequence[Stage]) -> list[Stage]:
    return [stage for stage in stages if not isinstance(stage, Correct)]


def _check_holdable(module: nn.Module, stages: Sequence[Stage], edges: Edges | None) -> None:
    layers = [stage_layers(module, stage, edges) for stage in _compressing(stages)]
    computed = sorted({name for found in layers for name, layer in found.items() if is_computed(layer)})
    if computed:
        raise UnsupportedLayerError(
            "Weights that a parametrization computes cannot be held while training",
            got=", ".join(computed),
            expected="weights that are parameters of their own",
            remedy="exclude them, remove their parametrization, or compress after training",
        )


def follow(trainer: Trainer, timetable: Timetable, watch: PlateauWatch, *, validation: bool) -> None:
    """Look at the metric that the next stage waits for: after a validation, or at the end of an epoch.

    Raises:
        ScheduleError: Neither validation nor training logs it, or only some of the ranks do.
    """
    logged = compat.validation_metrics(trainer) if validation else trainer.callback_metrics
    if validation:
        watch.validated = (watch.validated or set()) | set(logged)
    plateau = timetable.next_plateau()
    if plateau is None:
        return
    ranks, name = compat.ranks(trainer), plateau.monitor
    known = watch.validated
    # What one rank alone decides, from what it alone has logged, would leave the others waiting.
    found = ranks.gather((name in logged, name in (known or ()), known is None))
    _check_logged_alike(plateau, [(has, before) for has, before, _ in found])
    here, in_validation, none_yet = found[0]
    if in_validation != validation:
        # At the end of an epoch, what a validation logged has been looked at, or is left from an earlier epoch.
        return
    if not here and none_yet and compat.validates(trainer):
        return
    # Not strategy.reduce: NCCL takes no tensor of the host.
    with all_or_none(ranks):
        values = exchange(ranks, monitored(plateau, logged))
    watch.observe(plateau, sum(values) / len(values), trainer.global_step)


def _check_logged_alike(plateau: Plateau, found: Sequence[tuple[bool, bool]]) -> None:
    """Refuse a metric that only some of the ranks log: the others have nothing to wait for."""
    missing = [str(rank) for rank, (has, before) in enumerate(found) if not (has or before)]
    if missing and len(missing) < len(found):
        raise ScheduleError(
            "The metric that a stage waits for is logged on some of the ranks only",
            got=f"monitor={plateau.monitor!r}, missing on rank {', '.join(missing)} of {len(found)}",
            expected="the metric on every rank",
            remedy="call self.log for it on every rank, without rank_zero_only, with sync_dist=True for a mean",
        )


@contextmanager
def whole_or_not(module: nn.Module, stage: Stage, spec: Calibration) -> Iterator[None]:
    """After an exception or an interrupt inside, the model is as it was before the stage.

    A checkpoint that is saved then, with a stage that counts as not run, must not hold half of it. Parameters are
    copied to host memory first, and buffers too where the stage corrects something.
    """
    corrects = spec.paired or spec.bias or isinstance(stage, Correct) or quantizes_inputs(stage)
    inputs = attached(module)
    tensors = [*module.parameters(), *(module.buffers() if corrects else ())]
    saved = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
        detach(module)
        attach(module, inputs)
        raise


def check_destination(path: bool | str | os.PathLike[str]) -> None:
    """Find out now, not after the work, that the compressed checkpoint cannot be written.

    Raises:
        ExportError: The folder cannot be made or written, or the path is one.
    """
    if isinstance(path, bool) or "://" in os.fspath(path):
        return
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        problem = "it is a folder" if target.is_dir() else None
        if not os.access(target.parent, os.W_OK):
            problem = "its folder cannot be written"
    except OSError as error:
        problem = error.strerror or str(error)
    if problem is not None:
        raise ExportError(
            "The compressed checkpoint could not be saved in the end",
            got=f"{str(target)!r}: {problem}",
            expected="a file in a folder that can be written",
            remedy="choose another path",
        )


def collector(
    trainer: Trainer, module: LightningModule, spec: Calibration, display: Display, source: Any = None
) -> Collector:
    """Collects statistics from the trainer's calibration data, the way training sees it.

    Args:
        trainer: The trainer.
        module: Its module.
        spec: How to calibrate.
        display: Shows the progress.
        source: The calibration data, where it has been asked for already.
    """

    def forward(model: nn.Module, batch: Any) -> Any:
        batch = compat.to_device(trainer, batch)
        with trainer.precision_plugin.forward_context():
            return call_forward(model, batch)

    compat.check_precision(trainer, offload_of(module, spec) is not None)
    if source is None:
        # Hooks that make loaders may split data sets at random.
        with preserved_rng():
            source = compat.calibration_source(trainer)
    batches = calibration_batches(source, spec)
    return Collector(module, batches, spec, forward=forward, progress=display.update, ranks=compat.ranks(trainer))


def references(collect: Collector, stages: Sequence[Stage]) -> list[DenseReference | None]:
    """What each of the stages that run at one time needs of the model as it is before the first of them."""
    options: dict[str, Any] = {"forward": collect.forward, "progress": collect.progress, "ranks": collect.ranks}
    check_sharded(collect.model, stages, collect.spec)
    with all_or_none(collect.ranks):
        begin_together(collect.model, collect.ranks)
        found = dense_references(collect.model, stages, collect.batches, **options)
    return [found.get(index) for index in range(len(stages))]
