"""Corrections as stages: the spec, the references, and whole recipes through ``compress``."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_obc as obc
from lightning_obc.correction import dense_references, reset_batch_norm, run_correction
from lightning_obc.errors import LayerNotFoundError, ScheduleError, SpecError
from lightning_obc.pipeline import compress
from lightning_obc.planning import plan_stage


class Net(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(4, width, 3), nn.BatchNorm2d(width)
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        return self.head(F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))).mean((2, 3)))


def _made() -> tuple[Net, list[Tensor], Tensor]:
    """A net with true running statistics, calibration batches, and fresh data."""
    torch.manual_seed(0)
    net = Net()
    for norm in (net.norm0, net.norm1, net.norm2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.5)
    mixing = torch.randn(4, 4)
    batches = [torch.einsum("ij,njhw->nihw", mixing, torch.randn(8, 4, 8, 8)) + 0.5 for _ in range(4)]
    reset_batch_norm(net, batches)
    fresh = torch.einsum("ij,njhw->nihw", mixing, torch.randn(64, 4, 8, 8)) + 0.5
    return net.eval(), batches, fresh


def _error(dense: nn.Module, small: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((small(x) - dense(x)).square().mean() / dense(x).square().mean())


HEAVY: dict[str, Any] = {"pattern": 0.85, "exclude": ["stem", "head"]}


@pytest.mark.parametrize(
    "stage",
    [obc.Correct("batch_norm"), obc.Correct("statistics"), obc.Correct("global", lr=1e-3, epochs=20)],
    ids=str,
)
def test_corrections_in_a_recipe_lower_the_error_of_a_heavily_pruned_net(stage: obc.Correct) -> None:
    dense, batches, fresh = _made()
    plain, corrected = copy.deepcopy(dense), copy.deepcopy(dense)
    compress(plain, batches, obc.Prune(**HEAVY))
    report = compress(corrected, batches, [obc.Prune(**HEAVY), stage])
    assert _error(dense, corrected, fresh) < 0.9 * _error(dense, plain, fresh)
    for name in ("conv1", "conv2"):
        zeros = corrected.get_parameter(f"{name}.weight") == 0
        assert torch.equal(zeros, plain.get_parameter(f"{name}.weight") == 0)
    assert [correction.method for correction in report.corrections] == [stage.method]
    assert str(stage) in report.table()
    assert json.loads(json.dumps(report.to_dict()))["corrections"][0]["method"] == stage.method


def test_global_tuning_leaves_quantized_weights_on_their_grid() -> None:
    dense, batches, _ = _made()
    stages = [obc.Prune("2:4"), obc.Quantize(3, layers=["conv1"]), obc.Correct("global", lr=1e-3, epochs=3)]
    report = compress(dense, batches, stages)
    solution = report.solutions["conv1"]
    by_column = dense.conv1.weight.detach().movedim(1, -1).reshape(1, 16, -1)
    assert torch.equal(by_column, solution.weight)
    pruned = report.solutions["conv2"]
    tuned = dense.conv2.weight.detach().movedim(1, -1).reshape(1, 16, -1)
    assert not torch.equal(tuned, pruned.weight)
    assert not tuned[~pruned.mask].any()
    notes = {row.name: row.note for row in report.corrections[0].layers}
    assert notes["conv1"] == "its weights stay"


def test_vectors_and_bias_in_one_recipe() -> None:
    dense, batches, fresh = _made()
    small = copy.deepcopy(dense)
    stages = [obc.Quantize(2), obc.Correct("bias"), obc.Correct("vectors", epochs=5, lr=1e-3)]
    report = compress(small, batches, stages)
    plain = copy.deepcopy(dense)
    compress(plain, batches, obc.Quantize(2))
    for name in ("stem", "conv1", "conv2", "head"):
        assert torch.equal(small.get_parameter(f"{name}.weight"), plain.get_parameter(f"{name}.weight"))
    assert _error(dense, small, fresh) < _error(dense, plain, fresh)
    assert [row.name for row in report.corrections[0].layers] == ["stem", "head"]
    objective = report.corrections[1].objective
    assert objective is not None
    assert objective[1] < objective[0]


def test_references_are_what_the_methods_need() -> None:
    dense, batches, _ = _made()
    methods = ("batch_norm", "statistics", "bias", "global", "vectors")
    stages = [obc.Prune(0.5), *(obc.Correct(method) for method in methods)]
    references = dense_references(dense, stages, batches)
    assert sorted(references) == [2, 3, 4, 5]
    assert list(references[2].channels) == ["norm0", "norm1", "norm2"]
    assert list(references[3].channels) == ["stem", "conv1", "conv2", "head"]
    assert references[4] is references[5]
    assert references[4] is not dense
    assert dense_references(dense, [obc.Prune(0.5), obc.Correct()], batches) == {}


def test_a_correction_that_fails_does_not_lose_the_run() -> None:
    net, batches, _ = _made()
    stages = [obc.Prune(0.5), obc.Correct("global")]
    report = compress(net, batches[:1], stages)
    assert "two batches" in report.corrections[0].notes[0]
    assert report.stages[0].layers[0].compressed
    with pytest.raises(obc.errors.CalibrationError, match="two batches"):
        compress(net, batches[:1], stages, on_failure="raise")


def test_refused_before_anything_is_changed() -> None:
    net, batches, _ = _made()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ScheduleError, match="nothing to correct"):
        compress(net, batches, [obc.Correct("statistics"), obc.Prune(0.5)])
    with pytest.raises(LayerNotFoundError, match="'norm7'"):
        compress(net, batches, [obc.Prune(0.5), obc.Correct("batch_norm", layers=["norm7"])])
    with pytest.raises(LayerNotFoundError, match="no normalisation layer"):
        compress(nn.Linear(4, 4), [torch.randn(3, 4)], [obc.Prune(0.5), obc.Correct("statistics")])
    with pytest.raises(ScheduleError, match="needs the dense model"):
        run_correction(net, obc.Correct("bias"), batches)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())
    assert "Correct(batch_norm)" in str(plan_stage(net, obc.Correct()))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "magic"}, "method"),
        ({"momentum": 2.0}, "momentum"),
        ({"method": "bias", "momentum": 0.1}, "no such setting"),
        ({"method": "statistics", "lr": 0.1}, "no such setting"),
        ({"method": "global", "lr": -1.0}, "lr"),
        ({"method": "global", "epochs": 0}, "epochs"),
        ({"method": "vectors", "time_limit": 0.0}, "time_limit"),
        ({"batches": 0}, "batches"),
        ({"at": "never"}, "time"),
    ],
)
def test_specs_that_cannot_be_meant(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(SpecError, match=match):
        obc.Correct(**settings)


def test_the_spec_is_frozen_and_fills_in_defaults() -> None:
    stage = obc.Correct("batch_norm", momentum=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stage.momentum = 0.2  # type: ignore[misc]
    assert (stage.batches_limit, obc.Correct("bias").batches_limit, obc.Correct("global").batches_limit) == (
        100,
        16,
        None,
    )
    assert obc.Correct("global", lr=0.1).tuning == {"lr": 0.1}
