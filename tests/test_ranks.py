"""Several ranks that compress one model together agree with one process; ranks are threads here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from thread_ranks import run_ranks
from torch import Tensor, nn

import lightning_obc as obc
from lightning_obc import shared_rows
from lightning_obc.errors import CalibrationError, NonFiniteError, RankError
from lightning_obc.team import Team


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Linear(8 * 16, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.wide(x.flatten(1))))


def network() -> Net:
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(64, 3, 4, 4))
    return net


def images(samples: int = 90) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 1, 4, 4, generator=generator) + 0.7 * torch.randn(samples, 3, 4, 4, generator=generator)


def compressed(stages: Any, ranks: Any = None, **options: Any) -> tuple[Any, Net]:
    net = options.pop("model", None) or network()
    report = obc.compress(net, options.pop("data", images()), stages, ranks=ranks, **options)
    return report, net


def check_agreement(stages: Any, size: int, **options: Any) -> list[Any]:
    """Every rank has the same bits, and what one process alone gets."""
    alone, net = compressed(stages, **options)
    found = run_ranks(size, lambda ranks: compressed(stages, ranks, **options))
    for result in found:
        if isinstance(result, BaseException):
            raise result
    states = [result[1].state_dict() for result in found]
    for key, value in net.state_dict().items():
        assert all(torch.equal(state[key], states[0][key]) for state in states), key
        same = ((value == 0) == (states[0][key] == 0)).double().mean()
        assert same >= 0.999
        torch.testing.assert_close(states[0][key], value, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(alone.stages, found[0][0].stages, strict=True):
        assert theirs.samples == mine.samples
        for one, other in zip(mine.layers, theirs.layers, strict=True):
            assert other.loss == pytest.approx(one.loss, rel=1e-4)
            total = one.total_error
            assert other.total_error == (total if total is None else pytest.approx(total, rel=1e-4))
            assert other.status == one.status
            assert other.held_out == (one.held_out if one.held_out is None else pytest.approx(one.held_out, rel=1e-4))
    return [result[0] for result in found]


EIGHT = obc.Calibration(batch_size=8)
RECIPES: dict[str, tuple[list[Any], obc.Calibration]] = {
    "independent": ([obc.Prune(0.6, damping="auto"), obc.Quantize(4, refine=True)], EIGHT),
    "memory": ([obc.Prune("2:4", layers=["wide", "head"])], obc.Calibration(batch_size=8, memory="300 KiB")),
    "sequential": ([obc.Quantize(3)], obc.Calibration(batch_size=8, mode="sequential", bias=True)),
    "elsewhere": ([obc.Quantize(3)], obc.Calibration(batch_size=8, mode="sequential", execution_device="cpu:0")),
    "asymmetric": ([obc.Prune(0.5)], obc.Calibration(batch_size=8, mode="asymmetric", together="all")),
    "batch norm": ([obc.Prune(0.5), obc.Correct("batch_norm")], EIGHT),
    "statistics": ([obc.Prune(0.7), obc.Correct("statistics"), obc.Correct("bias")], EIGHT),
    "tuning": ([obc.Prune(0.7), obc.Correct("global", lr=1e-3, epochs=3)], EIGHT),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_ranks_agree_with_one_process(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_rows, "LEAST_FLOPS", 1e6)
    monkeypatch.setattr("lightning_obc.team.LEAST_FLOPS", 1e6)
    stages, calibration = RECIPES[recipe]
    check_agreement(stages, 3, calibration=calibration)


def test_a_large_layer_is_shared_by_rows_and_the_work_of_each_rank_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_rows, "LEAST_FLOPS", 1e6)
    monkeypatch.setattr("lightning_obc.team.LEAST_FLOPS", 1e6)
    stages, shares = [obc.Prune(0.5), obc.Quantize(4)], {}
    for size in (2, 4):
        report = check_agreement(stages, size, calibration=EIGHT)[0]
        for stage in report.stages:
            assert [share.rank for share in stage.work] == list(range(size))
            assert sum(share.layers for share in stage.work) == pytest.approx(len(stage.layers))
        shares[size] = [max(share.flops for share in stage.work) for stage in report.stages]
    total = sum(share.flops for share in report.stages[0].work)
    assert all(flops < 0.55 * total for flops in shares[2])
    assert all(flops < 0.3 * total for flops in shares[4])
    assert compressed(stages)[0].stages[0].work == []


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "block"])
def test_shared_rows_have_the_masks_and_weights_of_one_process(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_rows, "LEAST_FLOPS", 0.0)
    torch.manual_seed(0)
    x = torch.randn(32, 100, dtype=torch.float64)
    weight, hessian = torch.randn(7, 32), 2 * x @ x.T / 100
    spec = {"0.5": 0.5, "2:4": "2:4", "block": obc.Block(4, 0.5)}[pattern]
    alone = obc.obs.prune(weight, hessian, spec)

    def work(ranks: Any) -> Any:
        if ranks.rank == 1:
            return shared_rows.drive(ranks, lambda: obc.obs.prune(weight, hessian, spec))
        return shared_rows.serve(ranks, 1, torch.device("cpu"))

    found = run_ranks(3, work)
    assert found[0] is found[2] is None
    assert torch.equal(found[1].mask, alone.mask)
    torch.testing.assert_close(found[1].weight, alone.weight, rtol=1e-6, atol=1e-7)


# Failures.
def failing_solver(monkeypatch: pytest.MonkeyPatch, layer_rows: int) -> None:
    from lightning_obc import stage_run

    own = stage_run.solve_layer

    def solve(stage: Any, weight: Tensor, *rest: Any) -> Any:
        if weight.shape[1] == layer_rows:
            raise NonFiniteError("made to fail")
        return own(stage, weight, *rest)

    monkeypatch.setattr(stage_run, "solve_layer", solve)


@pytest.mark.parametrize("rows", [24, 5])  # One layer's rows are shared, the other layer is one rank's own.
def test_a_layer_that_fails_is_kept_on_all_ranks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_obc.team.LEAST_FLOPS", 1e6)
    failing_solver(monkeypatch, rows)
    for report in check_agreement([obc.Prune(0.5)], 2, calibration=EIGHT):
        assert list(report.stages[0].failed) == ["wide" if rows == 24 else "head"]


@pytest.mark.parametrize("rows", [24, 5])
def test_or_its_error_ends_the_run_on_all_ranks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_obc.team.LEAST_FLOPS", 1e6)
    failing_solver(monkeypatch, rows)
    models = [network() for _ in range(3)]

    def work(ranks: Any) -> Any:
        return compressed([obc.Prune(0.5)], ranks, on_failure="raise", model=models[ranks.rank])

    found = run_ranks(3, work)
    assert all(isinstance(error, NonFiniteError) and "made to fail" in str(error) for error in found)
    dense = network().state_dict()
    assert all(torch.equal(model.state_dict()[key], dense[key]) for model in models for key in dense)


@pytest.mark.parametrize("stage", [obc.Prune(0.5), obc.Correct("batch_norm")])
def test_a_forward_pass_that_fails_on_one_rank_fails_on_all(stage: Any) -> None:
    def work(ranks: Any) -> Any:
        def forward(model: nn.Module, batch: Tensor) -> Any:
            if ranks.rank == 1:
                raise KeyError("no such thing")
            return model(batch)

        return compressed(stage, ranks, forward=forward, calibration=EIGHT, on_failure="raise")

    found = run_ranks(2, work)
    # An error of this package goes to the other ranks as it is; its cause stays where it was raised.
    assert all(isinstance(error, CalibrationError) and "KeyError: 'no such thing'" in str(error) for error in found)
    assert isinstance(found[1].__cause__, KeyError)
    assert not isinstance(found[0].__cause__, KeyError)


def test_different_models_are_refused_before_anything_changes() -> None:
    models = [network(), network()]
    with torch.no_grad():
        models[1].head.weight[0, 0] += 1
    before = [copy.deepcopy(model.state_dict()) for model in models]
    found = run_ranks(2, lambda ranks: compressed(obc.Prune(0.5), ranks, model=models[ranks.rank]))
    assert all(isinstance(error, RankError) and "head.weight" in str(error) for error in found)
    assert all(torch.equal(m.state_dict()[key], b[key]) for m, b in zip(models, before, strict=True) for key in b)


def test_weights_that_come_to_differ_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_obc.stage_run import _StageRun

    own = _StageRun.apply_

    def apply_(self: Any, group: Any) -> None:
        own(self, group)
        with torch.no_grad():
            self.model.wide.weight[0, 0] += self.team.ranks.rank

    monkeypatch.setattr(_StageRun, "apply_", apply_)
    found = run_ranks(2, lambda ranks: compressed(obc.Prune(0.5), ranks))
    assert all(isinstance(error, RankError) and "wide.weight" in str(error) for error in found)


def test_masks_that_differ_under_equal_weights_are_an_error() -> None:
    """A weight may be zero by itself: only its mask says whether it will stay so."""
    found = run_ranks(2, lambda ranks: Team(ranks).end(network(), {"head": torch.arange(4) > ranks.rank}))
    assert all(isinstance(error, RankError) and "different masks. Got: head" in str(error) for error in found)
    found = run_ranks(2, lambda ranks: Team(ranks).end(network(), {"head": torch.arange(4) > 1}))
    assert [work.rank for work in found[0]] == [0, 1]


def test_buffers_are_those_of_the_first_rank() -> None:
    models = [network(), network()]
    models[1].norm.running_mean.add_(3)
    found = run_ranks(2, lambda ranks: compressed(obc.Prune(0.5), ranks, model=models[ranks.rank]))
    assert not any(isinstance(result, BaseException) for result in found)
    assert torch.equal(models[1].norm.running_mean, network().norm.running_mean)


def test_ranges_of_inputs_are_those_of_all_batches() -> None:
    stage = obc.Quantize(8, activations=obc.ActivationGrid(8, range="minmax"))
    alone, _ = compressed(stage)
    for report, net in run_ranks(5, lambda ranks: compressed(stage, ranks)):  # more ranks than batches
        assert set(report.activations) == {"conv", "wide", "head"}
        for name, grid in report.activations.items():
            torch.testing.assert_close(grid.scale, alone.activations[name].scale, rtol=1e-3, atol=0)
        assert net(images()).shape == (90, 5)


def test_more_ranks_than_batches() -> None:
    check_agreement([obc.Prune(0.5)], 4, data=images(20).split(10))


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_an_interrupted_run_goes_on_with_another_number_of_ranks(
    first: int, then: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(ranks: Any = None) -> Any:
        return compressed([obc.Prune(0.5)], ranks, store=tmp_path, calibration=EIGHT)

    before = run_ranks(first, work) if first > 1 else [work()]
    failing_solver(monkeypatch, 24)  # Nothing is left to be solved.
    after = run_ranks(then, work) if then > 1 else [work()]
    for _, model in after:
        for key, value in before[0][1].state_dict().items():
            assert torch.equal(model.state_dict()[key], value)
    assert not any(report.stages[0].failed for report, _ in after)
