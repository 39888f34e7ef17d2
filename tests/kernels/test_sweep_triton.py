"""The Triton backend against the oracle.

Without a GPU the kernels run under Triton's interpreter: one subprocess works through every scenario, and tests look
at what it brings back. With a GPU the tests marked ``gpu`` run the same scenarios compiled.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from channel_cases import Case
from channel_cases import assert_parity as assert_same_channels
from sweep_cases import MODES, Mode, agreement, assert_parity, make_problem
from triton_scenarios import (
    CHANNEL_CASES,
    FEW_LEFT_MODES,
    GRID,
    SCENARIOS,
    SOME,
    broken_problem,
    engine_cases,
    engine_problem,
    few_left_problem,
    irregular_groups,
    parity_name,
    parity_problem,
    scarce_problem,
    solve,
    ties_problem,
)

from lightning_obc.errors import BackendError
from lightning_obc.kernels.obs_sweep import SweepOutput, channel_backend, resolve_backend, sweep_prune

ROOT = Path(__file__).parent.parent.parent
SCRIPT = Path(__file__).parent / "triton_scenarios.py"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


Results = Callable[[str], Any]


@pytest.fixture(scope="module")
def compiling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """Kernels being compiled for a device that need not be there, while the interpreter is busy."""
    cache = str(tmp_path_factory.mktemp("compiled"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": "0"}
    script = [str(ROOT / "benchmarks" / "gpu_plan.py"), "--few", "--capabilities", "90"]
    command = [sys.executable, "-W", "ignore", *script]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process


@pytest.fixture(scope="module")
def everything(compiling: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(path)], env=environment, capture_output=True, text=True
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
    """Besides, memory that nothing has written holds NaN there."""
    problem = parity_problem(shape, keep, dtype)
    assert_parity(result(parity_name(mode, shape, keep, dtype)), mode.run(problem, "naive"), **tolerances(dtype))


def test_parity_with_the_default_launch(result: Results) -> None:
    oracle = MODES[1].run(make_problem(1, 3, 36, dtype=torch.float32), "naive")
    assert_parity(result("default launch"), oracle, **tolerances(torch.float32))


@pytest.mark.parametrize("name", engine_cases())
def test_every_pattern_through_the_functions_on_matrices(result: Results, name: str) -> None:
    """Also: no tensor of a sweep is made on another device than the weights'."""
    weight, hessian = engine_problem()
    for got, oracle in zip(result(f"engine {name}"), engine_cases()[name](weight, hessian, "naive"), strict=True):
        assert torch.equal(got == 0, oracle == 0)
        assert not bool(torch.signbit(got[got == 0]).any())
        torch.testing.assert_close(got, oracle, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CHANNEL_CASES, ids=str)
def test_channels(result: Results, case: Case) -> None:
    """Besides, memory that nothing has written holds NaN there."""
    assert_same_channels(result(f"channels {case}"), case.run("naive"))


def test_a_channel_that_is_not_definite_is_reported_for_its_problem(result: Results) -> None:
    out, oracle = result("broken channels"), Case(2, 3, 7, 2).run("naive")
    assert out.broken.tolist() == [False, True]
    assert torch.equal(out.order[0], oracle.order[0])


def test_channels_leave_without_the_host_waiting_in_a_step(result: Results) -> None:
    # Before the first step: does every row agree on its zeros, are inputs finite.
    assert len(result("waits of channels")) <= 4


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
        assert out.order[0, 2].tolist() == [*range(1, 16, 2), *range(0, 16, 2)]


@pytest.mark.parametrize("mode", SOME, ids=lambda mode: mode.name)
def test_worn_rows_restart_from_float64(result: Results, mode: Mode) -> None:
    out, oracle = result(f"scarce {mode.name}"), mode.run(scarce_problem(mode), "naive")
    assert not bool(out.broken.any())
    assert agreement(out, oracle) >= 0.99
    assert worst_row(out, oracle) < 1e-3


@pytest.mark.parametrize("mode", FEW_LEFT_MODES, ids=lambda mode: mode.name)
def test_rows_start_anew_when_few_columns_are_left(result: Results, mode: Mode) -> None:
    got = result(f"few left {mode.name}")
    assert got["restarts"] == 1
    assert_parity(got["out"], mode.run(few_left_problem(), "naive"), **tolerances(torch.float32))


@pytest.mark.parametrize("mode", [SOME[0], SOME[3]], ids=lambda mode: mode.name)
def test_without_restarts_the_float32_order_would_drift(result: Results, mode: Mode) -> None:
    """What the test of worn rows tests: without restarts, the order or the losses are off by more than it allows."""
    out, oracle = result(f"scarce without restarts {mode.name}"), mode.run(scarce_problem(mode), "naive")
    assert bool(out.broken.any()) or agreement(out, oracle) < 0.99 or worst_row(out, oracle) > 0.05


def worst_row(got: SweepOutput, oracle: SweepOutput) -> float:
    """Largest relative difference of a row's summed loss."""
    return (got.losses.double().sum(-1) / oracle.losses.sum(-1) - 1).abs().max().item()


@pytest.mark.parametrize("mode", [SOME[0], SOME[3]], ids=lambda mode: mode.name)
def test_a_broken_pivot_is_reported_and_stops_its_problem_only(result: Results, mode: Mode) -> None:
    out = result(f"broken {mode.name}")
    assert bool(out.broken[1].all())
    assert bool((out.count[1] < out.order.shape[2]).all())
    assert bool((out.order[1, :, -1] == -1).all())
    healthy = replace(broken_problem(), inverse=make_problem(2, 3, 12, dtype=torch.float32).inverse)
    oracle = mode.run(healthy, "naive")
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


def test_out_of_memory_halves_the_chunk_and_goes_on_with_one_message(result: Results) -> None:
    got = result("out of memory")
    assert got["tried"] == [7, 4, 2, 2, 2, 1]
    assert len(got["messages"]) == 1
    assert "7 rows" in got["messages"][0]
    assert_parity(got["out"], MODES[0].run(make_problem(1, 7, 3), "naive"), **tolerances(torch.float64))


def test_out_of_memory_with_a_single_row_is_raised(result: Results) -> None:
    assert result("out of memory for one row") == "raised"


@pytest.mark.parametrize("name", ["waits", "waits of blocks"])
def test_the_host_waits_once_a_chunk_and_never_between_panels(result: Results, name: str) -> None:
    got = result(name)
    assert got["queued"] == []
    # The bound on closing groups (two numbers, two masks) or whether blocks are in order, then which rows are worn.
    assert len(got["whole"]) <= 5


def test_inputs_may_be_strided_and_are_not_changed(result: Results) -> None:
    plain, turned = result("strided")
    assert torch.equal(plain.order, turned.order)
    assert torch.equal(plain.codes, turned.codes)


def test_every_part_of_the_gpu_benchmark_runs(everything: dict[str, Any]) -> None:
    got = everything["rehearsal"]
    assert not isinstance(got, str), got
    assert set(got) == {"parity", "shapes", "structured", "wide", "memory", "semi-structured", "report"}
    patterns = got["parity"]["patterns"]
    assert all(pattern["parity"] for pattern in patterns.values())
    assert patterns.pop("structured")["same"] == 1.0
    assert got["shapes"]["patterns"] == list(patterns)
    assert len(got["shapes"]["layers"]) == got["shapes"]["expected"] == 2
    assert all(set(layer["seconds"]) == {*patterns, "rank-1"} for layer in got["shapes"]["layers"])
    assert got["memory"]["same"] == 1.0
    assert "| all of them | 3 |" in got["report"]["shapes"]
    assert len(got["structured"]["layers"]) == got["structured"]["expected"] == 3
    assert all(set(layer["seconds"]) == {"triton", "torch"} for layer in got["structured"]["layers"])
    assert "| 5×2, rows with zeros of their own | – |" in got["report"]["structured"]


@needs_triton
def test_channels_of_more_columns_than_a_program_holds_are_refused() -> None:
    with pytest.raises(BackendError, match="channels of 65 columns"):
        channel_backend("triton", "cuda", 65)
    assert channel_backend("auto", "cpu", 65) == "numba"


@needs_triton
def test_compiled_kernels_are_refused_on_a_cpu() -> None:
    with pytest.raises(BackendError, match="cuda"):
        resolve_backend("triton", "cpu")


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_every_kernel_compiles_for_compute_capability_9_without_a_spill(compiling: subprocess.Popen[str]) -> None:
    """No device is needed. Launches are the package's own; two programs of 256 threads share a multiprocessor."""
    printed, errors = compiling.communicate()
    assert compiling.returncode == 0, printed + errors
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.split("|---")[-1].splitlines()[1:]]
    sources = (ROOT / "lightning_obc" / "kernels" / "obs_sweep").glob("triton_*.py")
    kernels = {name for path in sources for name in re.findall(r"^def (\w+)_kernel\(", path.read_text(), re.MULTILINE)}
    assert {line[0] for line in lines} == kernels
    assert len(kernels) == len(lines) == 6
    for line in lines:
        warps, (registers, spilled, shared) = int(line[4]), map(int, line[5].split(","))
        assert 0 < registers * warps <= 8 * 128, line
        assert spilled == 0, line
        assert shared <= 227 * 1024, line


@gpu
@needs_gpu
@pytest.mark.parametrize("mode", SOME, ids=lambda mode: mode.name)
def test_gpu_and_cpu_agree_on_a_wide_layer(mode: Mode) -> None:
    problem = make_problem(1, 4, 640, dtype=torch.float32)
    assert_parity(solve(problem, mode, "cuda"), mode.run(problem, "torch"), **tolerances(torch.float32))


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
