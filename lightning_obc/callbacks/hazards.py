"""Settings of a Trainer under which a staged run may not end as meant: said when it starts, and when it happens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn

from lightning_obc.callbacks import compat
from lightning_obc.callbacks.checkpoint import is_plain
from lightning_obc.errors import ScheduleError
from lightning_obc.schedules import Plateau, times
from lightning_obc.specs import Stage


def warn_hazards(trainer: Trainer, stages: Sequence[Stage]) -> None:
    """Warn of callbacks that can end the run before a stage, or keep a checkpoint from before it as the best.

    Args:
        trainer: At the start of its training, when the number of batches is known.
        stages: Stages of the training that have not run, in order.
    """
    if not stages or compat.fast_dev_run(trainer):
        return
    last = _last_step(trainer)
    if late := [stage for stage in stages if any(unit == "step" and n > last for unit, n in times(stage.at))]:
        rank_zero_warn(
            f"This training has no more than {last:g} optimizer steps: {_listed(late)} will not run. Train longer, or "
            'use an earlier step or at="train_end".'
        )
    for callback in compat.callbacks(trainer):
        if isinstance(callback, EarlyStopping):
            in_danger = [stage for stage in stages if _may_miss(trainer, callback, stage)]
            if in_danger:
                rank_zero_warn(
                    f"EarlyStopping(monitor={callback.monitor!r}, patience={callback.patience}) can end the training "
                    f"before {_listed(in_danger)}. Raise its patience, set Trainer(min_epochs=…) behind the stage, or "
                    'use at="train_end", which runs however the training ends.'
                )
        elif is_plain(callback) and any(_comes_later(trainer, stage) for stage in stages):
            monitor = vars(callback)["monitor"]
            rank_zero_warn(
                f"ModelCheckpoint(monitor={monitor!r}) can keep weights from before {stages[-1]} as its best. "
                "lightning_obc.CompressedCheckpoint takes the same arguments and starts anew behind every stage."
            )


def unfinished(trainer: Trainer, left: Sequence[Stage]) -> str:
    """What is said when a training has ended and stages have not run."""
    why = stopped_by(trainer)
    if not why:
        why = f" (after {trainer.current_epoch} epochs and {trainer.global_step} optimizer steps)"
    return (
        f"Training ended{why} before {len(left)} of the compression stages could run: {_listed(left)}. The model is "
        'not compressed by them. at="train_end" runs however a training ends; a longer training resumed from a '
        "checkpoint of this one runs them at their time."
    )


def nothing_trained(trainer: Trainer, left: Sequence[Stage]) -> ScheduleError:
    """The error of a fit without a single batch, in which no stage had its time."""
    if vars(trainer)["limit_train_batches"] == 0:
        why = "Trainer(limit_train_batches=0)"
    elif trainer.fit_loop.max_batches == 0:
        why = "a train loader without a batch"
    elif trainer.max_epochs == 0 or trainer.max_steps == 0:
        why = f"Trainer(max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps})"
    else:
        why = f"a training that is over at epoch {trainer.current_epoch}, optimizer step {trainer.global_step}"
    return ScheduleError(
        "Nothing was trained, and no compression stage ran",
        got=f"{why}; stages that have not run: {_listed(left)}",
        expected="at least one training batch",
        remedy='look at the train loader and its drop_last, or compress without training: at="validate" and '
        "trainer.validate, lightning-obc compress, or lightning_obc.compress",
    )


def stopped_by(trainer: Trainer) -> str:
    """Why the training ended before its last epoch, as far as callbacks tell: a clause, or nothing."""
    stops = [c for c in compat.callbacks(trainer) if isinstance(c, EarlyStopping) and c.stopped_epoch > 0]
    return "".join(f" (EarlyStopping on {c.monitor!r} in epoch {c.stopped_epoch})" for c in stops)


def warn_old_checkpoint(trainer: Trainer, state: Mapping[str, Any], run_before: int) -> None:
    """Say that the checkpoint which is loaded for an evaluation comes from before stages that this run has made."""
    done = len(state["done"])
    if done < run_before:
        missing = [state["stages"][index] for index in range(done, min(run_before, len(state["stages"])))]
        rank_zero_warn(
            f"The checkpoint that trainer.{trainer.state.fn} loads was written before {len(missing)} of the "
            f"compression stages had run: {'; '.join(missing)}. lightning_obc.CompressedCheckpoint keeps the best one "
            "from behind them."
        )


def _last_step(trainer: Trainer) -> float:
    """Optimizer steps at the end of the training, at most; infinite where that cannot be told."""
    epochs = trainer.max_epochs
    if not trainer.lightning_module.automatic_optimization or epochs is None or epochs < 0:
        return math.inf
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in compat.callbacks(trainer)):
        return math.inf
    batches = trainer.num_training_batches / max(1, trainer.accumulate_grad_batches)
    if not math.isfinite(batches):
        return math.inf
    return trainer.global_step + math.ceil(batches) * max(0, epochs - trainer.current_epoch)


def _may_miss(trainer: Trainer, stopping: EarlyStopping, stage: Stage) -> bool:
    """Whether early stopping can end the training before the stage's time."""
    if isinstance(stage.at, Plateau):
        # Both count validations without an improvement; the one that needs fewer comes first.
        return stopping.monitor != stage.at.monitor or stopping.patience <= stage.at.patience
    first = _earliest_stop(trainer, stopping)
    steps = trainer.num_training_batches / max(1, trainer.accumulate_grad_batches)
    for unit, number in times(stage.at):
        if unit == "epoch" and number >= first:
            return True
        if unit == "step" and not (math.isfinite(steps) and number <= first * math.ceil(steps)):
            return True
    return False


def _earliest_stop(trainer: Trainer, stopping: EarlyStopping) -> int:
    """Epochs after which early stopping can end the training at the earliest.

    The first check of all sets the score to beat; then ``patience`` checks without an improvement have to follow.
    """
    checks = max(1, stopping.patience - stopping.wait_count) + (0 if stopping.best_score.isfinite() else 1)
    if stopping.stopping_threshold is not None or stopping.divergence_threshold is not None:
        checks = 1
    every, interval = trainer.check_val_every_n_epoch or 1, trainer.val_check_interval
    per_epoch = 1 / interval if isinstance(interval, float) else trainer.num_training_batches / (interval or 1)
    if interval is not None and per_epoch > 1:
        done = trainer.current_epoch + max(1, math.ceil(checks / per_epoch))
    else:
        first = math.ceil((trainer.current_epoch + 1) / every) * every
        done = first + (checks - 1) * every
    return max(done, trainer.min_epochs or 0)


def _comes_later(trainer: Trainer, stage: Stage) -> bool:
    """Whether checkpoints can be written before the stage runs."""
    return stage.at != "train_start" and {"epoch": trainer.current_epoch} != stage.at


def _listed(stages: Sequence[Stage]) -> str:
    return "; ".join(f"{stage} at {stage.at}" for stage in stages)
