"""Layer errors of every solver on two real networks, calibrated on some samples and measured on others.

    python -m benchmarks.layer_errors digits encoder --out benchmarks/results

Every column of a table has one damping for each layer and level, the one that ``damping="auto"`` chooses for OBS by the
two halves of the calibration samples, so that all of them minimise one objective: the damped one. GPTQ, SparseGPT and
AdaPrune run once more with the damping that ``damping="auto"`` chooses for each of them; round-to-nearest and magnitude
have none. A level is written as soon as it is measured, and a run that was interrupted goes on where it stopped with
``--resume``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.networks import Layer, Network, digits, encoder, held_out_error
from lightning_obc.baselines import adaprune, gptq, magnitude, round_to_nearest, sparsegpt
from lightning_obc.errors import PatternError
from lightning_obc.files import write_whole
from lightning_obc.obs import LayerSolution, prune, quantize

GREEDY, OBS, REFINED = "greedy", "OBS", "refined"
LEVELS: dict[str, tuple[Any, ...]] = {"bits": (4, 3, 2), "pattern": (0.5, 0.75, 0.9, "2:4")}
Solver = Callable[..., LayerSolution]
# OBS goes first: it chooses the damping of all.
SOLVERS: dict[str, dict[str, Solver]] = {
    "bits": {
        OBS: quantize,
        "nearest": round_to_nearest,
        "GPTQ": gptq,
        "GPTQ, act order": functools.partial(gptq, act_order=True),
        GREEDY: functools.partial(quantize, order="greedy"),
        REFINED: functools.partial(quantize, refine=True),
    },
    "pattern": {
        OBS: prune,
        "magnitude": magnitude,
        "SparseGPT": sparsegpt,
        "AdaPrune": adaprune,
        REFINED: functools.partial(prune, refine=True),
    },
}
# As in the tables, ours last.
COLUMNS = {
    "bits": ("nearest", "GPTQ", "GPTQ, act order", GREEDY, OBS, REFINED),
    "pattern": ("magnitude", "SparseGPT", "AdaPrune", OBS, REFINED),
}
# What refinement is compared with: the paper's algorithm.
BASELINE = {"bits": GREEDY, "pattern": OBS}
RIVALS = {
    "bits": ("nearest", "GPTQ", "GPTQ, act order"),
    "pattern": ("magnitude", "SparseGPT", "AdaPrune"),
}
UNDAMPED = ("nearest", "magnitude")
OBJECTIVES = {"damped": "damped calibration", "calibration": "calibration", "held_out": "held out"}
Row = dict[str, Any]


def measure(layer: Layer, kind: str, level: Any) -> Iterator[Row]:
    """One row for each solver on a level of a layer; none where the pattern does not fit."""
    damping: float | None = None
    for name, solver in SOLVERS[kind].items():
        try:
            solution, seconds = _timed(solver, layer, level, "auto" if damping is None else damping)
        except PatternError as error:
            print(f"  {layer.name}: {level} left out, {error.got}", flush=True)
            return
        damping = solution.status.damping
        row = {"layer": layer.name, "shape": list(layer.weight.shape), "kind": kind, "level": str(level)}
        row |= {"solver": name, "seconds": seconds, "own": None} | _figures(layer, solution)
        if name in RIVALS[kind] and name not in UNDAMPED:
            own, more = _timed(solver, layer, level, "auto")
            row["own"] = _figures(layer, own) | {"seconds": more}
        yield row


def _timed(solver: Solver, layer: Layer, level: Any, damping: float | str) -> tuple[LayerSolution, float]:
    started = time.perf_counter()
    solution = solver(layer.weight, layer.calibration, level, channels=layer.channels, damping=damping)
    return solution, time.perf_counter() - started


def _figures(layer: Layer, solution: LayerSolution) -> Row:
    """Relative errors, shares of what no weights at all would lose under the same objective."""
    lam_bar = solution.status.damping * layer.calibration.full().diagonal(dim1=-2, dim2=-1).mean(-1)
    whole = solution.reference + float((lam_bar[:, None, None] * layer.weight.double().square()).sum() / 2)
    refined = solution.refinement
    return {
        "damped": (solution.loss + solution.damping_loss) / whole,
        "calibration": solution.relative_error,
        "held_out": held_out_error(layer, solution.weight),
        "damping": solution.status.damping,
        "gain": None if refined is None else refined.gain,
        "held_out_gain": None if refined is None else refined.held_out_gain,
        "status": str(solution.status),
    }


def table(rows: list[Row], kind: str) -> str:
    """Markdown: geometric mean over layers, in percent, damped calibration / held out, all at one damping."""
    mine, base = [row for row in rows if row["kind"] == kind], BASELINE[kind]
    head = [kind, "layers", *COLUMNS[kind], f"refined ÷ {base}, damped", f"refined ÷ {base}, held out"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for level in dict.fromkeys(row["level"] for row in mine):
        by_solver = {name: _column(mine, level, name) for name in COLUMNS[kind]}
        cells = [level, str(len(by_solver[base]))]
        cells += [_cell(by_solver[name], "damped") for name in COLUMNS[kind]]
        for key in ("damped", "held_out"):
            pairs = zip(by_solver[REFINED], by_solver[base], strict=True)
            cells.append(f"{_mean([a[key] / b[key] for a, b in pairs]):.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def own_table(rows: list[Row], kind: str) -> str:
    """The same, undamped calibration / held out, with each rival at the damping chosen for it."""
    mine = [row for row in rows if row["kind"] == kind]
    names = [name for name in COLUMNS[kind] if name != GREEDY]
    lines = ["| " + " | ".join([kind, *names]) + " |", "|" + "---|" * (len(names) + 1)]
    for level in dict.fromkeys(row["level"] for row in mine):
        columns = ([row["own"] or row for row in _column(mine, level, name)] for name in names)
        lines.append("| " + " | ".join([level, *(_cell(column, "calibration") for column in columns)]) + " |")
    return "\n".join(lines)


def findings(rows: list[Row]) -> list[str]:
    """What was expected, and whether it holds; exceptions by name."""
    found = []
    for kind in LEVELS:
        mine = [row for row in rows if row["kind"] == kind]
        base = BASELINE[kind]
        start, refined = ([row for row in mine if row["solver"] == name] for name in (base, REFINED))
        pairs = list(zip(refined, start, strict=True))
        ratios = {key: _mean([a[key] / b[key] for a, b in pairs]) for key in ("damped", "held_out")}
        worse = [f"{a['layer']} at {a['level']}" for a, b in pairs if a["held_out"] > b["held_out"] * (1 + 1e-9)]
        found.append(
            f"{kind}: refined ÷ {base} is {ratios['damped']:.3f} on the damped calibration objective and "
            f"{ratios['held_out']:.3f} held out; held out it is worse in {_listed(worse, len(pairs))}"
        )
        for own, key in ((False, "damped"), (False, "calibration"), (False, "held_out"), (True, "held_out")):
            which = "at the dampings chosen for them" if own else "at the same damping"
            told = [
                f"below {name} in {_listed(beaten(mine, key, name, own=own), len(start))}"
                for name in dict.fromkeys((base, OBS, REFINED))
            ]
            found.append(f"{kind}, {OBJECTIVES[key]} error: a rival {which} is " + "; ".join(told))
    return found


def beaten(rows: list[Row], key: str, solver: str, *, own: bool = False) -> list[str]:
    """Where a rival has a lower error than ``solver``, at its damping or at the rival's own."""
    rivals: dict[tuple[str, str], tuple[float, str]] = {}
    for row in rows:
        if row["solver"] in RIVALS[row["kind"]]:
            error = ((own and row["own"]) or row)[key]
            place = (row["layer"], row["level"])
            rivals[place] = min(rivals.get(place, (math.inf, "")), (error, row["solver"]))
    names = []
    for row in (row for row in rows if row["solver"] == solver):
        least, rival = rivals[row["layer"], row["level"]]
        # Equal weights have equal errors but for the order of a sum.
        if least < row[key] * (1 - 1e-9):
            names.append(f"{rival} in {row['layer']} at {row['level']}, by {100 * (row[key] / least - 1):.2g} %")
    return names


def _listed(names: list[str], cases: int) -> str:
    more = "; …" if len(names) > 4 else ""
    return f"{len(names)} of {cases} cases" + (f" ({'; '.join(names[:4])}{more})" if names else "")


def _column(rows: list[Row], level: str, solver: str) -> list[Row]:
    return [row for row in rows if row["level"] == level and row["solver"] == solver]


def _cell(rows: list[Row], key: str) -> str:
    fitted, unseen = (_mean([row[name] for row in rows]) for name in (key, "held_out"))
    return f"{100 * fitted:.3g} / {100 * unseen:.3g}"


def _mean(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(math.log(max(value, 1e-300)) for value in values) / max(len(values), 1))


def report(record: dict[str, Any]) -> str:
    """The page of one network."""
    rows: list[Row] = record["rows"]
    layers = len({row["layer"] for row in rows})
    processor, clock = (seconds / 60 for seconds in record["seconds"])
    runs = "one run" if record["runs"] == 1 else f"{record['runs']} runs, each going on where the last one stopped"
    return "\n\n".join(
        [
            f"# Layer errors: {record['network']}",
            f"Machine: {record['machine']}. {processor:.1f} min of processor time, {clock:.1f} min on the clock, in "
            f"{runs}, training and calibration included.",
            f"{layers} layers, {record['data']}. Grids: asymmetric, per channel, MSE range search (refined codes also "
            "refit their scales). Greedy is the paper's order of rounding; OBS at bits is the default, "
            '`order="auto"`: every row has the best of greedy, activation and ascending order, so that on the damped '
            "calibration objective GPTQ can never be below it.",
            "## One damping for all columns",
            'The damping that `damping="auto"` chooses for OBS, layer by layer and level by level. Cells: relative '
            "squared output error in percent, geometric mean over layers, damped calibration objective / held out.",
            table(rows, "bits"),
            table(rows, "pattern"),
            "## Each rival at its own damping",
            'The damping that `damping="auto"` chooses for each solver by itself. Cells: undamped calibration error / '
            "held out (damped errors of different dampings do not compare).",
            own_table(rows, "bits"),
            own_table(rows, "pattern"),
            "## Findings",
            "\n".join(f"* {line}." for line in findings(rows)),
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    makers = {"digits": digits, "encoder": encoder}
    parser.add_argument("networks", nargs="*", choices=[*makers, []], default=list(makers))
    parser.add_argument(
        "--resume", action="store_true", help="go on with the levels that the last run has not measured"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    for name in options.networks:
        started = _clocks()
        run(makers[name](), options.out / f"layer_errors_{name}.json", started, resume=options.resume)


def _clocks() -> tuple[float, float]:
    """Seconds of the processor and on the clock."""
    return time.process_time(), time.perf_counter()


def run(network: Network, path: Path, started: tuple[float, float], *, resume: bool) -> None:
    """Measure what is left of a network; page and figures are written whole after every level.

    Raises:
        SystemExit: What is to be resumed was measured on other data or another machine.
    """
    record = {"machine": describe(), "network": network.name, "data": network.data, "runs": 0, "seconds": [0.0, 0.0]}
    record["rows"] = []
    if resume and path.exists():
        before = json.loads(path.read_text())
        for key in ("machine", "network", "data"):
            if before.get(key) != record[key]:
                raise SystemExit(f"cannot resume {path}: {key} was {before.get(key)!r}, is {record[key]!r}")
        record = before
    rows: list[Row] = record["rows"]
    earlier = record["seconds"]
    record["runs"] += 1
    done = {(row["layer"], row["kind"], row["level"]) for row in rows}
    for layer, (kind, levels) in itertools.product(network.layers, LEVELS.items()):
        for level in levels:
            if (layer.name, kind, str(level)) in done:
                continue
            rows.extend(measure(layer, kind, level))
            record["seconds"] = [a + b - c for a, b, c in zip(earlier, _clocks(), started, strict=True)]
            write(record, path)
        print(f"{record['seconds'][0]:5.0f} s  {layer.name} {tuple(layer.weight.shape)}, {kind}", flush=True)
    print(path.with_suffix(".md").read_text(), flush=True)


def write(record: dict[str, Any], path: Path) -> None:
    """The page and its figures, whole files both."""
    if {row["kind"] for row in record["rows"]} == set(LEVELS):
        write_whole(path.with_suffix(".md"), lambda target: target.write_text(report(record) + "\n"))
    # A line for each row: differences of two runs can be read.
    rows = ",\n".join(map(json.dumps, record["rows"]))
    text = json.dumps(record | {"rows": []}).removesuffix("[]}") + f"[\n{rows}\n]}}\n"
    write_whole(path, lambda target: target.write_text(text))


if __name__ == "__main__":
    main()
