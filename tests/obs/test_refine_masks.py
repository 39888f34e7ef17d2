"""1-swaps on masks: the tableau against plain inverses, swaps against brute force, patterns and limits kept."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lightning_obc.errors import NotPositiveDefiniteError
from lightning_obc.kernels.masked_refit import masked_refit
from lightning_obc.obs.problem import row_losses
from lightning_obc.obs.refine import masks
from lightning_obc.obs.refine.judge import Deadline
from lightning_obc.obs.refine.masks import MaskState, SwapProblem, swap
from lightning_obc.obs.refine.tableau import SwapState, pivot_block, tableau


def layer(
    groups: int, rows: int, columns: int, kept: float = 0.5, seed: int = 0, column_group: Tensor | None = None
) -> SwapProblem:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, columns, 3 * columns, generator=generator, dtype=torch.float64)
    x = torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64) @ x
    hessian = 2 * x @ x.mT / (3 * columns) + 0.05 * columns * torch.eye(columns, dtype=torch.float64)
    dense = torch.randn(groups, rows, columns, generator=generator)
    mask = torch.rand(groups, rows, columns, generator=generator) < kept
    free = torch.ones_like(mask)
    return SwapProblem(dense, hessian, torch.linalg.inv(hessian), mask, free, column_group)


def losses(problem: SwapProblem, mask: Tensor) -> Tensor:
    best = masked_refit(problem.hessian, problem.dense, mask)
    return row_losses(best - problem.dense.double(), problem.hessian)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_tableau_holds_the_inverse_and_the_schur_complement(share: float) -> None:
    problem = layer(1, 5, 9, share)
    if share in (0.0, 1.0):
        problem.mask.fill_(bool(share))
    which = torch.zeros(5, dtype=torch.int64)
    got = tableau(problem.hessian, problem.inverse, which, problem.mask[0])
    torch.testing.assert_close(got, pivot_block(problem.hessian, which, problem.mask[0]), rtol=1e-8, atol=1e-9)
    for row in range(5):
        kept, gone = problem.mask[0, row].nonzero().flatten(), (~problem.mask[0, row]).nonzero().flatten()
        h, inverse = problem.hessian[0], torch.linalg.inv(problem.hessian[0][kept][:, kept])
        torch.testing.assert_close(got[row][kept][:, kept], -inverse)
        torch.testing.assert_close(got[row][kept][:, gone], inverse @ h[kept][:, gone])
        schur = h[gone][:, gone] - h[gone][:, kept] @ inverse @ h[kept][:, gone]
        torch.testing.assert_close(got[row][gone][:, gone], schur)


def test_flips_equal_a_fresh_tableau() -> None:
    problem = layer(1, 6, 10)
    kept = problem.mask[0]
    dense = problem.dense[0].double()
    which = torch.zeros(6, dtype=torch.int64)
    state = SwapState.start(tableau(problem.hessian, problem.inverse, which, kept), dense, kept, 4)
    generator = torch.Generator().manual_seed(3)
    for _ in range(8):
        chosen = torch.randint(0, 10, (6,), generator=generator)
        moving = torch.rand(6, generator=generator) < 0.7
        state.flip_(chosen, moving)
        base = tableau(problem.hessian, problem.inverse, which, state.kept)
        fresh = SwapState.start(base, dense, state.kept, 4)
        torch.testing.assert_close(state.diagonal, fresh.diagonal)
        torch.testing.assert_close(state.linear, fresh.linear)
        everything = torch.arange(10).expand(6, 10)
        torch.testing.assert_close(state.columns(everything), fresh.base)
        torch.testing.assert_close(state.weight, masked_refit(problem.hessian, problem.dense, state.kept[None])[0])


def best_single_swap(problem: SwapProblem, g: int, r: int) -> float:
    """Loss of the row after the best of all single swaps."""
    kept, gone = (part.nonzero().flatten().tolist() for part in (problem.mask[g, r], ~problem.mask[g, r]))
    group = problem.column_group
    found = []
    for enter, leave in itertools.product(gone, kept):
        if group is not None and group[enter] != group[leave]:
            continue
        trial = problem.mask.clone()
        trial[g, r, enter], trial[g, r, leave] = True, False
        found.append(float(losses(problem, trial)[g, r]))
    return min([*found, float(losses(problem, problem.mask)[g, r])])


@pytest.mark.parametrize("grouped", [False, True])
def test_the_first_swap_is_the_best_one(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "CANDIDATES", 8)
    group = torch.arange(8) // 4 if grouped else None
    problem = layer(2, 4, 8, column_group=group)
    *_, last = swap(problem, swaps=1)
    got = losses(problem, last.mask)
    for g, r in itertools.product(range(2), range(4)):
        assert float(got[g, r]) == pytest.approx(best_single_swap(problem, g, r), rel=1e-9)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kept", [0.15, 0.5, 0.85])
def test_path_never_rises_and_keeps_the_pattern(grouped: bool, kept: float) -> None:
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5]) if grouped else None
    problem = layer(2, 6, 20, kept, column_group=group)
    states = list(swap(problem, swaps=40))
    assert len(states) > 2
    previous = losses(problem, problem.mask)
    first = previous.sum()
    for state in states:
        current = losses(problem, state.mask)
        assert bool((current <= previous * (1 + 1e-9)).all())
        previous = current
        torch.testing.assert_close(state.weight, masked_refit(problem.hessian, problem.dense, state.mask))
        assert torch.equal(state.mask.sum(-1), problem.mask.sum(-1))
        if group is not None:
            per_group = [torch.zeros(2, 6, 6, dtype=torch.int64) for _ in range(2)]
            for counts, mask in zip(per_group, (state.mask, problem.mask), strict=True):
                counts.index_add_(2, group, mask.long())
            assert torch.equal(*per_group)
    assert previous.sum() < first


def test_the_end_of_a_grouped_path_has_no_better_swap() -> None:
    problem = layer(1, 3, 8, column_group=torch.arange(8) // 4)
    *_, last = swap(problem, swaps=100)
    end = SwapProblem(problem.dense, problem.hessian, problem.inverse, last.mask, problem.free, problem.column_group)
    for r in range(3):
        assert best_single_swap(end, 0, r) == pytest.approx(float(losses(end, end.mask)[0, r]), rel=1e-7)


def test_zeros_for_good_never_come_back() -> None:
    problem = layer(1, 6, 20, 0.3)
    problem.free[:] = problem.mask
    problem.free[0, :, :12] = True
    problem.dense[~problem.free] = 0.0
    *_, last = swap(problem, swaps=40)
    assert not bool((last.mask & ~problem.free).any())
    assert not torch.equal(last.mask, problem.mask)


def test_rows_stop_at_their_own_depth() -> None:
    problem = layer(1, 5, 24)
    free = {state.depth: state for state in swap(problem, swaps=8)}
    depth = torch.tensor([[0, 1, 2, 4, 8]])
    *_, last = swap(problem, swaps=8, depth=depth)
    for row, limit in enumerate(depth[0].tolist()):
        reached: MaskState = free[max(mark for mark in free if mark <= limit)]
        assert torch.equal(last.mask[0, row], reached.mask[0, row])


@pytest.mark.parametrize("fill", [True, False])
def test_nothing_to_swap(fill: bool) -> None:
    problem = layer(1, 3, 6)
    problem.mask.fill_(fill)
    states = list(swap(problem, swaps=4))
    assert [state.depth for state in states] == [0]
    assert bool((states[0].mask == fill).all())


def test_small_budgets_and_deadlines() -> None:
    problem = layer(3, 5, 12)
    *_, expected = swap(problem, swaps=8)
    *_, got = swap(problem, swaps=8, memory_budget=1)
    assert torch.equal(got.mask, expected.mask)
    assert [state.depth for state in swap(problem, swaps=8, deadline=Deadline(0.0))] == [0]


def test_depths_on_record() -> None:
    assert masks._marks(1) == [0, 1]
    assert masks._marks(5) == [0, 1, 2, 3, 4, 5]
    assert masks._marks(32) == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32]


def test_indefinite_matrices_are_refused() -> None:
    with pytest.raises(NotPositiveDefiniteError, match="raise damping"):
        pivot_block(-torch.eye(3, dtype=torch.float64)[None], torch.tensor([0]), torch.tensor([[True, True, False]]))


def test_tableau_of_a_badly_scaled_matrix() -> None:
    """Channels of very unequal size, as in transformers: scaling must not cost digits."""
    problem = layer(1, 4, 12)
    size = torch.logspace(-4, 4, 12, dtype=torch.float64)
    hessian = problem.hessian * size[:, None] * size[None, :]
    got = tableau(hessian, torch.linalg.inv(hessian), torch.zeros(4, dtype=torch.int64), problem.mask[0])
    for row in range(4):
        kept = problem.mask[0, row].nonzero().flatten()
        inverse = torch.linalg.inv(problem.hessian[0][kept][:, kept]) / (size[kept][:, None] * size[kept][None, :])
        torch.testing.assert_close(got[row][kept][:, kept], -inverse, rtol=1e-6, atol=0)
