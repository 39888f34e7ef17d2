"""The best checkpoint has what the last stage made, and a score of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

import lightning_obc as obc
from tests.callbacks.small import Small, is_two_four, levels, loader, quiet_trainer


class Scripted(Small):
    """Logs the scores it is given, one for each validation, and then those of the weights themselves."""

    def __init__(self, *scores: float, **options) -> None:
        super().__init__(**options)
        self.scores = list(scores)

    def on_train_epoch_end(self) -> None:
        self.log("train_score", float(self.current_epoch))

    def validation_step(self, batch, batch_idx):
        pass

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        self.log("score", self.scores.pop(0) if self.scores else 0.5 + float((self.fc.weight == 0).sum()))


PRUNE = obc.Prune("2:4", at={"epoch": 2})
QUANTIZE = obc.Quantize(4, at="train_end")


def callback(*stages, **options):
    # Measuring the dense model would take scripted scores away.
    defaults = {"verbose": False, "compare": False, "save_checkpoint": False}
    return obc.OBCCallback(list(stages), obc.Calibration(samples=16), **(defaults | options))


def checkpoint(tmp_path, **options):
    defaults = {"dirpath": str(tmp_path / "files"), "monitor": "score"}
    return obc.CompressedCheckpoint(**(defaults | options))


def fit(tmp_path, model, *callbacks, **options):
    defaults = {"enable_checkpointing": True, "num_sanity_val_steps": 0}
    trainer = quiet_trainer(tmp_path, *callbacks, **(defaults | options))
    trainer.fit(model, loader(), loader(1))
    return trainer


def saved(path) -> dict:
    return torch.load(path, weights_only=True)


def test_dense_scores_do_not_compete_with_compressed_ones(tmp_path):
    files = checkpoint(tmp_path)
    fit(tmp_path, Scripted(0.1, 0.2, 9.0, 8.0, 8.5), callback(PRUNE), files, max_epochs=5)

    assert float(files.best_model_score) == 8.0
    assert Path(files.best_model_path).name == "epoch=3-step=24-stage=1.ckpt"
    content = saved(files.best_model_path)
    assert is_two_four(content["state_dict"]["conv.weight"])
    own = next(state for key, state in content["callbacks"].items() if "CompressedCheckpoint" in key)
    assert own["stage"] == 1
    # The winner of the dense competition is still there, under its own stage.
    assert sorted(path.name for path in Path(files.dirpath).iterdir()) == [
        "epoch=0-step=6-stage=0.ckpt",
        "epoch=3-step=24-stage=1.ckpt",
    ]


def test_earlier_winners_go_when_asked(tmp_path):
    files = checkpoint(tmp_path, keep_earlier=False, save_top_k=2)
    fit(tmp_path, Scripted(0.1, 0.2, 9.0, 8.0), callback(PRUNE), files, max_epochs=4)
    assert sorted(path.name for path in Path(files.dirpath).iterdir()) == [
        "epoch=2-step=18-stage=1.ckpt",
        "epoch=3-step=24-stage=1.ckpt",
    ]


@pytest.mark.parametrize("compare", [True, False])
def test_stages_at_the_end_are_scored_and_saved(tmp_path, compare):
    files = checkpoint(tmp_path, save_last=True)
    model = Scripted(9.0, 9.0)
    trainer = fit(tmp_path, model, callback(obc.Prune("2:4"), QUANTIZE, compare=compare), files, max_epochs=2)

    zeros = int((model.fc.weight == 0).sum())
    assert float(files.best_model_score) == 0.5 + zeros
    content = saved(files.best_model_path)["state_dict"]
    assert all(torch.equal(value, content[name]) for name, value in model.state_dict().items())
    assert levels(content["fc.weight"]) <= 16
    assert all(torch.equal(value, saved(files.last_model_path)["state_dict"][name]) for name, value in content.items())
    model.fc.weight.data.normal_()
    trainer.validate(model, loader(1), ckpt_path="best", verbose=False)
    assert int((model.fc.weight == 0).sum()) == zeros


def test_without_a_monitor_the_last_file_is_that_of_the_final_weights(tmp_path):
    files = checkpoint(tmp_path, monitor=None)
    model = Scripted()
    fit(tmp_path, model, callback(QUANTIZE), files, max_epochs=1)
    assert torch.equal(saved(files.best_model_path)["state_dict"]["fc.weight"], model.fc.weight)


def test_a_figure_of_training_cannot_score_what_the_end_made(tmp_path):
    files = checkpoint(tmp_path, monitor="train_score")
    model = Scripted()
    with pytest.warns(UserWarning, match="kept without a score"):
        fit(tmp_path, model, callback(QUANTIZE), files, max_epochs=1)
    assert files.best_model_score is None
    assert torch.equal(saved(files.best_model_path)["state_dict"]["fc.weight"], model.fc.weight)


def test_a_score_from_before_a_stage_is_not_that_of_weights_behind_it(tmp_path):
    """Files every 2 steps, validation after every 3, and a stage after step 8."""
    files = checkpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    stages = callback(obc.Prune("2:4", at={"step": 8}))
    fit(tmp_path, Scripted(0.1, 0.2, 7.0, 8.0), stages, files, max_epochs=2, val_check_interval=3)
    names = sorted((path.name for path in Path(files.dirpath).iterdir()), key=lambda name: int(name[13:-13]))
    # Lightning saves step 2 when its score is there, after step 3. Step 8 has pruned weights and no score of theirs.
    assert names == [
        "epoch=0-step=3-stage=0.ckpt",
        "epoch=0-step=4-stage=0.ckpt",
        "epoch=0-step=6-stage=0.ckpt",
        "epoch=1-step=10-stage=1.ckpt",
        "epoch=1-step=12-stage=1.ckpt",
    ]
    assert float(files.best_model_score) == 7.0
    assert is_two_four(saved(files.best_model_path)["state_dict"]["conv.weight"])


def test_an_epoch_with_a_stage_inside_is_no_score_of_either_model(tmp_path):
    files = checkpoint(tmp_path, monitor="train_score", save_top_k=-1)
    fit(tmp_path, Scripted(), callback(obc.Prune("2:4", at={"step": 8})), files, max_epochs=3)
    names = sorted(path.name for path in Path(files.dirpath).iterdir())
    assert names == ["epoch=0-step=6-stage=0.ckpt", "epoch=2-step=18-stage=1.ckpt"]


def test_a_resumed_run_keeps_its_competition(tmp_path):
    scores = [0.1, 0.2, 9.0, 6.0, 8.0, 7.0]
    whole = checkpoint(tmp_path, dirpath=str(tmp_path / "whole"))
    fit(tmp_path, Scripted(*scores), callback(PRUNE), whole, max_epochs=6)

    for stop in (2, 4):
        folder = tmp_path / f"parts{stop}"
        first = checkpoint(tmp_path, dirpath=str(folder))
        trainer = fit(tmp_path, Scripted(*scores), callback(PRUNE), first, max_epochs=6, max_steps=6 * stop)
        trainer.save_checkpoint(folder / "stopped.ckpt")
        second = checkpoint(tmp_path, dirpath=str(folder))
        trainer = quiet_trainer(tmp_path, callback(PRUNE), second, enable_checkpointing=True, max_epochs=6)
        trainer.fit(Scripted(*scores[stop:]), loader(), loader(1), ckpt_path=folder / "stopped.ckpt")
        assert Path(second.best_model_path).name == Path(whole.best_model_path).name
        assert float(second.best_model_score) == float(whole.best_model_score) == 6.0


def test_without_stages_it_is_a_model_checkpoint(tmp_path):
    ours, theirs = checkpoint(tmp_path), ModelCheckpoint(dirpath=str(tmp_path / "theirs"), monitor="score")
    fit(tmp_path, Scripted(3.0, 1.0, 2.0), ours, theirs)
    assert ours.best_model_score == theirs.best_model_score
    assert Path(ours.best_model_path).name == "epoch=1-step=12-stage=0.ckpt"


def warned(tmp_path, recwarn, *callbacks, scores=(1.0,) * 9, **options) -> str:
    fit(tmp_path, Scripted(*scores), *callbacks, **options)
    return "\n".join(str(entry.message) for entry in recwarn.list)


def test_a_plain_checkpoint_is_warned_of_and_so_is_what_it_brings_back(tmp_path, recwarn):
    plain = ModelCheckpoint(dirpath=str(tmp_path / "plain"), monitor="score")
    stages = callback(PRUNE)
    model = Scripted(0.1, 0.2, 9.0)
    trainer = fit(tmp_path, model, stages, plain)
    said = "\n".join(str(entry.message) for entry in recwarn.list)
    assert "can keep weights from before Prune(2:4) as its best" in said
    with pytest.warns(UserWarning, match=r"before 1 of the compression stages had run: Prune\(pattern='2:4'"):
        trainer.validate(model, loader(1), ckpt_path="best", verbose=False)


@pytest.mark.parametrize(
    "quiet",
    [
        lambda: (callback(obc.Prune("2:4", at="train_start")), ModelCheckpoint(monitor="score")),
        lambda: (callback(PRUNE), ModelCheckpoint()),
        lambda: (callback(QUANTIZE), EarlyStopping("score", patience=1), obc.CompressedCheckpoint(monitor="score")),
        # The first check sets the score to beat, two more stop the training: after epoch 2 at the earliest.
        lambda: (callback(PRUNE), EarlyStopping("score", patience=2), obc.CompressedCheckpoint(monitor="score")),
    ],
)
def test_what_cannot_go_wrong_is_not_warned_of(tmp_path, recwarn, quiet):
    said = warned(tmp_path, recwarn, *quiet(), scores=(3.0, 2.0, 1.0))
    assert "as its best" not in said
    assert "can end the training" not in said


@pytest.mark.parametrize("stage", [PRUNE, obc.Prune("2:4", at={"step": 13})])
def test_early_stopping_is_warned_of_before_and_named_when_it_fires(tmp_path, recwarn, stage):
    stop = EarlyStopping("score", patience=1)
    said = warned(tmp_path, recwarn, callback(stage), stop, max_epochs=4)
    assert "EarlyStopping(monitor='score', patience=1) can end the training before Prune(2:4)" in said
    assert "Training ended (EarlyStopping on 'score' in epoch 1) before 1 of the compression stages" in said
