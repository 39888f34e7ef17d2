"""Stages that wait until a monitored metric has stopped improving."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Small, loader, quiet_trainer, same, weights
from thread_ranks import run_ranks

import lightning_obc as obc
from lightning_obc.callbacks import compat
from lightning_obc.callbacks.passes import follow
from lightning_obc.callbacks.plateau import PlateauWatch, monitored
from lightning_obc.callbacks.timetable import Timetable, check_order
from lightning_obc.errors import ScheduleError

SPEC = obc.Calibration(samples=16)


class Scripted(Small):
    """Logs the given scores, one per validation, and one per training epoch as ``effort``."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.drop = torch.nn.Identity()
        self.scores = scores

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            per_epoch = round(1 / self.trainer.val_check_interval)
            done = self.trainer.global_step // (6 // per_epoch) - 1
            self.log("score", self.scores[done])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("effort", self.scores[self.current_epoch], on_epoch=True, on_step=False)
        return super().training_step(batch, batch_idx)


def make(*stages: obc.Prune | obc.Quantize) -> obc.OBCCallback:
    return obc.OBCCallback(list(stages), SPEC, save_checkpoint=False, verbose=False, compare=False)


def fit(
    path: Path, scores: list[float], *stages: Any, resume: Any = None, extra: Any = (), **options: Any
) -> tuple[Any, Any]:
    torch.manual_seed(0)
    callback, model = make(*stages), Scripted(scores)
    trainer = quiet_trainer(path, callback, *extra, **({"max_epochs": len(scores)} | options))
    trainer.fit(model, loader(shuffle=False), loader(1, shuffle=False), ckpt_path=resume)
    return callback, model


def times(callback: obc.OBCCallback) -> list[str]:
    return [report.stage for report in callback.report.stages] if callback.report else []


PRUNE = "Prune(2:4)"


@pytest.mark.parametrize(
    ("plateau", "values", "bad"),
    [
        (obc.Plateau("x", 2), [3, 2, 2, 1.5, 1.6], 1),
        (obc.Plateau("x", 2, min_delta=0.5), [3, 2.25, 1.75], 1),
        (obc.Plateau("x", 2, "max"), [3, 2, 4, 4, 3], 2),
        (obc.Plateau("x", 2), [math.nan, math.nan], 2),
        (obc.Plateau("x", 2), [1, math.nan, 0.5], 0),
        (obc.Plateau("x", 2), [math.inf, 5.0], 0),
    ],
)
def test_values_without_an_improvement_are_counted(plateau: obc.Plateau, values: list[float], bad: int) -> None:
    watch = PlateauWatch()
    for step, value in enumerate(values):
        watch.observe(plateau, value, step)
        watch.observe(plateau, value, step)
    assert watch.bad == bad
    assert watch.reached(plateau) == (bad >= 2)
    twin = PlateauWatch()
    twin.load_state_dict(watch.state_dict())
    assert twin == watch
    assert not watch.reached(obc.Plateau("y"))


def test_the_stage_runs_before_the_epoch_after_the_plateau(tmp_path: Path) -> None:
    callback, _ = fit(tmp_path, [3, 2, 2, 2, 2], obc.Prune("2:4", at=obc.Plateau("score", patience=2)))
    assert callback._state.dense_when.endswith("(epoch 4, step 24)")
    callback, _ = fit(tmp_path, [3, 2, 2, 2, 2], obc.Prune("2:4", at=obc.Plateau("effort", patience=1)))
    assert callback._state.dense_when.endswith("(epoch 3, step 18)")


def test_validations_inside_an_epoch_count_and_the_stage_runs_there(tmp_path: Path) -> None:
    stage = obc.Prune("2:4", at=obc.Plateau("score", patience=1, mode="max"))
    callback, model = fit(tmp_path, [1, 2, 2, 3, 0, 0], stage, val_check_interval=0.5, max_epochs=3)
    assert callback._state.dense_when.endswith("(epoch 1, step 9)")
    assert bool(((model.fc.weight.reshape(-1, 4) != 0).sum(1) <= 2).all())


def test_rare_validations_are_waited_for(tmp_path: Path) -> None:
    stage = obc.Prune("2:4", at=obc.Plateau("score", patience=1))
    callback, _ = fit(tmp_path, [9, 2, 9, 2, 9, 9], stage, check_val_every_n_epoch=2)
    assert callback._state.dense_when.endswith("(epoch 4, step 24)")


def test_plateaus_one_after_the_other(tmp_path: Path) -> None:
    """Stages with an equal time run together; the next plateau counts from there."""
    first, second = obc.Plateau("score", patience=1), obc.Plateau("score", patience=1, nth=2)
    stages = [obc.Prune(0.3, at=first), obc.Prune(0.5, at=first), obc.Quantize(4, at=second)]
    seen = []

    class Seen(obc.OBCCallback):
        def _log(self, trainer: Any, values: Any) -> None:
            seen.append(trainer.current_epoch)

    callback = Seen(stages, SPEC, save_checkpoint=False, verbose=False, compare=False)
    scores = [1.0, 1.0, 0.5, 1.0, 0.2, 0.0]
    quiet_trainer(tmp_path, callback, max_epochs=6).fit(Scripted(scores), loader(), loader(1))
    assert seen == [2, 2, 4]


def test_no_plateau_is_reported_or_has_a_latest_epoch(tmp_path: Path) -> None:
    falling = [3.0, 2.0, 1.0]
    with pytest.warns(UserWarning, match=r"before 2 of the compression stages.*Prune\(2:4\) at plateau of score"):
        callback, _ = fit(tmp_path, falling, obc.Prune("2:4", at=obc.Plateau("score")), obc.Quantize(4))
    assert times(callback) == []
    callback, _ = fit(tmp_path, falling, obc.Prune("2:4", at=obc.Plateau("score", latest=1)))
    assert callback._state.dense_when.endswith("(epoch 1, step 6)")
    callback, _ = fit(tmp_path, falling, obc.Prune("2:4", at=obc.Plateau("score", latest=9)), obc.Quantize(4))
    assert callback._state.dense_when.endswith("(epoch 3, step 18)")
    assert len(times(callback)) == 2


def test_a_plateau_at_the_last_validation_runs_the_stage_at_the_end(tmp_path: Path) -> None:
    callback, _ = fit(tmp_path, [1.0, 1.0], obc.Prune("2:4", at=obc.Plateau("score", patience=1)))
    assert times(callback) == [PRUNE]
    assert callback._state.dense_when.endswith("(epoch 2, step 12)")


def test_a_metric_that_nobody_logs_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"'speed'.*'effort'.*'score'"):
        fit(tmp_path, [1.0, 1.0], obc.Prune("2:4", at=obc.Plateau("speed")))
    with pytest.raises(ScheduleError, match=r"'speed'.*one of 'effort'"):
        fit(tmp_path, [1.0, 1.0], obc.Prune("2:4", at=obc.Plateau("speed")), limit_val_batches=0)
    with pytest.raises(ScheduleError, match="single number"):
        monitored(obc.Plateau("x"), {"x": torch.zeros(2)})


@pytest.mark.parametrize("validation", [True, False])
def test_a_metric_that_one_rank_never_logs_is_named_on_all(monkeypatch: pytest.MonkeyPatch, validation: bool) -> None:
    monkeypatch.setattr(compat, "ranks", lambda trainer: trainer.ranks)
    monkeypatch.setattr(compat, "validates", lambda trainer: True)
    monkeypatch.setattr(compat, "validation_metrics", lambda trainer: trainer.callback_metrics)

    def epoch(ranks: Any, logged: dict[str, Any]) -> PlateauWatch:
        watch, timetable = PlateauWatch(), Timetable([obc.Prune(0.5, at=obc.Plateau("score"))])
        trainer: Any = SimpleNamespace(ranks=ranks, callback_metrics=logged, global_step=1)
        follow(trainer, timetable, watch, validation=True)
        if not validation:
            trainer.callback_metrics = logged | {"effort": torch.tensor(1.0)}
            follow(trainer, timetable, watch, validation=False)
        return watch

    found = run_ranks(3, lambda ranks: epoch(ranks, {} if ranks.rank == 1 else {"score": torch.tensor(2.0)}))
    assert [type(error) for error in found] == [ScheduleError] * 3
    assert all("missing on rank 1 of 3" in str(error) for error in found)
    watches: Any = run_ranks(2, lambda ranks: epoch(ranks, {"score": torch.tensor(float(ranks.rank))}))
    assert [watch.best for watch in watches] == [0.5, 0.5]


@pytest.mark.parametrize("stop", ["epoch=2", "epoch=3", "epoch=4"])
def test_a_resumed_run_waits_for_the_same_plateau(tmp_path: Path, stop: str) -> None:
    scores = [3.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    stage = obc.Prune("2:4", at=obc.Plateau("score", patience=2))
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}-{step}", save_top_k=-1)
    _, whole = fit(tmp_path, scores, stage, extra=(checkpoint,), enable_checkpointing=True)
    (path,) = tmp_path.glob(f"{stop}-*.ckpt")
    callback, resumed = fit(tmp_path, scores, stage, resume=str(path))
    assert callback._state.dense_when.endswith("(epoch 4, step 24)")
    assert same(weights(whole), weights(resumed))


def test_order_and_yaml() -> None:
    at = obc.Plateau("val_loss", latest=3)
    with pytest.raises(ScheduleError, match="order"):
        check_order([obc.Quantize(4, at="train_end"), obc.Prune(0.5, at=at)])
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(obc.OBCCallback, "obc")
    text = "obc: {stages: [{class_path: lightning_obc.Prune, init_args: {pattern: '2:4', at: {monitor: val_loss, "
    config = parser.parse_string(text + "latest: 3}}}]}")
    assert parser.instantiate_classes(config).obc.stages == [obc.Prune("2:4", at=at)]
    again = parser.parse_string(parser.dump(config))
    assert parser.dump(again) == parser.dump(config)
    assert parser.instantiate_classes(again).obc.stages == [obc.Prune("2:4", at=at)]
