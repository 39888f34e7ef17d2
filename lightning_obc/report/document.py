"""The same record as HTML, Markdown and JSON files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Union

from lightning_obc.errors import SpecError
from lightning_obc.files import check_target, write_whole
from lightning_obc.report.bars import failed
from lightning_obc.report.charts import number
from lightning_obc.report.html import correction, left_dense, render_html, tiles, trade_off_rows
from lightning_obc.report.record import WORK, Record, bits_text, work_rows
from lightning_obc.report.tables import figure_cells, markdown
from lightning_obc.report.totals import is_told, note


def render_json(record: Record) -> str:
    """The record itself; reports can be drawn and compared from it."""
    return json.dumps(record, indent=1) + "\n"


def render_markdown(record: Record) -> str:
    """The report's tables as Markdown."""
    parts = [f"# {record['title']}", *_summary(record)]
    parts += [_stage(stage) for stage in record["stages"]]
    for one in map(correction, record["corrections"]):
        rows = [[row[key] for key in ("name", "type", "before", "after", "note")] for row in one["rows"]]
        parts.append(markdown(one["title"], ("layer", "type", "distance before", "after", "status"), rows))
    parts += [text] if (text := note(record["stages"])) else []
    left = [f"- `{name}`: {reason}" for name, reason in left_dense(record)]
    parts.append("\n".join(["## Left dense", "", *(left or ["Nothing."])]))
    if record["recipe"]:
        parts.append("\n".join(["## Recipe", "", *(f"1. `{stage}`" for stage in record["recipe"])]))
    parts += [f"```text\n{plan}\n```" for plan in record["plans"]]
    if record["reproduce"]:
        parts.append(f"## Reproduce\n\n```python\n{record['reproduce']}\n```")
    versions = [[name, value] for name, value in record["environment"].items()]
    parts.append(markdown("Software", ("what", "version"), versions))
    return "\n\n".join(parts) + "\n"


def _summary(record: Record) -> list[str]:
    parts = ["\n".join(f"- {tile['name']}: {tile['value']}" for tile in tiles(record))]
    if record["figures"]:
        rows = [[name, *figure_cells(*pair)] for name, pair in record["figures"].items()]
        parts.append(markdown("Dense against compressed", ("figure", "dense", "compressed", "change"), rows))
    parts += ["\n".join(f"- {note}" for note in record["notes"])] if record["notes"] else []
    if data := record["trade_off"]:
        parts.append(markdown("Trade-off", ("", data["x"], data["y"]), trade_off_rows(data)))
    if record["measured"]:
        rows = [
            [row["name"], f"{1e3 * row['latency']:.3f}", f"{row['size'] / 2**20:.2f}", f"{row['speedup']:.2f}×"]
            for row in record["measured"]
        ]
        parts.append(markdown("Measured", ("file", "latency [ms]", "size [MiB]", "speed-up"), rows))
    return parts


def _stage(stage: dict[str, Any]) -> str:
    columns = [
        "layer",
        "type",
        "weight",
        "sparsity [%]",
        "bits",
        "loss",
        "rel. error [%]",
        "held out [%]",
        "time [s]",
        "status",
    ]
    rows = [
        [
            row["name"],
            row["type"],
            "×".join(map(str, row["shape"])),
            f"{100 * row['sparsity']:.1f}",
            bits_text(row),
            "–" if failed(row) else f"{row['loss']:.4g}",
            "–" if failed(row) else number(100 * row["relative_error"]),
            "–" if row["held_out"] is None else number(100 * row["held_out"]),
            f"{row['seconds']:.2f}",
            row["status"].replace("|", "\\|"),
        ]
        for row in stage["layers"]
    ]
    if is_told(stage["layers"]):
        place = columns.index("rel. error [%]") + 1
        columns.insert(place, "all stages [%]")
        for cells, row in zip(rows, stage["layers"], strict=True):
            total = row.get("total_error")
            cells.insert(place, "–" if total is None else number(100 * total))
    title = f"{stage['stage']}: {len(rows)} layers, {stage['samples']} calibration samples, {stage['seconds']:.1f} s"
    parts = [markdown(title, columns, rows)]
    if work := work_rows(stage):
        parts.append(markdown(f"{stage['stage']} by process", WORK, work))
    return "\n\n".join(parts)


_FORMATS: dict[str, Callable[[Record], str]] = {"html": render_html, "md": render_markdown, "json": render_json}


def default_formats() -> list[str]:
    """HTML only where the extra ``report`` is installed."""
    return ["html", "md", "json"] if find_spec("jinja2") else ["md", "json"]


def save_report(
    record: Record,
    path: Union[str, Path],
    *,
    formats: Sequence[str] = ("html", "md", "json"),
    overwrite: bool = False,
) -> list[Path]:
    """Write a record as ``path.html``, ``path.md`` and ``path.json``.

    Raises:
        SpecError: An unknown format. ExportError: A file exists or cannot be written. MissingExtraError: HTML without
            the extra ``report``.
    """
    return write_formats({name: _FORMATS.get(name) for name in formats}, record, path, overwrite)


def write_formats(
    renderers: dict[str, Callable[[Record], str] | None], record: Record, path: Union[str, Path], overwrite: bool
) -> list[Path]:
    """Render everything first, then write: a missing extra leaves no half report."""
    if unknown := [name for name, renderer in renderers.items() if renderer is None]:
        raise SpecError("A report format is unknown", got=", ".join(unknown), expected="html, md or json")
    targets = {name: check_target(Path(f"{path}.{name}"), overwrite) for name in renderers}
    texts = {name: renderer(record) for name, renderer in renderers.items() if renderer is not None}
    for name, text in texts.items():
        write_whole(targets[name], partial(_write, text))
    return list(targets.values())


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
