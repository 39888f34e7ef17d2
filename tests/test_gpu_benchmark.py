"""The command that runs on a GPU: a part that fails or hangs is recorded, and the rest goes on.

What its parts do is rehearsed under Triton's interpreter, see ``kernels/triton_scenarios.py``.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPT = """
import json, sys, time
name, saved, earlier = sys.argv[1:4]
assert json.load(open(earlier))["parts"][0]["name"] == "parity"
if name == "parity":
    green = {"2:4": {"parity": True, "same": 1, "loss": 0}}
    found = {"device": "a device", "torch": "2", "python": "3", "patterns": green}
elif name == "wide":
    found = {"rows": 4, "columns": 5, "seconds": 1.5, "peak_gib": 2.0}
else:
    found = {"counts": {"failed": 1}, "failures": ["FAILED test_x"]}
json.dump(found, open(saved, "w"))
if name == "tests":
    print("what went wrong")
    raise SystemExit(3)
if name == "wide":
    print("hanging", flush=True)
    time.sleep(60)
if name == "memory":
    open(saved, "w").write('{"messages": ["halved"], "same": 1.0}')
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def test_a_part_that_fails_or_hangs_is_recorded_and_the_rest_goes_on(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "parts.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(gpu, "SCRIPT", script)
    monkeypatch.setitem(gpu.LIMITS, "wide", 3)
    results = tmp_path / "results"
    assert gpu.main(["--results", str(results), "--parts", "parity", "tests", "wide", "memory"]) == 1
    parts = json.loads((results / "gpu.json").read_text())["parts"]
    assert [part["status"] for part in parts] == ["done", "failed with status 3", "stopped after 3 s", "done"]
    assert "what went wrong" in parts[1]["tail"]
    assert parts[2]["found"]["seconds"] == 1.5
    text = (results / "gpu.md").read_text()
    for said in ("a device", "| 2:4 | green |", "FAILED test_x", "hanging", "4×5 quantized", "halved"):
        assert said in text
    assert "stopped after 3 s" in capsys.readouterr().out
    assert not list(results.glob(".*"))


def test_without_a_device_every_part_says_so(gpu: Any, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert gpu.main(["--results", str(tmp_path), "--parts", "memory"]) == 1
    (part,) = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert "needs a CUDA device" in part["tail"]


def test_all_limits_together_are_nine_minutes(gpu: Any) -> None:
    assert sum(gpu.LIMITS.values()) <= 9 * 60
    assert sys.modules["gpu_report"].SECTIONS.keys() == gpu.LIMITS.keys()
