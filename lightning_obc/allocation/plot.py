"""A trade-off curve drawn with matplotlib, from its plain values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_obc.errors import MissingExtraError
from lightning_obc.files import write_whole

LABELS = {"uniform": "uniform", "dp": "dynamic programme", "spdy": "SPDY"}
COST_NAMES = {"flops": "FLOPs", "bops": "BOPs", "bytes": "bytes", "seconds": "time"}
# Okabe and Ito's colours, told apart in every kind of colour vision; shapes tell the methods apart without colour.
_STYLES: dict[str, dict[str, Any]] = {
    # Without a line: between two levels there may be no uniform model.
    "uniform": {"color": "#666666", "marker": "s", "linestyle": "none"},
    "dp": {"color": "#0072b2", "marker": "o"},
    "spdy": {"color": "#d55e00", "marker": "D", "markerfacecolor": "white"},
}


def draw_curve(curve: Mapping[str, Any], path: str | Path) -> None:
    """Metric over real cost for every method, with the budgets as vertical lines.

    Args:
        curve: ``SearchResult.to_dict()``, or what ``curve.json`` holds.
        path: The file; its ending chooses the format.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError(
            "The curve cannot be drawn", got="no matplotlib", remedy="pip install matplotlib"
        ) from None
    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    axes = figure.subplots()
    budgets = sorted({point["budget"] for point in curve["points"]})
    for budget in budgets:
        axes.axvline(budget, color="#dddddd", linewidth=1, zorder=0)
    for method, label in LABELS.items():
        points = sorted((p for p in curve["points"] if p["method"] == method), key=lambda p: p["budget"])
        if points:
            x, y = [point["cost"] for point in points], [point["metric"] for point in points]
            axes.plot(x, y, label=label, markersize=6, **_STYLES[method])
    axes.axhline(curve["dense_metric"], color="black", linestyle=":", linewidth=1.2, label="dense float32")
    cost = COST_NAMES.get(curve["cost"], curve["cost"])
    axes.set_xscale("log")
    axes.set_xticks(budgets, [f"{100 * budget:.3g} %\n1/{1 / budget:.3g}" for budget in budgets])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(f"{cost} as a share of {curve['baseline']} (lines: budgets; marks: real cost)")
    axes.set_ylabel(str(curve["metric"]).replace("_", " "))
    axes.set_title(f"{curve['metric']} under a budget of {cost}".replace("_", " "), loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    figure.legend(frameon=False, loc="outside lower center", ncols=4)
    target = Path(path)
    form = target.suffix.removeprefix(".") or None
    write_whole(target, lambda part: figure.savefig(part, dpi=150, format=form))
