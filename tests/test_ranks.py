"""Several ranks that compress one model together agree with one process; ranks are threads here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from thread_ranks import run_ranks
from torch import Tensor, nn

import lightning_obc as obc
from lightning_obc import shared_rows


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Linear(8 * 16, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.wide(x.flatten(1))))


def network() -> Net:
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(64, 3, 4, 4))
    return net


def images(samples: int = 90) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 1, 4, 4, generator=generator) + 0.7 * torch.randn(samples, 3, 4, 4, generator=generator)


def compressed(stages: Any, ranks: Any = None, **options: Any) -> tuple[Any, Net]:
    net = options.pop("model", None) or network()
    report = obc.compress(net, options.pop("data", images()), stages, ranks=ranks, **options)
    return report, net


def check_agreement(stages: Any, size: int, **options: Any) -> list[Any]:
    """Every rank has the same bits, and what one process alone gets."""
    alone, net = compressed(stages, **options)
    found = run_ranks(size, lambda ranks: compressed(stages, ranks, **options))
    for result in found:
        if isinstance(result, BaseException):
            raise result
    states = [result[1].state_dict() for result in found]
    for key, value in net.state_dict().items():
        assert all(torch.equal(state[key], states[0][key]) for state in states), key
        same = ((value == 0) == (states[0][key] == 0)).double().mean()
        assert same >= 0.999
        torch.testing.assert_close(states[0][key], value, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(alone.stages, found[0][0].stages, strict=True):
        assert theirs.samples == mine.samples
        for one, other in zip(mine.layers, theirs.layers, strict=True):
            assert other.loss == pytest.approx(one.loss, rel=1e-4)
            assert other.status == one.status
            assert other.held_out == (one.held_out if one.held_out is None else pytest.approx(one.held_out, rel=1e-4))
    return [result[0] for result in found]


EIGHT = obc.Calibration(batch_size=8)
RECIPES: dict[str, tuple[list[Any], obc.Calibration]] = {
    "independent": ([obc.Prune(0.6, damping="auto"), obc.Quantize(4, refine=True)], EIGHT),
    "memory": ([obc.Prune("2:4", layers=["wide", "head"])], obc.Calibration(batch_size=8, memory="300 KiB")),
    "sequential": ([obc.Quantize(3)], obc.Calibration(batch_size=8, mode="sequential", bias=True)),
    "asymmetric": ([obc.Prune(0.5)], obc.Calibration(batch_size=8, mode="asymmetric", together="all")),
    "batch norm": ([obc.Prune(0.5), obc.Correct("batch_norm")], EIGHT),
    "statistics": ([obc.Prune(0.7), obc.Correct("statistics"), obc.Correct("bias")], EIGHT),
    "tuning": ([obc.Prune(0.7), obc.Correct("global", lr=1e-3, epochs=3)], EIGHT),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_ranks_agree_with_one_process(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_rows, "LEAST_FLOPS", 1e6)
    monkeypatch.setattr("lightning_obc.team.LEAST_FLOPS", 1e6)
    stages, calibration = RECIPES[recipe]
    check_agreement(stages, 3, calibration=calibration)
