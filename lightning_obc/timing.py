"""How long a stage takes to solve a layer on this machine, from its own solver on four small problems.

Index legend: ``g`` problems of a layer, ``R`` rows, ``d`` columns.

A problem costs ``p·d³`` for what its rows share (factorisation and inverse in float64) and ``q·d³`` a row for the
sweep, or ``q·d²`` a row for solvers that go through the columns in one order. A layer also costs a fixed time, and one
per column. Refinement is measured on top; it costs ``d³`` a row for masks and ``d²`` for codes. ``damping="auto"``
solves a sample of the rows at several dampings on both halves.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_obc.hessian import Hessian
from lightning_obc.obs.damping import CANDIDATES, ROWS
from lightning_obc.obs.speed import sweep_flops
from lightning_obc.patterns import NM, Block
from lightning_obc.solvers import parse_refine
from lightning_obc.solving import solve_layer
from lightning_obc.specs import Prune, Quantize

# Columns of a narrow, a middle and a wide problem. The oracle eliminates one weight at a time.
_COLUMNS, _ORACLE_COLUMNS = (32, 128, 512), (16, 32, 64)
_ROWS, _MORE_ROWS, _ENTRIES = 16, 64, 2048
# A run shorter than this is repeated: the first one also pays for memory and code that are new.
_SHORT = 0.2


@dataclass(frozen=True)
class Cost:
    """Seconds of one step: ``layer + column·d + g·problem·d³ + g·R·row·d^power``."""

    layer: float
    column: float
    problem: float
    row: float
    power: int

    def seconds(self, groups: int, rows: int, columns: int) -> float:
        shared = self.layer + self.column * columns + groups * self.problem * float(columns) ** 3
        return shared + groups * rows * self.row * float(columns) ** self.power


@dataclass(frozen=True)
class SolveTime:
    """Times of one stage on one device.

    Attributes:
        stage: The stage, with the settings of the layers that it is for.
        solve: One solve of a layer.
        refining: What refinement adds, apart from further solves; None without.
        lookup: Seconds per weight of an embedding; 0 unless it was measured.
    """

    stage: Prune | Quantize
    solve: Cost
    refining: Cost | None = None
    lookup: float = 0.0

    @property
    def flops_per_second(self) -> float | None:
        """Speed of the sweeps, counted as ⅔·d³ a row; None with other solvers."""
        return 2 / 3 / max(self.solve.row, 1e-18) if self.stage.solver == "obs" else None

    def seconds(self, groups: int, rows: int, columns: int) -> float:
        """About how long a layer of ``g`` problems ``[R, d]`` takes."""
        total = once = self.solve.seconds(groups, rows, columns)
        if self.stage.damping == "auto":
            sampled = min(rows, max(1, ROWS // groups))
            total += 2 * len(CANDIDATES) * self.solve.seconds(groups, sampled, columns)
        refine = parse_refine(self.stage.refine)
        if refine is None or self.refining is None:
            return total
        solves, searching = (2 if refine.judge else 0), self.refining.seconds(groups, rows, columns)
        if refine.seconds is not None:
            searching = min(searching, (1 + solves) * refine.seconds)
        return total + solves * once + searching

    def lookup_seconds(self, rows: int, columns: int) -> float:
        """About how long an embedding ``[R, d]`` takes, whose rows are rounded."""
        return self.solve.layer + self.lookup * rows * columns


def sweeps(stage: Prune | Quantize, groups: int, rows: int) -> float:
    """Full sweeps of a layer that a stage takes: one, and what choices of damping and of refinement add."""
    if stage.solver != "obs":
        return 0.0
    sampled = min(1.0, max(1, ROWS // groups) / rows)
    choosing = 2 * len(CANDIDATES) * sampled if stage.damping == "auto" else 0.0
    refine = parse_refine(stage.refine)
    return 1 + choosing + (2 if refine is not None and refine.judge else 0)


def layer_flops(stage: Prune | Quantize, groups: int, rows: int, columns: int) -> float:
    """Floating point operations of these sweeps."""
    return sweeps(stage, groups, rows) * sweep_flops(groups, rows, columns)


def measured_time(stage: Prune | Quantize, device: torch.device | str = "cpu", *, lookups: bool = False) -> SolveTime:
    """Time a stage on this machine; takes about as long as a few sweeps of 64 rows and 512 columns.

    Args:
        stage: The stage, with the settings of the layers that it is for.
        device: Where to solve.
        lookups: Also time the rounding of embeddings.

    Raises:
        BackendError: The stage's backend is unknown or cannot run there.
    """
    greedy: Any = replace(stage, damping=0.01 if stage.damping == "auto" else stage.damping, refine=False)
    unit = _unit(stage)
    sizes = _ORACLE_COLUMNS if stage.backend == "naive" and stage.solver == "obs" else _COLUMNS
    narrow, middle, wide = (max(unit, size // unit * unit) for size in sizes)
    _timed(greedy, _ROWS, narrow, device)
    least, more, few = (_timed(greedy, _ROWS, columns, device) for columns in (narrow, middle, wide))
    many = _timed(greedy, _MORE_ROWS, wide, device)
    power = 3 if stage.solver == "obs" else 2
    row = max(0.0, many - few) / ((_MORE_ROWS - _ROWS) * wide**power)
    column = max(0.0, more - least - _ROWS * row * (middle**power - narrow**power)) / max(1, middle - narrow)
    problem = max(0.0, few - least - (wide - narrow) * column - _ROWS * row * wide**power) / wide**3
    found = SolveTime(stage, Cost(least, column, problem, row, power))
    if lookups:
        some, all_ = (_timed(greedy, rows, middle, device, lookup=True) for rows in (_ROWS, _ENTRIES))
        found = replace(found, lookup=max(0.0, all_ - some) / ((_ENTRIES - _ROWS) * middle))
    refine = parse_refine(stage.refine)
    if refine is None:
        return found
    searching: Any = replace(greedy, refine=replace(refine, seconds=None))
    return replace(found, refining=_refining(searching, found.solve, narrow, middle, device))


def _refining(stage: Prune | Quantize, solve: Cost, narrow: int, middle: int, device: torch.device | str) -> Cost:
    refine = parse_refine(stage.refine)
    solves = 3 if refine is not None and refine.judge else 1

    def added(rows: int, columns: int) -> float:
        return max(0.0, _timed(stage, rows, columns, device) - solves * solve.seconds(1, rows, columns))

    least, few, many = added(_ROWS, narrow), added(_ROWS, middle), added(_MORE_ROWS, middle)
    power = 3 if isinstance(stage, Prune) else 2
    row = max(0.0, many - few) / ((_MORE_ROWS - _ROWS) * middle**power)
    column = max(0.0, few - least - _ROWS * row * (middle**power - narrow**power)) / max(1, middle - narrow)
    return Cost(least, column, 0.0, row, power)


def _unit(stage: Prune | Quantize) -> int:
    """Columns that the stage's pattern or grid takes together."""
    parsed = stage.parsed
    if isinstance(parsed, NM):
        return parsed.m
    if isinstance(parsed, Block):
        return parsed.size
    return getattr(parsed, "group_size", None) or 1


def _timed(stage: Prune | Quantize, rows: int, columns: int, device: torch.device | str, lookup: bool = False) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, rows, columns, generator=generator).to(device)
    inputs = torch.randn(2, 1, columns, 2 * columns, generator=generator, dtype=torch.float64).to(device)
    hessian = Hessian(inputs @ inputs.mT, (columns, columns))
    if lookup:
        counts = torch.ones(2, 1, rows, dtype=torch.float64, device=device)
        hessian = Hessian(torch.zeros_like(hessian.halves), hessian.samples, rows=counts)
    seconds: list[float] = []
    while not seconds or (len(seconds) < 2 and seconds[0] < _SHORT):
        started = time.perf_counter()
        # The loss is a number, which the device must have finished.
        assert solve_layer(stage, weight, hessian, columns).loss >= 0
        seconds.append(time.perf_counter() - started)
    return min(seconds)
