"""Reports as text. Rich draws the tables where it is installed; otherwise they come as plain Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_obc.layers import by_reason
from lightning_obc.report.result import CompressionReport, LayerReport, StageReport
from lightning_obc.report.totals import is_told

if TYPE_CHECKING:
    from lightning_obc.correction import CorrectionReport

COLUMNS = ("layer", "weight", "sparsity [%]", "bits", "loss", "rel. error [%]", "time [s]", "status")

LEFT, LEFT_SEVERAL = "left as it was", "left as they were"

_SHORT = 8


def layer_cells(layer: LayerReport) -> list[str]:
    """One row of the per-layer table."""
    kept = not layer.compressed and layer.status.startswith("kept")
    return [
        layer.name,
        "×".join(map(str, layer.shape)),
        f"{100 * layer.sparsity:.1f}",
        f"{layer.bits}" if layer.input_bits is None else f"{layer.bits}, input {layer.input_bits}",
        "–" if kept else f"{layer.loss:.4g}",
        "–" if kept else f"{100 * layer.relative_error:.3g}",
        f"{layer.seconds:.2f}",
        _short(layer),
    ]


def _short(layer: LayerReport) -> str:
    """What fits a cell; :func:`stage_table` writes the rest below."""
    if len(layer.status) <= _SHORT:
        return layer.status
    return "ok, note" if layer.compressed else "kept"


def stage_table(stage: StageReport) -> str:
    """Per-layer table of one stage with its totals, and what was skipped or failed."""
    columns, rows = list(COLUMNS), [layer_cells(layer) for layer in stage.layers]
    totals = is_told(layer.to_dict() for layer in stage.layers)
    if totals:
        place = columns.index("rel. error [%]") + 1
        columns.insert(place, "all stages [%]")
        for row, layer in zip(rows, stage.layers, strict=True):
            row.insert(place, "–" if layer.total_error is None else f"{100 * layer.total_error:.3g}")
    title = f"{stage.stage}: {len(stage.layers)} layers, {stage.samples} calibration samples, {stage.seconds:.1f} s"
    note = f"loss: squared output error per sample, against the weights before this stage; sum {stage.loss:.4g}"
    inherited = [layer.inherited for layer in stage.layers if layer.compressed and layer.inherited is not None]
    if inherited:
        note += f", of which {sum(inherited):.4g} came with the inputs behind compressed layers"
    note += "\nrel. error: that loss as a share of the layer's squared output, bias left out"
    if totals:
        note += "\nall stages: the same, of this and all earlier stages, against the weights before the first"
    apart = {layer.name: f"by {layer.stage}" for layer in stage.layers if layer.stage != stage.stage}
    apart_lines = by_reason(apart, "differently", "differently")
    left = by_reason(stage.skipped, LEFT, LEFT_SEVERAL)
    remarks = {layer.name: layer.status for layer in stage.layers if len(layer.status) > _SHORT}
    notes = by_reason(remarks, "note", "notes")
    return "\n".join([render(title, columns, rows), note, *notes, *apart_lines, *left])


def figure_cells(dense: float, compressed: float) -> tuple[str, str, str]:
    """Two figures and their difference, with four places behind the point, or more of figures below 0.1."""
    largest = max(abs(dense), abs(compressed))
    places = 4 if largest >= 0.1 or not largest > 1e-9 else 3 - math.floor(math.log10(largest))
    return f"{dense:.{places}f}", f"{compressed:.{places}f}", f"{compressed - dense:+.{places}f}"


def correction_table(correction: CorrectionReport) -> str:
    """Per-layer table of one correction, and what was left out."""
    rows = [
        [row.name, row.type, f"{row.before:.4g}", "" if row.after is None else f"{row.after:.4g}", row.note or "ok"]
        for row in correction.layers
    ]
    title = f"{correction}, {correction.batches} batches, {correction.seconds:.1f} s"
    left = by_reason(correction.skipped, LEFT, LEFT_SEVERAL)
    columns = ("layer", "type", "distance before", "after", "status")
    return "\n".join([render(title, columns, rows), *correction.notes, *left])


def report_table(report: CompressionReport) -> str:
    """Every stage, then dense against compressed figures."""
    parts = [stage_table(stage) for stage in report.stages]
    parts += [correction_table(correction) for correction in report.corrections]
    if report.figures:
        rows = [[name, *figure_cells(*pair)] for name, pair in report.figures.items()]
        parts.append(render("Dense against compressed", ("figure", "dense", "compressed", "change"), rows))
    parts += by_reason(report.left_dense, "not compressible", "not compressible")
    return "\n\n".join(parts)


def render(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text: drawn by Rich when it is installed, otherwise Markdown."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return markdown(title, columns, rows)
    # Text objects, because Rich would read square brackets in strings as markup.
    table = Table()
    cells = list(zip(*rows, strict=True)) if rows else [()] * len(columns)
    heads = [_folded(column, max(map(len, below), default=0)) for column, below in zip(columns, cells, strict=True)]
    for index, head in enumerate(heads):
        table.add_column(Text(head), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    # Wide enough for every cell: a table in a log file must not depend on the terminal it was started from.
    widths = [max(map(len, (*head.split("\n"), *below))) for head, below in zip(heads, cells, strict=True)]
    console = Console(width=sum(widths) + 3 * len(widths) + 1, color_system=None, record=False)
    with console.capture() as capture:
        console.print(table)
    # The title by itself: as one of the table it would be folded to the table's width.
    return "\n".join([title, *(line.rstrip() for line in capture.get().rstrip("\n").splitlines())])


def _folded(head: str, room: int) -> str:
    """A column's name on two lines where one line would be wider than all that stands below it."""
    words = head.split(" ")
    if len(head) <= room or len(words) == 1:
        return head
    folds = [(" ".join(words[:i]), " ".join(words[i:])) for i in range(1, len(words))]
    return "\n".join(min(folds, key=lambda fold: max(map(len, fold))))


def markdown(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table under a bold title, columns padded so that it reads well as plain text."""
    cells = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([f"**{title}**", "", *lines])
