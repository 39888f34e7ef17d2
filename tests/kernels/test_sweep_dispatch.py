"""The front of the sweep: choice of a backend, checks, degenerate sizes, threads and processes."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from sweep_cases import MODES, make_grid, make_groups, make_problem

from lightning_obc.errors import BackendError, NonFiniteError, ShapeError
from lightning_obc.kernels.obs_sweep import (
    NMGroups,
    SweepInput,
    SweepOutput,
    resolve_backend,
    sweep_prune,
    sweep_quantize,
)


def test_auto_is_the_compiled_backend_on_a_cpu() -> None:
    assert resolve_backend("auto", "cpu") == "numba"
    assert resolve_backend("torch", "cpu") == "torch"
    assert resolve_backend("torch", "cuda") == "torch"
    assert resolve_backend("auto", "cuda") == "torch"


@pytest.mark.parametrize(("name", "device"), [("nmba", "cpu"), ("numba", "cuda")])
def test_a_backend_that_cannot_run_is_named(name: str, device: str) -> None:
    with pytest.raises(BackendError, match="Remedy"):
        resolve_backend(name, device)


@pytest.mark.parametrize("shape", [(1, 0, 5), (0, 2, 5), (1, 3, 0)])
@pytest.mark.parametrize("backend", ["naive", "torch", "numba"])
def test_nothing_to_do_gives_empty_results(shape: tuple[int, int, int], backend: str) -> None:
    groups, _, columns = shape
    square = torch.eye(columns).expand(groups, columns, columns)
    out = sweep_prune(SweepInput(torch.zeros(shape), square, square.double()), backend=backend)
    assert out.order.shape == out.losses.shape == shape
    assert not out.any_broken


def test_quotas_of_zero_make_no_step() -> None:
    problem = make_problem(1, 2, 8)
    out = sweep_prune(problem, groups=NMGroups(torch.zeros(8, dtype=torch.int64), torch.tensor([0])))
    assert out.order.shape == (1, 2, 0)


def test_wrong_inputs_are_named_before_anything_runs() -> None:
    problem = make_problem(1, 2, 8, dtype=torch.float32)
    grid = make_grid(problem.weight, 4, False)
    with pytest.raises(ShapeError, match="cast half precision"):
        sweep_prune(replace(problem, weight=problem.weight.half()))
    with pytest.raises(ShapeError, match="inverse does not belong"):
        sweep_prune(replace(problem, inverse=problem.inverse.double()))
    with pytest.raises(ShapeError, match="hessian does not belong"):
        sweep_prune(replace(problem, hessian=problem.hessian.float()))
    with pytest.raises(ShapeError, match="keep is False at weights"):
        sweep_prune(replace(problem, keep=torch.zeros(1, 2, 8, dtype=torch.bool)))
    with pytest.raises(NonFiniteError, match="weights"):
        sweep_prune(replace(problem, weight=problem.weight * float("nan")))
    with pytest.raises(NonFiniteError, match="inverse Hessian"):
        sweep_prune(replace(problem, inverse=problem.inverse * float("inf")))
    with pytest.raises(NonFiniteError, match="scale"):
        sweep_quantize(problem, replace(grid, scale=grid.scale * 0))
    with pytest.raises(ShapeError, match="A quota exceeds"):
        sweep_prune(problem, groups=NMGroups(torch.arange(8) // 4, torch.tensor([5, 2])))
    with pytest.raises(ShapeError, match="without a quota"):
        sweep_prune(problem, groups=NMGroups(torch.arange(8) // 4, torch.tensor([2])))


def _sweep(problem: SweepInput) -> SweepOutput:
    return sweep_prune(problem, groups=make_groups(60, 2, 4), backend="numba")


def test_calls_from_several_threads_agree() -> None:
    problem = make_problem(1, 6, 60, dtype=torch.float32)
    expected = _sweep(problem)
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(_sweep, [problem] * 8):
            assert torch.equal(out.order, expected.order)
            assert torch.equal(out.losses, expected.losses)


def _child(problem: SweepInput, order: torch.Tensor) -> None:
    raise SystemExit(0 if torch.equal(_sweep(problem).order, order) else 1)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_can_sweep_after_its_parent_did() -> None:
    problem = make_problem(1, 6, 60, dtype=torch.float32)
    order = _sweep(problem).order
    child = multiprocessing.get_context("fork").Process(target=_child, args=(problem, order))
    child.start()
    child.join(60)
    alive = child.is_alive()
    if alive:
        child.kill()
    assert not alive
    assert child.exitcode == 0


def test_autograd_autocast_and_matmul_precision_do_not_matter() -> None:
    problem = make_problem(1, 3, 70, dtype=torch.float32)
    tracked = replace(problem, weight=problem.weight.clone().requires_grad_())
    for backend in ("torch", "numba"):
        expected = MODES[0].run(problem, backend)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            with torch.autocast("cpu"):
                out = MODES[0].run(tracked, backend)
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision(before)
        assert torch.equal(out.losses, expected.losses)
        assert not out.losses.requires_grad
