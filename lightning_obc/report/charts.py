"""Small charts as inline SVG and HTML bars: no library, no script, colours from the page's style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

WIDTH, HEIGHT = 340.0, 200.0
# Colours of series in the page's style; further series begin again.
COLOURS = 6
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 10.0, 24.0, 36.0
_LONGEST = 28


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
            return [10.0**power for power in reversed(range(last, first - 1, -stride))]
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
    """A short label for a number: three digits, and powers of ten only where there would be many zeros."""
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-4:
        mantissa, _, power = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-2 else f"{value:.2g}"


def told_apart(values: Sequence[float]) -> list[str]:
    """Labels of the ticks of one axis, with as many digits as tell them apart."""
    texts = [number(value) for value in values]
    digits = 4
    while len(set(texts)) < len(set(values)) and digits < 12:
        texts, digits = [f"{value:.{digits}g}" for value in values], digits + 1
    return texts


def seconds(value: float) -> str:
    """A time with its unit; a dash for what took none, because it was not measured."""
    if value <= 0:
        return "–"
    return "< 0.001 s" if value < 0.0005 else f"{value:.3f} s" if value < 0.1 else f"{value:.2f} s"


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


def _frame(
    x: Axis, y: Axis, name_x: str, name_y: str, body: str, label: str, ticks_x: Sequence[float] | None = None
) -> str:
    parts = [
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(label)}">',
        *(
            f'<line class="grid" x1="{_LEFT:g}" x2="{WIDTH - _RIGHT:g}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
            f'<text class="tick" x="{_LEFT - 5:g}" y="{y(t) + 3.5:.1f}" text-anchor="end">{text}</text>'
            for t, text in zip(y.ticks(), told_apart(y.ticks()), strict=True)
        ),
        _ticks_below(x, x.ticks() if ticks_x is None else ticks_x),
        f'<text class="axis" x="{WIDTH - _RIGHT:g}" y="{HEIGHT - 6:g}" text-anchor="end">{escape(name_x)}</text>',
        f'<text class="axis" x="2" y="11">{escape(name_y)}</text>',
        body,
        "</svg>",
    ]
    return "".join(parts)


def _ticks_below(x: Axis, values: Sequence[float]) -> str:
    base = HEIGHT - _BOTTOM
    marks = [
        f'<line class="grid" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{base:g}" y2="{base + 4:g}"/>'
        f'<text class="tick" x="{x(t):.1f}" y="{base + 14:g}" text-anchor="middle">{text}</text>'
        for t, text in zip(values, told_apart(values), strict=True)
    ]
    return f'<line class="grid" x1="{_LEFT:g}" x2="{WIDTH - _RIGHT:g}" y1="{base:g}" y2="{base:g}"/>{"".join(marks)}'


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
    return _frame(x, y, str(data.get("x", "")), str(data.get("y", "")), body, label, _points_as_ticks(points, x))


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
    x = Axis(low, high, _LEFT, WIDTH - _RIGHT, log)
    heights = [float(p["y"]) for p in points] + ([] if dense is None else [dense])
    margin = 0.08 * (max(heights) - min(heights)) or 0.05 * abs(heights[0]) or 0.5
    top = _TOP + (14.0 if legend else 0.0)
    return x, Axis(min(heights) - margin, max(heights) + margin, HEIGHT - _BOTTOM, top)


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
    sides = ["end", "start"] if left > (_LEFT + WIDTH) / 2 else ["start", "end"]
    offsets = [(side, down) for down in (-14.0, 4.0) for side in sides]
    offsets += [(sides[0], 4.0 + 11.0 * step) for step in range(1, 40)]
    for side, down in offsets:
        start = left + 6 if side == "start" else left - 6 - width
        box = (start, top + down, start + width, top + down + 10)
        outside = box[0] < 0 or box[2] > WIDTH or box[1] < _TOP - 14
        if not outside and all(box[2] <= a or c <= box[0] or box[3] <= b or d <= box[1] for a, b, c, d in taken):
            break
    return box, side


def _legend(names: Sequence[str]) -> str:
    """Names of the series in one line above the chart."""
    body, right = "", WIDTH - _RIGHT
    for index in reversed(range(len(names))):
        body += f'<text class="tick" x="{right:g}" y="26" text-anchor="end">{escape(names[index])}</text>'
        right -= 6.1 * len(names[index]) + 10
        body += f'<circle class="dot series{index % COLOURS}" cx="{right:g}" cy="22.5" r="3.5"/>'
        right -= 14
    return body


_ALONE = """
svg { background: #fff; font-family: system-ui, sans-serif }
text { fill: #333; font-size: 10px } .grid { stroke: #ddd } .level { stroke: #888 }
.line { fill: none; stroke-width: 1.6; stroke: #2563eb } .dot { fill: #2563eb }
.line.series1 { stroke: #d97706 } .dot.series1 { fill: #d97706 }
.line.series2 { stroke: #059669 } .dot.series2 { fill: #059669 }
.line.series3 { stroke: #7c3aed } .dot.series3 { fill: #7c3aed }
.line.series4 { stroke: #be185d } .dot.series4 { fill: #be185d }
.line.series5 { stroke: #57534e } .dot.series5 { fill: #57534e }
"""


def standalone(svg: str) -> str:
    """A chart as a file of its own, with colours that do not come from a page."""
    start = svg.index(">") + 1
    opening = svg[:start].replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH:g}" ', 1)
    return f"{opening}<style>{_ALONE}</style>{svg[start:]}\n"


def histogram(data: Mapping[str, Any], label: str) -> str:
    """Weights before (line) and after (bars), with the grid points as ticks where there is a grid of few of them.

    Counts are drawn on a square-root scale: after quantization they pile up on few points, and both shapes should show.
    """
    after, before = data["after"], data.get("before")
    highest = float(max(*after, *(before or [0]), 1))
    x = Axis(data["low"], data["high"], _LEFT, WIDTH - _RIGHT)
    root = Axis(0.0, math.sqrt(highest), HEIGHT - _BOTTOM, _TOP)
    width, base = (WIDTH - _RIGHT - _LEFT) / len(after), HEIGHT - _BOTTOM
    heights = [root(math.sqrt(count)) for count in after]
    body = "".join(
        f'<rect class="bar" x="{_LEFT + i * width:.2f}" y="{top:.1f}" width="{max(width - 0.6, 0.5):.2f}" '
        f'height="{base - top:.1f}"/>'
        for i, (top, count) in enumerate(zip(heights, after, strict=True))
        if count
    )
    if before:
        steps = [(_LEFT + (i + 0.5) * width, root(math.sqrt(count))) for i, count in enumerate(before)]
        path = " ".join(f"{'M' if i == 0 else 'L'}{a:.1f} {b:.1f}" for i, (a, b) in enumerate(steps))
        body += f'<path class="line second" d="{path}"/>'
    levels = data.get("levels")
    if levels and levels <= 32:
        body += "".join(
            f'<line class="level" x1="{x(i):.1f}" x2="{x(i):.1f}" y1="{base:g}" y2="{base + 4:g}"/>'
            for i in range(levels)
        )
    scale = "".join(
        f'<line class="grid" x1="{_LEFT:g}" x2="{WIDTH - _RIGHT:g}" y1="{root(math.sqrt(t)):.1f}" '
        f'y2="{root(math.sqrt(t)):.1f}"/><text class="tick" x="{_LEFT - 5:g}" y="{root(math.sqrt(t)) + 3.5:.1f}" '
        f'text-anchor="end">{number(t)}</text>'
        for t in _round_counts(highest)
    )
    name = f"code on the grid of {levels} points" if levels else "weight"
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(label)}">'
        f"{scale}{body}{_ticks_below(x, [t for t in x.ticks() if not levels or t == round(t)])}"
        f'<text class="axis" x="{WIDTH - _RIGHT:g}" y="{HEIGHT - 6:g}" text-anchor="end">{name}</text>'
        f'<text class="axis" x="2" y="11">number of weights, √ scale</text></svg>'
    )


def _round_counts(highest: float) -> list[float]:
    """Round counts near a third and two thirds of the height of the square-root scale, and near its top."""
    found = []
    for part in (highest / 9, 4 * highest / 9, highest):
        power = 10.0 ** math.floor(math.log10(max(part, 1.0)))
        factors = (1, 1.5, 2, 3, 4, 5, 6, 8) if power > 1 else (1, 2, 3, 4, 5, 6, 8)
        found.append(max(factor * power for factor in factors if factor * power <= max(part, 1.0)))
    return sorted(set(found))
