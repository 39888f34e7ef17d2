"""The benchmarks print figures beside a green parity check, and none beside a red one."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("sweep")
    for name in ("sweep", "resnet50", "rank1", "machine", "greedy"):
        sys.modules.pop(name, None)


SMALL = ["--shapes", "3x40", "--repeats", "1", "--oracle-rows", "3", "--threads", "1"]


def test_a_green_check_prints_every_pattern(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(SMALL) == 0
    printed = capsys.readouterr().out
    for pattern in benchmark.PATTERNS:
        assert f"| 3x40 | {pattern} |" in printed


@pytest.mark.parametrize("pattern", ["unstructured", "quantize", "2:4 + refit", "blocks of 4"])
def test_a_red_check_prints_no_figures(
    benchmark: ModuleType, pattern: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sweep_prune", "sweep_quantize", "sweep_blocks"):
        right = getattr(benchmark, name)

        def wrong(*args, backend, right=right, **options):  # type: ignore[no-untyped-def]
            out = right(*args, backend=backend, **options)
            return out if backend == "naive" else replace(out, order=out.order.flip(-1))

        monkeypatch.setattr(benchmark, name, wrong)
    assert benchmark.main([*SMALL, "--patterns", pattern]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "parity is red" in captured.err


def test_the_network_benchmark_resumes_and_refuses(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = importlib.import_module("resnet50")
    shapes = network.shapes()
    assert sum(layers for *_, layers in shapes) == 54
    monkeypatch.setattr(network, "FOLDER", tmp_path)
    monkeypatch.setattr(network, "shapes", lambda: [(2, 8, 1)])
    assert network.main(["--name", "net"]) == 0
    monkeypatch.setattr(network, "shapes", lambda: [(2, 8, 1), (3, 20, 2)])
    assert network.main(["--name", "net", "--resume"]) == 0
    text = (tmp_path / "net.md").read_text()
    assert "| 2×8 | 1 |" in text
    assert "| 3×20 | 2 |" in text
    assert "Interrupted" not in text
    right = network.sweep_prune
    monkeypatch.setattr(
        network, "sweep_prune", lambda *a, **o: replace(right(*a, **o), order=right(*a, **o).order.flip(-1))
    )
    capsys.readouterr()
    assert network.main(["--name", "other"]) == 1
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "other.md").exists()
