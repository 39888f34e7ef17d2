"""The error of all stages together is that of the final weights against the dense ones, or it is not there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_obc as obc
from lightning_obc import solving
from lightning_obc.calibration import Collector
from lightning_obc.errors import NotPositiveDefiniteError
from lightning_obc.report import render_markdown, report_record
from lightning_obc.stage_run import run_stage

RECIPE = [obc.Prune(0.5), obc.Quantize(3)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5), nn.Linear(5, 6)
    ).eval()


def images() -> Tensor:
    return torch.randn(40, 4, 5, 5, generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Sequential, weights: nn.Sequential, index: int) -> Tensor:
    """What the layer puts out, without bias, with its weights from one network and its inputs from another."""
    with torch.no_grad():
        layer = copy.deepcopy(weights[index]).double()
        nn.init.zeros_(layer.bias)
        return layer(model[:index](images()).double())


@pytest.mark.parametrize("mode", ["independent", "sequential", "asymmetric"])
def test_it_is_the_error_of_the_last_weights_against_the_dense_ones(mode: Any) -> None:
    """Inputs: those of the model before the layer's last stage; behind compressed layers, those after it too."""
    dense, model = network(), network()
    spec = obc.Calibration(samples=40, mode=mode)
    pruned = network()
    obc.compress(pruned, images(), RECIPE[:1], calibration=spec)
    report = obc.compress(model, images(), RECIPE, calibration=spec)
    for name in ("0", "4", "5"):
        index = int(name)
        wanted = outputs(pruned, dense, index)
        got = outputs(pruned if mode == "independent" else model, model, index)
        expected = float((wanted - got).square().sum() / wanted.square().sum())
        first, last = (next(row for row in stage.layers if row.name == name) for stage in report.stages)
        assert last.total_error == pytest.approx(expected, rel=1e-3)
        assert first.total_error == first.relative_error
        assert last.total_error > 1.05 * last.relative_error


def test_only_layers_that_a_later_stage_solves_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[set[str]] = []
    own = obc.stage_run._StageRun.leave

    def leave(self: Any) -> None:
        kept.append(set(self.origins._kept))
        own(self)
        kept.append(set(self.origins._kept))

    monkeypatch.setattr(obc.stage_run._StageRun, "leave", leave)
    stages = [obc.Prune(0.5), obc.Prune(0.6, layers=["4"]), obc.Quantize(4, layers=["0", "4"])]
    report = obc.compress(network(), images(), stages)
    assert kept == [{"0", "4"}, {"0", "4"}, {"0", "4"}, {"0", "4"}, {"0", "4"}, set()]
    assert all(row.total_error is not None for stage in report.stages for row in stage.layers)


@pytest.mark.parametrize(("method", "is_known"), [("bias", True), ("global", False)])
def test_what_else_moves_weights_leaves_none(method: Any, is_known: bool) -> None:
    report = obc.compress(network(), images(), [RECIPE[0], obc.Correct(method), RECIPE[1]])
    assert report.corrections[0].notes == ()
    assert {row.total_error is not None for row in report.stages[1].layers} == {is_known}
    assert ("all stages" in report.table()) == is_known
    text = render_markdown(report_record(report))
    assert ("3 layers have no error of all stages: training or a correction" in text) != is_known


def test_a_layer_that_a_stage_could_not_solve_begins_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = solving.prune

    def failing(weight: Tensor, *args: Any, **options: Any) -> Any:
        if weight.shape[-1] == 72:
            raise NotPositiveDefiniteError("A Hessian stays indefinite", got="this layer")
        return solve(weight, *args, **options)

    monkeypatch.setattr(solving, "prune", failing)
    stages = obc.compress(network(), images(), RECIPE).stages
    pruned, quantized = ({row.name: row for row in stage.layers} for stage in stages)
    assert pruned["4"].total_error is None
    assert quantized["4"].total_error == pytest.approx(quantized["4"].relative_error)
    assert quantized["0"].total_error > quantized["0"].relative_error


def test_a_stage_alone_does_not_say_what_it_cannot_know() -> None:
    model = network()
    obc.compress(model, images(), RECIPE[0])
    spec = obc.Calibration(samples=40)
    report = run_stage(model, RECIPE[1], Collector(model, [images()], spec))
    assert [row.total_error for row in report.layers] == [None] * 3


def test_no_memory_for_the_figure_does_not_cost_the_layer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> float:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("lightning_obc.origins.relative_error", full)
    report = obc.compress(network(), images(), RECIPE, on_failure="raise")
    first, last = report.stages
    assert all(row.total_error == row.relative_error for row in first.layers)
    assert all(row.total_error is None and row.bits == 3 for row in last.layers)
    assert sum("left out of the report" in record.message for record in caplog.records) == len(last.layers)
