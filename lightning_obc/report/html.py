"""One self-contained HTML file: style and charts inside, no script, nothing loaded from anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightning_obc.files import require
from lightning_obc.report import charts, totals
from lightning_obc.report.bars import bar_charts, failed, percent, without_prefix
from lightning_obc.report.record import WORK, Record, bits_text, last_rows, work_rows
from lightning_obc.report.scatter import scatter
from lightning_obc.report.tables import figure_cells

MOST = 24
_ROOM = 24
_HERE = Path(__file__).parent


@lru_cache(maxsize=1)
def _environment() -> Any:
    jinja2 = require("jinja2", "report")
    return jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)


def page(template: str, **values: Any) -> str:
    """A template of this folder, filled; strings are escaped unless marked as safe."""
    text = (_HERE / template).read_text(encoding="utf-8")
    style = safe((_HERE / "style.css").read_text(encoding="utf-8"))
    helpers = {
        "percent": percent,
        "failed": failed,
        "breakable": breakable,
        "is_long": is_long,
        "seconds": charts.seconds,
    }
    rendered: str = _environment().from_string(text).render(style=style, colours=charts.COLOURS, **helpers, **values)
    return rendered


def safe(markup: str) -> Any:
    """Markup made by this package, which must not be escaped again."""
    return require("markupsafe", "report").Markup(markup)


def render_html(record: Record) -> str:
    """The report as one HTML page.

    Raises:
        MissingExtraError: The extra ``report`` is not installed.
    """
    rows = last_rows(record)
    shown = sorted(rows, key=lambda row: -row["loss"])[:MOST]
    names = [name for name in _order(record) if any(name == row["name"] for row in shown)]
    histograms = {name: record["histograms"][name] for name in names if name in record["histograms"]}
    bars = bar_charts(layer_rows(record, names))
    return page(
        "template.html",
        record=record,
        tiles=tiles(record),
        bars=bars,
        timed=any(chart["title"].startswith("Time") for chart in bars),
        omitted=len(rows) - len(shown),
        trade_off=safe(scatter(record["trade_off"], "Trade-off")) if record["trade_off"] else None,
        points=trade_off_rows(record["trade_off"]) if record["trade_off"] else [],
        bits_text=bits_text,
        figure_cells=figure_cells,
        is_told=totals.is_told,
        several=any(totals.is_told(stage["layers"]) for stage in record["stages"]),
        unknown=totals.note(record["stages"]),
        work=[work_rows(stage) for stage in record["stages"]],
        work_columns=WORK,
        stages=[stage["stage"] for stage in record["stages"]],
        curves=_curves(record["curves"]),
        histograms=_histograms(histograms),
        has_before=any(data["before"] for data in histograms.values()),
        corrections=[correction(one) for one in record["corrections"]],
        left=left_dense(record),
    )


def _curves(curves: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Charts of the loss curves of every stage, with its name; of many layers the first ones."""
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for one in curves:
        if len(shown := stages.setdefault(one["stage"], [])) < MOST:
            shown.append(one)
    labels = without_prefix([one["name"] for shown in stages.values() for one in shown])
    return [(stage, [(labels[one["name"]], _curve(one)) for one in shown]) for stage, shown in stages.items()]


def _curve(one: Mapping[str, Any]) -> Any:
    label = f"Loss curve of {one['name']} {one['stage']}"
    return safe(charts.curve(one["points"], one["x"], "relative error", label))


def _histograms(data: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Any]]:
    labels = without_prefix(list(data))
    return [(labels[name], safe(charts.histogram(one, f"Weights of {name}"))) for name, one in data.items()]


def breakable(name: str) -> Any:
    """A dotted name that may be folded behind its dots and underscores."""
    return safe(re.sub(r"([._])", r"\1<wbr>", str(require("markupsafe", "report").escape(name))))


def is_long(names: Iterable[str]) -> bool:
    """True where names would leave a table no room for anything else."""
    return max(map(len, names), default=0) > _ROOM


def _order(record: Record) -> list[str]:
    """Layers in the order of the stage that has most of them: with several stages the first need not be the longest."""
    longest: list[dict[str, Any]] = max((stage["layers"] for stage in record["stages"]), key=len, default=[])
    return list(dict.fromkeys(row["name"] for row in [*longest, *last_rows(record)]))


def trade_off_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """The points of a trade-off as cells: name, horizontal and vertical figure."""
    return [
        [
            str(point.get("series") or point.get("label") or "–"),
            charts.number(point["x"]),
            f"{point['y']:.4f}",
        ]
        for point in data["points"]
    ]


def tiles(record: Record) -> list[dict[str, str]]:
    """The few numbers that come first."""
    rows = last_rows(record)
    done = sum(row["compressed"] for row in rows)
    found = [{"name": "layers compressed", "value": f"{done} of {len(rows) + len(record['left_dense'])}"}]
    if size := record["sizes"]:
        found += [
            {"name": "zeros in these layers", "value": f"{100 * size['sparsity']:.1f} %"},
            {"name": "bits per weight with masks, dense 32", "value": f"{size['bits_per_weight']:.2f}"},
            {"name": "smaller in theory than float32", "value": f"{size['ratio']:.1f}×"},
        ]
    found += [
        {"name": f"{name}, dense {pair[0]:.4g}", "value": f"{pair[1]:.4g}"}
        for name, pair in list(record["figures"].items())[:2]
    ]
    if record["measured"]:
        best = max(record["measured"], key=lambda row: row["speedup"])
        found.append({"name": f"faster, measured: {best['name']}", "value": f"{best['speedup']:.2f}×"})
    if seconds := sum(stage["seconds"] for stage in record["stages"]):
        found.append({"name": "compression time", "value": f"{seconds:.1f} s"})
    return found


def layer_rows(record: Record, names: Sequence[str]) -> list[list[dict[str, Any]]]:
    """The rows of each named layer, one for every stage it took part in, with the stage's number as ``series``."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for index, stage in enumerate(record["stages"]):
        for row in stage["layers"]:
            if row["name"] in found:
                found[row["name"]].append(row | {"series": index})
    return list(found.values())


def left_dense(record: Record) -> list[tuple[str, str]]:
    """Layers that were left as they were, with the reason: not supported, left out, or not solvable."""
    compressed = {row["name"] for row in last_rows(record) if row["compressed"]}
    found = dict(record["left_dense"])
    for stage in record["stages"]:
        skipped = {name: f"{stage['stage']}: {reason}" for name, reason in stage["skipped"].items()}
        failed = {row["name"]: f"{stage['stage']}: {row['status']}" for row in stage["layers"] if not row["compressed"]}
        for name, reason in (skipped | failed).items():
            note = f"{reason}{'; compressed by another stage' if name in compressed else ''}"
            found[name] = f"{found[name]}; {note}" if name in found else note
    return [(name or "the model itself", reason) for name, reason in found.items()]


def correction(done: Mapping[str, Any]) -> dict[str, Any]:
    """A correction as a title and rows of cells."""
    rows = [
        {
            "name": row["name"],
            "type": row["type"],
            "before": f"{row['before']:.4g}",
            "after": "–" if row["after"] is None else f"{row['after']:.4g}",
            "note": row["note"] or "ok",
        }
        for row in done["layers"]
    ]
    title = f"Correction: {done['method']}, {done['batches']} batches, {done['seconds']:.1f} s"
    return {"title": title, "rows": rows}
