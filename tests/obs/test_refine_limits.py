"""Limits of refinement: how far it goes, what it returns when it is cut short, and what it says about that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_obc as obc
from lightning_obc import obs
from lightning_obc.hessian import Hessian
from lightning_obc.obs.problem import row_losses
from lightning_obc.obs.refine import codes, judge, masks
from lightning_obc.obs.refine.judge import Deadline, Judgement
from lightning_obc.obs.refine.layer import _recorded
from lightning_obc.obs.solution import LayerSolution, Refinement
from lightning_obc.solvers import Refine
from lightning_obc.specs import NM, IntGrid, Pattern, Unstructured

ROWS, COLUMNS = 10, 48
# Paths of more than two steps.
CODES = [IntGrid(4), IntGrid(3, granularity="tensor")]
MASKS = [Unstructured(0.6), NM(2, 4)]


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Hessian]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(1, COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)
    halves = [mixing @ torch.randn(1, COLUMNS, 80, generator=generator).double() for _ in range(2)]
    weight = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    return weight, Hessian(torch.stack([half @ half.mT for half in halves]), (80, 80))


def solve(layer: tuple[Tensor, Hessian], what: Any, refine: bool | Refine = False) -> obs.LayerSolution:
    run: Callable[..., obs.LayerSolution] = obs.prune if isinstance(what, Pattern) else obs.quantize
    return run(*layer, what, refine=refine)


def objective(layer: tuple[Tensor, Hessian], solution: obs.LayerSolution) -> Tensor:
    """Damped loss of every row."""
    weight, hessian = layer
    return row_losses((solution.weight - weight)[None], obs.prepare(weight, hessian).damped)[0]


def assert_not_above(layer: tuple[Tensor, Hessian], what: Any, solution: obs.LayerSolution, base: Any) -> None:
    after, before = objective(layer, solution), objective(layer, base)
    if isinstance(what, IntGrid) and what.granularity == "tensor":
        after, before = after.sum(), before.sum()
    assert bool((after <= before * (1 + 1e-12)).all())


class Clock:
    """Time that passes only when refinement takes a step: one second each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(judge.time, "monotonic", lambda: self.now)
        for owner, name in ((codes, "_sweep"), (masks._AnyPair, "best"), (masks._GroupPair, "best")):
            monkeypatch.setattr(owner, name, self.ticking(getattr(owner, name)))

    def ticking(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*arguments: Any) -> Any:
            self.now += 1.0
            return step(*arguments)

        return stepped

    @property
    def steps(self) -> int:
        return round(self.now - 100)


@pytest.mark.parametrize("what", CODES, ids=str)
def test_no_more_sweeps_than_the_limit_and_each_lowers_the_loss(
    what: IntGrid, layer: tuple[Tensor, Hessian], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, before, losses = Clock(monkeypatch), solve(layer, what), []
    for limit in (1, 2, 3):
        start = clock.steps
        refined = solve(layer, what, Refine(sweeps=limit, judge=False, restart=False))
        assert clock.steps - start == limit
        assert_not_above(layer, what, refined, before)
        losses.append(float(objective(layer, refined).sum()))
        assert refined.refinement is not None
        assert not refined.refinement.stopped
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] < float(objective(layer, before).sum())


@pytest.mark.parametrize("what", CODES, ids=str)
def test_the_limit_holds_for_every_start_and_half(
    what: IntGrid, layer: tuple[Tensor, Hessian], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    refined = solve(layer, what, Refine(sweeps=2))
    # Two halves and all samples, each from at most two starts.
    assert 0 < clock.steps <= 3 * 2 * 2
    assert_not_above(layer, what, refined, solve(layer, what))


@pytest.mark.parametrize("what", MASKS, ids=str)
@pytest.mark.parametrize("limit", [1, 2, 4])
def test_no_more_swaps_in_a_row_than_the_limit(what: Pattern, limit: int, layer: tuple[Tensor, Hessian]) -> None:
    before, refined = solve(layer, what), solve(layer, what, Refine(swaps=limit, judge=False))
    exchanged = (before.mask & ~refined.mask).sum(1)
    assert torch.equal(exchanged, (refined.mask & ~before.mask).sum(1))
    # A later swap may bring back what an earlier one removed.
    assert 0 < int(exchanged.max()) <= limit
    assert_not_above(layer, what, refined, before)
    if limit > 1:
        assert_not_above(layer, what, refined, solve(layer, what, Refine(swaps=limit // 2, judge=False)))


@pytest.mark.parametrize("what", [*CODES, *MASKS], ids=str)
def test_a_time_limit_returns_what_it_has_reached(
    what: Any, layer: tuple[Tensor, Hessian], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit falls into the second step, which is finished; no third begins."""
    clock, before = Clock(monkeypatch), solve(layer, what)
    start = clock.steps
    cut = solve(layer, what, Refine(seconds=1.5, judge=False, restart=False))
    assert clock.steps - start == 2
    limited = Refine(sweeps=2, swaps=2, judge=False, restart=False)
    assert torch.equal(cut.weight, solve(layer, what, limited).weight)
    assert cut.refinement is not None
    assert cut.refinement.stopped
    assert cut.refinement.gain > 0
    assert "when its time was up" in cut.remarks
    assert_not_above(layer, what, cut, before)
    free = solve(layer, what, Refine(seconds=1e9, judge=False, restart=False))
    assert free.refinement is not None
    assert not free.refinement.stopped
    assert_not_above(layer, what, free, cut)


@pytest.mark.parametrize("what", [*CODES, *MASKS], ids=str)
@pytest.mark.parametrize("seconds", [0.5, 3.5, 6.5])
def test_a_time_limit_with_a_judge_is_never_worse_than_greedy(
    what: Any, seconds: float, layer: tuple[Tensor, Hessian], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, before = Clock(monkeypatch), solve(layer, what)
    start = clock.steps
    cut = solve(layer, what, Refine(seconds=seconds))
    # A step that has begun in one half ends; the others see that the time is up.
    assert clock.steps - start <= seconds + 3
    assert cut.refinement is not None
    assert cut.refinement.stopped
    assert int(cut.mask.sum()) == int(before.mask.sum())
    assert_not_above(layer, what, cut, before)
    assert cut.refinement.gain == pytest.approx(
        1 - float(objective(layer, cut).sum() / objective(layer, before).sum()), abs=1e-9
    )


def test_the_report_says_what_refinement_brought() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 12))
    stage = obc.Quantize(2, refine=True)
    report = obc.compress(model, [torch.randn(64, 32)], stage)
    status = report.stages[0].layers[0].status
    assert "refined: damped loss" in status
    assert "lower than greedy's" in status
    assert "lower on the other" in status
    assert status in report.table()


def test_a_gain_is_told_with_what_it_is_measured_on() -> None:
    assert str(Refinement(0.0, 0.117, 0.0)) == "refined: no better weights than the greedy ones"
    assert str(Refinement(0.0, None, 0.0, stopped=True)).endswith("than the greedy ones, when its time was up")
    told = str(Refinement(3e-4, 0.117, 0.25))
    assert "damped loss 0.03 % lower than greedy's, in 25 % of the rows" in told
    assert "solved on one half of the samples, 11.7 % lower on the other" in told
    assert "damped loss less than 0.001 % lower" in str(Refinement(1e-9, None, 1.0))
    assert "no lower on the other" in str(Refinement(0.1, 0.0, 1.0))


def test_where_no_row_becomes_better_the_held_out_error_is_that_of_greedy() -> None:
    """Halves may gain where all samples together do not: then nothing of the layer has changed."""
    solution = LayerSolution(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), 0.1, 0.0, 1.0)
    verdict = Judgement(torch.tensor([[1, 1]]), held_out=0.2, greedy=0.3)
    kept = _recorded(solution, torch.zeros(2, 1, dtype=torch.bool), 0.0, verdict, Deadline(None))
    assert kept.refinement is not None
    assert (kept.status.held_out, kept.refinement.held_out_gain) == (0.3, 0.0)
    moved = _recorded(solution, torch.ones(2, 1, dtype=torch.bool), 0.1, verdict, Deadline(None))
    assert moved.refinement is not None
    assert (moved.status.held_out, moved.refinement.held_out_gain) == (0.2, pytest.approx(1 / 3))
