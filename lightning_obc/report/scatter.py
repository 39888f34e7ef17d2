"""The chart of a trade-off: named points, or lines of several series, against the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from lightning_obc.report.charts import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, frame, number

_LONGEST = 28


def scatter(data: Mapping[str, Any], label: str) -> str:
    """Labelled points of a trade-off, joined in the order of their horizontal position, one line per series.

    Args:
        data: Names ``x`` and ``y``, ``points`` with ``x``, ``y``, and optionally ``label`` and ``series``; optionally
            ``dense``, a height to compare with, ``log`` for a logarithmic horizontal axis, and ``joined``, False for
            points without a line.
        label: What the chart is called for those who cannot see it.
    """
    points = sorted(data.get("points", ()), key=lambda point: point["x"])
    if not points:
        return ""
    dense = data.get("dense")
    series = list(dict.fromkeys(str(p.get("series", "")) for p in points))
    several = len(series) > 1
    x, y = _trade_off_axes(points, dense, bool(data.get("log")), several)
    body = "" if dense is None else _level(dense, x, y)
    for index, name in enumerate(series):
        mine = [p for p in points if str(p.get("series", "")) == name]
        body += _series(
            mine, x, y, f" series{index % COLOURS}" if several else "", joined=bool(data.get("joined", True))
        )
    body += _legend(series) if several else _labels(points, x, y, dense)
    return frame(x, y, str(data.get("x", "")), str(data.get("y", "")), body, label, _points_as_ticks(points, x))


def _trade_off_axes(
    points: Sequence[Mapping[str, Any]], dense: float | None, log: bool, legend: bool
) -> tuple[Axis, Axis]:
    """Axes with some room around the points: nothing lies on the frame."""
    across = [float(p["x"]) for p in points]
    log = log and across[0] > 0
    if log:
        room = max(1.05, (across[-1] / across[0]) ** 0.06)
        low, high = across[0] / room, across[-1] * room
    else:
        margin = 0.06 * (across[-1] - across[0]) or 0.5 * abs(across[0]) or 0.5
        low, high = across[0] - margin, across[-1] + margin
    x = Axis(low, high, LEFT, WIDTH - RIGHT, log)
    heights = [float(p["y"]) for p in points] + ([] if dense is None else [dense])
    margin = 0.08 * (max(heights) - min(heights)) or 0.05 * abs(heights[0]) or 0.5
    top = TOP + (14.0 if legend else 0.0)
    return x, Axis(min(heights) - margin, max(heights) + margin, HEIGHT - BOTTOM, top)


def _points_as_ticks(points: Sequence[Mapping[str, Any]], x: Axis) -> list[float] | None:
    """The points' own positions as ticks when there are few and they leave room for their labels."""
    values = sorted({float(p["x"]) for p in points})
    gaps = [x(b) - x(a) for a, b in pairwise(values)]
    return values if len(values) <= 6 and all(gap > 34 for gap in gaps) else None


def _level(value: float, x: Axis, y: Axis) -> str:
    return (
        f'<line class="level" x1="{x.start:g}" x2="{x.end:g}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
        f'stroke-dasharray="3 3"><title>dense: {number(value)}</title></line>'
        f'<line class="level" x1="{x.end - 20:g}" x2="{x.end:g}" y1="7.5" y2="7.5" stroke-dasharray="3 3"/>'
        f'<text class="tick" x="{x.end - 24:g}" y="11" text-anchor="end">dense {value:.4g}</text>'
    )


def _series(points: Sequence[Mapping[str, Any]], x: Axis, y: Axis, colour: str, joined: bool) -> str:
    path = " ".join(f"{'M' if i == 0 else 'L'}{x(p['x']):.1f} {y(p['y']):.1f}" for i, p in enumerate(points))
    body = f'<path class="line{colour or " faint"}" d="{path}"/>' if joined else ""
    for point in points:
        text = escape(" ".join(part for part in (str(point.get("series", "")), str(point.get("label", ""))) if part))
        title = f"{text} {number(point['x'])}, {number(point['y'])}"
        centre = f'cx="{x(point["x"]):.1f}" cy="{y(point["y"]):.1f}"'
        body += f'<circle class="dot{colour}" {centre} r="3.5"><title>{title}</title></circle>'
    return body


def _labels(points: Sequence[Mapping[str, Any]], x: Axis, y: Axis, dense: float | None) -> str:
    """Names beside their points, each where it covers no other, no point and not the level to compare with."""
    taken = [(x(p["x"]) - 4, y(p["y"]) - 4, x(p["x"]) + 4, y(p["y"]) + 4) for p in points]
    taken += [] if dense is None else [(x.start, y(dense) - 1, x.end, y(dense) + 1)]
    body = ""
    for point in points:
        text = str(point.get("label", ""))
        if not text:
            continue
        text = text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST :]}"
        box, anchor = _place(x(point["x"]), y(point["y"]), 6.0 * len(text), taken)
        taken.append(box)
        place = f'x="{box[0] if anchor == "start" else box[2]:.1f}" y="{box[3] - 1:.1f}" text-anchor="{anchor}"'
        body += f'<text class="tick" {place}>{escape(text)}</text>'
    return body


_Box = tuple[float, float, float, float]


def _place(left: float, top: float, width: float, taken: Sequence[_Box]) -> tuple[_Box, str]:
    """Box (left, top, right, bottom) and anchor of a name: above or below its point, else the next free line below."""
    sides = ["end", "start"] if left > (LEFT + WIDTH) / 2 else ["start", "end"]
    offsets = [(side, down) for down in (-14.0, 4.0) for side in sides]
    offsets += [(sides[0], 4.0 + 11.0 * step) for step in range(1, 40)]
    for side, down in offsets:
        start = left + 6 if side == "start" else left - 6 - width
        box = (start, top + down, start + width, top + down + 10)
        outside = box[0] < 0 or box[2] > WIDTH or box[1] < TOP - 14
        if not outside and all(box[2] <= a or c <= box[0] or box[3] <= b or d <= box[1] for a, b, c, d in taken):
            break
    return box, side


def _legend(names: Sequence[str]) -> str:
    """Names of the series in one line above the chart."""
    body, right = "", WIDTH - RIGHT
    for index in reversed(range(len(names))):
        body += f'<text class="tick" x="{right:g}" y="26" text-anchor="end">{escape(names[index])}</text>'
        right -= 6.1 * len(names[index]) + 10
        body += f'<circle class="dot series{index % COLOURS}" cx="{right:g}" cy="22.5" r="3.5"/>'
        right -= 14
    return body
