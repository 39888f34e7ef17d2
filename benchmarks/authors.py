"""Our engine beside the authors' own code: the same layer, Hessian, damping and grid; the same result, or no speed.

    git clone https://github.com/IST-DASLab/OBC ~/OBC
    python -m benchmarks.authors --checkout ~/OBC                          # a random layer of 64x576
    python -m benchmarks.authors --checkout ~/OBC --networks random digits encoder --name authors
    python -m benchmarks.authors --checkout ~/OBC --gptq ~/gptq --sparsegpt ~/sparsegpt

On a machine that others use too, ``--threads 1 --clock cpu`` counts this process's own time, and the ratios hold.

The checkouts are the user's; this file calls them and holds nothing of them. They run in float32 on a CPU, as released
but for the adjustments that the page lists. What is compared, for each layer and pattern:

* which weights are zero, or which codes they have, row by row;
* the damped loss of each row, computed here in float64 from the weights that either returns;
* the loss that either code reports;
* the same once more with both in float64, on rows that differ and on the first ones, where rounding is no excuse;
* the time of the whole call, inverse, grid, elimination and final weights included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.authors_tasks import CASES, DAMPING, NETWORKS, Case, Layer
from benchmarks.machine import Clock, describe
from benchmarks.upstream import ADJUSTMENTS, NEEDED, Solved, Upstream, load, run
from lightning_obc import obs
from lightning_obc.files import write_whole
from lightning_obc.kernels.obs_sweep import compiled, panels
from lightning_obc.obs import LayerSolution

# In float64 both codes round at 1e-16; the condition of a damped Hessian and d steps in a row leave this much.
TWIN_TOLERANCE = 1e-8
# Near ties fall differently in two float32 codes, and a row then goes its own way: better or worse, by little together.
TOTAL = 0.02
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
_TOLERANCE = "OUTLIER_TOLERANCE"


@dataclass(frozen=True)
class Line:
    """One row of the table; see :data:`LEGEND`."""

    layer: str
    shape: str
    task: str
    rows_same: float
    weights_same: float
    loss_ratio: float
    their_report: float
    our_report: float
    differing: int
    ours_right: int
    theirs_right: int
    twin_rows: int
    twin_error: float
    their_seconds: float
    our_seconds: float


class ParityError(RuntimeError):
    """The two codes do not agree, so their speed is of no interest."""


def row_losses(result: Tensor, layer: Layer) -> Tensor:
    """Damped loss of every row, ``[R]`` float64, from the weights alone."""
    delta = result.double() - layer.weight.double()
    lam_bar = DAMPING * layer.hessian.diagonal().mean()
    return (((delta @ layer.hessian) * delta).sum(1) + lam_bar * delta.square().sum(1)) / 2


def same_weights(theirs: Tensor, ours: LayerSolution, codes: bool) -> Tensor:
    """Which weights agree, ``[R, d]`` bool: masks by what is zero, codes by their values, on grids fitted apart.

    Scales of two fits may differ in their last digits, neighbouring grid points by 1/255 of the range at the least.
    """
    if not codes:
        return (theirs != 0) == ours.mask
    return torch.isclose(theirs, ours.weight, rtol=1e-5, atol=0)


def twins(upstream: Upstream, case: Case, layer: Layer, rows: Tensor) -> tuple[list[LayerSolution], float]:
    """Both in float64 on ``rows [r]``: our solution of every level, and the largest relative difference of a loss.

    Raises:
        ParityError: A mask or a code differs.
    """
    few = Layer(layer.name, layer.weight[rows].double(), layer.hessian)
    theirs = _theirs(upstream, case, few, time.perf_counter, double=True)
    # The one rule of ours that is not theirs is switched off, see LEGEND.
    with mock.patch.object(compiled, _TOLERANCE, 0.0), mock.patch.object(panels, _TOLERANCE, 0.0):
        ours = case.ours(few.weight, few.hessian)
    error, found = 0.0, []
    for result, solution in zip(theirs.weights, ours, strict=True):
        one, other = row_losses(result, few), row_losses(solution.weight, few)
        same = same_weights(result, solution, case.codes)
        if not bool(same.all()):
            raise ParityError(f"in float64 {int((~same).sum())} of {same.numel()} weights differ")
        error = max(error, float(((one - other).abs() / other.clamp(min=1e-300)).max()))
        found.append(solution)
    return found, error


def _theirs(upstream: Upstream, case: Case, layer: Layer, clock: Clock, double: bool = False) -> Solved:
    options = {"rel_damp": DAMPING} if case.code == "checkout" else {}
    return run(upstream, case.theirs, layer.weight, layer.hessian, clock, double=double, **options)


def compare(upstream: Upstream, case: Case, layer: Layer, task: str, args: argparse.Namespace) -> Line:
    """One task on one layer, both codes in turn.

    Raises:
        ParityError: They do not agree.
    """
    clock = CLOCKS[args.clock]
    case.ours(layer.weight, layer.hessian)  # compiles
    theirs = _theirs(upstream, case, layer, clock)
    rounds = args.repeats if theirs.seconds < args.once_above else 1
    their_times, our_times = [theirs.seconds], []
    for index in range(max(rounds, 3)):
        if 0 < index < rounds:
            their_times.append(_theirs(upstream, case, layer, clock).seconds)
        start = clock()
        ours = case.ours(layer.weight, layer.hessian)
        our_times.append(clock() - start)
    return Line(
        layer.name,
        "{}x{}".format(*layer.weight.shape),
        task,
        **agreement(theirs, ours, layer, case),
        **judged(upstream, case, layer, theirs, ours, args.twin_rows),
        their_seconds=statistics.median(their_times),
        our_seconds=statistics.median(our_times),
    )


def judged(
    upstream: Upstream, case: Case, layer: Layer, theirs: Solved, ours: list[LayerSolution], limit: int
) -> dict[str, Any]:
    """Rows in float64: those that differ, the first ones up to ``limit``; and which of the float32 codes was right.

    Raises:
        ParityError: The codes differ in float64 too.
    """
    same = torch.stack([same_weights(w, s, case.codes).all(1) for w, s in zip(theirs.weights, ours, strict=True)])
    agreed, first = same.all(0), torch.arange(len(layer.weight))
    rows = torch.cat([first[~agreed], first[agreed]])[:limit] if case.by_row else first[:limit]
    exact, error = twins(upstream, case, layer, rows)
    if error > TWIN_TOLERANCE:
        raise ParityError(f"in float64 the loss of a row is off by {error:.1e}")
    differing = ~agreed[rows] if case.by_row else torch.zeros(len(rows), dtype=torch.bool)

    def right(weights: list[Tensor]) -> int:
        pairs = zip(weights, exact, strict=True)
        found = [same_weights(w[rows].double(), solution, case.codes).all(1) for w, solution in pairs]
        return int((torch.stack(found).all(0) & differing).sum())

    return {
        "differing": int(differing.sum()),
        "ours_right": right([solution.weight for solution in ours]),
        "theirs_right": right(theirs.weights),
        "twin_rows": len(rows),
        "twin_error": error,
    }


def agreement(theirs: Solved, ours: list[LayerSolution], layer: Layer, case: Case) -> dict[str, float]:
    """How far two float32 results agree, over all levels.

    Raises:
        ParityError: Ours is worse than theirs by more than rounding explains.
    """
    same = torch.stack([same_weights(w, s, case.codes) for w, s in zip(theirs.weights, ours, strict=True)])
    one = torch.stack([row_losses(result, layer) for result in theirs.weights])
    other = torch.stack([row_losses(solution.weight, layer) for solution in ours])
    rows = same.all(2)
    worse = (other / one.clamp(min=1e-300) - 1)[rows]
    if worse.numel() and float(worse.max()) > case.excess(layer.weight.shape[1]):
        raise ParityError(f"a row of ours with the same result has a loss {float(worse.max()):.1e} higher")
    if float(other.sum() / one.sum() - 1) > TOTAL:
        raise ParityError(f"the layer's loss of ours is {float(other.sum() / one.sum()):.4f} times theirs")
    reported = sum(solution.loss + solution.damping_loss for solution in ours)
    return {
        "rows_same": float(rows.double().mean()),
        "weights_same": float(same.double().mean()),
        "loss_ratio": float(one.sum() / other.sum()),
        "their_report": sum(theirs.reported) / float(one.sum()),
        "our_report": reported / float(other.sum()),
    }


LEGEND = (
    "Theirs runs in float32. Same rows: rows with the same mask (or codes) at every level. Float64: both codes once "
    "more in float64, on so many rows, those that differ first; all masks and codes are then the same, or nothing "
    "would be printed, and no row's loss differs by more than this. Right: of the rows that differ in float32, how "
    "many agree with float64, ours / theirs. Loss: damped loss of their weights ÷ that of ours, computed in float64 "
    "from the weights. Reported: the loss that a code itself reports ÷ the loss of its weights, theirs / ours. Times "
    "are medians of whole calls, in alternation, theirs once where it takes long; × is theirs ÷ ours.\n\n"
    "One rule differs on purpose: a clipped weight goes first once it is more than half a step outside the grid, in "
    "theirs by anything at all, in ours by 1e-5 of it (rounding must not decide where symmetric ranges end exactly "
    "there). Float64 and right count by their rule."
)


def table(lines: list[Line]) -> str:
    """Markdown."""
    names = "layer | shape | task | same rows | float64 | right | loss | reported | theirs [s] | ours [s] | ×"
    text = [f"| {names} |", "|" + "---|" * 11]
    for line in lines:
        right = f"{line.ours_right} / {line.theirs_right} of {line.differing}" if line.differing else "–"
        text.append(
            f"| {line.layer} | {line.shape} | {line.task} | {100 * line.rows_same:.1f} % "
            f"| {line.twin_rows} rows, {line.twin_error:.0e} | {right} "
            f"| {line.loss_ratio:.5f} | {line.their_report:.4f} / {line.our_report:.4f} "
            f"| {line.their_seconds:.3g} | {line.our_seconds:.3g} | {line.their_seconds / line.our_seconds:.3g} |"
        )
    return "\n".join(text)


def page(record: dict[str, Any]) -> str:
    """The page of what was measured so far."""
    lines = [Line(**line) for line in record["lines"]]
    parts = [
        "# Beside the authors' code",
        f"Machine: {record['machine']}. Damping {DAMPING}, grids per channel with MSE range search.",
        "Codes compared with: " + "; ".join(record["sources"]) + ".",
        "Adjustments that they need on a CPU, none of them in their files:\n\n"
        + "\n".join(f"* {line}." for line in ADJUSTMENTS),
        LEGEND,
        table(lines),
    ]
    return "\n\n".join(parts) + "\n"


def write(record: dict[str, Any], folder: Path, name: str) -> None:
    rows = ",\n".join(map(json.dumps, record["lines"]))
    text = json.dumps(record | {"lines": []}).removesuffix("[]}") + f"[\n{rows}\n]}}\n"
    write_whole(folder / f"{name}.json", lambda target: target.write_text(text))
    write_whole(folder / f"{name}.md", lambda target: target.write_text(page(record)))


def measure(upstreams: dict[str, Upstream], args: argparse.Namespace) -> Iterator[Line]:
    """All tasks on all layers, one after the other.

    Raises:
        ParityError: Two codes do not agree on one of them.
    """
    for network in args.networks:
        for layer in NETWORKS[network]():
            for task, case in CASES.items():
                if case.code not in upstreams or (args.tasks and task not in args.tasks):
                    continue
                if layer.weight.shape[1] % 4 and ("blocks" in task or "2:4" in task):
                    continue
                solved = layer
                if task.endswith("after 2:4"):
                    pruned = obs.prune(layer.weight, layer.hessian, "2:4", damping=DAMPING)
                    solved = Layer(layer.name, pruned.weight, layer.hessian)
                try:
                    yield compare(upstreams[case.code], case, solved, task, args)
                except ParityError as error:
                    raise ParityError(f"{layer.name}, {task}: {error}") from error


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, (_, _, address) in NEEDED.items():
        parser.add_argument(f"--{option}", type=Path, metavar="DIR", help=f"your checkout of {address}")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["random"])
    parser.add_argument("--tasks", nargs="+", choices=CASES, metavar="TASK", help=", ".join(CASES).replace("%", "%%"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--once-above", type=float, default=3.0, metavar="S", help="time theirs once if it takes longer"
    )
    parser.add_argument("--twin-rows", type=int, default=4, help="rows that both solve in float64 too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", help="write NAME.md and NAME.json, keeping the lines of other layers and tasks")
    args = parser.parse_args(arguments)
    if not any(getattr(args, option) for option in NEEDED):
        parser.error("name at least one checkout: " + ", ".join(f"--{option} DIR" for option in NEEDED))
    return args


def resumed(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """The record with the lines and sources of an earlier run on the same machine.

    Raises:
        SystemExit: It was measured on another machine.
    """
    if path.exists():
        before = json.loads(path.read_text())
        if before["machine"] != record["machine"]:
            raise SystemExit(f"{path} was measured on {before['machine']}; choose another --name")
        record["lines"] = before["lines"]
        record["sources"] = list(dict.fromkeys([*before["sources"], *record["sources"]]))
    return record


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    given = {option: getattr(args, option) for option in NEEDED if getattr(args, option)}
    upstreams = {option: load(option, folder) for option, folder in given.items()}
    record = {
        "machine": f"{describe()}, {args.clock} clock",
        "sources": [each.source for each in upstreams.values()],
        "lines": [],
    }
    if args.name:
        record = resumed(record, args.out / f"{args.name}.json")
    try:
        for line in measure(upstreams, args):
            record["lines"] = [old for old in record["lines"] if (old["layer"], old["task"]) != (line.layer, line.task)]
            record["lines"].append(asdict(line))
            if args.name:
                write(record, args.out, args.name)
            print(f"{line.layer}, {line.task}: parity is green", file=sys.stderr, flush=True)
    except ParityError as error:
        print(f"parity is red, no figures: {error}", file=sys.stderr)
        return 1
    print(page(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
