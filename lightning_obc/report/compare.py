"""Several runs side by side, from their records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union

from lightning_obc.errors import FingerprintError, SpecError
from lightning_obc.report import charts
from lightning_obc.report.document import write_formats
from lightning_obc.report.html import page, safe
from lightning_obc.report.record import Record, last_rows, load_record
from lightning_obc.report.scatter import scatter
from lightning_obc.report.tables import figure_cells, markdown
from lightning_obc.report.totals import final_errors


def compare_records(records: Mapping[str, Record]) -> dict[str, Any]:
    """What several runs have in common, by label.

    Returns:
        ``summary``: rows of ``[name, value of each run]``; ``layers``: per layer the relative error of its last stage
        and of all, sparsity and bits of each run (None where a run does not have the layer); ``trade_off``: bits per
        weight against the first figure that all runs measured.

    Raises:
        SpecError: Fewer than two runs.
    """
    if len(records) < 2:
        raise SpecError("A comparison needs several runs", got=len(records), expected="at least two")
    rows = {label: {row["name"]: row for row in last_rows(record)} for label, record in records.items()}
    names = list(dict.fromkeys(name for layers in rows.values() for name in layers))
    errors = [final_errors(record["stages"]) for record in records.values()]
    layers = [
        {
            "name": name,
            "runs": [_cell(mine.get(name), known) for mine, known in zip(rows.values(), errors, strict=True)],
        }
        for name in names
    ]
    return {"runs": list(records), "summary": _summary(records), "layers": layers, "trade_off": _trade_off(records)}


def _cell(row: Mapping[str, Any] | None, known: Mapping[str, float | None]) -> dict[str, Any] | None:
    if row is None:
        return None
    plain = {key: row[key] for key in ("relative_error", "sparsity", "bits", "compressed")}
    return plain | {"total_error": known.get(row["name"], 0.0)}


def _error(run: Mapping[str, Any]) -> tuple[float, str]:
    """What a layer has lost in all stages or, where that is not known, in its last; and which of the two it is."""
    total = run["total_error"]
    return (run["relative_error"], "last stage alone") if total is None else (total, "")


def _summary(records: Mapping[str, Record]) -> list[list[str]]:
    def row(name: str, value: Any) -> list[str]:
        return [name, *(value(record) for record in records.values())]

    table = [
        row("stages", lambda record: " → ".join(stage["stage"] for stage in record["stages"]) or "–"),
        row("layers compressed", lambda record: str(sum(entry["compressed"] for entry in last_rows(record)))),
        row("zeros [%]", lambda record: _size(record, "sparsity", 100)),
        row("bits per weight", lambda record: _size(record, "bits_per_weight", 1)),
        row("summed loss of last stages", lambda record: f"{sum(entry['loss'] for entry in last_rows(record)):.4g}"),
        row("time [s]", _time),
    ]
    figures = dict.fromkeys(name for record in records.values() for name in record["figures"])
    for name in figures:
        table.append(row(f"{name}, dense", lambda record, name=name: _figure(record, name, 0)))
        table.append(row(f"{name}, compressed", lambda record, name=name: _figure(record, name, 1)))
    versions = dict.fromkeys(name for record in records.values() for name in record["environment"])
    for name in versions:
        found = [record["environment"].get(name, "–") for record in records.values()]
        if len(set(found)) > 1:
            table.append([name, *found])
    return table


def _time(record: Record) -> str:
    seconds = sum(stage["seconds"] for stage in record["stages"])
    return f"{seconds:.1f}" if seconds else "–"


def _size(record: Record, key: str, factor: float) -> str:
    return f"{factor * record['sizes'][key]:.2f}" if record["sizes"] else "–"


def _figure(record: Record, name: str, index: int) -> str:
    pair = record["figures"].get(name)
    return "–" if pair is None else figure_cells(*pair)[index]


def _trade_off(records: Mapping[str, Record]) -> dict[str, Any] | None:
    shared = [
        name
        for name in next(iter(records.values()))["figures"]
        if all(name in record["figures"] and record["sizes"] for record in records.values())
    ]
    if not shared:
        return None
    points = [
        {"x": record["sizes"]["bits_per_weight"], "y": record["figures"][shared[0]][1], "label": label}
        for label, record in records.items()
    ]
    dense = {record["figures"][shared[0]][0] for record in records.values()}
    baseline = {"dense": dense.pop()} if len(dense) == 1 else {}
    return {"x": "bits per weight", "y": shared[0], "points": points, "joined": False, **baseline}


def render_comparison_html(comparison: Mapping[str, Any]) -> str:
    """The comparison as one HTML page."""
    trade_off = comparison["trade_off"]
    return page(
        "compare.html",
        comparison=comparison,
        trade_off=safe(scatter(trade_off, "Trade-off")) if trade_off else None,
        error=_error,
    )


def render_comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """The comparison as Markdown tables."""
    runs = comparison["runs"]
    errors = [
        [layer["name"], *("–" if run is None else _plain(*_error(run)) for run in layer["runs"])]
        for layer in comparison["layers"]
    ]
    parts = [
        f"# {' · '.join(runs)}",
        markdown("Runs", ("", *runs), comparison["summary"]),
        markdown("Relative error of all stages by layer [%]", ("layer", *runs), errors),
    ]
    return "\n\n".join(parts) + "\n"


def _plain(error: float, note: str) -> str:
    return charts.number(100 * error) + (f" ({note})" if note else "")


def compare_reports(
    reports: Sequence[Union[str, Path]],
    path: Union[str, Path],
    *,
    formats: Sequence[str] = ("html", "md", "json"),
    overwrite: bool = False,
) -> list[Path]:
    """Compare the JSON files of several runs, and write the comparison beside ``path``.

    Runs are called after their files; files of one name after their folders too.

    Raises:
        SpecError: Fewer than two reports, one of them twice, or an unknown format. FingerprintError: Files that are no
            reports; all of them are named.
    """
    paths = [Path(report) for report in reports]
    if twice := [str(path) for index, path in enumerate(paths) if path.resolve() in map(Path.resolve, paths[:index])]:
        raise SpecError("A run is to be compared with itself", got=", ".join(twice), expected="every file once")
    stems = [file.stem.removesuffix(".report") for file in paths]
    labels = [
        stem if stems.count(stem) == 1 else str(file.with_name(stem)) for stem, file in zip(stems, paths, strict=True)
    ]
    comparison = compare_records(dict(zip(labels, _records(paths), strict=True)))
    renderers = {
        "html": render_comparison_html,
        "md": render_comparison_markdown,
        "json": lambda data: json.dumps(data, indent=1) + "\n",
    }
    return write_formats({name: renderers.get(name) for name in formats}, comparison, path, overwrite)


def _records(paths: Sequence[Path]) -> list[Record]:
    """All records, or one error that names every file that holds none."""
    records, wrong = [], list[FingerprintError]()
    for path in paths:
        try:
            records.append(load_record(path))
        except FingerprintError as error:
            wrong.append(error)
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        raise FingerprintError(
            f"{len(wrong)} of {len(paths)} files are no reports",
            got="; ".join(str(error.got) for error in wrong),
            expected="the JSON files of reports",
            remedy="leave them out, or write these reports again",
        )
    return records
