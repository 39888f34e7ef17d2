"""``--plan``, ``--print_config`` and mistakes in configurations: what is said before anything runs."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

# Its logger keeps the stream that it finds on import, which is a test's own, closed after it, from within a test.
import lightning.pytorch  # noqa: F401
import pytest
import yaml

from lightning_obc.cli.mistakes import explain

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "configs" / "digits.yaml"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command line in this process, with its output under ``tmp_path``."""
    from lightning_obc.cli import main

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning-obc"])
    return lambda *args: main([*args, f"--trainer.default_root_dir={tmp_path}"])


def test_plan_of_a_training_run(run, tmp_path, capsys):
    run("fit", f"--config={ROOT / 'configs' / 'digits_sparse.yaml'}", "--plan")
    said = capsys.readouterr().out
    assert "Plan of Prune(90% unstructured)" in said or "Plan of Prune(" in said
    assert "stages.2.conv2" in said
    assert "estimate:" in said
    assert "calibration about" in said
    assert "left dense: 2 layers (no stage selects it): head, stem.0" in said
    assert "1. before epoch 12, counted from 0: Prune" in said
    assert "in 5 steps to epoch 16: 30 %" in said
    assert "90 %" in said.partition("in 5 steps")[2]
    assert said.rstrip().endswith("plan only: nothing was run, changed or written")
    assert list(tmp_path.iterdir()) == []


def test_plan_of_a_compression(run, tmp_path, capsys):
    cli = run("compress", f"--config={DIGITS}", "--calibration.execution_device=cpu:0", "--plan", "true")
    said = capsys.readouterr().out
    assert cli.result is None
    assert "Plan of Prune(2:4): 9 layers" in said
    assert "Plan of Quantize(int4 asym per channel): 10 layers" in said
    assert "1. after the validation of the dense model: Prune(2:4)" in said
    assert "one block after the other on cpu:0: at most" in said
    assert list(tmp_path.iterdir()) == []


def test_a_plan_needs_stages(run):
    with pytest.raises(SystemExit, match="nothing to compress with"):
        run("fit", f"--config={DIGITS}", "--trainer.callbacks=null", "--plan")


def test_options_are_documented_in_a_printed_configuration(run, capsys):
    pytest.importorskip("ruamel.yaml")
    with pytest.raises(SystemExit):
        run("compress", f"--config={DIGITS}", "--print_config=comments")
    said = capsys.readouterr().out
    assert yaml.safe_load(said)["calibration"] is None
    assert "# What to do, in order; ``at`` is ignored." in said
    assert "# Print what the stages would do" in said


def test_without_the_package_for_comments_a_hint(run, capsys, monkeypatch):
    import jsonargparse._actions as actions

    monkeypatch.setattr(actions, "ruamel_support", False)
    with pytest.raises(SystemExit):
        run("fit", f"--config={DIGITS}", "--print_config=comments")
    assert "pip install 'lightning-obc[comments]'" in capsys.readouterr().err


def test_a_run_without_logs_does_not_write_over_the_users_file(run, tmp_path):
    mine = tmp_path / "config.yaml"
    mine.write_text("mine: true\n")
    run("validate", f"--config={DIGITS}", "--trainer.callbacks=null", "--trainer.logger=false")
    assert mine.read_text() == "mine: true\n"


def stages(config) -> list:
    return config["trainer"]["callbacks"][0]["init_args"]["stages"]


def change(path: str, value: object):
    """A mistake: the value at a path of the configuration, ``prune``, ``quantize`` and ``callback`` being short."""

    def apply(config) -> None:
        start = {
            "prune": stages(config)[0],
            "quantize": stages(config)[1],
            "callback": config["trainer"]["callbacks"][0],
        }
        first, *middle, last = path.split(".")
        target = start[first] if first in start else config[first]
        for key in middle:
            target = target[key]
        target[last] = value

    return apply


MISTAKES = [
    (change("prune.init_args.pattern", 124), [r'write the pattern in quotes, "2:4"']),
    (
        change("prune.init_args.patern", "2:4"),
        ["stages > lightning_obc.Prune: Option 'patern' is not accepted", "did you mean 'pattern'?", "schedule"],
    ),
    (change("prune.class_path", "lightning_obc.Prun"), ["no attribute 'Prun'", "did you mean 'Prune'"]),
    (change("prune.class_path", "lightning_ob.Prune"), ["No module named 'lightning_ob'", "'lightning_obc'"]),
    (change("callback.class_path", "lightning_obc.OBCCalback"), ["did you mean 'OBCCallback'"]),
    (change("callback.init_args.stage", []), ["Option 'stage' is not accepted", "did you mean 'stages'"]),
    (
        change("callback.init_args.calibration.smaples", 5),
        ["Group 'calibration' does not accept option 'smaples'", "did you mean 'samples'"],
    ),
    (change("quantize.init_args.grid", "4bit"), ["'4bit' is not possible. Expected: int or IntGrid"]),
    (change("quantize.init_args.after", "thaw"), ["thaw"]),
    (change("quantize.bits", 4), ['below "init_args"']),
    (change("prune.init_args.exclude", ["stm.0"]), ["'stm.0'", "one of 'stem.0'"]),
    (change("prune.init_args.pattern", None), ["arguments are required: pattern"]),
    (change("trainer.max_epoch", 3), ["'trainer.max_epoch'", "did you mean 'trainer.max_epochs'"]),
    (change("model.class_path", "examples.digits.DigitClassifier"), ["did you mean 'DigitsClassifier'"]),
    (change("model.class_path", "exmples.digits.DigitsClassifier"), ["No module named 'exmples'", "'examples'"]),
]


@pytest.mark.parametrize(("mistake", "words"), MISTAKES)
def test_a_mistake_is_told_in_a_few_lines(run, tmp_path, capsys, mistake, words):
    config = copy.deepcopy(yaml.safe_load(DIGITS.read_text()))
    mistake(config)
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stop:
        run("fit", f"--config={path}", "--trainer.fast_dev_run=true", "--trainer.enable_progress_bar=false")
    assert stop.value.code
    said = capsys.readouterr().err + (str(stop.value.code) if isinstance(stop.value.code, str) else "")
    for word in words:
        assert word in said, said
    assert "Union subtypes" not in said
    assert "usage:" not in said
    assert len(said.splitlines()) < 12, said


def test_messages_of_other_forms_stay_as_they_are():
    assert explain("something else is wrong") == ["something else is wrong"]


def test_the_programs_help_names_every_subcommand(run, capsys):
    with pytest.raises(SystemExit):
        run("--help")
    said = capsys.readouterr().out
    for name in ("fit", "validate", "test", "predict", "compress", "search", "export", "report", "benchmark"):
        assert re.search(rf"\b{name}\b", said), name
