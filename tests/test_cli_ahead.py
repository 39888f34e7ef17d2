"""Mistakes in a search, in a recipe, in a place to write to are told before a training or an hour of work."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from torch import nn

from examples.digits import DigitsClassifier
from lightning_obc.cli import main
from lightning_obc.cli.ahead import LookAhead

ROOT = Path(__file__).parents[1]


class Worked(AssertionError):
    """What must not happen before the mistake is told."""


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning-obc"])
    quiet = [f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_progress_bar=false"]

    def call(subcommand: str, config: str, *args: str):
        return main([subcommand, f"--config=configs/{config}.yaml", *quiet, *args])

    return call


def refuse(*args: object, **kwargs: object) -> None:
    raise Worked


def misnamed(module, batch):
    return module(pixels=batch[0])


def with_spare_layer(init):
    def wrapped(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.spare = nn.Linear(4, 4)

    return wrapped


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--exclude=[stm.0]", r"LayerNotFoundError.*stm\.0.*stem"),
        ("--metric=val_acc", r"SpecError.*'val_acc'.*val_accuracy"),
        ("--budgets=[0.5,0.00001]", r"BudgetError: .*0\.5|BudgetError: .*1e-05.*at least"),
        ("--cost=bobs", r"SpecError: Unknown cost. Got: 'bobs'.*bops"),
        ("--linear=packed", r"SpecError: .*linear packed with cost bops.*seconds"),
        ("calibration_step", r"CalibrationError.*calibration batch cannot be sent"),
        ("spare", r"LayerNotReachedError.*spare"),
    ],
)
def test_mistakes_in_a_search_are_told_before_its_training(run, monkeypatch, option, words):
    monkeypatch.setattr(DigitsClassifier, "training_step", refuse)
    extra = [option] if option.startswith("--") else []
    if option == "calibration_step":
        monkeypatch.setattr(DigitsClassifier, "calibration_step", misnamed, raising=False)
    elif option == "spare":
        monkeypatch.setattr(DigitsClassifier, "__init__", with_spare_layer(DigitsClassifier.__init__))
    with pytest.raises(SystemExit, match=words):
        run("search", "digits_search", *extra)


def test_a_search_by_time_misses_its_extra_before_its_training(run, monkeypatch):
    monkeypatch.setattr(DigitsClassifier, "training_step", refuse)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SystemExit, match=r"MissingExtraError.*onnxruntime.*lightning-obc\[onnx\]"):
        run("search", "digits_search", "--cost=seconds")


class LogsLate(L.LightningModule):
    """Nothing in the sanity check, and one of its figures in the first epoch alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, index):
        return self.layer(batch).sum()

    def validation_step(self, batch, index):
        if not self.trainer.sanity_checking:
            self.log("val_loss", 1.0)
            if self.current_epoch == 0:
                self.log("val_rare", 2.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def test_figures_are_looked_at_once_where_a_validation_logs_some():
    """A figure that later epochs leave out must not end a training, nor a sanity check that logs nothing."""
    looked: list[dict[str, float]] = []
    loader = torch.utils.data.DataLoader(torch.zeros(2, 2))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", callbacks=[LookAhead(lambda *_: None, looked.append)], **quiet)
    trainer.fit(LogsLate(), loader, loader)
    assert looked == [{"val_loss": 1.0, "val_rare": 2.0}]


def test_a_search_does_not_write_over_another_ones_results(run, monkeypatch, tmp_path):
    monkeypatch.setattr(DigitsClassifier, "training_step", refuse)
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "curve.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"ExportError.*results of a search already.*--overwrite"):
        run("search", "digits_search", f"--output={tmp_path}/search")
    # Without a logger all searches of a folder would share one, too.
    with pytest.raises(SystemExit, match=r"ExportError.*results of a search already.*--overwrite"):
        run("search", "digits_search", "--trainer.logger=false")
    with pytest.raises(Worked):
        run("search", "digits_search", f"--output={tmp_path}/search", "--overwrite=true")


@pytest.mark.parametrize(
    ("layer", "level", "words"),
    [
        ("stem.1x", {}, r"LayerNotFoundError.*stem\.1x"),
        ("stem.0", {"pattern": "2:4"}, r"PatternError.*'stem\.0' cannot have the recipe's level 2:4"),
    ],
)
def test_a_recipe_of_another_model_is_refused_before_the_validation(run, monkeypatch, tmp_path, layer, level, words):
    recipe = {"format": 1, "solve": {}, "calibration": {"samples": 64}, "layers": {"head": {"grid": 4}, layer: level}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(DigitsClassifier, "validation_step", refuse)
    with pytest.raises(SystemExit, match=words):
        run("apply", "digits", "--trainer.callbacks=null", f"--recipe={tmp_path}/recipe.yaml")


def test_a_recipe_with_an_unknown_option_of_calibration_cannot_be_read(run, tmp_path):
    recipe = {"format": 1, "solve": {}, "calibration": {"sample": 64}, "layers": {"head": {"grid": 4}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit, match=r"SpecError: A recipe cannot be read.*'sample'"):
        run("apply", "digits", "--trainer.callbacks=null", f"--recipe={tmp_path}/recipe.yaml")


@pytest.mark.parametrize("subcommand", ["compress", "apply"])
def test_the_dense_checkpoint_is_not_written_over(run, tmp_path, subcommand):
    dense = tmp_path / "dense.ckpt"
    torch.save({"state_dict": {}}, dense)
    before = dense.read_bytes()
    recipe = ["--recipe=none.yaml"] if subcommand == "apply" else []
    (tmp_path / "same.ckpt").symlink_to(dense)
    for output in (dense, tmp_path / "same.ckpt"):
        with pytest.raises(SystemExit, match=r"ExportError.*would replace the one that it is made from"):
            run(subcommand, "digits_4bit", f"--ckpt_path={dense}", f"--output={output}", *recipe)
    assert dense.read_bytes() == before


def test_a_checkpoint_by_the_name_of_the_recipe_is_not_written_over(run, tmp_path):
    """Without a logger the place is the same every time, and may be that of the dense checkpoint."""
    recipe = {"format": 1, "solve": {}, "calibration": {"samples": 64}, "layers": {"head": {"grid": 4}}}
    (tmp_path / "dense.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "dense.ckpt").write_text("of the user")
    quiet = ["--trainer.callbacks=null", "--trainer.logger=false", "--trainer.limit_val_batches=1"]
    done = run("apply", "digits", *quiet, f"--recipe={tmp_path}/dense.yaml")
    assert (tmp_path / "dense.ckpt").read_text() == "of the user"
    assert done.result.checkpoint == tmp_path / "dense-v1.ckpt"
    assert done.result.checkpoint.is_file()


def test_a_place_that_cannot_be_written_is_found_before_the_compression(run, monkeypatch, tmp_path):
    monkeypatch.setattr(DigitsClassifier, "validation_step", refuse)
    with pytest.raises(SystemExit, match=r"ExportError.*could not be saved in the end.*it is a folder"):
        run("compress", "digits_4bit", f"--output={tmp_path}")


def test_an_export_misses_its_extra_before_the_validation(run, monkeypatch, tmp_path):
    monkeypatch.setattr(DigitsClassifier, "validation_step", refuse)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(SystemExit, match=r"MissingExtraError.*onnxscript.*lightning-obc\[onnx\]"):
        run("export", "digits", "--trainer.callbacks=null", "--trainer.logger=false", f"--path={tmp_path}/model.onnx")


def test_the_name_of_an_exported_file_says_its_format(run, monkeypatch, tmp_path):
    monkeypatch.setattr(DigitsClassifier, "validation_step", lambda *_: None)
    quiet = ["--trainer.callbacks=null", "--trainer.logger=false"]
    done = run("export", "digits", *quiet, f"--path={tmp_path}/model.safetensors")
    from safetensors import safe_open

    with safe_open(done.result.path, "pt") as file:
        assert "lightning_obc.packed" in file.metadata()
    with pytest.raises(SystemExit, match=r"ExportError.*does not say in which format.*--format"):
        run("export", "digits", *quiet, f"--path={tmp_path}/model.bin")
