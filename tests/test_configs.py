"""Every shipped configuration parses, comes back from a dump unchanged, and runs for one batch through the real CLI."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_there_are_configurations():
    assert CONFIGS


SHORT = {
    "fit": [],
    "compress": ["--output=false"],
    "validate": [],
    "search": ["--spdy.evaluations=3", "--budgets=[0.1]", "--methods=[uniform,spdy]"],
}


def subcommand(config: Path) -> str:
    """The subcommand that a configuration says it is run with."""
    said = re.search(rf"^#     lightning-obc (\w+) --config configs/{config.name}\b", config.read_text(), re.MULTILINE)
    assert said is not None, "a configuration says in its first lines how it is run"
    return said[1]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command line in this process, with its output under ``tmp_path``."""
    from lightning_obc.cli import main

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning-obc"])
    return lambda *args: main([*args, f"--trainer.default_root_dir={tmp_path}"])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configuration_round_trips(config, run, tmp_path, capsys):
    texts, source = [], config
    for _ in range(2):
        with pytest.raises(SystemExit):
            run(subcommand(config), f"--config={source}", "--print_config")
        texts.append(capsys.readouterr().out)
        source = tmp_path / "printed.yaml"
        source.write_text(texts[-1])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configuration_runs(config, run):
    name = subcommand(config)
    cli = run(name, f"--config={config}", "--trainer.fast_dev_run=true", *SHORT[name])
    if name == "search":
        assert cli.result.points
        return
    callback = cli.result if name == "compress" else next(x for x in cli.trainer.callbacks if hasattr(x, "report"))
    assert callback.report.stages
    assert all(layer.compressed for stage in callback.report.stages for layer in stage.layers)


def test_a_configuration_for_compress_serves_validate_too(run):
    cli = run("validate", f"--config={ROOT / 'configs' / 'digits_4bit.yaml'}", "--trainer.fast_dev_run=true")
    report = cli.trainer.callbacks[0].report
    assert all(layer.bits == 4 for layer in report.layers.values())
    assert report.corrections
