"""Coordinate descent on codes: against a loop over single weights, never worse, fixed points, limits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lightning_obc import baselines, obs
from lightning_obc.grid_fitting import fit_grid
from lightning_obc.grids import Grid
from lightning_obc.obs.orders import column_order_codes
from lightning_obc.obs.problem import row_losses
from lightning_obc.obs.refine.codes import CodesState, better_of, descend
from lightning_obc.obs.refine.judge import Deadline
from lightning_obc.solvers import Refine
from lightning_obc.specs import IntGrid

SPECS = [
    IntGrid(3),
    IntGrid(2, symmetric=True),
    IntGrid(3, granularity="tensor"),
    IntGrid(2, granularity="group", group_size=4),
]


def problem(groups: int, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, columns, 3 * columns, generator=generator, dtype=torch.float64)
    x = torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64) @ x
    hessian = 2 * x @ x.mT / (3 * columns)
    hessian += 0.01 * torch.eye(columns, dtype=torch.float64)
    return torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64), hessian


def start(weight: Tensor, spec: IntGrid) -> tuple[Grid, Tensor]:
    grid = fit_grid(weight, spec)
    return grid, grid.encode(weight)


def one_sweep_by_hand(weight: Tensor, hessian: Tensor, grid: Grid, codes: Tensor) -> Tensor:
    """Every weight in turn to the grid point of least loss, found by trying all of them."""
    codes = codes.clone()
    for g in range(weight.shape[0]):
        for r in range(weight.shape[1]):
            for column in range(weight.shape[2]):
                losses = []
                for code in range(grid.max_code + 1):
                    codes_now = codes.clone()
                    codes_now[g, r, column] = code
                    delta = (grid.dequantize(codes_now) - weight)[g, r]
                    losses.append(float(delta @ hessian[g] @ delta))
                best = min(range(len(losses)), key=losses.__getitem__)
                if losses[best] < losses[int(codes[g, r, column])] * (1 - 1e-12):
                    codes[g, r, column] = best
    return codes


@pytest.mark.parametrize(("groups", "rows", "columns"), [(1, 4, 11), (3, 2, 5), (1, 1, 1), (1, 2, 70)])
def test_first_sweep_equals_trying_every_grid_point(groups: int, rows: int, columns: int) -> None:
    weight, hessian = problem(groups, rows, columns)
    grid, codes = start(weight, IntGrid(2))
    states = list(descend(weight, hessian, grid, codes, sweeps=1))
    assert torch.equal(states[0].codes, codes)
    assert torch.equal(states[-1].codes, one_sweep_by_hand(weight, hessian, grid, codes))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_loss_never_rises_along_the_path(spec: IntGrid) -> None:
    weight, hessian = problem(2, 6, 16)
    grid, codes = start(weight, spec)
    losses = [row_losses(state.weight - weight, hessian) for state in descend(weight, hessian, grid, codes)]
    if spec.granularity == "tensor":
        losses = [loss.sum() for loss in losses]
    assert len(losses) > 2
    for before, after in itertools.pairwise(losses):
        assert bool((after <= before * (1 + 1e-12)).all())
    assert losses[-1].sum() < 0.9 * losses[0].sum()


def test_the_end_of_the_path_is_a_fixed_point() -> None:
    weight, hessian = problem(1, 5, 12)
    grid, codes = start(weight, IntGrid(3))
    *_, last = descend(weight, hessian, grid, codes, sweeps=200)
    assert torch.equal(one_sweep_by_hand(weight, hessian, last.grid, last.codes), last.codes)
    assert len(list(descend(weight, hessian, last.grid, last.codes))) <= 2


def test_masked_codes_stay_on_the_zero_point() -> None:
    weight, hessian = problem(2, 6, 16)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    grid, codes = start(weight * keep, IntGrid(3))
    for state in descend(weight * keep, hessian, grid, codes, keep=keep):
        gone = state.weight[~keep]
        assert torch.equal(gone, torch.zeros_like(gone))
        assert not torch.signbit(gone).any()


def test_rows_stop_at_their_own_depth() -> None:
    weight, hessian = problem(1, 5, 24)
    grid, codes = start(weight, IntGrid(3))
    free = {state.depth: state for state in descend(weight, hessian, grid, codes)}
    depth = torch.tensor([[0, 1, 2, 3, 99]])
    *_, last = descend(weight, hessian, grid, codes, depth=depth)
    for row, limit in enumerate(depth[0].tolist()):
        expected = free[min(limit, max(free))]
        assert torch.equal(last.codes[0, row], expected.codes[0, row])
        assert torch.equal(last.grid.scale[0, row], expected.grid.scale[0, row])


def test_no_sweep_starts_after_the_deadline() -> None:
    weight, hessian = problem(1, 5, 24)
    grid, codes = start(weight, IntGrid(3))
    deadline = Deadline(0.0)
    assert [state.depth for state in descend(weight, hessian, grid, codes, deadline=deadline)] == [0]
    assert deadline.hit


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_row_has_the_better_of_two_starts(spec: IntGrid) -> None:
    weight, hessian = problem(2, 6, 16)
    grid, codes = start(weight, spec)
    one = CodesState(3, grid, codes)
    layer = obs.prepare(weight, hessian, 0.0)
    two = CodesState(9, grid, column_order_codes(layer, grid, None, act_order=True)[0])
    everywhere = torch.ones(2, 6, dtype=torch.bool)
    best = better_of(one, two, weight, hessian, everywhere)
    losses = [row_losses(state.weight - weight, hessian) for state in (one, two, best)]
    if spec.granularity == "tensor":
        losses = [loss.sum() for loss in losses]
    assert best.depth == 4
    torch.testing.assert_close(losses[2], torch.minimum(losses[0], losses[1]))
    nowhere = better_of(one, two, weight, hessian, ~everywhere)
    assert torch.equal(nowhere.codes, one.codes)


def test_the_second_start_is_gptq_in_activation_order() -> None:
    weight, hessian = problem(2, 4, 12)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    expected = baselines.gptq(weight * keep, hessian, 3, mask=keep, damping=0.02, act_order=True)
    layer = obs.prepare(weight * keep, hessian, 0.02)
    grid = fit_grid(weight * keep, IntGrid(3))
    assert expected.codes is not None
    assert torch.equal(column_order_codes(layer, grid, keep, act_order=True)[0], expected.codes)


def test_the_second_start_helps_where_few_columns_matter() -> None:
    """Columns of very unequal weight: the greedy order leaves the important ones to the end."""
    weight, hessian = problem(1, 16, 24)
    size = torch.logspace(-2, 2, 24, dtype=torch.float64)
    hessian = hessian * size[:, None] * size[None, :]
    one, both = (obs.quantize(weight, hessian, 4, refine=Refine(restart=flag)) for flag in (False, True))
    assert both.loss + both.damping_loss < 0.99 * (one.loss + one.damping_loss)
