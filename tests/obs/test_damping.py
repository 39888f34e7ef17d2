"""Damping chosen by the two halves of the calibration samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_obc import obs
from lightning_obc.errors import NotPositiveDefiniteError, SpecError
from lightning_obc.hessian import Hessian
from lightning_obc.obs.damping import CANDIDATES, choose_damping, resolve_damping, sample_rows, with_damping
from lightning_obc.obs.solution import LayerSolution


def statistic(columns: int, samples: int, seed: int = 0, groups: int = 1) -> tuple[Hessian, Tensor]:
    """Two halves, and the Hessian of many other samples of the same kind."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64)

    def draw(count: int) -> Tensor:
        x = mixing @ torch.randn(groups, columns, count, generator=generator, dtype=torch.float64)
        return x @ x.mT

    halves = torch.stack([draw(samples), draw(samples)])
    return Hessian(halves, (samples, samples)), 2 * draw(5000) / 5000


def held_out(solution: LayerSolution, weight: Tensor, hessian: Tensor) -> tuple[float, float]:
    delta, dense = solution.weight.double() - weight.double(), weight.double()
    return float(((delta @ hessian) * delta).sum()), float(((dense @ hessian) * dense).sum())


@pytest.mark.parametrize("what", ["2:4", 3])
def test_the_choice_is_the_best_of_all_candidates(what: str | int) -> None:
    hessian, _ = statistic(16, 20)
    weight = torch.randn(10, 16, generator=torch.Generator().manual_seed(1))
    scores = {}
    for damping in CANDIDATES:
        errors = [0.0, 0.0]
        for fit, judge in ((0, 1), (1, 0)):
            half = hessian.half(fit)[0]
            if isinstance(what, str):
                solution = obs.prune(weight, half, what, damping=damping)
            else:
                solution = obs.quantize(weight, half, what, damping=damping)
            pair = held_out(solution, weight, hessian.half(judge)[0])
            errors = [a + b for a, b in zip(errors, pair, strict=True)]
        scores[damping] = errors[0] / errors[1]
    if isinstance(what, str):
        chosen = obs.prune(weight, hessian, what, damping="auto")
    else:
        chosen = obs.quantize(weight, hessian, what, damping="auto")
    best = min(scores, key=scores.__getitem__)
    assert chosen.status.damping == pytest.approx(best)
    assert chosen.status.held_out == pytest.approx(scores[best], rel=1e-6)
    by_hand = obs.prune if isinstance(what, str) else obs.quantize
    assert torch.equal(chosen.weight, by_hand(weight, hessian, what, damping=best).weight)  # type: ignore[arg-type]


def test_few_samples_ask_for_more_damping_and_it_helps_on_new_samples() -> None:
    weight = torch.randn(32, 24, generator=torch.Generator().manual_seed(2))
    few, truth = statistic(24, 12)
    many, _ = statistic(24, 2000)
    chosen_few, chosen_many = (obs.prune(weight, h, "2:4", damping="auto") for h in (few, many))
    assert chosen_few.status.damping > chosen_many.status.damping
    little = obs.prune(weight, few, "2:4", damping=1e-3)
    assert held_out(chosen_few, weight, truth[0])[0] < held_out(little, weight, truth[0])[0]


def test_rows_are_sampled_evenly() -> None:
    rows = torch.arange(100.0)[None, :, None].expand(1, 100, 3)
    sampled = sample_rows(rows)
    assert sampled.shape == (1, 32, 3)
    assert float(sampled[0, 0, 0]) == 0
    assert float(sampled[0, -1, 0]) == 99
    assert int(sampled[0, :, 0].diff().max()) <= 4
    assert sample_rows(torch.zeros(64, 5, 2)).shape == (64, 1, 2)
    assert sample_rows(torch.zeros(8, 3, 2)).shape == (8, 3, 2)
    assert sample_rows(torch.zeros(1, 7, 2)).shape == (1, 7, 2)


def test_masks_are_sampled_with_their_rows() -> None:
    hessian, _ = statistic(8, 40)
    weight = torch.randn(90, 8, generator=torch.Generator().manual_seed(2))
    mask = torch.rand(90, 8, generator=torch.Generator().manual_seed(3)) < 0.5
    solution = obs.quantize(weight * mask, hessian, 3, mask=mask, damping="auto")
    assert not bool((solution.weight[~mask] != 0).any())
    assert solution.status.held_out is not None


def test_a_damping_that_fails_is_not_chosen() -> None:
    hessian, _ = statistic(6, 20)
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))

    def solve(rows: Tensor, half: Tensor, damping: float) -> LayerSolution:
        if damping < 0.1:
            raise NotPositiveDefiniteError("too little damping")
        return obs.prune(rows, half, 0.5, damping=damping)

    damping, error = choose_damping(weight, hessian, solve)
    assert damping >= 0.1
    assert error is not None
    assert with_damping(weight, hessian, "auto", solve).status.damping == pytest.approx(damping)


@pytest.mark.parametrize("bad", [-0.1, float("inf"), float("nan"), "Auto"])
def test_impossible_dampings_are_named(bad: float) -> None:
    hessian, _ = statistic(6, 20)
    with pytest.raises(SpecError, match="damping"):
        resolve_damping(torch.randn(4, 6), hessian, bad, lambda *_: pytest.fail("not solved"))


def test_groups_share_one_choice() -> None:
    hessian, _ = statistic(9, 12, groups=5)
    weight = torch.randn(5, 2, 9, generator=torch.Generator().manual_seed(2))
    solution = obs.prune(weight, hessian, 0.5, damping="auto")
    assert solution.status.damping in [pytest.approx(value) for value in CANDIDATES]
    assert solution.weight.shape == weight.shape
