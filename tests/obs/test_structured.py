"""Structured pruning against direct least squares."""

from __future__ import annotations

import pytest
import torch

from lightning_obc import obs
from lightning_obc.obs.problem import prepare, quadratic
from lightning_obc.obs.structured import structured_order
from lightning_obc.specs import Structured


def random_problem(groups: int, rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(groups, columns, 3 * columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    inputs = mixing @ inputs + 0.3 * inputs
    weight = torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64)
    return weight, 2 * inputs @ inputs.mT / (3 * columns)


def best_on_mask(weight: torch.Tensor, hessian: torch.Tensor, kept: torch.Tensor) -> float:
    """Least ``½ Σ Δw H Δw`` of ``[R, d]`` rows that may use the kept columns only."""
    solved = torch.zeros_like(weight)
    if bool(kept.any()):
        solved[:, kept] = torch.linalg.solve(hessian[kept][:, kept], (weight @ hessian)[:, kept].T).T
    return quadratic(solved - weight, hessian)


@pytest.mark.parametrize(("groups", "channels", "positions"), [(1, 5, 1), (1, 4, 3), (2, 3, 2)])
def test_every_step_takes_the_cheapest_channel(groups: int, channels: int, positions: int) -> None:
    weight, hessian = random_problem(groups, 3, channels * positions)
    problem = prepare(weight, hessian, 0.0)
    order, losses = structured_order(problem, channels, groups * channels)
    kept = torch.ones(groups, positions, channels, dtype=torch.bool)
    total = 0.0
    for (group, channel), loss in zip(order.tolist(), losses.tolist(), strict=True):
        candidates = {}
        for g in range(groups):
            for c in range(channels):
                if kept[g, 0, c]:
                    without = kept[g].clone()
                    without[:, c] = False
                    before = best_on_mask(weight[g], hessian[g], kept[g].flatten())
                    candidates[g, c] = best_on_mask(weight[g], hessian[g], without.flatten()) - before
        assert (group, channel) == min(candidates, key=candidates.__getitem__)
        assert loss == pytest.approx(candidates[group, channel], rel=1e-8)
        kept[group, :, channel] = False
        total += loss
    assert total == pytest.approx(quadratic(weight, hessian), rel=1e-8)


def reinverting_order(weight: torch.Tensor, hessian: torch.Tensor, channels: int) -> tuple[list[int], list[float]]:
    """Greedy channels of one problem, with the inverse of what is left computed anew at every step."""
    alive, order, losses = torch.ones(len(hessian), dtype=torch.bool), [], []
    members = torch.arange(len(hessian)).reshape(-1, channels).T
    current = weight.double().clone()
    while len(order) < channels:
        left = alive.nonzero().flatten()
        inverse = torch.zeros_like(hessian)
        inverse[left[:, None], left] = torch.linalg.inv(hessian[left][:, left])
        steps = {
            c: torch.linalg.solve(inverse[members[c]][:, members[c]], current[:, members[c]].T)
            for c in range(channels)
            if c not in order
        }
        costs = {c: float((step * current[:, members[c]].T).sum()) / 2 for c, step in steps.items()}
        best = min(costs, key=costs.__getitem__)
        current -= (inverse[:, members[best]] @ steps[best]).T
        alive[members[best]] = False
        order.append(best)
        losses.append(costs[best])
    return order, losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "channels", "positions"), [(1, 1, 1), (5, 63, 1), (2, 65, 2), (3, 21, 9)])
def test_ragged_shapes_agree_with_inverses_computed_anew(
    rows: int, channels: int, positions: int, dtype: torch.dtype
) -> None:
    weight, hessian = random_problem(1, rows, channels * positions, seed=4)
    problem = prepare(weight.to(dtype), hessian, 1e-2)
    order, losses = structured_order(problem, channels, channels)
    expected, costs = reinverting_order(problem.weight[0], problem.damped[0], channels)
    assert order[:, 1].tolist() == expected
    assert losses.tolist() == pytest.approx(costs, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_structured_solution(dtype: torch.dtype) -> None:
    weight, hessian = random_problem(1, 6, 24)
    solution = obs.prune(weight[0].to(dtype), hessian[0], Structured(0.5), channels=8)
    by_channel = solution.mask.reshape(6, 3, 8)
    assert int((~by_channel).all(0).all(0).sum()) == 4
    assert bool((by_channel == by_channel[:1, :1]).all())
    assert solution.weight.dtype == dtype
    assert bool((solution.weight[~solution.mask] == 0).all())
    kept = solution.mask[0]
    damped = hessian[0] + 0.01 * hessian[0].diagonal().mean() * torch.eye(24, dtype=torch.float64)
    expected = best_on_mask(weight[0], damped, kept)
    assert solution.loss + solution.damping_loss == pytest.approx(expected, rel=1e-5)


def test_zero_sparsity_changes_nothing() -> None:
    weight, hessian = random_problem(1, 3, 8)
    solution = obs.prune(weight[0], hessian[0], Structured(0.0))
    assert torch.equal(solution.weight, weight[0])
    assert solution.loss == 0
