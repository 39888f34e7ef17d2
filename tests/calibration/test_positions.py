"""``Calibration(positions=…)``: an unbiased estimate of the statistic, marked as one up to the report."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_obc as obc
from lightning_obc.calibration import HessianAccumulator, collect_hessians
from lightning_obc.errors import SpecError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


def images(count: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(count, 3, 6, 6, generator=generator).split(8))


def test_the_statistic_estimates_the_full_one_without_bias() -> None:
    model, batches = network(), images()
    layers = {"conv": model[0], "head": model[3]}
    full = collect_hessians(model, layers, batches)
    drawn = [collect_hessians(model, layers, batches, positions=9, seed=seed) for seed in range(16)]
    scale = full["conv"].full().norm()
    errors = [float((one["conv"].full() - full["conv"].full()).norm() / scale) for one in drawn]
    mean = torch.stack([one["conv"].full() for one in drawn]).mean(0)
    assert all(one["conv"].estimate for one in drawn)
    assert all(one["conv"].samples == full["conv"].samples for one in drawn)
    # 16 independent draws: the error of their mean is a quarter of one's, if nothing is biased.
    assert min(errors) > 0
    assert float((mean - full["conv"].full()).norm() / scale) < 0.5 * sum(errors) / len(errors)
    # The linear layer has one position per sample: nothing to leave out.
    assert not drawn[0]["head"].estimate
    assert torch.equal(drawn[0]["head"].halves, full["head"].halves)


def test_draws_differ_by_layer_and_seed_only() -> None:
    layer, batch = nn.Conv2d(3, 8, 3), images()[0]

    def hessian(name: str, seed: int) -> torch.Tensor:
        statistic = HessianAccumulator(layer, name=name, positions=4, seed=seed)
        statistic.begin_batch(len(batch))
        statistic.update(batch)
        return statistic.finalise().halves

    assert torch.equal(hessian("a", 0), hessian("a", 0))
    assert not torch.equal(hessian("a", 0), hessian("a", 1))
    assert not torch.equal(hessian("a", 0), hessian("b", 0))


def test_merging_with_an_estimate_is_an_estimate() -> None:
    layer, batch = nn.Conv2d(3, 8, 3), images()[0]
    parts = []
    for positions in (None, 4):
        part = HessianAccumulator(layer, positions=positions)
        part.begin_batch(len(batch))
        part.update(batch)
        parts.append(part)
    parts[0].merge(parts[1])
    assert parts[0].finalise().estimate
    assert not HessianAccumulator(layer, positions=4).estimate


@pytest.mark.parametrize("stage", [obc.Prune(0.5), obc.Quantize(4), obc.Prune(0.5, solver="magnitude")], ids=str)
def test_the_report_says_that_errors_are_estimates(stage: obc.Prune | obc.Quantize) -> None:
    report = obc.compress(network(), images(), stage, calibration=obc.Calibration(samples=24, positions=9))
    conv, head = report.stages[0].layers
    assert "errors estimated from sampled positions" in conv.status
    assert "estimated" not in head.status
    assert "errors estimated from sampled positions" in report.table()


def test_sampling_behind_compressed_layers_and_impossible_numbers_are_refused() -> None:
    with pytest.raises(SpecError, match='mode="independent"'):
        obc.Calibration(positions=100, mode="sequential")
    for positions in (0, -1, 2.5, True):
        with pytest.raises(SpecError, match="positions"):
            obc.Calibration(positions=positions)  # type: ignore[arg-type]
