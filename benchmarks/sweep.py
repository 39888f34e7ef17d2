"""Time the OBS sweep against a rank-1 update per weight and against this machine's float32 matrix speed.

    python benchmarks/sweep.py                        # 64x576, rank-1 included
    python benchmarks/sweep.py --shapes 128x1152 16x2304 --no-rank1
    python benchmarks/resnet50.py                     # all layers of a network

On a machine that others use too, ``--threads 1 --clock cpu`` counts this process's own time, and the ratios hold.

Nothing is printed unless the sweep just timed also agrees with the oracle, and with the rank-1 run where there is one.
"Share" is the time of ⅔·R·d³ flop at matrix speed divided by the sweep's time: above 1, the sweep is faster than that.
A whole sweep counts that many as long as both triangles are kept. 2:4 eliminates half of the columns, at most 7/12·R·d³
of it, and its refit adds R·d³/24.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import rank1
import torch
from machine import Clock, describe, matrix_speed, peak_memory, seconds

from lightning_obc.kernels.masked_refit import masked_refit
from lightning_obc.kernels.obs_sweep import (
    ColumnBlocks,
    GridInput,
    NMGroups,
    SweepInput,
    SweepOutput,
    sweep_blocks,
    sweep_prune,
    sweep_quantize,
)
from lightning_obc.linalg import safe_inverse

PATTERNS = ("unstructured", "quantize", "2:4 + refit", "blocks of 4")
MIB = 2**20
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    shape: str
    pattern: str
    seconds: float
    share: float
    rank1_ratio: float | None
    peak_mib: float
    order_agreement: float


def make_problem(rows: int, columns: int, seed: int = 0) -> SweepInput:
    """Rectified, correlated inputs, two samples per column, damping 1e-2."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(columns, 2 * columns, generator=generator)
    x = (x + mix @ x).clamp(min=0)
    result = safe_inverse((x @ x.mT / columns).double()[None], 1e-2)
    weight = torch.randn(1, rows, columns, generator=generator) / columns**0.5
    return SweepInput(weight, result.inverse.float(), result.damped_hessian)


class Case:
    """One pattern on one problem."""

    def __init__(self, pattern: str, problem: SweepInput, backend: str) -> None:
        columns = problem.weight.shape[2]
        self.pattern, self.problem, self.backend = pattern, problem, backend
        self.groups: NMGroups | None = None
        self.grid: GridInput | None = None
        self.blocks: ColumnBlocks | None = None
        if pattern.startswith("blocks"):
            self.blocks = ColumnBlocks(torch.arange(columns).view(-1, 4))
        if pattern.startswith("2:4"):
            group = torch.arange(columns) // 4
            self.groups = NMGroups(group, torch.bincount(group) // 2)
        if pattern == "quantize":
            low, high = problem.weight.amin(2, keepdim=True), problem.weight.amax(2, keepdim=True)
            scale = 0.8 * (high - low) / 15
            zero = torch.round(-0.8 * low / scale).clamp(0, 15)
            self.grid = GridInput(scale.expand_as(problem.weight), zero.expand_as(problem.weight), 15)

    def sweep(self, backend: str | None = None) -> SweepOutput:
        backend = backend or self.backend
        if self.blocks is not None:
            return sweep_blocks(self.problem, self.blocks, backend=backend)
        if self.grid is not None:
            return sweep_quantize(self.problem, self.grid, backend=backend)
        return sweep_prune(self.problem, groups=self.groups, backend=backend)

    def run(self) -> SweepOutput:
        """What is timed: the sweep, and for N:M the exact weights on its mask."""
        out = self.sweep()
        if self.groups is not None:
            masked_refit(self.problem.hessian, self.problem.weight, self.mask(out.order))
        return out

    def mask(self, order: torch.Tensor) -> torch.Tensor:
        # In NumPy, as the kernels' own checks: see lightning_obc.kernels.host.
        kept = np.ones(self.problem.weight.shape, np.bool_)
        np.put_along_axis(kept, order.numpy().astype(np.int64), False, 2)
        return torch.from_numpy(kept)

    def rank1(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.blocks is not None:
            return rank1.sweep_blocks(self.problem, self.blocks)
        order, losses = rank1.sweep(self.problem, groups=self.groups, grid=self.grid)
        if self.groups is not None:
            masked_refit(self.problem.hessian, self.problem.weight, self.mask(order[None]))
        return order, losses

    def first_rows(self, rows: int) -> Case:
        few = replace(self.problem, weight=self.problem.weight[:, :rows])
        return Case(self.pattern, few, self.backend)


class ParityError(RuntimeError):
    """The sweep is not right, so its speed is of no interest."""


def check(case: Case, out: SweepOutput, oracle_rows: int) -> float:
    """Compare the first rows with the float64 oracle; returns the share of equal steps."""
    few = case.first_rows(oracle_rows).sweep("naive")
    order, losses = out.order[:, :oracle_rows], out.losses[:, :oracle_rows].double().sum(-1)
    agreement = (order == few.order).double().mean().item()
    error = (losses / few.losses.double().sum(-1) - 1).abs().max().item()
    if out.any_broken or agreement < 0.99 or error > 1e-5:
        raise ParityError(f"{case.pattern}: {agreement:.2%} of the order, loss off by {error:.1e}")
    return agreement


def check_rank1(case: Case, out: SweepOutput, order: torch.Tensor, losses: torch.Tensor) -> None:
    agreement = (out.order[0] == order).double().mean().item()
    error = (out.losses[0].double().sum() / losses.double().sum() - 1).abs().item()
    if agreement < 0.98 or error > 1e-4:
        raise ParityError(f"{case.pattern} against rank-1: {agreement:.2%} of the order, loss off by {error:.1e}")


def measure(rows: int, columns: int, pattern: str, args: argparse.Namespace) -> Line:
    """Time one pattern on one shape, in alternation with the matrix product it is compared with."""
    clock = CLOCKS[args.clock]
    case = Case(pattern, make_problem(rows, columns), args.backend)
    out = case.run()
    agreement = check(case, out, min(rows, args.oracle_rows))
    times, speeds = [], []
    for _ in range(args.repeats):
        speeds.append(matrix_speed(repeats=1, clock=clock))
        # The product's worker threads spin for up to 20 ms before they sleep: they are not the sweep's.
        case.run()
        times.append(seconds(case.run, clock))
    speeds.append(matrix_speed(repeats=1, clock=clock))
    taken = statistics.median(times)
    ideal = 2 / 3 * rows * columns**3 / statistics.median(speeds)
    ratio = time_rank1(case, out, clock) / taken if args.rank1 else None
    peak = peak_memory(case.run) / MIB
    return Line(f"{rows}x{columns}", pattern, taken, ideal / taken, ratio, peak, agreement)


def time_rank1(case: Case, out: SweepOutput, clock: Clock) -> float:
    result: list[tuple[torch.Tensor, torch.Tensor]] = []
    taken = seconds(lambda: result.append(case.rank1()), clock)
    check_rank1(case, out, *result[0])
    return taken


def table(lines: list[Line]) -> str:
    """Markdown."""
    head = "| shape | pattern | time [s] | × rank-1 | share of matrix speed | peak memory [MiB] | same order |"
    text = [head, "|" + "---|" * 7]
    for line in lines:
        ratio = "–" if line.rank1_ratio is None else f"{line.rank1_ratio:.0f}"
        text.append(
            f"| {line.shape} | {line.pattern} | {line.seconds:.4g} | {ratio} | {line.share:.2f} "
            f"| {line.peak_mib:.0f} | {line.order_agreement:.2%} |"
        )
    return "\n".join(text)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["64x576"], metavar="RxD")
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), choices=PATTERNS)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-rank1", dest="rank1", action="store_false")
    parser.add_argument("--oracle-rows", type=int, default=2, help="rows that the float64 oracle checks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--name", help="write benchmarks/results/NAME.md and NAME.json")
    return parser.parse_args(arguments)


def lines(args: argparse.Namespace) -> list[Line]:
    shapes = [tuple(int(size) for size in shape.split("x")) for shape in args.shapes]
    return [measure(rows, columns, pattern, args) for rows, columns in shapes for pattern in args.patterns]


def report(measured: list[Line], args: argparse.Namespace) -> str:
    speed = matrix_speed(clock=CLOCKS[args.clock]) / 1e9
    return f"{describe()}, {args.clock} clock\n\nfloat32 matrix speed: {speed:.0f} Gflop/s\n\n{table(measured)}\n"


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    try:
        measured = lines(args)
    except ParityError as error:
        print(f"parity is red, no figures: {error}", file=sys.stderr)
        return 1
    text = report(measured, args)
    print(text)
    if args.name:
        write: Callable[[str, str], int] = lambda end, body: (  # noqa: E731
            Path(__file__).parent / "results" / f"{args.name}{end}"
        ).write_text(body)
        write(".md", text)
        write(".json", json.dumps({"machine": describe(), "lines": [asdict(line) for line in measured]}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
