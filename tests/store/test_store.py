"""Durable layer solutions: what comes back, what is refused, and what is only lost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_obc as obc
from lightning_obc import stage_run
from lightning_obc.errors import ExportError, FingerprintError
from lightning_obc.store import SolutionStore

BATCHES = [torch.randn(64, 16, generator=torch.Generator().manual_seed(1))]
RECIPE = [obc.Prune("2:4"), obc.Quantize(obc.IntGrid(3, granularity="group", group_size=8), refine=True)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def run(store: Path | None, stages: Any = RECIPE, batches: Any = BATCHES, **options: Any) -> Any:
    return obc.compress(network(), batches, stages, store=store, **options)


def figures(report: Any) -> list[Any]:
    return [
        (
            *(row.name, row.loss, row.damping_loss, row.relative_error, row.held_out, row.status),
            *(row.sparsity, row.bits, row.curve),
        )
        for stage in report.stages
        for row in stage.layers
    ]


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Layers that the engine really solved."""
    names: list[str] = []
    solve = stage_run._StageRun._solution

    def counting(self: Any, layer: Any, *args: Any) -> Any:
        names.append(layer.name)
        return solve(self, layer, *args)

    monkeypatch.setattr(stage_run._StageRun, "_solution", counting)
    return names


@pytest.mark.parametrize("mode", ["independent", "sequential", "asymmetric"])
def test_a_second_run_solves_nothing_and_gives_the_same(tmp_path: Path, solved: list[str], mode: Any) -> None:
    calibration = obc.Calibration(mode=mode)
    plain = run(None, calibration=calibration)
    first = run(tmp_path, calibration=calibration)
    solved.clear()
    second = run(tmp_path, calibration=calibration)
    assert solved == []
    for report in (first, second):
        for name, value in plain.model.state_dict().items():
            assert torch.equal(report.model.state_dict()[name], value)
        assert figures(report) == figures(plain)
    for name, solution in plain.solutions.items():
        again = second.solutions[name]
        assert torch.equal(again.codes, solution.codes)
        assert torch.equal(again.grid.scale, solution.grid.scale)
        assert torch.equal(again.grid.column_group, solution.grid.column_group)
        assert again.grid.spec == solution.grid.spec
        assert again.refinement == solution.refinement
        assert again.status == solution.status


def test_only_what_is_missing_is_solved(tmp_path: Path, solved: list[str]) -> None:
    run(tmp_path)
    files = sorted(tmp_path.glob("stage01-*"))
    assert len(files) == 3
    files[1].unlink()
    solved.clear()
    run(tmp_path)
    assert solved == ["2"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_file_is_solved_again(tmp_path: Path, solved: list[str], damage: str) -> None:
    plain = run(tmp_path)
    path = next(iter(sorted(tmp_path.glob("stage00-*"))))
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-3] ^= 0x40
    path.write_bytes({"cut": content[:-20], "flip": content, "empty": b""}[damage])
    solved.clear()
    with pytest.warns(UserWarning, match="damaged"):
        again = run(tmp_path)
    assert solved == ["0"]
    assert figures(again) == figures(plain)


def other_weights() -> nn.Sequential:
    model = network()
    with torch.no_grad():
        model[4].weight[0, 0] += 1e-3
    return model


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"stages": [obc.Prune("1:4")]}, "another stage"),
        ({"stages": [obc.Prune("2:4", damping=0.02)]}, "another stage"),
        ({"batches": [torch.randn(64, 16)]}, "another statistic"),
        ({"batches": [BATCHES[0][:63]]}, "another statistic"),
        ({"calibration": obc.Calibration(mode="asymmetric")}, "another statistic"),
        ({"model": other_weights()}, "another weight"),
    ],
)
def test_progress_of_another_run_is_refused_before_anything_changes(
    tmp_path: Path, change: dict[str, Any], part: str
) -> None:
    run(tmp_path, stages=[obc.Prune("2:4")])
    options = {"model": network(), "batches": BATCHES, "stages": [obc.Prune("2:4")], **change}
    model = options["model"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FingerprintError, match=part) as caught:
        obc.compress(**options, store=tmp_path)
    assert str(tmp_path) in str(caught.value.remedy)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_another_mixing_is_another_result(tmp_path: Path) -> None:
    recipe = [obc.Prune("2:4")]
    run(tmp_path, stages=recipe, calibration=obc.Calibration(mode="asymmetric", mixing=0.5))
    with pytest.raises(FingerprintError, match="another mixing"):
        run(tmp_path, stages=recipe, calibration=obc.Calibration(mode="asymmetric", mixing=0.75))


def test_layer_names_that_are_no_file_names(tmp_path: Path) -> None:
    store = SolutionStore(tmp_path).stage(3)
    paths = {store.path(name) for name in ("a/b", "a.b", "a_b", "a:b", "é" * 300, "../up")}
    assert len(paths) == 6
    assert all(path.parent == tmp_path and len(path.name) < 200 for path in paths)


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path: Path, solved: list[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be made"):
        run(tmp_path / "file" / "store")
    assert solved == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ExportError, match="cannot be written"):
        run(tmp_path)


def test_a_full_disk_costs_the_durability_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_obc.store.save_file", full)
    with pytest.warns(UserWarning, match="not durable"):
        report = run(tmp_path)
    assert figures(report) == figures(run(None))
    assert not list(tmp_path.glob("stage*"))
