from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_obc.calibration import HessianAccumulator
from lightning_obc.errors import NonFiniteError, ShapeError, UnsupportedLayerError


def filled(layer: nn.Module, seed: int, batch: int = 5, start: int = 0) -> HessianAccumulator:
    statistic = HessianAccumulator(layer, name="layer")
    statistic.begin_batch(batch, start=start)
    statistic.update(torch.randn(batch, 4, 6, 6, generator=torch.Generator().manual_seed(seed)))
    return statistic


@pytest.fixture
def layer() -> nn.Conv2d:
    return nn.Conv2d(4, 6, 3, groups=2)


def test_halves_add_up(layer: nn.Conv2d) -> None:
    hessian = filled(layer, 0).finalise()
    weighted = sum(hessian.half(i) * hessian.samples[i] for i in (0, 1)) / sum(hessian.samples)
    torch.testing.assert_close(hessian.full(), weighted)
    assert torch.equal(hessian.halves, hessian.halves.mT)


def test_merging_equals_one_pass_and_is_associative(layer: nn.Conv2d) -> None:
    parts = [{"seed": seed, "batch": batch, "start": start} for seed, batch, start in ((0, 5, 0), (1, 2, 5), (2, 4, 7))]
    single = HessianAccumulator(layer)
    for part in parts:
        single.begin_batch(part["batch"], start=part["start"])
        generator = torch.Generator().manual_seed(part["seed"])
        single.update(torch.randn(part["batch"], 4, 6, 6, generator=generator))
    left = filled(layer, **parts[0])
    left.merge(filled(layer, **parts[1]))
    left.merge(filled(layer, **parts[2]))
    tail = filled(layer, **parts[1])
    tail.merge(filled(layer, **parts[2]))
    right = filled(layer, **parts[0])
    right.merge(tail)
    for merged in (left, right):
        assert merged.finalise().samples == single.finalise().samples == (6, 5)
        torch.testing.assert_close(merged.finalise().halves, single.finalise().halves, rtol=1e-13, atol=1e-12)
    swapped = filled(layer, **parts[2])
    swapped.merge(filled(layer, **parts[0]))
    other = filled(layer, **parts[0])
    other.merge(filled(layer, **parts[2]))
    assert torch.equal(swapped.finalise().halves, other.finalise().halves)


def test_merging_leaves_the_other_alone_and_refuses_other_layers(layer: nn.Conv2d) -> None:
    other = filled(layer, 1)
    before = other.sums.clone()
    filled(layer, 0).merge(other)
    assert torch.equal(other.sums.nan_to_num(), before.nan_to_num())
    with pytest.raises(ShapeError, match="different layers"):
        filled(layer, 0).merge(HessianAccumulator(nn.Conv2d(4, 6, 3)))


def test_finalise_does_not_end_the_accumulation(layer: nn.Conv2d) -> None:
    statistic = filled(layer, 0)
    first = statistic.finalise()
    kept = first.halves.clone()
    x = torch.randn(2, 4, 6, 6)
    statistic.begin_batch(2, start=5)
    statistic.update(x)
    assert torch.equal(first.halves, kept)
    assert statistic.finalise().samples == (4, 3)


def test_nan_is_refused(layer: nn.Conv2d) -> None:
    statistic = HessianAccumulator(layer, name="stem")
    statistic.begin_batch(2, batch_index=7)
    statistic.update(torch.full((2, 4, 6, 6), torch.nan))
    with pytest.raises(NonFiniteError, match=r"'stem'.*batch 7"):
        statistic.finalise()


def test_modules_without_adapter_are_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="bn"):
        HessianAccumulator(nn.BatchNorm2d(3), name="bn")
