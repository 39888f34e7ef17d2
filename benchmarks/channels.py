"""Time the sweep over input channels on a CPU: the compiled backend beside torch's, which ``"auto"`` chooses between.

    python benchmarks/channels.py --threads 1 --clock cpu --name channels_1core

A shape is rows × channels × kernel positions; with ``z`` behind it a third of the weights are zero already, others in
every row, so that each row has an inverse of its own. Nothing is printed unless both backends take the same channels at
the same losses, to 1e-8, and the float64 oracle does on the first steps. Backends run in turns; times are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from machine import Clock, describe, seconds
from sweep import CLOCKS, ParityError, make_problem

from lightning_obc.kernels.obs_sweep import ChannelOutput, SweepInput, channel_backend, sweep_channels

FOLDER = Path(__file__).parent / "results"
SHAPES = [
    *("64x3x49", "64x3x1", "16x8x25", "16x15x25", "16x16x25", "16x24x25", "16x32x25", "16x64x25"),
    *("64x8x9", "64x15x9", "64x16x9", "64x32x9", "64x64x9", "128x128x9", "64x64x1", "256x256x1", "512x1024x1"),
    *("16x16x16", "16x64x16", "16x32x49", "8x4x9z", "8x16x9z", "8x32x9z", "4x8x25z", "4x16x25z", "4x64x25z"),
]


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    shape: str
    numba: float
    torch: float
    chosen: str

    @property
    def ratio(self) -> float:
        return self.torch / self.numba


@dataclass(frozen=True)
class Case:
    """A layer, and how to sweep it."""

    problem: SweepInput
    channels: int
    own: bool

    def run(self, backend: str, steps: int | None = None) -> ChannelOutput:
        steps = self.channels if steps is None else min(steps, self.channels)
        return sweep_channels(self.problem, self.channels, steps, own_inverses=self.own, backend=backend)


def case(shape: str) -> Case:
    rows, channels, positions = (int(size) for size in shape.removesuffix("z").split("x"))
    own, plain = shape.endswith("z"), make_problem(rows, channels * positions)
    # Float32 products are not symmetric to the last digit, and backends read different triangles.
    hessian = (plain.hessian + plain.hessian.mT) / 2
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    keep = torch.rand(plain.weight.shape, generator=torch.Generator().manual_seed(1)) > 1 / 3 if own else None
    weight = plain.weight.double() if keep is None else plain.weight.double() * keep
    return Case(SweepInput(weight, inverse, hessian, keep), channels, own)


def check(shape: str, case: Case) -> None:
    """Both backends against each other, and against the oracle on the first two steps.

    Raises:
        ParityError: They differ.
    """
    found, other, oracle = case.run("numba"), case.run("torch"), case.run("naive", 2)
    for name, one, two in (("torch", found, other), ("naive", found, oracle)):
        steps = two.order.shape[1]
        error = (one.losses[:, :steps] / two.losses - 1).abs().max().item()
        if bool(one.broken.any()) or not torch.equal(one.order[:, :steps], two.order) or not error <= 1e-8:
            raise ParityError(f"{shape} against {name}: losses off by {error:.1e}, or another order")


def measure(shape: str, repeats: int, clock: Clock) -> Line:
    here = case(shape)
    check(shape, here)
    times: dict[str, list[float]] = {"numba": [], "torch": []}
    for _ in range(repeats):
        for backend, taken in times.items():
            taken.append(seconds(partial(here.run, backend), clock))
    positions = here.problem.weight.shape[2] // here.channels
    chosen = channel_backend("auto", "cpu", positions, here.channels, here.own)
    return Line(shape, statistics.median(times["numba"]), statistics.median(times["torch"]), chosen)


def report(lines: list[Line], clock: str) -> str:
    head = "| rows × channels × positions | numba [ms] | torch [ms] | torch ÷ numba | `auto` takes |"
    text = [f"{describe()}, {clock} clock", "", head, "|" + "---|" * 5]
    for line in lines:
        size = line.shape.removesuffix("z").replace("x", "×") + (", zeros" if line.shape.endswith("z") else "")
        cells = f"{line.numba * 1e3:.2f} | {line.torch * 1e3:.2f} | {line.ratio:.2f} | {line.chosen}"
        text.append(f"| {size} | {cells} |")
    return "\n".join(text) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="RxCxS")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--name", help="write benchmarks/results/NAME.md and NAME.json")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    try:
        lines = [measure(shape, args.repeats, CLOCKS[args.clock]) for shape in args.shapes]
    except ParityError as error:
        print(f"parity is red, no figures: {error}", file=sys.stderr)
        return 1
    text = report(lines, args.clock)
    print(text)
    if args.name:
        body = {"machine": describe(), "clock": args.clock, "lines": [asdict(line) for line in lines]}
        write: Callable[[str, str], int] = lambda end, text: (FOLDER / f"{args.name}{end}").write_text(text)  # noqa: E731
        write(".md", text)
        write(".json", json.dumps(body, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
