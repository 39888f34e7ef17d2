"""The sweep over input channels: every backend against the oracle, and the oracle against all subsets."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from unittest import mock

import pytest
import torch
from channel_cases import CASES, Case, assert_parity

from lightning_obc import obs
from lightning_obc.errors import ShapeError
from lightning_obc.kernels.obs_sweep import ChannelOutput, channel_backend, channel_compiled, sweep_channels
from lightning_obc.specs import Structured

by_backend = pytest.mark.parametrize("backend", ["torch", "numba"])
BROKEN = Case(2, 3, 20, 2)


@lru_cache
def oracle(case: Case, steps: int | None = None) -> ChannelOutput:
    return case.run("naive", steps=steps)


@by_backend
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: Case, backend: str) -> None:
    assert_parity(case.run(backend), oracle(case))


@pytest.mark.parametrize("zeros", ["none", "weights"])
@pytest.mark.parametrize(("channels", "positions"), [(70, 1), (41, 3)])
def test_panels_flushes_and_chunks_change_nothing(channels: int, positions: int, zeros: str) -> None:
    """Panels of a few lines, and chunks of one team, so that small problems have many of both."""
    case = Case(1, 4, channels, positions, zeros)
    with mock.patch.multiple(channel_compiled, LINES=7, SINGLE=0, TILE=32):
        assert_parity(case.run("numba"), oracle(case))


@by_backend
def test_a_layer_of_a_thousand_columns(backend: str) -> None:
    """Too wide for the oracle's loops: the sum of all losses is that of a layer without weights."""
    case = Case(1, 6, 1000)
    problem, got = case.problem(), case.run(backend)
    whole = torch.einsum("grd,gde,gre->", problem.weight, problem.hessian, problem.weight) / 2
    assert got.losses.sum().item() == pytest.approx(whole.item(), rel=1e-9)
    assert got.order[0].sort().values.tolist() == list(range(1000))
    gone = got.order[0, :300]
    block = problem.inverse[0][gone][:, gone]
    removed = problem.weight[0][:, gone]
    direct = (removed * torch.linalg.solve(block, removed.T).T).sum() / 2
    assert got.losses[0, :300].sum().item() == pytest.approx(direct.item(), rel=1e-9)
    first = problem.weight[0].square().sum(0) / problem.inverse[0].diagonal() / 2
    assert int(got.order[0, 0]) == int(first.argmin())


@pytest.mark.parametrize("backend", ["naive", "torch", "numba"])
def test_fewer_steps_are_the_first_of_all_of_them(backend: str) -> None:
    case = Case(2, 3, 20, 2)
    whole, part = case.run(backend), case.run(backend, steps=7)
    assert torch.equal(part.order, whole.order[:, :7])
    assert case.run(backend, steps=0).order.shape == (2, 0)


@by_backend
def test_equal_channels_leave_in_their_order(backend: str) -> None:
    """Also where channels have changed their slots between panels."""
    problem = Case(1, 2, 40).problem()
    identity = torch.eye(40, dtype=torch.float64)[None]
    alike = replace(problem, weight=torch.ones_like(problem.weight), inverse=identity, hessian=identity)
    alike.weight[..., 7] = 0.5
    with mock.patch.multiple(channel_compiled, LINES=6, SINGLE=0):
        got = sweep_channels(alike, 40, 40, backend=backend)
    assert got.order[0].tolist() == [7, *(c for c in range(40) if c != 7)]


@by_backend
@pytest.mark.parametrize("zeros", ["none", "weights"])
def test_a_block_that_is_not_definite_is_reported_for_its_problem(backend: str, zeros: str) -> None:
    problem = replace(BROKEN, zeros=zeros).problem()
    spoiled = (problem.inverse if zeros == "none" else problem.hessian)[1]
    kept = 13 if problem.keep is None else int(problem.keep[1, 0].nonzero()[0])
    spoiled[kept, kept] = -1.0
    got = sweep_channels(problem, 20, 20, own_inverses=zeros == "weights", backend=backend)
    assert got.broken.tolist() == [False, True]
    assert_parity(ChannelOutput(*(t[:1] for t in vars(got).values())), first_of(oracle(replace(BROKEN, zeros=zeros))))


def first_of(out: ChannelOutput) -> ChannelOutput:
    return ChannelOutput(*(tensor[:1] for tensor in vars(out).values()))


@by_backend
def test_nothing_that_was_passed_in_changes(backend: str) -> None:
    for zeros in ("none", "columns", "weights"):
        problem = Case(2, 3, 17, 2, zeros).problem()
        before = [None if t is None else t.clone() for t in vars(problem).values()]
        first, second = (
            sweep_channels(problem, 17, 17, own_inverses=zeros == "weights", backend=backend) for _ in range(2)
        )
        assert torch.equal(first.order, second.order)
        assert torch.equal(first.losses, second.losses), "the same bits twice"
        for old, new in zip(before, vars(problem).values(), strict=True):
            assert old is new or torch.equal(old, new)


def test_what_does_not_fit_is_refused() -> None:
    problem = Case(1, 2, 6, 2).problem()
    for channels, steps in ((5, 1), (0, 0), (6, 7), (6, -1)):
        with pytest.raises(ShapeError, match="do not fit"):
            sweep_channels(problem, channels, steps)
    single = replace(problem, weight=problem.weight.float(), inverse=problem.inverse.float())
    with pytest.raises(ShapeError, match="float64"):
        sweep_channels(single, 6, 6)


def test_auto_takes_torch_for_few_channels_of_many_positions() -> None:
    """As measured: ``benchmarks/results/channels_1core.md``."""
    assert channel_backend("auto", "cpu", 25, 16) == "torch"
    assert channel_backend("auto", "cpu", 25, 64) == channel_backend("auto", "cpu", 9, 8) == "numba"
    assert channel_backend("auto", "cpu", 25, 16, own_inverses=True) == "numba"
    assert channel_backend("auto", "cpu", 49, 3, own_inverses=True) == "torch"
    assert channel_backend("numba", "cpu", 25, 16) == "numba"


def test_the_solution_names_the_backend_that_auto_took() -> None:
    for positions, expected in ((2, "numba"), (20, "torch")):
        problem = Case(1, 2, 4, positions).problem()
        found = obs.prune(problem.weight[0], problem.hessian[0], Structured(0.5), channels=4)
        assert found.status.backend == expected
