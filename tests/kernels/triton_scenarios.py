"""What the tests of the Triton backend run, by name, on any device.

As a script it runs all of it under Triton's interpreter, which has to be chosen before Triton is imported, and saves
what comes back. The interpreter takes its time per operation, not per element, so problems have several rows, and few
columns over tiles and panels that are smaller still.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from channel_cases import Case
from sweep_cases import BLOCKS, MODES, Mode, make_problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_obc import obs
from lightning_obc.kernels.obs_sweep import (
    ChannelOutput,
    NMGroups,
    SweepInput,
    SweepOutput,
    sweep_channels,
    sweep_prune,
)
from lightning_obc.kernels.obs_sweep.types import WORN_FLOAT32, SweepPlan
from lightning_obc.specs import NM, Block, IntGrid

BACKEND = "lightning_obc.kernels.obs_sweep.triton_backend"
# Unstructured, 2:4, a grid for the tensor, grids by columns, and blocks on every shape; other widths on one.
SOME = [MODES[0], MODES[1], MODES[5], BLOCKS[0]]
PARITY_MODES = [*SOME, MODES[4]]
OTHERS = [MODES[2], MODES[3], MODES[6], Mode("block 2", block=2), Mode("block 3", block=3), Mode("block 8", block=8)]
FEW_LEFT_MODES = [MODES[0], MODES[5], Mode("block 2", block=2)]
RAGGED = (2, 2, 14)
F32, F64 = torch.float32, torch.float64
CASES = [((1, 1, 1), None, F32), ((5, 1, 7), 0.8, F32), (RAGGED, None, F32), (RAGGED, 0.8, F64), (RAGGED, 0.3, F32)]
GRID = [(mode, *case) for mode in PARITY_MODES for case in CASES]
GRID += [(mode, (2, 2, 17), 0.8, F32) for mode in OTHERS]


def to(problem: SweepInput, device: str) -> SweepInput:
    return SweepInput(*(None if t is None else t.to(device) for t in vars(problem).values()))


def on_cpu(out: SweepOutput) -> SweepOutput:
    return SweepOutput(**{f.name: None if (t := getattr(out, f.name)) is None else t.cpu() for f in fields(out)})


def solve(problem: SweepInput, mode: Mode, device: str, memory_budget: int | None = None) -> SweepOutput:
    """As ``mode.run``, on a device."""
    return on_cpu(mode.run(to(problem, device), "triton", memory_budget))


@contextmanager
def small_tiles(rows: int = 4, columns: int = 8, steps: int = 6) -> Any:
    """Several tiles and panels even at few columns, and several programs where there are more rows."""
    from lightning_obc.kernels.obs_sweep.triton_chunk import Tuning

    tuning = Tuning(rows, columns, depth=4, lines=16, steps=steps)
    with mock.patch(f"{BACKEND}.default_tuning", return_value=tuning):
        yield


class Poison(TorchDispatchMode):
    """Memory that nothing has written yet holds NaN, or the largest integer."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("empty", "new_empty", "empty_like", "empty_strided"):
            integers = not out.is_floating_point() and out.dtype != torch.bool
            out.fill_(torch.iinfo(out.dtype).max if integers else torch.nan)
        return out


Scenario = Callable[[str], Any]

CHANNELS = "lightning_obc.kernels.obs_sweep.triton_channels"
CHANNEL_CASES = [
    *(Case(*shape, zeros=zeros) for shape in ((1, 3, 9, 1), (2, 2, 5, 3)) for zeros in ("none", "columns", "weights")),
    Case(1, 1, 1, 1),
    Case(3, 2, 1, 9),
    Case(1, 2, 65, 1, dtype=torch.float32),
]


def channels(case: Case) -> Scenario:
    """Panels of a few lines and programs of a few channels, so that small problems have many of both."""

    def scenario(device: str) -> ChannelOutput:
        lines = 3 * case.positions if case.channels < 60 else 8
        held = 2 * 4 ** (case.positions - 1).bit_length() if case.channels < 60 else 2048
        with mock.patch.multiple(CHANNELS, LINES=lines, _HELD=held), Poison():
            return case.run("triton", device)

    return scenario


def broken_channels(device: str) -> ChannelOutput:
    problem = Case(2, 3, 7, 2).problem()
    problem.inverse[1, 5, 5] = -1.0
    there = SweepInput(*(None if t is None else t.to(device) for t in vars(problem).values()))
    found = sweep_channels(there, 7, 7, backend="triton")
    return ChannelOutput(*(tensor.cpu() for tensor in vars(found).values()))


def waits_of_channels(device: str) -> list[str]:
    watched = Waits()
    with mock.patch.multiple(CHANNELS, LINES=4), watched:
        Case(1, 2, 12).run("triton", device)
    return watched.names


def parity_problem(shape: tuple[int, int, int], keep: float | None, dtype: torch.dtype) -> SweepInput:
    return make_problem(*shape, keep=keep, dtype=dtype)


def parity(mode: Mode, shape: tuple[int, int, int], keep: float | None, dtype: torch.dtype) -> Scenario:
    def scenario(device: str) -> SweepOutput:
        with small_tiles(steps=9 if mode.block else 6), Poison():
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
    weight = torch.zeros(1, 3, 16)
    weight[0, 1] = 0.5
    weight[0, 2] = torch.tensor([0.5, 0.25]).repeat(8)
    eye = torch.eye(16)[None]
    return SweepInput(weight, eye, eye.double())


def ties(mode: Mode) -> Scenario:
    def scenario(device: str) -> SweepOutput:
        with small_tiles():
            return solve(ties_problem(), mode, device)

    return scenario


def scarce_problem(mode: Mode) -> SweepInput:
    """Fewer samples than columns: float32 needs restarts. The oracle sees the same rounded weights.

    Of this size every seed of six needs them by far, whatever the processor's rounding: without, 77 to 95 % of the
    order stay, and the worst row's loss is off by a quarter to 27 times itself.
    """
    problem = make_problem(1, 16, 40, damping=1e-7, samples=20, seed=1)
    return replace(problem, weight=problem.weight.float(), inverse=problem.inverse.float())


def scarce(device: str, mode: Mode = MODES[0], ratio: float | None = None) -> SweepOutput:
    module = "lightning_obc.kernels.obs_sweep.triton_chunk"
    ratio = WORN_FLOAT32 if ratio is None else ratio
    with small_tiles(16, 32, 12), mock.patch(f"{module}.WORN_FLOAT32", ratio):
        return solve(scarce_problem(mode), mode, device)


def broken_problem() -> SweepInput:
    problem = make_problem(2, 3, 12, dtype=torch.float32)
    problem.inverse[1, 9, 9] = -1.0
    return problem


def broken(mode: Mode) -> Scenario:
    def scenario(device: str) -> SweepOutput:
        with small_tiles(8):
            return solve(broken_problem(), mode, device)

    return scenario


def twice_and_in_small_chunks(mode: Mode) -> Scenario:
    def scenario(device: str) -> list[SweepOutput]:
        problem = make_problem(2, 1, 9, dtype=torch.float32, keep=0.9)
        with small_tiles(columns=16):
            return [solve(problem, mode, device, memory_budget=budget) for budget in (None, None, 1)]

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
            out = solve(make_problem(1, 7, 3), MODES[0], device)
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


def waits(device: str, block: bool = False) -> dict[str, list[str]]:
    """Host waits while a chunk is queued, and from then to the end of the sweep."""
    from lightning_obc.kernels.obs_sweep import triton_backend

    run = triton_backend.run
    queued, whole = Waits(), Waits()

    def watched(job: Any, chunk: Any) -> None:
        with queued:
            run(job, chunk)

    problem = to(make_problem(1, 4, 16, dtype=torch.float32), device)
    groups = NMGroups(torch.arange(16, device=device) // 4, torch.full((4,), 2, device=device))
    with small_tiles(), mock.patch.object(triton_backend, "run", watched), whole:
        if block:
            triton_backend.sweep_blocks(problem, torch.arange(16, device=device).view(-1, 4), 10**9)
        else:
            triton_backend.sweep(SweepPlan(problem, groups, None, 8, 10**9))
    return {"queued": queued.names, "whole": whole.names}


def few_left(device: str, mode: Mode = MODES[0]) -> dict[str, Any]:
    """Two panels of 16 columns leave 2 of 34: few enough for rows to start anew."""
    from lightning_obc.kernels.obs_sweep import triton_backend

    with (
        small_tiles(4, 32, 16),
        mock.patch.object(triton_backend, "restarted", wraps=triton_backend.restarted) as again,
    ):
        return {"out": solve(few_left_problem(), mode, device), "restarts": again.call_count}


def few_left_problem() -> SweepInput:
    return make_problem(1, 3, 34, dtype=torch.float32)


def strided(device: str) -> list[SweepOutput]:
    problem = make_problem(2, 3, 6, dtype=torch.float32, keep=0.8)
    turned = SweepInput(*(t.mT.contiguous().mT for t in vars(problem).values()))
    before = [t.clone() for t in vars(turned).values()]
    with small_tiles():
        outs = [solve(problem, MODES[5], device), solve(turned, MODES[5], device)]
    assert all(torch.equal(a, b) for a, b in zip(before, vars(turned).values(), strict=True)), "an input was changed"
    return outs


def parity_name(mode: Mode, shape: tuple[int, int, int], keep: float | None, dtype: torch.dtype) -> str:
    return f"parity {mode.name} {'x'.join(map(str, shape))} keep={keep} {str(dtype).removeprefix('torch.')}"


def engine_cases() -> dict[str, Callable[[Tensor, Tensor, str], list[Tensor]]]:
    """Every pattern through the functions on plain matrices: weights of what comes back, several where one sweep gives
    several."""

    def prune(pattern: Any) -> Callable[[Tensor, Tensor, str], list[Tensor]]:
        return lambda w, h, backend: [obs.prune(w, h, pattern, backend=backend).weight]

    def quantize(grid: IntGrid) -> Callable[[Tensor, Tensor, str], list[Tensor]]:
        return lambda w, h, backend: [obs.quantize(w, h, grid, order="greedy", backend=backend).weight]

    def joint(w: Tensor, h: Tensor, backend: str) -> list[Tensor]:
        sparse = obs.prune(w, h, "2:4", backend=backend).weight
        return [sparse, *quantize(IntGrid(3))(sparse, h, backend)]

    def levels(w: Tensor, h: Tensor, backend: str) -> list[Tensor]:
        sweep = obs.sweep(w, h, backend=backend)
        return [sweep.solution(share).weight for share in (0.25, 0.5, 0.75)]

    def block_levels(w: Tensor, h: Tensor, backend: str) -> list[Tensor]:
        sweep = obs.sweep_blocks(w, h, 2, backend=backend)
        return [sweep.solution(share).weight for share in (0.25, 0.5, 0.75)]

    return {
        "unstructured levels": levels,
        "block levels": block_levels,
        "2:3": prune(NM(2, 3)),
        "4:6": prune(NM(4, 6)),
        "block 3": prune(Block(3, 0.5)),
        "grid of the tensor": quantize(IntGrid(3, granularity="tensor")),
        "grids of groups, symmetric": quantize(IntGrid(4, True, "group", 4)),
        "zeros, then codes": joint,
        "channels": lambda w, h, backend: [
            level.weight for level in obs.sweep_structured(w, h, channels=4, backend=backend).solutions((0.25, 0.75))
        ],
    }


def engine_problem() -> tuple[Tensor, Tensor]:
    problem = make_problem(1, 3, 12)
    return problem.weight[0].float(), problem.hessian[0]


def engine(name: str, device: str) -> list[Tensor]:
    weight, hessian = engine_problem()
    # A tensor that is made without its device lands on ``meta``, and fails beside the others.
    with torch.device("meta"):
        return [t.cpu() for t in engine_cases()[name](weight.to(device), hessian.to(device), "triton")]


def rehearsal(device: str) -> dict[str, Any]:
    """What every part of ``benchmarks/gpu.py`` finds in its rehearsal, but for the tests that it runs."""
    sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
    import gpu_parts
    from gpu_report import SECTIONS

    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, part in gpu_parts.PARTS.items():
            if name != "tests":
                place = gpu_parts.Place(True, found, Path(folder) / "found.json")
                part(place)
                found[name] = json.loads(place.saved.read_text())
    return found | {"report": {name: SECTIONS[name](part) for name, part in found.items()}}


SCENARIOS: dict[str, Scenario] = {
    **{parity_name(*case): parity(*case) for case in GRID},
    "default launch": default_launch(MODES[1]),
    **{f"engine {name}": partial(engine, name) for name in engine_cases()},
    "irregular groups": run_irregular_groups,
    **{f"ties {mode.name}": ties(mode) for mode in SOME},
    **{f"scarce {mode.name}": partial(scarce, mode=mode) for mode in SOME},
    **{f"scarce without restarts {mode.name}": partial(scarce, mode=mode, ratio=1e30) for mode in (SOME[0], SOME[3])},
    **{f"broken {mode.name}": broken(mode) for mode in (SOME[0], SOME[3])},
    **{f"twice {mode.name}": twice_and_in_small_chunks(mode) for mode in SOME},
    "out of memory": out_of_memory,
    "out of memory for one row": out_of_memory_for_one_row,
    "waits": waits,
    "waits of blocks": partial(waits, block=True),
    "strided": strided,
    **{f"few left {mode.name}": partial(few_left, mode=mode) for mode in FEW_LEFT_MODES},
    **{f"channels {case}": channels(case) for case in CHANNEL_CASES},
    "broken channels": broken_channels,
    "waits of channels": waits_of_channels,
    "rehearsal": rehearsal,
}


def call_inside_a_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
    """What a kernel's own functions become. The launch has put the interpreter's operations in place; Triton does it
    again at every call, which takes a third of the time."""
    return self.rewrite()(*args, **kwargs)


def main(path: str) -> None:
    """Run every scenario under the interpreter; a scenario that raises leaves its traceback."""
    from triton.runtime.interpreter import InterpretedFunction

    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with mock.patch.object(InterpretedFunction, "__call__", call_inside_a_launch):
        for name, scenario in SCENARIOS.items():
            started = time.perf_counter()
            try:
                results[name] = scenario("cpu")
            except Exception:
                results[name] = traceback.format_exc()
                print(results[name])
            print(f"{time.perf_counter() - started:6.2f} s  {name}")
    torch.save(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
