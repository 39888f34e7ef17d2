"""The benchmarks print figures beside a green parity check, and none beside a red one."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lightning_obc.hessian import Hessian

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("sweep")
    for name in ("sweep", "resnet50", "rank1", "machine", "greedy", "channels"):
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


def test_the_channel_benchmark_prints_beside_a_green_check_alone(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    channels = importlib.import_module("channels")
    arguments = ["--shapes", "3x5x2", "3x4x16", "2x4x2z", "--repeats", "1", "--threads", "1"]
    assert channels.main(arguments) == 0
    printed = capsys.readouterr().out
    for line, chosen in (("| 3×5×2 |", "numba"), ("| 3×4×16 |", "torch"), ("| 2×4×2, zeros |", "numba")):
        assert [row.split("|")[-2].strip() for row in printed.splitlines() if row.startswith(line)] == [chosen]
    right = channels.sweep_channels

    def wrong(*args, backend, **options):  # type: ignore[no-untyped-def]
        out = right(*args, backend=backend, **options)
        return replace(out, losses=out.losses * (1 + 1e-7)) if backend == "numba" else out

    monkeypatch.setattr(channels, "sweep_channels", wrong)
    assert channels.main(arguments) == 1
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


@pytest.fixture
def layer_errors(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    return importlib.import_module("benchmarks.layer_errors")


def network(errors: ModuleType, data: str = "random samples") -> Any:
    """Two small layers; 2:4 does not fit the second one."""
    networks = importlib.import_module("benchmarks.networks")
    generator = torch.Generator().manual_seed(0)
    layers = []
    for name, columns in (("first", 24), ("second", 18)):
        mixing = torch.randn(1, columns, columns, generator=generator, dtype=torch.float64)
        x = [mixing @ torch.randn(1, columns, 60, generator=generator).double() for _ in range(3)]
        one, two, unseen = (part @ part.mT for part in x)
        weight = torch.randn(1, 4, columns, generator=generator)
        hessian = Hessian(torch.stack([one, two]), (60, 60))
        layers.append(networks.Layer(name, weight, columns, hessian, unseen / 30))
    return networks.Network("small", data, layers)


def test_layer_errors_compare_at_one_damping_and_go_on_where_they_stopped(
    layer_errors: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "errors.json"
    layer_errors.run(network(layer_errors), path, layer_errors._clocks(), resume=False)
    whole = json.loads(path.read_text())
    rows = whole["rows"]
    assert "second: 2:4 left out" in capsys.readouterr().out
    assert len(rows) == (3 * 6 + 4 * 5) + (3 * 6 + 3 * 5)
    for case in {(row["layer"], row["level"]) for row in rows}:
        mine = [row for row in rows if (row["layer"], row["level"]) == case]
        assert len({row["damping"] for row in mine}) == 1
        assert {row["solver"] for row in mine if row["own"]} <= {"GPTQ", "GPTQ, act order", "SparseGPT", "AdaPrune"}
    bits = [row for row in rows if row["kind"] == "bits"]
    assert layer_errors.beaten(bits, "damped", "OBS") == [], "GPTQ's orders are among those of OBS"
    page = path.with_suffix(".md").read_text()
    assert "## One damping for all columns" in page
    assert "below OBS in 0 of 6 cases" in page

    part = whole | {"rows": [row for row in rows if row["layer"] == "first"]}
    path.write_text(json.dumps(part))
    layer_errors.run(network(layer_errors), path, layer_errors._clocks(), resume=True)
    again = json.loads(path.read_text())
    assert again["runs"] == 2

    def figures(record: dict[str, Any]) -> list[tuple[Any, ...]]:
        return [(row["layer"], row["level"], row["solver"], row["damped"], row["held_out"]) for row in record["rows"]]

    assert figures(again) == figures(whole)
    with pytest.raises(SystemExit, match="cannot resume"):
        layer_errors.run(network(layer_errors, "others"), path, layer_errors._clocks(), resume=True)


def test_a_rival_that_is_better_is_named(layer_errors: ModuleType) -> None:
    place = {"layer": "a", "kind": "bits", "level": "4"}
    rows = [
        place | {"solver": "OBS", "held_out": 1.0, "own": None},
        place | {"solver": "GPTQ", "held_out": 1.0, "own": {"held_out": 0.8}},
        place | {"solver": "nearest", "held_out": 2.0, "own": None},
    ]
    assert layer_errors.beaten(rows, "held_out", "OBS") == []
    assert layer_errors.beaten(rows, "held_out", "OBS", own=True) == ["GPTQ in a at 4, by 25 %"]


def test_levels_of_one_elimination_are_compared_only_when_they_are_equal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    levels = importlib.import_module("benchmarks.levels")
    assert "| 3×16 | structured | 10 |" in levels.compare(3, 8, 2, "structured", 1)
    right = levels.solve_levels_

    def wrong(record: Any, *rest: Any) -> None:
        right(record, *rest)
        record.levels = {name: replace(level, loss=level.loss * 1.01) for name, level in record.levels.items()}

    monkeypatch.setattr(levels, "solve_levels_", wrong)
    with pytest.raises(SystemExit, match="parity is red"):
        levels.compare(3, 8, 2, "structured", 1)
