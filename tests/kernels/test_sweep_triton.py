"""The Triton backend against the oracle.

Without a GPU the kernels run under Triton's interpreter, which has to be chosen before Triton is imported: one
subprocess (this file, run as a script) works through every scenario, and the tests look at what it brings back. With a
GPU the tests marked ``gpu`` run the same scenarios compiled.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from sweep_cases import MODES, Mode, agreement, assert_parity, make_grid, make_groups, make_problem
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_obc.errors import BackendError
from lightning_obc.kernels.obs_sweep import (
    NMGroups,
    SweepInput,
    SweepOutput,
    resolve_backend,
    sweep_prune,
    sweep_quantize,
)
from lightning_obc.kernels.obs_sweep.types import SweepPlan

ROOT = Path(__file__).parent.parent.parent
BACKEND = "lightning_obc.kernels.obs_sweep.triton_backend"
PARITY_MODES = [MODES[0], MODES[1], MODES[4], MODES[5]]
SHAPES = [(1, 1, 1), (1, 3, 7), (2, 2, 33), (5, 1, 9)]
KEEPS = [None, 0.8, 0.3]
DTYPES = [torch.float32, torch.float64]
GRID = [
    (mode, shape, keep, dtype)
    for mode in PARITY_MODES
    for shape, keep in [*((shape, 0.8) for shape in SHAPES), (SHAPES[2], None), (SHAPES[2], 0.3)]
    for dtype in DTYPES
]
SOME = [MODES[0], MODES[1], MODES[5]]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def to(problem: SweepInput, device: str) -> SweepInput:
    return SweepInput(*(None if t is None else t.to(device) for t in vars(problem).values()))


def on_cpu(out: SweepOutput) -> SweepOutput:
    return SweepOutput(**{f.name: None if (t := getattr(out, f.name)) is None else t.cpu() for f in fields(out)})


def solve(problem: SweepInput, mode: Mode, device: str, memory_budget: int | None = None) -> SweepOutput:
    """As ``mode.run``, on a device."""
    if mode.bits:
        grid = make_grid(problem.weight, mode.bits, mode.symmetric)
        grid = replace(grid, scale=grid.scale.to(device), zero_point=grid.zero_point.to(device))
        return on_cpu(sweep_quantize(to(problem, device), grid, backend="triton", memory_budget=memory_budget))
    groups = None
    if mode.pattern:
        groups = make_groups(problem.weight.shape[2], *mode.pattern)
        groups = NMGroups(groups.column_group.to(device), groups.quota.to(device))
    return on_cpu(sweep_prune(to(problem, device), groups=groups, backend="triton", memory_budget=memory_budget))


@contextmanager
def small_tiles(rows: int = 8) -> Any:
    """Several tiles, panels and programs even at few columns."""
    from lightning_obc.kernels.obs_sweep.triton_chunk import Tuning

    tuning = Tuning(rows, columns=32, depth=8, lines=16, steps=11)
    with mock.patch(f"{BACKEND}.default_tuning", return_value=tuning):
        yield


# ------------------------------------------------------------------------------------------------ scenarios
Scenario = Callable[[str], Any]


def parity_problem(shape: tuple[int, int, int], keep: float | None, dtype: torch.dtype) -> SweepInput:
    return make_problem(*shape, keep=keep, dtype=dtype)


def parity(mode: Mode, shape: tuple[int, int, int], keep: float | None, dtype: torch.dtype) -> Scenario:
    def scenario(device: str) -> SweepOutput:
        with small_tiles():
            return solve(parity_problem(shape, keep, dtype), mode, device)

    return scenario


def default_launch(mode: Mode) -> Scenario:
    return lambda device: solve(make_problem(1, 3, 40, dtype=torch.float32), mode, device)


def irregular_groups() -> tuple[SweepInput, NMGroups]:
    """Interleaved groups of 5, 4 and 3 with quotas from nothing to everything."""
    problem = make_problem(1, 4, 24, dtype=torch.float32)
    group = torch.tensor([0, 1, 2, 3, 4, 5] * 3 + [0, 0, 1, 1, 2, 2])
    return problem, NMGroups(group, torch.tensor([2, 0, 5, 1, 3, 2]))


def run_irregular_groups(device: str) -> SweepOutput:
    problem, groups = irregular_groups()
    groups = NMGroups(groups.column_group.to(device), groups.quota.to(device))
    with small_tiles():
        return on_cpu(sweep_prune(to(problem, device), groups=groups, backend="triton"))


def ties_problem() -> SweepInput:
    """Equal scores everywhere: a row of zeros, a row of one value, and two values in turn."""
    weight = torch.zeros(1, 3, 40)
    weight[0, 1] = 0.5
    weight[0, 2] = torch.tensor([0.5, 0.25]).repeat(20)
    eye = torch.eye(40)[None]
    return SweepInput(weight, eye, eye.double())


def ties(mode: Mode) -> Scenario:
    def scenario(device: str) -> SweepOutput:
        with small_tiles():
            return solve(ties_problem(), mode, device)

    return scenario


def scarce_problem() -> SweepInput:
    """Fewer samples than columns: float32 needs restarts."""
    return make_problem(1, 8, 60, damping=1e-6, samples=30, seed=2)


def scarce(device: str, mode: Mode = MODES[0], ratio: float | None = None) -> SweepOutput:
    problem = scarce_problem()
    problem = replace(problem, weight=problem.weight.float(), inverse=problem.inverse.float())
    module = "lightning_obc.kernels.obs_sweep.triton_chunk"
    with small_tiles(), mock.patch(f"{module}.WORN_FLOAT32", 150.0 if ratio is None else ratio):
        return solve(problem, mode, device)


def broken_problem() -> SweepInput:
    problem = make_problem(2, 3, 20, dtype=torch.float32)
    problem.inverse[1, 9, 9] = -1.0
    return problem


def run_broken(device: str) -> SweepOutput:
    with small_tiles():
        return solve(broken_problem(), MODES[0], device)


def twice_and_in_small_chunks(mode: Mode) -> Scenario:
    def scenario(device: str) -> list[SweepOutput]:
        problem = make_problem(2, 2, 13, dtype=torch.float32, keep=0.9)
        with small_tiles():
            return [solve(problem, mode, device, memory_budget=budget) for budget in (None, None, 1)]

    return scenario


def poisoned(mode: Mode) -> Scenario:
    """Memory that nothing has written holds NaN."""

    def scenario(device: str) -> SweepOutput:
        torch.use_deterministic_algorithms(True)
        try:
            with small_tiles():
                return solve(make_problem(1, 3, 33, dtype=torch.float32, keep=0.8), mode, device)
        finally:
            torch.use_deterministic_algorithms(False)

    return scenario


def out_of_memory(device: str) -> dict[str, Any]:
    """More than two rows do not fit, and are only found out in mid-sweep."""
    from lightning_obc.kernels.obs_sweep import triton_backend

    run, tried = triton_backend.run, []

    def scarce_memory(job: Any, chunk: Any) -> None:
        run(job, chunk)
        tried.append(chunk.rows)
        if chunk.rows > 2:
            raise torch.OutOfMemoryError("injected")

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    triton_backend.log.addHandler(handler)
    try:
        with small_tiles(), mock.patch.object(triton_backend, "run", scarce_memory):
            out = solve(make_problem(1, 7, 12), MODES[0], device)
    finally:
        triton_backend.log.removeHandler(handler)
    return {"out": out, "tried": tried, "messages": messages}


def out_of_memory_for_one_row(device: str) -> str:
    from lightning_obc.kernels.obs_sweep import triton_backend

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("injected")

    with mock.patch.object(triton_backend, "run", no_memory):
        try:
            solve(make_problem(1, 5, 8), MODES[0], device)
        except torch.OutOfMemoryError:
            return "raised"
    return "went on"


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if masked or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def waits(device: str) -> dict[str, list[str]]:
    """Host waits while a chunk is queued, and from then to the end of the sweep."""
    from lightning_obc.kernels.obs_sweep import triton_backend

    run = triton_backend.run
    queued, whole = Waits(), Waits()

    def watched(job: Any, chunk: Any) -> None:
        with queued:
            run(job, chunk)

    problem = make_problem(1, 4, 40, dtype=torch.float32)
    with small_tiles(), mock.patch.object(triton_backend, "run", watched):
        groups = NMGroups(torch.arange(40, device=device) // 4, torch.full((10,), 2, device=device))
        with whole:
            triton_backend.sweep(SweepPlan(to(problem, device), groups, None, 20, 10**9))
    return {"queued": queued.names, "whole": whole.names}


def strided(device: str) -> list[SweepOutput]:
    problem = make_problem(2, 3, 20, dtype=torch.float32, keep=0.8)
    turned = SweepInput(*(t.mT.contiguous().mT for t in vars(problem).values()))
    before = [t.clone() for t in vars(turned).values()]
    with small_tiles():
        outs = [solve(problem, MODES[5], device), solve(turned, MODES[5], device)]
    assert all(torch.equal(a, b) for a, b in zip(before, vars(turned).values(), strict=True)), "an input was changed"
    return outs


def parity_name(mode: Mode, shape: tuple[int, int, int], keep: float | None, dtype: torch.dtype) -> str:
    return f"parity {mode.name} {'x'.join(map(str, shape))} keep={keep} {str(dtype).removeprefix('torch.')}"


SCENARIOS: dict[str, Scenario] = {
    **{parity_name(*case): parity(*case) for case in GRID},
    **{f"default launch {mode.name}": default_launch(mode) for mode in SOME},
    "irregular groups": run_irregular_groups,
    **{f"ties {mode.name}": ties(mode) for mode in SOME},
    **{f"scarce {mode.name}": partial(scarce, mode=mode) for mode in SOME},
    "scarce without restarts": partial(scarce, ratio=1e30),
    "broken": run_broken,
    **{f"twice {mode.name}": twice_and_in_small_chunks(mode) for mode in SOME},
    **{f"poisoned {mode.name}": poisoned(mode) for mode in SOME},
    "out of memory": out_of_memory,
    "out of memory for one row": out_of_memory_for_one_row,
    "waits": waits,
    "strided": strided,
}


def main(path: str) -> None:
    """Run every scenario under the interpreter; a scenario that raises leaves its traceback."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, scenario in SCENARIOS.items():
        started = time.perf_counter()
        try:
            results[name] = scenario("cpu")
        except Exception:
            results[name] = traceback.format_exc()
        print(f"{time.perf_counter() - started:6.2f} s  {name}")
    torch.save(results, path)


# ---------------------------------------------------------------------------------------------------- tests
Results = Callable[[str], Any]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(path, weights_only=False)


@pytest.fixture(params=["interpreted", pytest.param("compiled", marks=[gpu, needs_gpu])])
def result(request: pytest.FixtureRequest) -> Results:
    """What a scenario brings back, by name."""

    def of(name: str) -> Any:
        if request.param == "compiled":
            return SCENARIOS[name]("cuda")
        got = request.getfixturevalue("everything")[name]
        assert not (isinstance(got, str) and "Traceback" in got), got
        return got

    return of


def tolerances(dtype: torch.dtype) -> dict[str, float]:
    return {"order": 0.99, "loss": 1e-5} if dtype == torch.float32 else {"order": 1.0, "loss": 1e-9}


@pytest.mark.parametrize(("mode", "shape", "keep", "dtype"), GRID, ids=[parity_name(*case) for case in GRID])
def test_parity(
    result: Results, mode: Mode, shape: tuple[int, int, int], keep: float | None, dtype: torch.dtype
) -> None:
    problem = parity_problem(shape, keep, dtype)
    assert_parity(result(parity_name(mode, shape, keep, dtype)), mode.run(problem, "naive"), **tolerances(dtype))


@pytest.mark.parametrize("mode", SOME, ids=lambda mode: mode.name)
def test_parity_with_the_default_launch(result: Results, mode: Mode) -> None:
    oracle = mode.run(make_problem(1, 3, 40, dtype=torch.float32), "naive")
    assert_parity(result(f"default launch {mode.name}"), oracle, **tolerances(torch.float32))


def test_groups_of_any_shape_and_quota(result: Results) -> None:
    problem, groups = irregular_groups()
    assert_parity(
        result("irregular groups"), sweep_prune(problem, groups=groups, backend="naive"), **tolerances(torch.float32)
    )


@pytest.mark.parametrize("mode", SOME, ids=lambda mode: mode.name)
def test_ties_go_to_the_lower_column_across_tiles_and_compaction(result: Results, mode: Mode) -> None:
    out = result(f"ties {mode.name}")
    assert torch.equal(out.order, mode.run(ties_problem(), "naive").order)
    if mode.name == "unstructured":
        assert out.order[0, 2].tolist() == [*range(1, 40, 2), *range(0, 40, 2)]


@pytest.mark.parametrize("mode", SOME, ids=lambda mode: mode.name)
def test_worn_rows_restart_from_float64(result: Results, mode: Mode) -> None:
    out, oracle = result(f"scarce {mode.name}"), mode.run(scarce_problem(), "naive")
    assert not bool(out.broken.any())
    assert agreement(out, oracle) >= 0.99
    assert worst_row(out, oracle) < 0.01


def test_without_restarts_the_float32_order_would_drift(result: Results) -> None:
    """The restart is what the previous test tests."""
    out = result("scarce without restarts")
    assert bool(out.broken.any()) or worst_row(out, MODES[0].run(scarce_problem(), "naive")) > 0.05


def worst_row(got: SweepOutput, oracle: SweepOutput) -> float:
    """Largest relative difference of a row's summed loss."""
    return (got.losses.double().sum(-1) / oracle.losses.sum(-1) - 1).abs().max().item()


def test_a_broken_pivot_is_reported_and_stops_its_problem_only(result: Results) -> None:
    out = result("broken")
    assert bool(out.broken[1].all())
    assert bool((out.count[1] < 20).all())
    assert bool((out.order[1, :, -1] == -1).all())
    healthy = replace(broken_problem(), inverse=make_problem(2, 3, 20, dtype=torch.float32).inverse)
    oracle = MODES[0].run(healthy, "naive")
    assert not bool(out.broken[0].any())
    assert torch.equal(out.order[0], oracle.order[0])


@pytest.mark.parametrize("mode", SOME, ids=lambda mode: mode.name)
def test_same_bits_twice_and_the_same_order_in_small_chunks(result: Results, mode: Mode) -> None:
    first, second, small = result(f"twice {mode.name}")
    for field in fields(SweepOutput):
        a, b = getattr(first, field.name), getattr(second, field.name)
        assert a is b or torch.equal(a, b), field.name
    assert torch.equal(first.order, small.order)
    torch.testing.assert_close(first.losses.sum(-1), small.losses.sum(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", SOME, ids=lambda mode: mode.name)
def test_unwritten_memory_is_never_used(result: Results, mode: Mode) -> None:
    oracle = mode.run(make_problem(1, 3, 33, dtype=torch.float32, keep=0.8), "naive")
    assert_parity(result(f"poisoned {mode.name}"), oracle, **tolerances(torch.float32))


def test_out_of_memory_halves_the_chunk_and_goes_on_with_one_message(result: Results) -> None:
    got = result("out of memory")
    assert got["tried"] == [7, 4, 2, 2, 2, 1]
    assert len(got["messages"]) == 1
    assert "7 rows" in got["messages"][0]
    assert_parity(got["out"], MODES[0].run(make_problem(1, 7, 12), "naive"), **tolerances(torch.float64))


def test_out_of_memory_with_a_single_row_is_raised(result: Results) -> None:
    assert result("out of memory for one row") == "raised"


def test_the_host_waits_once_a_chunk_and_never_between_panels(result: Results) -> None:
    got = result("waits")
    assert got["queued"] == []
    # The bound on closing groups (two numbers, two masks), then which rows are worn.
    assert len(got["whole"]) <= 5


def test_inputs_may_be_strided_and_are_not_changed(result: Results) -> None:
    plain, turned = result("strided")
    assert torch.equal(plain.order, turned.order)
    assert torch.equal(plain.codes, turned.codes)


@needs_triton
def test_compiled_kernels_are_refused_on_a_cpu() -> None:
    with pytest.raises(BackendError, match="cuda"):
        resolve_backend("triton", "cpu")


@gpu
@needs_gpu
@pytest.mark.parametrize("mode", SOME, ids=lambda mode: mode.name)
def test_gpu_and_cpu_agree_on_a_wide_layer(mode: Mode) -> None:
    problem = make_problem(1, 4, 640, dtype=torch.float32)
    assert_parity(solve(problem, mode, "cuda"), mode.run(problem, "numba"), **tolerances(torch.float32))


@gpu
@needs_gpu
def test_the_callers_tf32_setting_changes_nothing() -> None:
    problem = make_problem(1, 4, 300, dtype=torch.float32)
    plain = solve(problem, MODES[0], "cuda")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert torch.equal(solve(problem, MODES[0], "cuda").losses, plain.losses)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


if __name__ == "__main__":
    main(sys.argv[1])
