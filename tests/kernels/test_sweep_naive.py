"""The oracle against brute force: enumeration of supports and least squares, for problems small enough."""

from __future__ import annotations

import itertools

import pytest
import torch
from sweep_cases import MODES, Mode, direct_loss, make_grid, make_groups, make_problem

from lightning_obc.kernels.obs_sweep import SweepInput, sweep_prune, sweep_quantize


def optimum(problem: SweepInput, row: int, fixed: dict[int, float]) -> float:
    """Least damped loss of a row whose weights in ``fixed`` take those values, by solving for the others."""
    hessian, dense = problem.hessian[0], problem.weight[0, row].double()
    free = [c for c in range(len(dense)) if c not in fixed]
    step = torch.zeros_like(dense)
    for column, value in fixed.items():
        step[column] = value - dense[column]
    if free:
        step[free] = torch.linalg.solve(hessian[free][:, free], -(hessian @ step)[free])
    return (step @ hessian @ step / 2).item()


@pytest.mark.parametrize("seed", range(4))
def test_every_prefix_costs_the_least_squares_optimum_of_its_support(seed: int) -> None:
    problem = make_problem(1, 3, 7, seed=seed)
    out = sweep_prune(problem, backend="naive")
    for row in range(3):
        for k in range(1, 8):
            gone = dict.fromkeys(out.order[0, row, :k].tolist(), 0.0)
            assert out.losses[0, row, :k].sum().item() == pytest.approx(optimum(problem, row, gone), rel=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_every_step_takes_the_cheapest_next_column(seed: int) -> None:
    problem = make_problem(1, 2, 8, seed=seed)
    out = sweep_prune(problem, backend="naive")
    for row in range(2):
        for k in range(8):
            gone = dict.fromkeys(out.order[0, row, :k].tolist(), 0.0)
            cost = {c: optimum(problem, row, {**gone, c: 0.0}) for c in range(8) if c not in gone}
            assert out.order[0, row, k] == min(cost, key=cost.__getitem__)


def test_greedy_is_never_below_the_best_support_of_its_size() -> None:
    problem = make_problem(1, 4, 8, seed=5)
    out = sweep_prune(problem, backend="naive")
    for row in range(4):
        for k in (1, 3, 5):
            best = min(optimum(problem, row, dict.fromkeys(s, 0.0)) for s in itertools.combinations(range(8), k))
            total = out.losses[0, row, :k].sum().item()
            assert total >= best - 1e-12
            if k == 1:
                assert total == pytest.approx(best, rel=1e-10)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_groups_lose_their_quota_at_the_cheapest_open_column(kept: int) -> None:
    problem = make_problem(1, 3, 8, seed=2)
    out = sweep_prune(problem, groups=make_groups(8, kept, 4), backend="naive")
    assert out.order.shape[2] == 2 * (4 - kept)
    for row in range(3):
        zeros = [0, 0]
        gone: dict[int, float] = {}
        for column in out.order[0, row].tolist():
            open_columns = [c for c in range(8) if c not in gone and zeros[c // 4] < 4 - kept]
            cost = {c: optimum(problem, row, {**gone, c: 0.0}) for c in open_columns}
            assert column == min(cost, key=cost.__getitem__)
            gone[column] = 0.0
            zeros[column // 4] += 1
        assert zeros == [4 - kept] * 2
        assert out.losses[0, row].sum().item() == pytest.approx(optimum(problem, row, gone), rel=1e-10)


def test_quantization_follows_the_optimal_weights_and_the_outlier_rule() -> None:
    problem = make_problem(1, 4, 7, seed=3)
    grid = make_grid(problem.weight, 3, False)
    out = sweep_quantize(problem, grid, backend="naive")
    assert out.codes is not None
    outliers = 0
    for row in range(4):
        scale, zero = grid.scale[0, row, 0].item(), grid.zero_point[0, row, 0].item()
        fixed: dict[int, float] = {}
        for column in out.order[0, row].tolist():
            weight = current_weights(problem, row, fixed)
            raw = torch.round(weight / scale) + zero
            target = (raw.clamp(0, 7) - zero) * scale
            error = (weight - target).abs()
            far = {c: error[c].item() for c in weights_left(fixed) if raw[c] != raw[c].clamp(0, 7)}
            far = {c: e for c, e in far.items() if e > 0.5 * scale * (1 + 1e-5)}
            outliers += bool(far)
            cost = {c: optimum(problem, row, {**fixed, c: target[c].item()}) for c in weights_left(fixed)}
            assert column == (max(far, key=far.__getitem__) if far else min(cost, key=cost.__getitem__))
            fixed[column] = target[column].item()
            assert out.codes[0, row, column].item() == raw[column].clamp(0, 7).item()
    assert outliers > 0


def weights_left(fixed: dict[int, float]) -> list[int]:
    return [c for c in range(7) if c not in fixed]


def current_weights(problem: SweepInput, row: int, fixed: dict[int, float]) -> torch.Tensor:
    """The row's optimal weights with some of them fixed."""
    hessian, dense = problem.hessian[0], problem.weight[0, row].double()
    step = torch.zeros_like(dense)
    for column, value in fixed.items():
        step[column] = value - dense[column]
    free = weights_left(fixed)
    step[free] = torch.linalg.solve(hessian[free][:, free], -(hessian @ step)[free])
    return dense + step


@pytest.mark.parametrize("keep", [None, 0.7])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_summed_losses_equal_the_direct_damped_loss(mode: Mode, keep: float | None) -> None:
    problem = make_problem(2, 3, 24, keep=keep)
    out = mode.run(problem, "naive")
    torch.testing.assert_close(out.losses.sum(-1), direct_loss(problem, out, mode), rtol=1e-9, atol=1e-12)
