"""A run that is stopped anywhere and resumed ends with the weights of one that was not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Small, is_two_four, levels, loader, quiet_trainer, resumable, same, weights
from torch import nn

import lightning_obc as obc
from lightning_obc import solving, stage_run
from lightning_obc.callbacks.held import HeldWeights
from lightning_obc.callbacks.state import RunState
from lightning_obc.callbacks.timetable import Timetable, expand
from lightning_obc.correction import CorrectedLayer, CorrectionReport
from lightning_obc.report import RankWork, report_record

RECIPES: dict[str, list[Any]] = {
    "gradual": [
        obc.Prune(0.5, at={"step": 2}, layers=["conv"], schedule=obc.Gradual(3, every=3, initial=0.2)),
        obc.Prune("2:4", at={"epoch": 2}, layers=["fc"]),
    ],
    "train": [obc.Prune("2:4", at={"step": 4}), obc.Quantize(3, at={"step": 9}, after="train")],
    "freeze": [
        obc.Prune("2:4", at={"epoch": 1}),
        obc.Quantize(3, at={"epoch": 2}, layers=["conv"]),
        obc.Prune(0.6, layers=["fc"]),
    ],
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "gradual": {"optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "train": {"optimizer": torch.optim.Adam, "lr": 0.02},
    "freeze": {"optimizer": torch.optim.AdamW, "lr": 0.02, "weight_decay": 0.2},
}
SPEC = obc.Calibration(samples=16)


def fit(path: Path, kind: str, *more: Any, resume: Any = None, spec: Any = SPEC, **options: Any) -> Small:
    """One run, or the rest of one. Without dropout: Lightning does not save random states."""
    torch.manual_seed(2)
    model = Small(**OPTIMIZERS[kind])
    model.drop = nn.Identity()
    callback = obc.OBCCallback(RECIPES[kind], spec, verbose=False, save_checkpoint=False, compare=False, **options)
    trainer = quiet_trainer(path, callback, *more, enable_checkpointing=bool(more))
    trainer.fit(model, resumable(), loader(1, shuffle=False), ckpt_path=resume, weights_only=True)
    return model


@pytest.fixture(scope="module", params=list(RECIPES))
def whole(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    """An uninterrupted run, with a checkpoint after every step and every epoch."""
    path = tmp_path_factory.mktemp(request.param)
    steps = ModelCheckpoint(
        path, filename="step={step}", save_top_k=-1, every_n_train_steps=1, auto_insert_metric_name=False
    )
    epochs = ModelCheckpoint(path, filename="epoch={step}", save_top_k=-1, auto_insert_metric_name=False)
    model = fit(path, request.param, steps, epochs)
    return request.param, path, weights(model)


@pytest.mark.parametrize("stop", [1, 2, 4, 5, 6, 7, 9, 11, 13, 17])
def test_resume_after_any_step(whole: Any, tmp_path: Path, stop: int) -> None:
    kind, path, expected = whole
    assert same(weights(fit(tmp_path, kind, resume=str(path / f"step={stop}.ckpt"))), expected)


@pytest.mark.parametrize("stop", [6, 12, 18])
def test_resume_after_an_epoch(whole: Any, tmp_path: Path, stop: int) -> None:
    kind, path, expected = whole
    assert same(weights(fit(tmp_path, kind, resume=str(path / f"epoch={stop}.ckpt"))), expected)


@pytest.mark.parametrize("kind", ["train", "freeze"])
@pytest.mark.parametrize("mode", ["independent", "sequential"])
def test_resume_of_a_run_that_was_interrupted_inside_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mode: Any
) -> None:
    """From a checkpoint that is written at the moment of the interrupt (it holds no half of a stage), or before.

    Lightning itself loses the whole epoch when it resumes a checkpoint that was saved in the first hook of an epoch,
    so the stage that runs there is resumed from the end of the epoch before.
    """
    spec = obc.Calibration(samples=16, mode=mode)
    expected = weights(fit(tmp_path, kind, spec=spec))
    calls, solve = [0], stage_run.solve_layer

    class Stop(BaseException):
        """The pipeline keeps a layer that it cannot solve; an interrupt is no such thing."""

    def stopped(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise Stop
        return solve(*args, **options)

    saving = ModelCheckpoint(tmp_path / "saved", save_on_exception=kind == "train", save_top_k=-1)
    monkeypatch.setattr(stage_run, "solve_layer", stopped)
    with pytest.raises(Stop):
        fit(tmp_path, kind, saving, spec=spec, store=tmp_path / "store")
    monkeypatch.setattr(stage_run, "solve_layer", solve)
    (path,) = (tmp_path / "saved").glob("*.ckpt")
    assert torch.load(path, weights_only=True)["state_dict"]["fc.weight"].ne(0).all()
    assert same(weights(fit(tmp_path, kind, resume=str(path), spec=spec, store=tmp_path / "store")), expected)
    assert calls[0] == 2, "the layer that was solved before is not solved again"


@pytest.mark.parametrize(("owner", "method"), [(stage_run._StageRun, "apply_"), (HeldWeights, "hold")])
def test_an_interrupt_behind_the_solving_leaves_no_half_of_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, method: str
) -> None:
    """Weights are written already; what is saved then says that the stage has not run, and must be as it was."""
    own = getattr(owner, method)

    def interrupted(*args: Any) -> None:
        own(*args)
        raise Stop

    class Stop(BaseException):
        pass

    monkeypatch.setattr(owner, method, interrupted)
    callback, model = make_callback([obc.Prune("2:4", at="train_start")]), Small()
    before = weights(model)
    with pytest.raises(Stop):
        quiet_trainer(tmp_path, callback).fit(model, loader())
    assert same(weights(model), before)
    state = callback.state_dict()
    assert (state["done"], state["layers"], state["reports"]) == ([], {}, [])
    monkeypatch.setattr(owner, method, own)
    quiet_trainer(tmp_path, callback).fit(model, loader())
    assert is_two_four(model.conv.weight)
    assert is_two_four(model.fc.weight)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Small, list[str]]:
    path = tmp_path_factory.mktemp("compressed")
    keys = list(Small().state_dict())
    files = [
        ModelCheckpoint(path, filename="best", monitor="val_loss"),
        ModelCheckpoint(path, filename="weights", save_weights_only=True),
    ]
    model = Small()
    stages = [obc.Prune("2:4", at="train_start"), obc.Quantize(3, at="train_start")]
    trainer = quiet_trainer(path, make_callback(stages), *files, enable_checkpointing=True)
    trainer.fit(model, loader(), loader(1, shuffle=False))
    before = weights(model)
    (figures,) = trainer.test(model, loader(1, shuffle=False), ckpt_path="best", verbose=False)
    assert figures["test_loss"] == pytest.approx(float(files[0].best_model_score), rel=1e-5)
    assert is_compressed(model)
    model.load_state_dict(before)
    return path, model, keys


def make_callback(stages: list[Any]) -> obc.OBCCallback:
    return obc.OBCCallback(stages, SPEC, verbose=False, save_checkpoint=False, compare=False)


def is_compressed(model: Small) -> bool:
    return all(is_two_four(layer.weight) and levels(layer.weight) <= 8 for layer in (model.conv, model.fc))


@pytest.mark.parametrize("name", ["best.ckpt", "weights.ckpt"])
@pytest.mark.parametrize("with_callback", [False, True])
def test_a_checkpoint_loads_everywhere(compressed: Any, tmp_path: Path, name: str, with_callback: bool) -> None:
    path, _, keys = compressed
    state = torch.load(path / name, weights_only=True)
    assert list(state["state_dict"]) == keys
    loaded = Small.load_from_checkpoint(path / name, strict=True, weights_only=True)
    assert is_compressed(loaded)
    stages = [obc.Prune("2:4", at="train_start"), obc.Quantize(3, at="train_start")]
    model, callbacks = Small(), [make_callback(stages)] if with_callback else []
    trainer = quiet_trainer(tmp_path, *callbacks)
    for run in (trainer.validate, trainer.test):
        run(model, loader(1, shuffle=False), ckpt_path=str(path / name), verbose=False, weights_only=True)
        assert same(weights(model), weights(loaded))
    assert len(trainer.predict(model, loader(1, shuffle=False), ckpt_path=str(path / name), weights_only=True)) == 6


def test_a_checkpoint_of_weights_alone_says_nothing_of_masks(compressed: Any, tmp_path: Path) -> None:
    """There is no state to hold by, so the recipe starts anew; what is zero stays zero while it is pruned again."""
    path, model, _ = compressed
    stages = [obc.Prune("2:4", at="train_start"), obc.Quantize(3, at="train_start")]
    again = Small.load_from_checkpoint(path / "weights.ckpt", weights_only=True)
    callback = make_callback(stages)
    quiet_trainer(tmp_path, callback, max_epochs=1).fit(again, loader())
    assert len(callback.report.stages) == 2
    assert is_compressed(again)
    assert bool(((model.fc.weight == 0) <= (again.fc.weight == 0)).all())


def test_rows_curves_shares_of_ranks_and_corrections_are_in_checkpoints(tmp_path: Path) -> None:
    """A report that is written after a resume shows the stages before it too."""
    stages = [obc.Prune("2:4", at={"step": 1}), obc.Quantize(4, at={"step": 2})]
    torch.manual_seed(0)
    report = obc.compress(nn.Sequential(nn.Linear(8, 8)), torch.randn(32, 8), [obc.Prune("2:4"), obc.Quantize(4)])
    corrected = CorrectionReport(
        "bias", [CorrectedLayer("0", "Linear", 0.5, None, "a note")], {"1": "no"}, 2, 0.1, (1.0, 0.5), 3, ("why",)
    )
    before, after = RunState(Timetable(expand(stages))), RunState(Timetable(expand(stages)))
    shares = [RankWork(0, 0.5, 10.0, 0.1), RankWork(1, 0.5, 9.0, 0.2)]
    before.reports = [replace(stage, work=shares, solutions={}) for stage in report.stages]
    before.corrections = [corrected]
    torch.save(before.state_dict(), tmp_path / "state.pt")
    after.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert after.corrections == [corrected]
    assert after.reports[0].work == shares
    assert [stage.to_dict() for stage in after.reports] == [stage.to_dict() for stage in before.reports]
    assert all(len(row.curve) > 1 for stage in after.reports for row in stage.layers)
    drawn = [report_record(obc.CompressionReport(report.model, state.reports)) for state in (before, after)]
    assert drawn[0]["curves"] == drawn[1]["curves"]
    assert len(drawn[0]["curves"]) == 2


def totals(callback: obc.OBCCallback) -> list[list[float | None]]:
    assert callback.report is not None
    return [[row.total_error for row in stage.layers] for stage in callback.report.stages]


def test_the_error_of_all_stages_is_known_where_no_training_lies_between(tmp_path: Path) -> None:
    """At one time, with an interrupt inside the second stage too; not over optimizer steps, before or after it."""
    stages = [obc.Prune(0.5, at="train_end"), obc.Quantize(3, at="train_end")]
    whole, model = make_callback(stages), Small()
    quiet_trainer(tmp_path, whole, max_epochs=1).fit(model, loader())
    assert whole.state_dict()["origins"] == {}
    assert all(total is not None for found in totals(whole) for total in found)
    assert totals(whole)[1] != [row.relative_error for row in whole.report.stages[1].layers]

    trained, other = make_callback([obc.Prune(0.5, at="train_start"), obc.Quantize(3, at="train_end")]), Small()
    quiet_trainer(tmp_path, trained, max_epochs=1).fit(other, loader())
    assert totals(trained) == [[row.relative_error for row in trained.report.stages[0].layers], [None, None]]


@pytest.mark.parametrize("whole", ["freeze"], indirect=True)
def test_a_resumed_run_shows_plans_and_weights_of_the_stages_before(whole: Any, tmp_path: Path) -> None:
    """Histograms of finished stages are kept as they were, and later ones compare with the weights before the first."""
    kind, path, _ = whole

    def record(*, resume: Any = None) -> dict[str, Any]:
        callback = obc.OBCCallback(RECIPES[kind], SPEC, verbose=False, save_checkpoint=False, compare=False)
        torch.manual_seed(2)
        model = Small(**OPTIMIZERS[kind])
        model.drop = nn.Identity()
        trainer = quiet_trainer(tmp_path, callback)
        trainer.fit(model, resumable(), loader(1, shuffle=False), ckpt_path=resume, weights_only=True)
        assert callback.report is not None
        return report_record(callback.report)

    plain, resumed = record(), record(resume=str(path / "step=13.ckpt"))
    assert resumed["plans"] == plain["plans"]
    assert len(plain["plans"]) == 3
    assert resumed["histograms"]["conv"] == plain["histograms"]["conv"]
    mine, theirs = (one["histograms"]["fc"] for one in (resumed, plain))
    assert (mine["after"], mine["low"], mine["high"]) == (theirs["after"], pytest.approx(theirs["low"]), theirs["high"])
    # Weights before are rounded to bfloat16 in a checkpoint: a few may fall into the next bin.
    assert sum(mine["before"]) == sum(theirs["before"]) == 32
    assert sum(abs(a - b) for a, b in zip(mine["before"], theirs["before"], strict=True)) <= 4


@pytest.mark.parametrize("moved", [False, True])
def test_a_resumed_run_knows_the_weights_before_its_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    """They are in the checkpoint of a run that was stopped between two stages, and good for what these left."""
    stages = [obc.Prune(0.5, at="train_end"), obc.Quantize(3, at="train_end")]

    class Stop(BaseException):
        pass

    def stopped(*args: Any, **options: Any) -> Any:
        raise Stop

    def run(folder: str, *more: Any, resume: Any = None) -> list[list[float | None]]:
        torch.manual_seed(2)
        callback, model = make_callback(stages), Small()
        trainer = quiet_trainer(tmp_path / folder, callback, *more, max_epochs=1, enable_checkpointing=bool(more))
        trainer.fit(model, resumable(), ckpt_path=resume, weights_only=True)
        return totals(callback)

    expected = run("whole")
    saving = ModelCheckpoint(tmp_path / "saved", save_on_exception=True, every_n_epochs=0)
    with monkeypatch.context() as patch:
        patch.setattr(solving, "quantize", stopped)
        with pytest.raises(Stop):
            run("stopped", saving)
    (path,) = (tmp_path / "saved").glob("*.ckpt")
    saved = torch.load(path, weights_only=True)
    if moved:
        saved["state_dict"]["fc.weight"].mul_(1.5)
        torch.save(saved, path)
    found = run("resumed", resume=str(path))
    assert found[0] == expected[0]
    if moved:
        assert (found[1][0], found[1][1]) == (pytest.approx(expected[1][0]), None)
    else:
        assert found[1] == pytest.approx(expected[1])
