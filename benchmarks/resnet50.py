"""The full unstructured sweep of every convolution and the classifier of ResNet-50, layer by layer, nothing scaled.

    python benchmarks/resnet50.py --name resnet50_2cores

Inputs are random, of the layers' shapes. Timed are the float64 inverse of the damped Hessian and the sweep of all rows.
One row of each layer is judged in float64 (:mod:`greedy`); a row that fails ends the run without a table. Results are
written after every shape, and ``--resume`` goes on behind them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import greedy
import torch
from machine import describe, peak_memory
from sweep import MIB, ParityError, make_problem

from lightning_obc.kernels.obs_sweep import SweepInput, sweep_prune
from lightning_obc.linalg import safe_inverse

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Shape:
    """All layers of one shape. Seconds are sums over the layers."""

    rows: int
    columns: int
    layers: int
    inverse_seconds: float
    sweep_seconds: float
    process_seconds: float
    peak_mib: float
    right_choices: float
    loss_error: float

    @property
    def flop(self) -> float:
        return 2 / 3 * self.layers * self.rows * self.columns**3


def shapes() -> list[tuple[int, int, int]]:
    """``(rows, columns, layers)`` of every distinct shape, the quickest first."""
    counts: dict[tuple[int, int], int] = {(64, 147): 1, (1000, 2048): 1}

    def add(rows: int, columns: int, layers: int) -> None:
        counts[rows, columns] = counts.get((rows, columns), 0) + layers

    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        add(width, inputs, 1)
        add(width, 4 * width, blocks - 1)
        add(width, 9 * width, blocks)
        add(4 * width, width, blocks)
        add(4 * width, inputs, 1)
        inputs = 4 * width
    found = [(rows, columns, layers) for (rows, columns), layers in counts.items()]
    return sorted(found, key=lambda shape: shape[0] * shape[1] ** 3)


def measure(rows: int, columns: int, layers: int, backend: str) -> Shape:
    """Sweep every layer of a shape."""
    inverse_seconds = sweep_seconds = process_seconds = peak = worst = 0.0
    right = 1.0
    for layer in range(layers):
        problem, factored = prepare(rows, columns, layer)
        inverse_seconds += factored
        outputs = []
        started, process = time.perf_counter(), time.process_time()
        used = peak_memory(lambda: outputs.append(sweep_prune(problem, backend=backend)))  # noqa: B023
        sweep_seconds += time.perf_counter() - started
        process_seconds += time.process_time() - process
        peak = max(peak, used / MIB)
        out = outputs[0]
        if out.any_broken:
            raise ParityError(f"{rows}x{columns}: broken rows")
        row = rows // 2
        share, error = greedy.judge(problem.hessian[0], problem.weight[0, row], out.order[0, row], out.losses[0, row])
        right, worst = min(right, share), max(worst, error)
        # Single float32 losses carry the 1e-4 that sweep losses are good for; the weights' loss is measured in float64.
        if share < 0.99 or error > 1e-4:
            raise ParityError(f"{rows}x{columns}: {share:.2%} of the choices, loss off by {error:.1e}")
    return Shape(rows, columns, layers, inverse_seconds, sweep_seconds, process_seconds, peak, right, worst)


def prepare(rows: int, columns: int, seed: int) -> tuple[SweepInput, float]:
    """A problem, and the seconds that inverting its Hessian took."""
    problem = make_problem(rows, columns, seed)
    started = time.perf_counter()
    safe_inverse(problem.hessian, 0.0)
    return problem, time.perf_counter() - started


def table(measured: list[Shape]) -> Iterator[str]:
    """Markdown."""
    yield "| rows × columns | layers | inverse [s] | sweep [s] | sweep, CPU time [s] | Gflop/s | peak memory [MiB] |"
    yield "|" + "---|" * 7
    for shape in measured:
        seconds = f"{shape.inverse_seconds:.2f} | {shape.sweep_seconds:.2f} | {shape.process_seconds:.2f}"
        speed = shape.flop / shape.sweep_seconds / 1e9
        yield f"| {shape.rows}×{shape.columns} | {shape.layers} | {seconds} | {speed:.0f} | {shape.peak_mib:.0f} |"


def report(measured: list[Shape], complete: bool, note: str = "") -> str:
    wall, cpu = sum(s.sweep_seconds for s in measured), sum(s.process_seconds for s in measured)
    inverses, layers = sum(s.inverse_seconds for s in measured), sum(s.layers for s in measured)
    right, error = min(s.right_choices for s in measured), max(s.loss_error for s in measured)
    head = (
        f"{describe()}, wall clock\n\n"
        + (f"{note}\n\n" if note else "")
        + ("" if complete else "**Interrupted: not all shapes.**\n\n")
    )
    foot = (
        f"\n\n{layers} layers: sweeps {wall:.0f} s = {wall / 60:.1f} min (CPU time {cpu:.0f} s), "
        f"inverses {inverses:.0f} s.\n"
        f"Gflop/s count ⅔·R·d³. Judged in float64, a row of each layer: {right:.2%} or more of its choices are the "
        f"cheapest column, summed losses within {error:.1e}.\n"
    )
    return head + "\n".join(table(measured)) + foot


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--resume", action="store_true", help="keep the shapes that the results of NAME hold")
    parser.add_argument("--note", default="", help="what the reader should know about the machine")
    parser.add_argument("--name", default="resnet50", help="write benchmarks/results/NAME.md and NAME.json")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    plan, begun = shapes(), time.perf_counter()
    measured = earlier(args.name) if args.resume else []
    work = [rows * columns**3 * layers for rows, columns, layers in plan]
    for at, shape in enumerate(plan[len(measured) :], len(measured)):
        try:
            measured.append(measure(*shape, args.backend))
        except ParityError as error:
            print(f"parity is red, no figures: {error}", file=sys.stderr)
            return 1
        text = report(measured, len(measured) == len(plan), args.note)
        write(args.name, text, measured)
        elapsed = time.perf_counter() - begun
        print(f"{shape}: {elapsed:.0f} s so far, {sum(work[: at + 1]) / sum(work):.1%} of the work", flush=True)
    print(text)
    return 0


def earlier(name: str) -> list[Shape]:
    """The shapes of an interrupted run."""
    stored = json.loads((FOLDER / f"{name}.json").read_text())
    return [Shape(**shape) for shape in stored["shapes"]]


def write(name: str, text: str, measured: list[Shape]) -> None:
    (FOLDER / f"{name}.md").write_text(text)
    body = {"machine": describe(), "shapes": [asdict(shape) for shape in measured]}
    (FOLDER / f"{name}.json").write_text(json.dumps(body, indent=1))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
