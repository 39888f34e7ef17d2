"""One self-contained HTML file: style and charts inside, no script, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightning_obc.files import require
from lightning_obc.report import charts
from lightning_obc.report.record import Record, last_rows

MOST = 24
_HERE = Path(__file__).parent


@lru_cache(maxsize=1)
def _environment() -> Any:
    jinja2 = require("jinja2", "report")
    return jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)


def page(template: str, **values: Any) -> str:
    """A template of this folder, filled; strings are escaped unless marked as safe."""
    text = (_HERE / template).read_text(encoding="utf-8")
    style = safe((_HERE / "style.css").read_text(encoding="utf-8"))
    rendered: str = _environment().from_string(text).render(style=style, **values)
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
    names = [row["name"] for row in rows if row in shown]
    histograms = {name: data for name, data in record["histograms"].items() if name in names}
    curves = dict(list(record["curves"].items())[:MOST])
    return page(
        "template.html",
        record=record,
        tiles=tiles(record),
        bars=bar_charts([row for row in rows if row in shown]),
        omitted=len(rows) - len(shown),
        trade_off=safe(charts.scatter(record["trade_off"], "Trade-off")) if record["trade_off"] else None,
        curves=[
            (name, safe(charts.curve(points, "sparsity", "error", f"Loss curve of {name}")))
            for name, points in curves.items()
        ],
        histograms=[(name, safe(charts.histogram(data, f"Weights of {name}"))) for name, data in histograms.items()],
        has_before=any(data["before"] for data in histograms.values()),
        corrections=[_correction(correction) for correction in record["corrections"]],
        left=left_dense(record),
    )


def tiles(record: Record) -> list[dict[str, str]]:
    """The few numbers that come first."""
    rows = last_rows(record)
    done = sum(row["compressed"] for row in rows)
    found = [{"name": "layers compressed", "value": f"{done} of {len(rows) + len(record['left_dense'])}"}]
    if size := record["sizes"]:
        found += [
            {"name": "zeros in these layers", "value": f"{100 * size['sparsity']:.1f} %"},
            {"name": "bits per weight, with masks", "value": f"{size['bits_per_weight']:.2f}"},
            {"name": "smaller in theory than float32", "value": f"{size['ratio']:.1f}×"},
        ]
    found += [
        {"name": name, "value": f"{pair[0]:.4g} → {pair[1]:.4g}"} for name, pair in list(record["figures"].items())[:2]
    ]
    if record["measured"]:
        best = max(record["measured"], key=lambda row: row["speedup"])
        found.append({"name": f"faster, measured: {best['name']}", "value": f"{best['speedup']:.2f}×"})
    seconds = sum(stage["seconds"] for stage in record["stages"])
    return [*found, {"name": "compression time", "value": f"{seconds:.1f} s"}]


def bar_charts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Error, sparsity and time of every layer, as horizontal bars."""
    if not rows:
        return []

    def chart(title: str, values: Sequence[float], texts: Sequence[str], log: bool) -> dict[str, Any]:
        lengths = charts.shares(values, log)
        entries = [
            {"name": row["name"], "share": length, "text": text, "bad": not row["compressed"]}
            for row, length, text in zip(rows, lengths, texts, strict=True)
        ]
        return {"title": title, "rows": entries}

    errors = [row["relative_error"] for row in rows]
    sparsity = [row["sparsity"] for row in rows]
    times = [row["seconds"] for row in rows]
    return [
        chart("Relative error, logarithmic", errors, [f"{100 * value:.3g} %" for value in errors], True),
        {
            **chart("Sparsity", sparsity, [f"{100 * value:.1f} %" for value in sparsity], False),
            "rows": [
                {
                    "name": row["name"],
                    "share": 100 * row["sparsity"],
                    "text": f"{100 * row['sparsity']:.1f} %",
                    "bad": False,
                }
                for row in rows
            ],
        },
        chart("Time", times, [f"{value:.2f} s" for value in times], False),
    ]


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


def _correction(correction: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        {
            "name": row["name"],
            "type": row["type"],
            "before": f"{row['before']:.4g}",
            "after": "–" if row["after"] is None else f"{row['after']:.4g}",
            "note": row["note"] or "ok",
        }
        for row in correction["layers"]
    ]
    title = f"Correction: {correction['method']}, {correction['batches']} batches, {correction['seconds']:.1f} s"
    return {"title": title, "rows": rows}
