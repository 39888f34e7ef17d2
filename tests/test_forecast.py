"""The plan of a recipe: complete, changes nothing, and its figures follow from what it says."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_obc as obc
from lightning_obc.errors import LayerNotReachedError, PatternError


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.words = nn.Embedding(5, 8)
        self.head, self.unused = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


STAGES = [
    obc.Prune("2:4", layers=["conv", "head"], misfit="skip"),
    obc.Quantize(4, layers=["head"], damping="auto"),
    obc.Correct(),
]


def planned(**options: Any) -> obc.Plan:
    torch.manual_seed(0)
    return obc.plan(Network(), STAGES, torch.randn(4, 3, 6, 6), **options)


def test_everything_with_weights_is_in_the_plan() -> None:
    plan = planned()
    assert [layer.name for layer in plan.stages[0].plan.layers] == ["head"]
    assert list(plan.left_dense) == ["conv", "unused", "words"]
    assert "does not fit" in plan.left_dense["conv"]
    assert plan.left_dense["unused"] == "no stage selects it"
    text = str(plan)
    for word in ("head", "Linear", "1 × 4 × 8", "left dense: conv", "Gflop/s", "Correct"):
        assert word in text
    assert "left dense: 2 layers (no stage selects it): unused, words" in text


def test_nothing_changes() -> None:
    torch.manual_seed(0)
    model = Network()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    obc.plan(model, STAGES[:2], torch.zeros(4, 3, 6, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_times_are_measured_and_scale_with_the_work() -> None:
    plan = planned()
    prune, quantize, correct = plan.stages
    sweep = 2 / 3 * 4 * 8**3
    assert prune.flops == pytest.approx(sweep)
    assert quantize.flops == pytest.approx(11 * sweep)  # all four rows, at five dampings, on both halves
    assert prune.solve_seconds is not None
    assert prune.solve_seconds > 0
    assert plan.speeds["auto"] > 0
    assert prune.calibration_seconds is not None
    assert prune.calibration_seconds > 0
    assert correct.solve_seconds is None
    assert plan.stages[0].plan.statistics_bytes == 2 * 8 * 8 * 8


def test_it_is_plain_data() -> None:
    plan = planned(calibration=obc.Calibration(mode="asymmetric", memory="1 KiB"))
    plain = json.loads(json.dumps(plan.to_dict()))
    assert plain["stages"][0]["layers"][0]["adapter"] == "LinearAdapter"
    assert plain["stages"][0]["statistics_bytes"] == 2048
    assert plain["left_dense"] == dict(plan.left_dense)
    assert "larger alone than the memory limit: head" in str(plan)


def test_what_would_stop_the_run_stops_the_plan() -> None:
    model = Network()
    with pytest.raises(PatternError, match="does not fit"):
        obc.plan(model, obc.Prune("2:4"))
    obc.plan(model, obc.Quantize(4))
    with pytest.raises(LayerNotReachedError, match="unused"):
        obc.plan(model, obc.Quantize(4), torch.randn(2, 3, 6, 6))


def test_other_solvers_are_timed_too() -> None:
    plan = obc.plan(nn.Linear(8, 8), obc.Quantize(4, solver="rtn"))
    assert plan.stages[0].solve_seconds is not None
    assert plan.stages[0].solve_seconds > 0
    assert plan.stages[0].flops == 0
    assert not plan.speeds


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage",
    [obc.Prune("2:4"), obc.Quantize(4), obc.Quantize(4, solver="gptq"), obc.Prune(0.5, damping="auto")],
    ids=lambda stage: f"{stage} {stage.solver} {stage.damping}",
)
def test_the_estimate_is_what_happens_within_a_factor_of_four(stage: Any) -> None:
    """Something else may keep the machine busy during one of the two, so the best of three counts."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(320, 320) for _ in range(2)), nn.Linear(320, 32)), torch.randn(640, 320)
    ratios = []
    for _ in range(3):
        estimate = obc.plan(model, stage).stages[0].solve_seconds
        report = obc.compress(copy.deepcopy(model), x, stage)
        assert estimate is not None
        ratios.append(estimate / sum(layer.seconds for layer in report.stages[0].layers))
        if 1 / 4 < ratios[-1] < 4:
            return
    pytest.fail(f"estimated over measured seconds: {ratios}")
