"""The sweep over blocks: against one row and one block at a time, least squares, and the sweep over single columns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_obc import obs
from lightning_obc.errors import PatternError
from lightning_obc.kernels.obs_sweep import ColumnBlocks, SweepInput, sweep_blocks, sweep_prune
from lightning_obc.obs.block_sweep import block_members
from lightning_obc.obs.problem import quadratic
from lightning_obc.specs import Block, Prune


def make(groups: int, rows: int, columns: int, seed: int = 0, zeros: float = 0.0) -> SweepInput:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(groups, columns, 2 * columns + 8, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    inputs = torch.relu(inputs + mixing @ inputs)
    hessian = 2 * inputs @ inputs.mT / inputs.shape[-1]
    hessian += 0.01 * hessian.diagonal(dim1=1, dim2=2).mean() * torch.eye(columns, dtype=torch.float64)
    weight = torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64)
    keep = torch.rand(weight.shape, generator=generator) >= zeros if zeros else None
    weight = weight if keep is None else torch.where(keep, weight, 0.0)
    return SweepInput(weight, torch.linalg.inv(hessian), hessian, keep)


@pytest.mark.parametrize(
    ("groups", "rows", "channels", "positions", "size", "zeros"),
    [
        (1, 1, 4, 1, 4, 0.0),
        (1, 3, 12, 1, 4, 0.0),
        (2, 3, 8, 3, 4, 0.0),
        (1, 5, 96, 2, 4, 0.0),
        (3, 2, 10, 1, 5, 0.3),
        (1, 4, 7, 3, 4, 0.0),
        (1, 4, 7, 3, 4, 0.4),
        (2, 2, 18, 2, 9, 0.2),
        (5, 1, 1, 9, 1, 0.0),
        (1, 6, 65, 1, 2, 0.0),
    ],
)
def test_panels_agree_with_the_oracle(
    groups: int, rows: int, channels: int, positions: int, size: int, zeros: float
) -> None:
    problem = make(groups, rows, channels * positions, zeros=zeros)
    blocks = ColumnBlocks(block_members(channels * positions, channels, size, torch.device("cpu")))
    fast, slow = sweep_blocks(problem, blocks, backend="torch"), sweep_blocks(problem, blocks, backend="naive")
    assert torch.equal(fast.order, slow.order)
    torch.testing.assert_close(fast.losses, slow.losses, rtol=1e-8, atol=1e-10)
    assert not fast.any_broken
    total = sum(quadratic(problem.weight[g], problem.hessian[g]) for g in range(groups))
    assert float(fast.losses.sum()) == pytest.approx(total, rel=1e-9)


def test_small_chunks_change_nothing() -> None:
    problem = make(2, 5, 24)
    blocks = ColumnBlocks(block_members(24, 24, 4, torch.device("cpu")))
    whole, parts = sweep_blocks(problem, blocks), sweep_blocks(problem, blocks, memory_budget=1)
    assert torch.equal(whole.order, parts.order)
    torch.testing.assert_close(whole.losses, parts.losses, rtol=1e-10, atol=0)


def test_blocks_of_one_are_the_sweep_over_columns() -> None:
    problem = make(1, 4, 40)
    blocks = sweep_blocks(problem, ColumnBlocks(torch.arange(40)[:, None]))
    columns = sweep_prune(problem, backend="naive")
    assert torch.equal(blocks.order, columns.order)
    torch.testing.assert_close(blocks.losses, columns.losses, rtol=1e-8, atol=1e-12)


def test_every_loss_is_the_least_squares_increase() -> None:
    problem = make(1, 2, 12)
    members = block_members(12, 6, 3, torch.device("cpu"))
    output = sweep_blocks(problem, ColumnBlocks(members))
    for row in range(2):
        kept, before = torch.ones(12, dtype=torch.bool), 0.0
        for block, loss in zip(output.order[0, row].tolist(), output.losses[0, row].tolist(), strict=True):
            kept[members[block]] = False
            after = best_on(problem.weight[0, row], problem.hessian[0], kept)
            assert loss == pytest.approx(after - before, rel=1e-7, abs=1e-10)
            before = after


def best_on(weight: Tensor, hessian: Tensor, kept: Tensor) -> float:
    solved = torch.zeros_like(weight)
    if bool(kept.any()):
        solved[kept] = torch.linalg.solve(hessian[kept][:, kept], (hessian @ weight)[kept])
    return quadratic((solved - weight)[None], hessian)


def test_a_matrix_that_is_not_positive_definite_is_flagged() -> None:
    problem = make(1, 2, 8)
    bad = SweepInput(problem.weight, -problem.inverse, problem.hessian)
    assert sweep_blocks(bad, ColumnBlocks(block_members(8, 8, 4, torch.device("cpu")))).broken.all()


@pytest.mark.parametrize("selection", ["heap", "sorted", "hull"])
@pytest.mark.parametrize("backend", ["auto", "naive"])
def test_block_pruning(selection: str, backend: str) -> None:
    problem = make(1, 6, 48, seed=3)
    weight = problem.weight[0].float()
    solution = obs.prune(weight, problem.hessian[0], Block(4, 0.5), channels=16, selection=selection, backend=backend)
    whole = solution.mask.reshape(6, 12, 4)
    assert bool((whole.all(-1) | ~whole.any(-1)).all())
    assert int((~whole.any(-1)).sum()) == 36
    assert bool((solution.weight[~solution.mask] == 0).all())
    magnitude = torch.topk(weight.reshape(6, 12, 4).square().sum(-1).flatten(), 36).values.min()
    kept = (weight.reshape(6, 12, 4).square().sum(-1) >= magnitude)[..., None].expand(6, 12, 4).reshape(6, 48)
    naive = sum(best_on(weight[r].double(), problem.hessian[0], kept[r]) for r in range(6))
    assert solution.loss < naive


def test_existing_zeros_count_and_stay() -> None:
    problem = make(1, 4, 24, seed=5)
    weight = problem.weight[0].clone()
    weight[:, :4] = 0.0
    weight[:, 10] = 0.0
    solution = obs.prune(weight, problem.hessian[0], Block(4, 0.5))
    assert not solution.mask[:, :4].any()
    assert not solution.mask[:, 10].any()
    assert int((~solution.mask.reshape(4, 6, 4).any(-1)).sum()) == 12


def test_short_blocks_are_an_error_or_padded() -> None:
    problem = make(1, 2, 14)
    with pytest.raises(PatternError, match="7 input channels"):
        obs.prune(problem.weight[0], problem.hessian[0], Block(4, 0.5), channels=7)
    solution = obs.prune(problem.weight[0], problem.hessian[0], Block(4, 0.5), channels=7, misfit="pad")
    runs = [solution.mask[:, start:stop] for start, stop in ((0, 4), (4, 7), (7, 11), (11, 14))]
    assert all(bool((run.all(1) | ~run.any(1)).all()) for run in runs)
    assert sum(int((~run.any(1)).sum()) for run in runs) == 4
    assert "padded" in str(solution.status)


def test_a_stage_takes_the_pattern() -> None:
    import lightning_obc as obc

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    obc.compress(model, [torch.randn(64, 16)], Prune(Block(4, 0.5)))
    blocks = model[0].weight.detach().reshape(8, 4, 4)
    assert int((blocks == 0).all(-1).sum()) == 16
