"""What the sweeps launch on a GPU, without one.

Their launch code runs on a CPU, and Triton's own specialisation of every launch is kept instead of being launched. So a
kernel is compiled ahead of time exactly as a device would get it.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_obc.kernels.obs_sweep import GridInput, NMGroups, SweepInput, triton_channels, triton_chunk
from lightning_obc.kernels.obs_sweep import triton_backend as backend
from lightning_obc.kernels.obs_sweep.channels import ChannelPlan
from lightning_obc.kernels.obs_sweep.types import SweepPlan

# Bytes of shared memory that a program can have on an H100 or H200.
MOST_SHARED = 227 * 1024
# What of the compiler's options a launch of ours sets.
_OPTIONS = ("num_warps", "enable_fp_fusion", "maxnreg")


@dataclass(frozen=True)
class Launch:
    """A kernel as some launches specialise it.

    Attributes:
        kernel, sweep: Names.
        columns: Of the first layer that launched it.
        meta: Constants of the launch by name.
        compiled: What Triton was about to compile, for its compiler.
    """

    kernel: str
    sweep: str
    columns: int
    meta: dict[str, Any]
    compiled: tuple[Any, dict[str, Any]]

    @property
    def warps(self) -> int:
        return int(self.compiled[1]["num_warps"])


class Resources(NamedTuple):
    """Registers of a thread, bytes that it spills (stores and loads), and bytes of shared memory of a program."""

    registers: int
    spilled: int
    shared: int


class _Driver:
    """As much of a driver as a launch asks for before it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def recording(capability: int) -> Iterator[Callable[[str, int, Callable[[], Any]], list[Launch]]]:
    """Yields ``record(sweep, columns, work)``, which returns the launches of ``work`` that were not seen before."""
    seen: set[tuple[str, str]] = set()
    driver, hook = triton.runtime.driver, knobs.runtime.jit_cache_hook

    def record(sweep: str, columns: int, work: Callable[[], Any]) -> list[Launch]:
        found: list[Launch] = []

        def instead(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
            key = (fn.name, str(compile["key"]))
            if key not in seen:
                seen.add(key)
                names = fn.jit_function.arg_names
                meta = {names[at[0]]: value for at, value in compile["constants"].items() if len(at) == 1}
                found.append(Launch(fn.name.rsplit(".")[-1], sweep, columns, meta, (fn.jit_function, compile)))
            return True

        knobs.runtime.jit_cache_hook = instead
        # The products between panels launch nothing of ours, and would take a CPU minutes. Rows that start anew launch
        # the same, and would do it without end where nothing is eliminated.
        with mock.patch.multiple(triton_chunk, _flush=mock.DEFAULT, REFRESH=1 << 60):
            work()
        return found

    driver.set_active(_Driver(capability))
    try:
        yield record
    finally:
        knobs.runtime.jit_cache_hook = hook
        # ``reset_active`` would ask for a device.
        driver._active = None


def resources(launch: Launch, capability: int) -> Resources:
    """Compile; no device is needed."""
    function, compile = launch.compiled
    source = ASTSource(function, compile["signature"], compile["constants"], compile["configs"][0])
    options = json.loads(compile["specialization_data"])["options"]
    log, target = io.StringIO(), GPUTarget("cuda", capability, 32)
    # The log is written by the compiler alone, not by its cache.
    with knobs.compilation.scope(), knobs.nvidia.scope(), redirect_stdout(log):
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=target, options={name: options[name] for name in _OPTIONS})
    registers = int(re.findall(r"Used (\d+) registers", log.getvalue())[0])
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", log.getvalue()))
    return Resources(registers, spilled, compiled.metadata.shared)


# ------------------------------------------------------------------------------------------------- the sweeps
def _problem(columns: int, dtype: torch.dtype = torch.float32, zeros: bool = False) -> SweepInput:
    """Two rows: a launch is specialised neither to their number nor to what they hold."""
    eye = torch.eye(columns, dtype=torch.float64)[None]
    keep = torch.ones(1, 2, columns, dtype=torch.bool) if zeros else None
    return SweepInput(torch.ones(1, 2, columns, dtype=dtype), eye.to(dtype), eye, keep)


def rows(columns: int, pattern: str = "", dtype: torch.dtype = torch.float32, zeros: bool = False) -> None:
    """The sweep row by row: unstructured, ``"2:4"`` or ``"4 bits"``."""
    problem, groups, grid, steps = _problem(columns, dtype, zeros), None, None, columns
    if pattern == "2:4":
        groups = NMGroups(torch.arange(columns) // 4, torch.full((-(-columns // 4),), 2))
        steps = 2 * len(groups.quota)
    if pattern == "4 bits":
        grid = GridInput(torch.ones_like(problem.weight), torch.full_like(problem.weight, 8.0), 15)
    backend.sweep(SweepPlan(problem, groups, grid, min(columns, steps), 10**9))


def blocks(columns: int, size: int = 4, dtype: torch.dtype = torch.float32) -> None:
    members = torch.arange(columns + -columns % size)
    backend.sweep_blocks(_problem(columns, dtype), torch.where(members < columns, members, -1).view(-1, size), 10**9)


def channels(columns: int, positions: int = 1, own: bool = False) -> None:
    """Two panels: later ones launch the same but for narrower choices."""
    count = columns // positions
    steps = min(count, 2 * max(1, triton_channels.LINES // positions))
    triton_channels.sweep(ChannelPlan(_problem(columns, torch.float64), count, steps, own))


SWEEPS: dict[str, Callable[[int], None]] = {
    "unstructured": rows,
    "unstructured with zeros": partial(rows, zeros=True),
    "4 bits": partial(rows, pattern="4 bits"),
    "4 bits with zeros": partial(rows, pattern="4 bits", zeros=True),
    "2:4": partial(rows, pattern="2:4"),
    "2:4 with zeros": partial(rows, pattern="2:4", zeros=True),
    "blocks of 4": blocks,
}
# Other widths and float64, on one shape; structured by kernel positions.
OTHERS: list[tuple[str, int, Callable[[int], None]]] = [
    ("blocks of 2", 576, partial(blocks, size=2)),
    ("blocks of 8", 576, partial(blocks, size=8)),
    ("4 bits with zeros, float64", 576, partial(rows, pattern="4 bits", dtype=torch.float64, zeros=True)),
    ("blocks of 4, float64", 576, partial(blocks, dtype=torch.float64)),
]
STRUCTURED = {1: (2048, 256), 9: (4608, 576), 16: (256,), 25: (400,), 49: (147,), 64: (512,)}
