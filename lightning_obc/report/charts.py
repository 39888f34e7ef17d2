"""Small charts as inline SVG and HTML bars: no library, no script, colours from the page's style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT = 340.0, 200.0
# Colours of series in the page's style; further series begin again.
COLOURS = 6
LEFT, RIGHT, TOP, BOTTOM = 50.0, 10.0, 24.0, 36.0


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
        Axis(min(values_x), max(values_x), LEFT, WIDTH - RIGHT),
        Axis(low_y, high_y, HEIGHT - BOTTOM, TOP, log_y),
    )


def frame(
    x: Axis, y: Axis, name_x: str, name_y: str, body: str, label: str, ticks_x: Sequence[float] | None = None
) -> str:
    """A chart's ticks and names of axes around its body, as one SVG element."""
    parts = [
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(label)}">',
        *(
            f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
            f'<text class="tick" x="{LEFT - 5:g}" y="{y(t) + 3.5:.1f}" text-anchor="end">{text}</text>'
            for t, text in zip(y.ticks(), told_apart(y.ticks()), strict=True)
        ),
        _ticks_below(x, x.ticks() if ticks_x is None else ticks_x),
        f'<text class="axis" x="{WIDTH - RIGHT:g}" y="{HEIGHT - 6:g}" text-anchor="end">{escape(name_x)}</text>',
        f'<text class="axis" x="2" y="11">{escape(name_y)}</text>',
        body,
        "</svg>",
    ]
    return "".join(parts)


def _ticks_below(x: Axis, values: Sequence[float]) -> str:
    base = HEIGHT - BOTTOM
    marks = [
        f'<line class="grid" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{base:g}" y2="{base + 4:g}"/>'
        f'<text class="tick" x="{x(t):.1f}" y="{base + 14:g}" text-anchor="middle">{text}</text>'
        for t, text in zip(values, told_apart(values), strict=True)
    ]
    return f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{base:g}" y2="{base:g}"/>{"".join(marks)}'


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
    return frame(x, y, name_x, name_y, f'<path class="line" d="{path}"/>{dots}', label)


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
    x = Axis(data["low"], data["high"], LEFT, WIDTH - RIGHT)
    root = Axis(0.0, math.sqrt(highest), HEIGHT - BOTTOM, TOP)
    width, base = (WIDTH - RIGHT - LEFT) / len(after), HEIGHT - BOTTOM
    heights = [root(math.sqrt(count)) for count in after]
    body = "".join(
        f'<rect class="bar" x="{LEFT + i * width:.2f}" y="{top:.1f}" width="{max(width - 0.6, 0.5):.2f}" '
        f'height="{base - top:.1f}"/>'
        for i, (top, count) in enumerate(zip(heights, after, strict=True))
        if count
    )
    if before:
        steps = [(LEFT + (i + 0.5) * width, root(math.sqrt(count))) for i, count in enumerate(before)]
        path = " ".join(f"{'M' if i == 0 else 'L'}{a:.1f} {b:.1f}" for i, (a, b) in enumerate(steps))
        body += f'<path class="line second" d="{path}"/>'
    levels = data.get("levels")
    if levels and levels <= 32:
        body += "".join(
            f'<line class="level" x1="{x(i):.1f}" x2="{x(i):.1f}" y1="{base:g}" y2="{base + 4:g}"/>'
            for i in range(levels)
        )
    scale = "".join(
        f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{root(math.sqrt(t)):.1f}" '
        f'y2="{root(math.sqrt(t)):.1f}"/><text class="tick" x="{LEFT - 5:g}" y="{root(math.sqrt(t)) + 3.5:.1f}" '
        f'text-anchor="end">{number(t)}</text>'
        for t in _round_counts(highest)
    )
    name = f"code on the grid of {levels} points" if levels else "weight"
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(label)}">'
        f"{scale}{body}{_ticks_below(x, [t for t in x.ticks() if not levels or t == round(t)])}"
        f'<text class="axis" x="{WIDTH - RIGHT:g}" y="{HEIGHT - 6:g}" text-anchor="end">{name}</text>'
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
