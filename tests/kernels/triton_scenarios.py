"""What the tests of the Triton backend run, by name, on any device.

As a script it runs all of it under Triton's interpreter, which has to be chosen before Triton is imported, and saves
what comes back.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from sweep_cases import MODES, Mode, make_grid, make_groups, make_problem
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_obc.kernels.obs_sweep import NMGroups, SweepInput, SweepOutput, sweep_prune, sweep_quantize
from lightning_obc.kernels.obs_sweep.types import WORN_FLOAT32, SweepPlan

BACKEND = "lightning_obc.kernels.obs_sweep.triton_backend"
PARITY_MODES = [MODES[0], MODES[1], MODES[4], MODES[5]]
SHAPES = [(1, 1, 1), (1, 3, 7), (2, 2, 25), (5, 1, 9)]
RAGGED = SHAPES[2]
PRECISIONS = [torch.float32, torch.float64]
# Of the interpreter's seconds, float64 gets those that show something new.
CASES = [(shape, 0.8, torch.float32) for shape in SHAPES if shape != RAGGED]
CASES += [(RAGGED, None, torch.float32), *((RAGGED, keep, dtype) for keep in (0.8, 0.3) for dtype in PRECISIONS)]
GRID = [(mode, *case) for mode in PARITY_MODES for case in CASES]
SOME = [MODES[0], MODES[1], MODES[5]]


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
def small_tiles(rows: int = 8, columns: int = 16) -> Any:
    """Several tiles and panels even at few columns, and several programs at few rows."""
    from lightning_obc.kernels.obs_sweep.triton_chunk import Tuning

    tuning = Tuning(rows, columns, depth=8, lines=16, steps=9)
    with mock.patch(f"{BACKEND}.default_tuning", return_value=tuning):
        yield


Scenario = Callable[[str], Any]


def parity_problem(shape: tuple[int, int, int], keep: float | None, dtype: torch.dtype) -> SweepInput:
    return make_problem(*shape, keep=keep, dtype=dtype)


def parity(mode: Mode, shape: tuple[int, int, int], keep: float | None, dtype: torch.dtype) -> Scenario:
    columns = shape[2]

    def scenario(device: str) -> SweepOutput:
        with small_tiles(rows=2 if columns < 10 else 8):
            return solve(parity_problem(shape, keep, dtype), mode, device)

    return scenario


def default_launch(mode: Mode) -> Scenario:
    return lambda device: solve(make_problem(1, 3, 36, dtype=torch.float32), mode, device)


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
    weight = torch.zeros(1, 3, 20)
    weight[0, 1] = 0.5
    weight[0, 2] = torch.tensor([0.5, 0.25]).repeat(10)
    eye = torch.eye(20)[None]
    return SweepInput(weight, eye, eye.double())


def ties(mode: Mode) -> Scenario:
    def scenario(device: str) -> SweepOutput:
        with small_tiles():
            return solve(ties_problem(), mode, device)

    return scenario


def scarce_problem() -> SweepInput:
    """Fewer samples than columns: float32 needs restarts."""
    return make_problem(1, 8, 60, damping=1e-7, samples=30, seed=0)


def scarce(device: str, mode: Mode = MODES[0], ratio: float | None = None) -> SweepOutput:
    problem = scarce_problem()
    problem = replace(problem, weight=problem.weight.float(), inverse=problem.inverse.float())
    module = "lightning_obc.kernels.obs_sweep.triton_chunk"
    with small_tiles(columns=64), mock.patch(f"{module}.WORN_FLOAT32", WORN_FLOAT32 if ratio is None else ratio):
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
                return solve(make_problem(1, 3, 25, dtype=torch.float32, keep=0.8), mode, device)
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

    problem = make_problem(1, 4, 20, dtype=torch.float32)
    with small_tiles(), mock.patch.object(triton_backend, "run", watched):
        groups = NMGroups(torch.arange(20, device=device) // 4, torch.full((5,), 2, device=device))
        with whole:
            triton_backend.sweep(SweepPlan(to(problem, device), groups, None, 10, 10**9))
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


if __name__ == "__main__":
    main(sys.argv[1])
