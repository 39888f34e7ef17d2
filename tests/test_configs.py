"""Every shipped configuration parses, comes back from a dump unchanged, and runs for one batch through the real CLI."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_there_are_configurations():
    assert CONFIGS


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configuration(config, monkeypatch, tmp_path, capsys):
    from lightning_obc.cli import main

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning-obc"])
    texts, source = [], config
    for _ in range(2):
        with pytest.raises(SystemExit):
            main(["fit", f"--config={source}", "--print_config"])
        texts.append(capsys.readouterr().out)
        source = tmp_path / "printed.yaml"
        source.write_text(texts[-1])
    assert texts[0] == texts[1]
    assert "class_path: lightning_obc.OBCCallback" in texts[0]
    cli = main(["fit", f"--config={config}", f"--trainer.default_root_dir={tmp_path}", "--trainer.fast_dev_run=true"])
    report = cli.trainer.callbacks[0].report
    assert [stage.stage for stage in report.stages]
    assert all(layer.compressed for stage in report.stages for layer in stage.layers)
