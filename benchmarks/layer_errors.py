"""Layer errors of every solver on two real networks, calibrated on some samples and measured on others.

    python -m benchmarks.layer_errors digits encoder --out benchmarks/results

Every solver chooses its own damping by the two halves of the calibration samples (``damping="auto"``); what follows
from the greedy solver ("greedy" at bits, "OBS" at patterns) has its damping, so that damped losses compare.
Round-to-nearest and magnitude have none. A layer's results are written as soon as it is measured; ``--resume`` goes on
with the layers that are missing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.networks import Layer, Network, digits, encoder, held_out_error
from lightning_obc.baselines import adaprune, gptq, magnitude, round_to_nearest, sparsegpt
from lightning_obc.errors import PatternError
from lightning_obc.files import write_whole
from lightning_obc.obs import LayerSolution, prune, quantize

KINDS = ("bits", "pattern")
BITS = (4, 3, 2)
PATTERNS = (0.5, 0.75, 0.9, "2:4")
GREEDY, OBS, REFINED = "greedy", "OBS", "refined"
QUANTIZERS: dict[str, Callable[..., LayerSolution]] = {
    "nearest": round_to_nearest,
    "GPTQ": gptq,
    "GPTQ, act order": functools.partial(gptq, act_order=True),
    GREEDY: functools.partial(quantize, order="greedy"),
    OBS: quantize,
}
PRUNERS: dict[str, Callable[..., LayerSolution]] = {
    "magnitude": magnitude,
    "SparseGPT": sparsegpt,
    "AdaPrune": adaprune,
    OBS: prune,
}
# What refinement is compared with: the paper's algorithm.
BASELINE = {"bits": GREEDY, "pattern": OBS}
UNDAMPED = ("nearest", "magnitude")
OURS = (GREEDY, OBS, REFINED)
Row = dict[str, Any]


def measure(layer: Layer, kinds: list[str]) -> Iterator[Row]:
    """One row per level and solver of a layer."""
    for kind in kinds:
        levels, solvers = {"bits": (BITS, QUANTIZERS), "pattern": (PATTERNS, PRUNERS)}[kind]
        for level in levels:
            try:
                yield from _level(layer, level, solvers)
            except PatternError as error:
                print(f"  {layer.name}: {level} left out, {error.got}", flush=True)


def _level(layer: Layer, level: Any, solvers: dict[str, Callable[..., LayerSolution]]) -> Iterator[Row]:
    kind = "bits" if solvers is QUANTIZERS else "pattern"
    damping: str | float = "auto"
    for name, solver in (*solvers.items(), (REFINED, solvers[OBS])):
        options = {"refine": True} if name == REFINED else {}
        started = time.perf_counter()
        share = 0.01 if name in UNDAMPED else damping
        solution = solver(layer.weight, layer.calibration, level, channels=layer.channels, damping=share, **options)
        if name == BASELINE[kind]:
            damping = solution.status.damping
        yield _row(layer, kind, level, name, solution, time.perf_counter() - started)


def _row(layer: Layer, kind: str, level: Any, solver: str, solution: LayerSolution, seconds: float) -> Row:
    refined = solution.refinement
    return {
        "layer": layer.name,
        "shape": list(layer.weight.shape),
        "kind": kind,
        "level": str(level),
        "solver": solver,
        "calibration": solution.relative_error,
        "held_out": held_out_error(layer, solution.weight),
        "damped": solution.loss + solution.damping_loss,
        "damping": solution.status.damping,
        "gain": None if refined is None else refined.gain,
        "held_out_gain": None if refined is None else refined.held_out_gain,
        "status": str(solution.status),
        "seconds": seconds,
    }


def table(network: Network, rows: list[Row], kind: str) -> str:
    """Markdown: geometric mean over layers of the relative error in percent, calibration / held out."""
    mine = [row for row in rows if row["kind"] == kind]
    solvers = list(dict.fromkeys(row["solver"] for row in mine))
    base = BASELINE[kind]
    head = [kind, "layers", *solvers, f"refined ÷ {base}, damped", f"refined ÷ {base}, held out"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for level in dict.fromkeys(row["level"] for row in mine):
        by_solver = {name: _column(mine, level, name) for name in solvers}
        cells = [level, str(len(by_solver[base]))]
        for name in solvers:
            fitted, unseen = (_mean([row[key] for row in by_solver[name]]) for key in ("calibration", "held_out"))
            cells.append(f"{100 * fitted:.3g} / {100 * unseen:.3g}")
        for key in ("damped", "held_out"):
            pairs = zip(by_solver[REFINED], by_solver[base], strict=True)
            cells.append(f"{_mean([a[key] / b[key] for a, b in pairs]):.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def findings(rows: list[Row]) -> list[str]:
    """What was expected, and whether it holds; exceptions by name."""
    found = []
    for kind in ("bits", "pattern"):
        mine = [row for row in rows if row["kind"] == kind]
        base = BASELINE[kind]
        greedy, refined = ([row for row in mine if row["solver"] == name] for name in (base, REFINED))
        pairs = list(zip(refined, greedy, strict=True))
        ratios = {key: _mean([a[key] / b[key] for a, b in pairs]) for key in ("damped", "held_out")}
        worse = [f"{a['layer']} at {a['level']}" for a, b in pairs if a["held_out"] > b["held_out"] * (1 + 1e-9)]
        found.append(
            f"{kind}: refined ÷ {base} is {ratios['damped']:.3f} on the damped calibration objective and "
            f"{ratios['held_out']:.3f} held out, over {len(pairs)} cases; held out it is worse in {len(worse)}"
            + (f" ({', '.join(worse[:8])}{', …' if len(worse) > 8 else ''})" if worse else "")
        )
        for key, name in itertools.product(("calibration", "held_out"), dict.fromkeys((base, OBS, REFINED))):
            beaten = _beaten(mine, key, name)
            found.append(
                f"{kind}, {key.replace('_', ' ')} error: another solver is below {name} in {len(beaten)} of "
                f"{len(greedy)} cases"
                + (f" ({', '.join(beaten[:8])}{', …' if len(beaten) > 8 else ''})" if beaten else "")
            )
    return found


def _beaten(rows: list[Row], key: str, solver: str) -> list[str]:
    """Where a solver that is not ours has a lower error than ``solver``."""
    names = []
    for row in (row for row in rows if row["solver"] == solver):
        rivals = [
            other
            for other in rows
            if (other["layer"], other["level"]) == (row["layer"], row["level"])
            and other["solver"] not in OURS
            and other[key] < row[key]
        ]
        least = min(rivals, key=lambda other: other[key], default=None)
        if least is not None:
            more = 100 * (row[key] / least[key] - 1)
            names.append(f"{least['solver']} in {row['layer']} at {row['level']}, by {more:.2g} %")
    return names


def _column(rows: list[Row], level: str, solver: str) -> list[Row]:
    return [row for row in rows if row["level"] == level and row["solver"] == solver]


def _mean(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(math.log(max(value, 1e-300)) for value in values) / max(len(values), 1))


def machine() -> str:
    """Processor, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def report(network: Network, rows: list[Row]) -> str:
    """The page of one network."""
    layers = len({row["layer"] for row in rows})
    return "\n\n".join(
        [
            f"## {network.name}",
            f"{layers} layers, {network.data}. Cells: relative squared output error in percent, geometric mean over "
            "layers, calibration / held out. Grids: asymmetric, per channel, MSE range search (refined codes also "
            "refit their scales). Greedy is the paper's order of rounding; OBS at bits is the default, "
            '`order="auto"`: every row has the best of greedy, activation and ascending order. '
            "At bits, OBS and refined have the damping that was chosen for greedy; the other solvers, and OBS by "
            "itself, choose their own.",
            table(network, rows, "bits"),
            table(network, rows, "pattern"),
            "\n".join(f"* {line}." for line in findings(rows)),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    makers = {"digits": digits, "encoder": encoder}
    parser.add_argument("networks", nargs="*", choices=[*makers, []], default=list(makers))
    parser.add_argument("--only", choices=KINDS, help="measure this kind anew and keep the other rows of the last run")
    parser.add_argument("--resume", action="store_true", help="keep the layers that the last run has measured")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    for name in arguments.networks:
        network = makers[name]()
        path = arguments.out / f"layer_errors_{name}.json"
        rows: list[Row] = json.loads(path.read_text())["rows"] if arguments.resume or arguments.only else []
        if arguments.only:
            rows = [row for row in rows if row["kind"] != arguments.only]
        kinds = [arguments.only] if arguments.only else list(KINDS)
        for layer in network.layers:
            left = [kind for kind in kinds if (layer.name, kind) not in {(row["layer"], row["kind"]) for row in rows}]
            started = time.perf_counter()
            rows += measure(layer, left)
            print(f"{layer.name} {tuple(layer.weight.shape)}: {time.perf_counter() - started:.0f} s", flush=True)
            write(network, rows, path)
        print(path.with_suffix(".md").read_text(), flush=True)


def write(network: Network, rows: list[Row], path: Path) -> None:
    """The page and its figures, whole files both."""
    page = f"# Layer errors\n\nMachine: {machine()}.\n\n{report(network, rows)}\n"
    record = {"machine": machine(), "network": network.name, "data": network.data, "rows": rows}
    write_whole(path.with_suffix(".md"), lambda target: target.write_text(page))
    write_whole(path, lambda target: target.write_text(json.dumps(record, indent=1) + "\n"))


if __name__ == "__main__":
    main()
