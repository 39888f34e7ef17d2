"""Horizontal bars of every layer: error, sparsity and time, one bar per stage, as data for the page's template."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_obc.report.charts import COLOURS, Axis, number, seconds
from lightning_obc.report.totals import final_errors, is_told

Row = Mapping[str, Any]
_DECADES = 8
_FAR = 20.0
_LONGEST = 30
_SHORT = 12


def share(value: float, axis: Axis) -> float:
    """Length of a bar in percent of its track; 0 for what a logarithmic axis cannot show."""
    return 0.0 if value <= 0 else axis(value)


def logarithmic(values: Sequence[float]) -> Axis:
    """Whole decades around the positive values, eight at most below the largest."""
    positive = [value for value in values if value > 0] or [1.0]
    high = math.ceil(math.log10(max(positive)) - 1e-9)
    # A value at the lower end would have no bar at all.
    low = max(math.floor(math.log10(min(positive)) - 0.1), high - _DECADES)
    return Axis(10.0**low, 10.0 ** max(high, low + 1), 0.0, 100.0, log=True)


def linear(values: Sequence[float]) -> Axis:
    """From 0 to the largest value."""
    return Axis(0.0, max(max(values, default=0.0), 1e-300), 0.0, 100.0)


def chart(
    title: str,
    rows: Sequence[Sequence[tuple[Row, float]]],
    axis: Axis,
    text: Callable[[float], str],
    ticks: Sequence[tuple[float, str]] | None = None,
) -> dict[str, Any]:
    """One chart: per layer a label and its bars, and the ticks of the axis below them.

    Args:
        title: What is drawn, with its unit.
        rows: Per layer the row of each stage that has one, with the value to draw.
        axis: From values to percent of the track.
        text: Writes a value with its unit.
        ticks: Values below the bars and what to write there; by default a few round ones.
    """
    entries = [
        {
            "name": bars[0][0]["name"],
            "label": shortened(bars[0][0].get("label", bars[0][0]["name"])),
            "bars": [_bar(row, share(value, axis), _told(row, value, text)) for row, value in bars],
            # Of more than two stages the last alone: the others are in the tables, and where the bars are pointed at.
            "text": " · ".join(_told(row, value, text) for row, value in (bars if len(bars) < 3 else bars[-1:])),
        }
        for bars in rows
    ]
    ticks = [(tick, text(tick)) for tick in axis.ticks()] if ticks is None else ticks
    return {
        "title": title,
        "rows": entries,
        "ticks": [{"left": axis(tick), "text": label} for tick, label in _few(ticks)],
        "is_long": any(len(entry["label"]) > _SHORT for entry in entries),
    }


def _few(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """At most three: both ends and, where there is one, the middle."""
    if len(ticks) <= 3:
        return list(ticks)
    return [ticks[0], ticks[len(ticks) // 2], ticks[-1]] if len(ticks) % 2 else [ticks[0], ticks[-1]]


def _told(row: Row, value: float, text: Callable[[float], str]) -> str:
    return "kept" if failed(row) and not value else text(value)


def without_prefix(names: Sequence[str]) -> dict[str, str]:
    """Names without the dotted parts that all of them begin with."""
    parts = [name.split(".")[:-1] for name in names]
    same = 0
    while len(names) > 1 and len({tuple(p[: same + 1]) for p in parts}) == 1 and all(len(p) > same for p in parts):
        same += 1
    return {name: ".".join(name.split(".")[same:]) for name in names}


def shortened(name: str) -> str:
    """A long name with its middle left out: layers of one network differ at the beginning and at the end."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2]}…{name[1 - _LONGEST // 2 :]}"


def _bar(row: Row, length: float, text: str) -> dict[str, Any]:
    return {"share": length, "text": text, "series": row["series"] % COLOURS, "bad": failed(row)}


def failed(row: Row) -> bool:
    """True for a layer that could not be solved; one that a search left dense on purpose has not failed."""
    return not row["compressed"] and str(row["status"]).startswith("kept")


def percent(value: float) -> str:
    return "0 %" if value <= 0 else f"{number(100 * value)} %"


def bar_charts(layers: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """Error, error of all stages together where there were several, sparsity and time of every layer.

    Args:
        layers: Per layer its rows, one of each stage it took part in, each with the stage's number as ``series``.
    """
    if not layers:
        return []
    labels = without_prefix([rows[0]["name"] for rows in layers])
    layers = [[{**row, "label": labels[row["name"]]} for row in rows] for rows in layers]
    errors = [[(row, row["relative_error"]) for row in rows] for rows in layers]
    zeros = [[({**rows[-1], "series": 0, "compressed": True}, rows[-1]["sparsity"])] for rows in layers]
    times = [[(row, row["seconds"]) for row in rows] for rows in layers]
    flat = [[value for bars in rows for _, value in bars] for rows in (errors, times)]
    found = [
        chart("Relative output error, logarithmic [%]", errors, logarithmic(flat[0]), percent),
        *_totals(layers),
        chart(
            "Zeros after the last stage [%]",
            zeros,
            linear([1.0]),
            lambda value: f"{100 * value:.3g} %",
            [(0.0, "0 %"), (0.5, "50 %"), (1.0, "100 %")],
        ),
    ]
    if any(value > 0 for value in flat[1]):
        # One layer that compiled the kernels would hide all others.
        far = max(flat[1]) > _FAR * sorted(flat[1])[len(flat[1]) // 2]
        title = f"Time to solve{', logarithmic' if far else ''} [s]"
        axis = logarithmic([max(value, 0.01) for value in flat[1]]) if far else linear(flat[1])
        ticks = [(tick, f"{number(tick)} s") for tick in axis.ticks()]
        found.append(chart(title, times, axis, seconds, ticks))
    return found


def _totals(layers: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """The error of all stages together, where it says more than that of the last one."""
    if not is_told(row for rows in layers for row in rows):
        return []
    known = final_errors([{"layers": [row for rows in layers for row in rows]}])
    bars = [
        [({**rows[-1], "series": 0, "compressed": True}, total)]
        for rows in layers
        if (total := known.get(rows[0]["name"])) is not None
    ]
    axis = logarithmic([value for row in bars for _, value in row])
    return [chart("Error of all stages together, logarithmic [%]", bars, axis, percent)]
