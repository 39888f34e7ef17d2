"""Small charts as inline SVG and HTML bars: no library, no script, colours from the page's style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

WIDTH, HEIGHT = 320.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 10.0, 24.0, 34.0


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic scale from values to positions."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (self._linear(number) for number in (self.low, self.high, value))
        share = 0.5 if high == low else (value - low) / (high - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def _linear(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value

    def ticks(self) -> list[float]:
        """A few round values within the range."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            if last - first < 1:
                return _within_decades(self.low, self.high)
            stride = max(1, math.ceil((last - first) / 4))
            return [10.0**power for power in range(first, last + 1, stride)]
        span = self.high - self.low or 1.0
        step = 10.0 ** math.floor(math.log10(span / 3))
        step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
        first = math.ceil(self.low / step - 1e-9)
        return [step * index for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _within_decades(low: float, high: float) -> list[float]:
    """Round values of a logarithmic range that holds fewer than two powers of ten, four at most."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    inside = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
    return inside[:: max(1, math.ceil(len(inside) / 4))] or [low]


def number(value: float) -> str:
    """A short label for a number."""
    if value == 0:
        return "0"
    if abs(value) >= 1e4 or abs(value) < 1e-2:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3g}"


def axes(values_x: Sequence[float], values_y: Sequence[float], log_y: bool = False) -> tuple[Axis, Axis]:
    """Axes that hold the values; a logarithmic one runs over whole decades."""
    low_y, high_y = min(values_y), max(values_y)
    if log_y:
        positive = [value for value in values_y if value > 0] or [1.0]
        low_y, high_y = 10 ** math.floor(math.log10(min(positive))), 10 ** math.ceil(math.log10(max(positive)))
        high_y = max(high_y, 10 * low_y)
    elif 0 < low_y < 0.5 * high_y:
        low_y = 0.0
    return (
        Axis(min(values_x), max(values_x), _LEFT, WIDTH - _RIGHT),
        Axis(low_y, high_y, HEIGHT - _BOTTOM, _TOP, log_y),
    )


def _frame(x: Axis, y: Axis, name_x: str, name_y: str, body: str, label: str) -> str:
    parts = [
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(label)}">',
        *(
            f'<line class="grid" x1="{_LEFT:g}" x2="{WIDTH - _RIGHT:g}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
            f'<text class="tick" x="{_LEFT - 5:g}" y="{y(t) + 3.5:.1f}" text-anchor="end">{number(t)}</text>'
            for t in y.ticks()
        ),
        *(
            f'<text class="tick" x="{x(t):.1f}" y="{HEIGHT - _BOTTOM + 13:g}" text-anchor="middle">{number(t)}</text>'
            for t in x.ticks()
        ),
        f'<text class="axis" x="{WIDTH - _RIGHT:g}" y="{HEIGHT - 6:g}" text-anchor="end">{escape(name_x)}</text>',
        f'<text class="axis" x="2" y="11">{escape(name_y)}</text>',
        body,
        "</svg>",
    ]
    return "".join(parts)


def curve(points: Sequence[Sequence[float]], name_x: str, name_y: str, label: str, log_y: bool = True) -> str:
    """A line through points, with a logarithmic vertical axis by default."""
    points = sorted((p[0], p[1]) for p in points if not log_y or p[1] > 0)
    if not points:
        return ""
    x, y = axes([p[0] for p in points], [p[1] for p in points], log_y)
    path = " ".join(f"{'M' if index == 0 else 'L'}{x(a):.1f} {y(b):.1f}" for index, (a, b) in enumerate(points))
    dots = "".join(
        f'<circle class="dot" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.2"><title>{number(a)}: {number(b)}</title></circle>'
        for a, b in (points if len(points) <= 60 else points[:: len(points) // 60])
    )
    return _frame(x, y, name_x, name_y, f'<path class="line" d="{path}"/>{dots}', label)


def scatter(data: Mapping[str, Any], label: str) -> str:
    """Labelled points of a trade-off, joined in the order of their horizontal position, one line per series.

    Args:
        data: Names ``x`` and ``y``, ``points`` with ``x``, ``y``, and optionally ``label`` and ``series``; optionally
            ``dense``, a height to compare with, and ``log`` for a logarithmic horizontal axis.
        label: What the chart is called for those who cannot see it.
    """
    points = sorted(data.get("points", ()), key=lambda point: point["x"])
    if not points:
        return ""
    log = bool(data.get("log")) and points[0]["x"] > 0
    heights = [p["y"] for p in points] + ([data["dense"]] if data.get("dense") is not None else [])
    x, y = axes([p["x"] for p in points], heights)
    x = replace(x, log=log, **(_decades(x.low, x.high) if log else {}))
    series = list(dict.fromkeys(str(p.get("series", "")) for p in points))
    body = "".join(
        _series([p for p in points if str(p.get("series", "")) == name], x, y, number, len(series) > 1)
        for number, name in enumerate(series)
    )
    if data.get("dense") is not None:
        level = y(data["dense"])
        body += (
            f'<line class="level" x1="{_LEFT:g}" x2="{WIDTH - _RIGHT:g}" y1="{level:.1f}" y2="{level:.1f}" '
            f'stroke-dasharray="3 3"><title>dense: {number(data["dense"])}</title></line>'
        )
    if len(series) > 1:
        body += _legend(series)
    return _frame(x, y, str(data.get("x", "")), str(data.get("y", "")), body, label)


def _decades(low: float, high: float) -> dict[str, float]:
    """A logarithmic range widened until it holds at least two ticks."""
    return {"low": low, "high": max(high, 1.05 * low)}


def _series(points: Sequence[Mapping[str, Any]], x: Axis, y: Axis, index: int, several: bool) -> str:
    path = " ".join(f"{'M' if i == 0 else 'L'}{x(p['x']):.1f} {y(p['y']):.1f}" for i, p in enumerate(points))
    colour = f" series{index % 3}" if several else ""
    body = f'<path class="line{colour}{"" if several else " faint"}" d="{path}"/>'
    for point in points:
        left, top = x(point["x"]), y(point["y"])
        anchor = "end" if left > WIDTH * 0.7 else "start"
        text = escape(" ".join(part for part in (str(point.get("series", "")), str(point.get("label", ""))) if part))
        title = f"{text} {number(point['x'])}, {number(point['y'])}"
        body += f'<circle class="dot{colour}" cx="{left:.1f}" cy="{top:.1f}" r="3.5"><title>{title}</title></circle>'
        if not several:
            shift = -6 if anchor == "end" else 6
            body += f'<text class="tick" x="{left + shift:.1f}" y="{top - 5:.1f}" text-anchor="{anchor}">{text}</text>'
    return body


def _legend(names: Sequence[str]) -> str:
    """Names of the series from the lower right corner upwards, where trade-offs have no points."""
    rows = []
    for index, name in enumerate(names):
        top = HEIGHT - _BOTTOM - 8 - 13 * (len(names) - 1 - index)
        rows.append(
            f'<circle class="dot series{index % 3}" cx="{WIDTH - _RIGHT - 6:g}" cy="{top - 3.5:g}" r="3.5"/>'
            f'<text class="tick" x="{WIDTH - _RIGHT - 14:g}" y="{top:g}" text-anchor="end">{escape(name)}</text>'
        )
    return "".join(rows)


_ALONE = """
svg { background: #fff; font-family: system-ui, sans-serif }
text { fill: #333; font-size: 10px } .grid { stroke: #ddd } .level { stroke: #888 }
.line { fill: none; stroke-width: 1.6; stroke: #2563eb } .dot { fill: #2563eb }
.line.series1 { stroke: #d97706 } .dot.series1 { fill: #d97706 }
.line.series2 { stroke: #059669 } .dot.series2 { fill: #059669 }
"""


def standalone(svg: str) -> str:
    """A chart as a file of its own, with colours that do not come from a page."""
    start = svg.index(">") + 1
    opening = svg[:start].replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH:g}" ', 1)
    return f"{opening}<style>{_ALONE}</style>{svg[start:]}\n"


def histogram(data: Mapping[str, Any], label: str) -> str:
    """Weights before (line) and after (bars), with the grid points as ticks where there is a grid of few of them."""
    after, before = data["after"], data.get("before")
    highest = max(max(after), max(before or [0]), 1)
    # Counts after quantization pile up on few points; the square root keeps both shapes visible.
    x = Axis(data["low"], data["high"], _LEFT, WIDTH - _RIGHT)
    y = Axis(0.0, math.sqrt(highest), HEIGHT - _BOTTOM, _TOP)
    width = (WIDTH - _RIGHT - _LEFT) / len(after)
    base = HEIGHT - _BOTTOM
    bars = "".join(
        f'<rect class="bar" x="{_LEFT + i * width:.2f}" y="{y(math.sqrt(c)):.1f}" width="{max(width - 0.6, 0.5):.2f}" '
        f'height="{base - y(math.sqrt(c)):.1f}"/>'
        for i, c in enumerate(after)
        if c
    )
    line = ""
    if before:
        steps = [(_LEFT + (i + 0.5) * width, y(math.sqrt(c))) for i, c in enumerate(before)]
        line = (
            '<path class="line second" d="'
            + " ".join(f"{'M' if i == 0 else 'L'}{a:.1f} {b:.1f}" for i, (a, b) in enumerate(steps))
            + '"/>'
        )
    levels = data.get("levels")
    grid = ""
    if levels and levels <= 32:
        grid = "".join(
            f'<line class="level" x1="{x(i):.1f}" x2="{x(i):.1f}" y1="{base:g}" y2="{base + 4:g}"/>'
            for i in range(levels)
        )
    ticks = "".join(
        f'<text class="tick" x="{x(t):.1f}" y="{base + 15:g}" text-anchor="middle">{number(t)}</text>'
        for t in x.ticks()
    )
    name = "code on the grid" if levels else "weight"
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(label)}">'
        f'<line class="grid" x1="{_LEFT:g}" x2="{WIDTH - _RIGHT:g}" y1="{base:g}" y2="{base:g}"/>'
        f"{bars}{line}{grid}{ticks}"
        f'<text class="axis" x="{WIDTH - _RIGHT:g}" y="{HEIGHT - 6:g}" text-anchor="end">{name}</text>'
        f'<text class="axis" x="2" y="11">√count</text></svg>'
    )


def shares(values: Sequence[float], log: bool = False) -> list[float]:
    """Lengths of bars in percent; on a logarithmic scale the smallest positive value still shows."""
    positive = [value for value in values if value > 0]
    if not positive:
        return [0.0] * len(values)
    if not log:
        return [100 * value / max(positive) for value in values]
    low, high = math.log10(min(positive)) - 0.5, math.log10(max(positive))
    return [0.0 if value <= 0 else 100 * (math.log10(value) - low) / (high - low or 1.0) for value in values]
