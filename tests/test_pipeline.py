"""One layer that cannot be solved: kept and named, or the end of the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lightning_obc as obc
from lightning_obc import solving
from lightning_obc.errors import NotPositiveDefiniteError, SpecError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.fixture
def second_layer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = solving.prune

    def failing(weight: torch.Tensor, *args: Any, **options: Any) -> Any:
        if weight.shape[-1] == 8:
            raise NotPositiveDefiniteError("A Hessian stays indefinite", got="this layer")
        return solve(weight, *args, **options)

    monkeypatch.setattr(solving, "prune", failing)


@pytest.mark.usefixtures("second_layer_fails")
def test_a_layer_that_cannot_be_solved_keeps_its_weights_and_is_named() -> None:
    model, batches = network(), [torch.randn(64, 16)]
    dense = model[2].weight.detach().clone()
    report = obc.compress(model, batches, obc.Prune("2:4"))
    assert torch.equal(model[2].weight, dense)
    assert float((model[0].weight == 0).float().mean()) == 0.5
    assert [(row.name, row.compressed) for row in report.stages[0].layers] == [("0", True), ("2", False)]
    assert "indefinite" in report.stages[0].failed["2"]
    assert "kept: A Hessian stays indefinite" in report.table()
    assert set(report.solutions) == {"0"}


@pytest.mark.usefixtures("second_layer_fails")
def test_or_the_run_stops_at_it() -> None:
    with pytest.raises(NotPositiveDefiniteError):
        obc.compress(network(), [torch.randn(64, 16)], obc.Prune("2:4"), on_failure="raise")


def test_progress_reaches_its_end_and_metrics_are_measured_before_and_after() -> None:
    seen: list[tuple[str, float, float]] = []
    model, batch = network(), torch.randn(64, 16)
    norm = {"zeros": lambda module: float((module[0].weight == 0).float().mean())}
    report = obc.compress(model, [batch], obc.Prune("2:4"), progress=lambda *step: seen.append(step), metrics=norm)
    assert {text.partition(":")[0] for text, _, _ in seen} >= {"calibration", "Prune(2"}
    assert seen[-1][1] == seen[-1][2] > 0
    assert report.figures == {"zeros": (0.0, 0.5)}


@pytest.mark.parametrize("recipe", ["2:4", [4], ["2:4"]])
def test_a_recipe_is_made_of_stages(recipe: Any) -> None:
    with pytest.raises(SpecError, match="made of stages"):
        obc.compress(network(), [torch.randn(8, 16)], recipe)
    with pytest.raises(SpecError, match="on_failure"):
        obc.compress(network(), [torch.randn(8, 16)], obc.Prune(0.5), on_failure="hope")  # type: ignore[arg-type]
