"""The two halves judge: depths, reliability, deadlines, and what the solution reports."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_obc import obs
from lightning_obc.errors import NotPositiveDefiniteError, SpecError
from lightning_obc.hessian import Hessian
from lightning_obc.obs.problem import row_losses
from lightning_obc.obs.refine import GreedyMask, refine_mask
from lightning_obc.obs.refine.judge import Deadline, Judgement, expected_change, judge
from lightning_obc.solvers import Refine
from lightning_obc.specs import NM, Block, IntGrid, Pattern, Structured, Unstructured


def statistic(columns: int, samples: int, seed: int = 0, groups: int = 1) -> Hessian:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64)
    halves = [mixing @ torch.randn(groups, columns, samples, generator=generator).double() for _ in range(2)]
    return Hessian(torch.stack([half @ half.mT for half in halves]), (samples, samples))


def test_cancellation_is_no_gain_above_the_whole_error() -> None:
    depth = torch.zeros(1, 1, dtype=torch.int64)
    assert Judgement(depth, held_out=-1e-18, greedy=1e-16).gain == 1.0
    assert Judgement(depth, held_out=1e-17, greedy=1e-16).gain == pytest.approx(0.9)


def test_depth_is_where_the_other_half_is_best() -> None:
    hessian = Hessian(
        torch.eye(2, dtype=torch.float64).expand(2, 1, 2, 2) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), (1, 1)
    )
    weight = torch.zeros(1, 3, 2)

    def path(half: Tensor, deadline: Deadline) -> list[tuple[int, Tensor]]:
        errors = torch.tensor([[3.0, 3.0, 3.0], [2.0, 4.0, 2.0], [1.0, 5.0, 4.0]])
        return [(depth, error.view(1, 3, 1).expand(1, 3, 2)) for depth, error in zip((0, 2, 5), errors, strict=True)]

    verdict = judge(weight, hessian, path, Deadline(None))
    assert verdict.depth.tolist() == [[5, 0, 2]]
    assert verdict.greedy / verdict.held_out == pytest.approx(27 / (1 + 9 + 4))
    together = judge(weight, hessian, path, Deadline(None), coupled=True)
    assert together.depth.tolist() == [[2, 2, 2]]
    assert together.gain == pytest.approx(1 - 24 / 27)


def test_a_path_that_ends_early_keeps_its_last_state() -> None:
    hessian = Hessian(
        torch.eye(1, dtype=torch.float64).expand(2, 1, 1, 1) * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1), (1, 1)
    )

    def path(half: Tensor, deadline: Deadline) -> list[tuple[int, Tensor]]:
        errors = (3.0, 1.0) if float(half) < 3 else (3.0, 2.0, 1.0)
        return [(depth, torch.tensor([[[error]]])) for depth, error in enumerate(errors)]

    verdict = judge(torch.zeros(1, 1, 1), hessian, path, Deadline(None))
    assert verdict.depth.tolist() == [[2]]


def test_reliable_rows_decide_for_themselves_and_noise_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(1, 500, generator=generator, dtype=torch.float64) * 0.1 - 0.02
    before = torch.ones(1, 500, dtype=torch.float64)

    def table(noise: float) -> Tensor:
        extra = noise * torch.randn(1, 500, generator=generator, dtype=torch.float64)
        return torch.stack([before, before + change + extra])

    own = expected_change(table(0.0), table(0.0))
    torch.testing.assert_close(own[1], change)
    shuffled = change[:, torch.randperm(500, generator=generator)]
    noise = torch.stack([before, before + shuffled])
    layer = expected_change(table(0.0), noise)[1]
    assert float(layer.std()) < 0.02
    assert float(layer.mean()) == pytest.approx(float(change.mean()), abs=1e-6)
    some = expected_change(table(0.1), table(0.1))[1]
    slope = float(((some - some.mean()) * (change - change.mean())).mean() / change.var())
    # Signal and noise have the same variance in one direction, so the mean of two is 2/3 reliable.
    assert slope == pytest.approx(2 / 3, abs=0.1)


def test_rows_that_are_exact_do_not_count() -> None:
    before = torch.tensor([[1.0, 0.0, 2.0]], dtype=torch.float64)
    table = torch.stack([before, before * 0.5])
    assert torch.equal(expected_change(table, table)[1, :, [0, 2]], torch.full((1, 2), -0.5, dtype=torch.float64))
    assert torch.equal(expected_change(0 * table, 0 * table), torch.zeros(2, 1, 3, dtype=torch.float64))


CASES: list[object] = [Unstructured(0.6), NM(2, 4), 3, IntGrid(3, granularity="tensor"), IntGrid(2, scale="hessian")]


def solve(what: object, weight: Tensor, hessian: Hessian | Tensor, **options: object) -> obs.LayerSolution:
    if isinstance(what, Pattern):
        return obs.prune(weight, hessian, what, **options)  # type: ignore[arg-type]
    return obs.quantize(weight, hessian, what, **options)  # type: ignore[arg-type]


def damped_rows(solution: obs.LayerSolution, weight: Tensor, hessian: Hessian) -> Tensor:
    full = hessian.full()
    bar = solution.status.damping * full.diagonal(dim1=1, dim2=2).mean()
    full = full + bar * torch.eye(full.shape[-1], dtype=full.dtype)
    return row_losses((solution.weight.double() - weight.double())[None], full)[0]


@pytest.mark.parametrize("what", CASES, ids=str)
@pytest.mark.parametrize("judged", [True, False])
def test_refined_is_never_worse_in_any_row(what: object, judged: bool) -> None:
    hessian = statistic(24, 60)
    weight = torch.randn(12, 24, generator=torch.Generator().manual_seed(4))
    greedy = solve(what, weight, hessian)
    refined = solve(what, weight, hessian, refine=Refine(judge=judged))
    before, after = damped_rows(greedy, weight, hessian), damped_rows(refined, weight, hessian)
    if isinstance(what, IntGrid) and what.granularity == "tensor":
        before, after = before.sum(), after.sum()
    assert bool((after <= before * (1 + 1e-12)).all())
    assert refined.refinement is not None
    assert refined.refinement.gain == pytest.approx(1 - float(after.sum() / before.sum()), rel=1e-6, abs=1e-9)
    assert (refined.refinement.held_out_gain is not None) == judged
    if not judged:
        assert refined.refinement.gain > 0.005
    assert int(refined.mask.sum()) == int(greedy.mask.sum())
    again = solve(what, weight, hessian, refine=Refine(judge=judged))
    assert torch.equal(again.weight, refined.weight)


@pytest.mark.parametrize("what", CASES, ids=str)
def test_a_plain_hessian_has_no_judge(what: object) -> None:
    hessian = statistic(24, 60)
    weight = torch.randn(12, 24, generator=torch.Generator().manual_seed(4))
    plain = solve(what, weight, hessian.full()[0], refine=True)
    unjudged = solve(what, weight, hessian, refine=Refine(judge=False))
    assert torch.equal(plain.weight, unjudged.weight)
    assert plain.refinement is not None
    assert plain.refinement.held_out_gain is None


def test_hopelessly_few_samples_are_not_refined_as_far() -> None:
    """With 6 samples a half for 32 columns and hardly any damping, fitting deeper is fitting noise."""
    hessian = statistic(32, 6, seed=3)
    weight = torch.randn(40, 32, generator=torch.Generator().manual_seed(5))
    free = solve(2, weight, hessian, damping=1e-4, refine=Refine(judge=False))
    judged = solve(2, weight, hessian, damping=1e-4, refine=True)
    assert free.refinement is not None
    assert judged.refinement is not None
    assert judged.refinement.gain < free.refinement.gain


def test_groups_are_refined_together() -> None:
    hessian = statistic(9, 30, groups=4)
    weight = torch.randn(4, 3, 9, generator=torch.Generator().manual_seed(1))
    for what in (Unstructured(0.5), 3):
        solution = solve(what, weight, hessian, refine=True, damping="auto")
        assert solution.weight.shape == weight.shape
        assert solution.refinement is not None


def test_time_limit_is_on_record() -> None:
    hessian = statistic(24, 60)
    weight = torch.randn(12, 24, generator=torch.Generator().manual_seed(4))
    for what in (3, NM(2, 4)):
        solution = solve(what, weight, hessian, refine=Refine(seconds=1e-9))
        assert solution.refinement is not None
        assert solution.refinement.stopped
        assert solution.refinement.gain == 0
        assert torch.equal(solution.weight, solve(what, weight, hessian).weight)


@pytest.mark.parametrize("pattern", [Block(4, 0.5), Structured(0.5)])
def test_patterns_without_swaps_are_refused(pattern: Pattern) -> None:
    with pytest.raises(SpecError, match="cannot be refined"):
        obs.prune(torch.randn(4, 8), torch.eye(8), pattern, refine=True)


def test_bad_limits_are_refused() -> None:
    for options in ({"sweeps": 0}, {"swaps": 1.5}, {"seconds": 0.0}, {"seconds": float("nan")}):
        with pytest.raises(SpecError, match="Refine"):
            Refine(**options)
    with pytest.raises(SpecError, match="refine"):
        obs.prune(torch.randn(4, 8), torch.eye(8), 0.5, refine="yes")  # type: ignore[arg-type]


def test_halves_that_cannot_be_solved_leave_the_greedy_solution() -> None:
    hessian = statistic(8, 20)
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    problem = obs.prepare(weight, hessian)
    mask = torch.rand(1, 4, 8, generator=torch.Generator().manual_seed(2)) < 0.5
    greedy = GreedyMask(problem, mask, "torch")

    def broken(problem: obs.Problem) -> GreedyMask:
        raise NotPositiveDefiniteError("no pivot is positive")

    solution = refine_mask(greedy.solution(), greedy, hessian, broken, Refine())
    assert torch.equal(solution.weight, greedy.solution().weight)
    assert solution.refinement is None
    assert "no pivot is positive" in str(solution.status)
