"""The report of :mod:`gpu` as Markdown, from what its parts have found so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Found = dict[str, Any]


def markdown(parts: list[dict[str, Any]]) -> str:
    """All parts, those that failed with their last lines."""
    found = {part["name"]: part["found"] for part in parts}
    machine = found.get("parity", {})
    head = "# On a GPU\n\n"
    if machine:
        head += f"{machine['device']}, torch {machine['torch']}, Python {machine['python']}.\n\n"
    rows = "".join(f"| {part['name']} | {part['status']} | {part['seconds']:.0f} |\n" for part in parts)
    text = f"{head}| part | status | seconds |\n|---|---|---|\n{rows}"
    for part in parts:
        if part["found"]:
            text += f"\n## {part['name']}\n\n{SECTIONS[part['name']](part['found'])}\n"
        if part["tail"]:
            text += f"\nThe last lines of *{part['name']}* ({part['status']}):\n\n```\n{part['tail']}\n```\n"
    return text


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parity(found: Found) -> str:
    rows = [
        [name, "green" if p["parity"] else "**red**", f"{p['same']:.2%}", f"{p['loss']:.1e}"]
        for name, p in found["patterns"].items()
    ]
    return table(["pattern", "parity", "steps equal", "summed losses differ by"], rows)


def tests(found: Found) -> str:
    counts = ", ".join(f"{count} {what}" for what, count in found["counts"].items())
    return "\n".join([f"`pytest -m gpu`: {counts}.", *(f"* {line}" for line in found["failures"])])


def shapes(found: Found) -> str:
    names = [*found["patterns"], "rank-1"]
    rows, sums = [], dict.fromkeys(names, 0.0)
    for layer in found["layers"]:
        times, flop = layer["seconds"], 2 / 3 * layer["rows"] * float(layer["columns"]) ** 3
        for name in names:
            sums[name] += layer["layers"] * times[name]
        first = times.get("unstructured")
        last = [f"{times['rank-1'] / first:.0f}×", f"{flop / found['speed'] / first:.2f}"] if first else ["–", "–"]
        cells = [f"{layer['rows']}×{layer['columns']}", str(layer["layers"]), *(f"{times[name]:.3f}" for name in names)]
        rows.append([*cells, *last, f"{layer['peak_gib']:.1f}"])
    ratio = f"{sums['rank-1'] / sums['unstructured']:.0f}×" if sums.get("unstructured") else "–"
    layers = sum(layer["layers"] for layer in found["layers"])
    rows.append(["all of them", str(layers), *(f"{sums[name]:.2f}" for name in names), ratio, "", ""])
    head = ["layer", "layers", *(f"{name} [s]" for name in names), "ratio", "share", "peak [GiB]"]
    missing = found["expected"] - len(found["layers"])
    return (
        table(head, rows)
        + (f"\n\n**{missing} shapes, the largest, are missing.**" if missing else "")
        + f"\n\nFloat32 products without TF32: {found['speed'] / 1e12:.1f} Tflop/s. Seconds of one layer; the last line"
        " sums over all layers. *rank-1*: one full rank-1 update per weight on the same device, scaled up from 16"
        " steps; *ratio*: rank-1 over unstructured; *share*: time of ⅔·R·d³ flop at the speed above, over unstructured."
    )


def structured(found: Found) -> str:
    rows, sums = [], {"triton": 0.0, "torch": 0.0}
    for layer in found["layers"]:
        times = layer["seconds"]
        for name in sums:
            sums[name] += layer["layers"] * times[name]
        zeros = ", rows with zeros of their own" if layer["zeros"] else ""
        shape = f"{layer['channels']}×{layer['positions']}{zeros}"
        cells = [shape, str(layer["layers"] or "–"), *(f"{times[name]:.4f}" for name in sums)]
        each = f"{times['triton'] / layer['launches'] * 1e6:.1f}"
        rows.append([*cells, f"{times['torch'] / times['triton']:.1f}×", each, f"{layer['peak_gib']:.1f}"])
    layers = sum(layer["layers"] for layer in found["layers"])
    ratio = f"{sums['torch'] / sums['triton']:.1f}×" if layers else "–"
    rows.append(["all of them", str(layers), *(f"{sums[name]:.3f}" for name in sums), ratio, "", ""])
    head = ["channels × positions", "layers", "triton [s]", "torch [s]", "ratio", "µs a launch", "peak [GiB]"]
    missing = found["expected"] - len(found["layers"])
    return table(head, rows) + (f"\n\n**{missing} layers, the largest, are missing.**" if missing else "")


def wide(found: Found) -> str:
    shape = f"{found['rows']}×{found['columns']}"
    return f"{shape} quantized to 4 bits: {found['seconds']:.2f} s, peak {found['peak_gib']:.1f} GiB."


def memory(found: Found) -> str:
    lines = [f"Rows for which there is no room: {found['same']:.2%} of all steps as with room. Logged:", ""]
    return "\n".join([*lines, *(f"* {message}" for message in found["messages"])])


def semi_structured(found: Found) -> str:
    def milliseconds(seconds: float | None) -> str:
        return "–" if seconds is None else f"{seconds * 1e3:.3f}"

    rows = [
        [p["shape"], milliseconds(p["dense"]), milliseconds(p["sparse"]), p["reason"], f"{p['error']:.1e}"]
        for p in found["layers"]
    ]
    head = ["2:4 linear layer", "dense [ms]", "2:4 [ms]", "decision", "largest difference, relative"]
    return table(head, rows) + f"\n\n{found['tokens']} rows of input, float16."


SECTIONS: dict[str, Callable[[Found], str]] = {
    "parity": parity,
    "tests": tests,
    "shapes": shapes,
    "structured": structured,
    "wide": wide,
    "memory": memory,
    "semi-structured": semi_structured,
}
