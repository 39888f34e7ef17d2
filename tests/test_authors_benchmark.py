"""The benchmark beside the authors' code, with small stand-ins of theirs written here: their interface, our results."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Interface only: what a checkout offers by name, solved by this package.
QUANT = """
class Quantizer:
    def configure(self, bits, perchannel=False, sym=True, mse=False):
        assert perchannel and mse
        self.bits, self.sym = bits, sym
"""
COMMON = """
import torch
from lightning_obc import baselines, obs
from lightning_obc.specs import IntGrid
from quant import *

def grid(solver):
    return IntGrid(solver.quantizer.bits, symmetric=solver.quantizer.sym)

def done(solver, *solutions):
    torch.cuda.synchronize()
    for solution in solutions:
        print("error", solution.loss + solution.damping_loss)
    solver.layer.weight.data = solutions[0].weight
    return [solution.weight for solution in solutions]
"""
OBC = """
class TrueOBS:
    def __init__(self, layer, rel_damp=0):
        assert rel_damp == 0.01
        self.layer, self.H = layer, torch.zeros(1, dtype=torch.double)

    def problem(self):
        weight = self.layer.weight.data
        assert weight.float().dtype == weight.dtype  # the twin in float64 is float64 throughout
        return weight, self.H

    def prepare_unstr(self):
        self.swept = obs.sweep(*self.problem())

    def prepare_blocked(self, size):
        self.swept = obs.sweep_blocks(*self.problem(), size)

    def prune_unstr(self, sparsities):
        return done(self, *[self.swept.solution(s, "sorted") for s in sparsities])

    prune_blocked = prune_unstr

    def nmprune(self, n, m):
        done(self, obs.prune(*self.problem(), f"{m - n}:{m}"))

    def quantize(self):
        weight, hessian = self.problem()
        done(self, obs.quantize(weight, hessian, grid(self), mask=weight != 0, order=ORDER))
"""
GPTQ = """
import transformers

class GPTQ:
    def __init__(self, layer):
        assert not isinstance(layer, transformers.Conv1D)
        self.layer, self.H = layer, torch.zeros(1)

    def fasterquant(self, blocksize, percdamp, actorder):
        assert self.H.dtype == self.layer.weight.dtype
        hessian = self.H.double()
        done(self, baselines.gptq(self.layer.weight.data, hessian, grid(self), act_order=actorder, block=blocksize))
"""
RIGHT = 'ORDER = "greedy"\n'


def checkout(folder: Path, name: str, code: str) -> Path:
    folder.mkdir()
    (folder / "quant.py").write_text(QUANT)
    (folder / f"{name}.py").write_text(COMMON + code)
    return folder


@pytest.fixture
def authors(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    module = importlib.import_module("benchmarks.authors")
    small = module.NETWORKS["random"]
    monkeypatch.setitem(module.NETWORKS, "random", lambda: small(rows=3, columns=16))
    return module


OPTIONS = ["--threads", "1", "--repeats", "1", "--twin-rows", "2"]


def test_every_task_is_compared_and_the_page_names_the_commits(
    authors: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    obc, gptq = checkout(tmp_path / "obc", "trueobs", RIGHT + OBC), checkout(tmp_path / "gptq", "gptq", GPTQ)
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", str(obc), *command], check=True)
    commit = subprocess.run(["git", "-C", str(obc), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    given = ["--checkout", str(obc), "--gptq", str(gptq), *OPTIONS, "--out", str(tmp_path), "--name", "page"]
    before = dict(sys.modules)
    assert authors.main(given) == 0
    assert {"quant", "trueobs", "gptq"}.isdisjoint(sys.modules)
    assert sys.modules.get("transformers") is before.get("transformers")
    page = (tmp_path / "page.md").read_text()
    assert page in capsys.readouterr().out
    assert f"https://github.com/IST-DASLab/OBC at {commit};" in page
    assert "https://github.com/IST-DASLab/gptq at an unknown commit" in page
    record = json.loads((tmp_path / "page.json").read_text())
    tasks = [task for task, case in authors.CASES.items() if case.code != "sparsegpt"]
    assert [line["task"] for line in record["lines"]] == tasks
    for line in record["lines"]:
        assert (line["rows_same"], line["differing"], line["twin_error"]) == (1, 0, 0)
        assert line["loss_ratio"] == pytest.approx(1)
        assert line["their_report"] == pytest.approx(1, rel=1e-6)
        assert line["our_report"] == pytest.approx(1, rel=1e-9)
    (obc / "quant.py").write_text(QUANT + "\n")
    assert authors.main([*given, "--tasks", "4 bits"]) == 0
    assert ", with local changes" in (tmp_path / "page.md").read_text()
    again = json.loads((tmp_path / "page.json").read_text())
    assert sorted(line["task"] for line in again["lines"]) == sorted(tasks), "other lines are kept"


@pytest.mark.parametrize(
    ("task", "right", "wrong"),
    [
        ("2:4", 'f"{m - n}:{m}"', 'f"{m - n - 1}:{m}"'),
        ("4 bits", "order=ORDER", "order='ascending'"),
        ("unstructured 50, 75, 90 %", '"sorted"', '"heap"'),
    ],
)
def test_a_red_check_prints_no_figures(
    authors: ModuleType,
    task: str,
    right: str,
    wrong: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = checkout(tmp_path / "obc", "trueobs", RIGHT + OBC.replace(right, wrong))
    given = ["--checkout", str(folder), *OPTIONS, "--out", str(tmp_path), "--name", "page", "--tasks", task]
    assert authors.main(given) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "in float64" in captured.err or "times theirs" in captured.err
    assert "parity is red" in captured.err
    assert not (tmp_path / "page.md").exists()


def test_better_weights_of_theirs_are_red(
    authors: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = authors.CASES["2:4"]

    def worse(*problem: Any) -> Any:
        return [replace(solution, weight=solution.weight * 1.002) for solution in case.ours(*problem)]

    monkeypatch.setitem(authors.CASES, "2:4", replace(case, ours=worse))
    folder = checkout(tmp_path / "obc", "trueobs", RIGHT + OBC)
    assert authors.main(["--checkout", str(folder), *OPTIONS, "--tasks", "2:4"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a row of ours with the same result has a loss" in captured.err


def test_what_is_no_checkout_is_named(authors: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no trueobs\.py in it; expected a checkout of https"):
        authors.main(["--checkout", str(tmp_path)])
    with pytest.raises(SystemExit):
        authors.main([])


def test_help_is_printed(authors: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        authors.parse(["--help"])
    assert stop.value.code == 0
    assert "blocks of 4, 50" in capsys.readouterr().out
