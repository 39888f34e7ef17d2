"""The shipped recipe from beginning to end: README's main job, and the simplest methods beside it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """The command line of README's first block, in this process."""
    from lightning_obc.cli import main

    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    patch.setattr(sys, "argv", ["lightning-obc"])
    directory = tmp_path_factory.mktemp("digits")
    started = time.process_time()
    cli = main(["fit", "--config=configs/digits.yaml", f"--trainer.default_root_dir={directory}"])
    seconds = time.process_time() - started
    yield cli, seconds
    patch.undo()


def test_accuracy_falls_by_at_most_one_point(digits_run, capsys):
    cli, seconds = digits_run
    dense, compressed = cli.trainer.callbacks[0].report.figures["val_accuracy"]
    with capsys.disabled():
        drop = 100 * (dense - compressed)
        print(f"\ndigits, 2:4 + 4 bits: validation accuracy dense {dense:.4f}, compressed {compressed:.4f}, ", end="")
        print(f"a drop of {drop:.2f} points; {seconds:.0f} s of processor time")
    assert dense > 0.97
    assert compressed >= dense - 0.01
    assert seconds < 180, "seconds of processor time: the machine may be shared"


def test_the_weights_are_what_the_recipe_says(digits_run):
    cli, _ = digits_run
    for name, module in cli.model.named_modules():
        if not isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            continue
        rows = module.weight.detach().flatten(1)
        assert max(len(row.unique()) for row in rows) <= 16, name
        if name != "stem.0":
            groups = module.weight.detach().movedim(1, -1).reshape(-1, 4)
            assert bool(((groups != 0).sum(1) <= 2).all()), name


def test_the_checkpoint_loads_into_the_plain_module_and_scores_the_same(digits_run):
    from lightning.pytorch import Trainer

    from examples.digits import DigitsClassifier, DigitsData

    cli, _ = digits_run
    callback = cli.trainer.callbacks[0]
    plain = DigitsClassifier.load_from_checkpoint(callback.checkpoint_path, strict=True)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    score = trainer.validate(plain, DigitsData(), verbose=False)[0]["val_accuracy"]
    assert score == pytest.approx(callback.report.figures["val_accuracy"][1])


def test_the_report_lies_beside_the_checkpoint(digits_run):
    from lightning_obc.report import load_record

    cli, _ = digits_run
    callback = cli.trainer.callbacks[0]
    record = load_record(callback.checkpoint_path.with_suffix(".report.json"))
    assert record["figures"]["val_accuracy"] == list(callback.report.figures["val_accuracy"])
    assert [entry.partition("(")[0] for entry in record["recipe"]] == ["obc.Prune", "obc.Quantize"]
    assert len(record["plans"]) == 2
    assert all(histogram["before"] for histogram in record["histograms"].values())
    assert "optimizer steps later" in record["notes"][1]
    assert "obc.OBCCallback(" in record["reproduce"]
    assert "<h2>Layers at a glance</h2>" in callback.checkpoint_path.with_suffix(".report.html").read_text()


def test_magnitude_and_nearest_rounding_are_worse(capsys):
    from examples.digits_baselines import main

    errors = main()
    printed = capsys.readouterr().out
    with capsys.disabled():
        print(f"\n{printed}")
    ours, simple = (sum(layer.values()) for layer in errors.values())
    assert ours < simple
    assert ours < 0.5 * simple, "second-order updates must pay clearly on this network"
