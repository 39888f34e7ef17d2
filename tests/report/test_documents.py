"""Records and what is drawn from them."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from importlib.metadata import version

import pytest
import torch
from sample_reports import HOSTILE, sample_record, sample_report

from lightning_obc import files as files_module
from lightning_obc.errors import ExportError, FingerprintError, MissingExtraError, SpecError
from lightning_obc.report import (
    CompressionReport,
    charts,
    compare_records,
    compare_reports,
    load_record,
    render_html,
    render_markdown,
    report_record,
    save_report,
)
from lightning_obc.report.html import bar_charts

pytest.importorskip("jinja2")


class Balanced(HTMLParser):
    """Checks that elements are closed in order, and collects what a browser would load."""

    VOID = frozenset({"meta", "link", "line", "circle", "rect", "path", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for key, value in attrs if key in ("src", "href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_html_is_one_file_without_scripts_or_anything_to_load():
    html = render_html(sample_record())
    page = Balanced()
    page.feed(html)
    assert not page.open
    assert page.loads == ["data:,"]
    assert "script" not in page.tags
    assert "@import" not in html
    assert "url(" not in html
    assert HOSTILE not in html
    assert "&lt;script&gt;" in html
    assert "Run 0 &amp; more" in html


def test_html_shows_every_part_of_the_record():
    html = render_html(sample_record())
    for heading in (
        "Dense against compressed",
        "Measured on this machine",
        "Layers at a glance",
        "Trade-off",
        "Loss curves of the sweep",
        "Weights",
        "Prune(0.5)",
        "Quantize(int4 asym per channel)",
        "Left dense",
        "Recipe and plan",
        "Reproduce",
        "Software",
    ):
        assert f"<h2>{heading}</h2>" in html, heading
    for text in ("no adapter for Embedding", "excluded", "Cholesky failed", version("torch"), "0.9900", "2.50×"):
        assert text in html, text
    assert html.count("<svg") == 1 + 3 + 3


def test_a_report_of_nothing_is_still_a_page(tmp_path):
    record = report_record(CompressionReport(torch.nn.Linear(2, 2), []))
    page = Balanced()
    page.feed(render_html(record))
    assert not page.open
    assert "0 of 0" in render_markdown(record)


def test_markdown_holds_the_same_rows():
    record = sample_record()
    text = render_markdown(record)
    for stage in record["stages"]:
        for row in stage["layers"]:
            assert f"| {row['name']} " in text
    assert "- `5`: no adapter for Embedding" in text
    assert "obc.compress(" in text
    assert "| accuracy | 0.9900 | 0.9800" in text


def test_files_come_back_and_are_not_overwritten(tmp_path):
    record = sample_record()
    paths = save_report(record, tmp_path / "run")
    assert [path.name for path in paths] == ["run.html", "run.md", "run.json"]
    assert load_record(tmp_path / "run.json") == json.loads(json.dumps(record))
    with pytest.raises(ExportError, match="exists already"):
        save_report(record, tmp_path / "run", formats=["json"])
    save_report(record, tmp_path / "run", overwrite=True)
    with pytest.raises(SpecError, match="pdf"):
        save_report(record, tmp_path / "other", formats=["pdf"])
    (tmp_path / "other.json").write_text("[1, 2]")
    with pytest.raises(FingerprintError, match="not a report"):
        load_record(tmp_path / "other.json")
    with pytest.raises(FingerprintError, match="cannot be read"):
        load_record(tmp_path / "nothing.json")


def test_a_missing_extra_leaves_no_half_report(tmp_path, monkeypatch):
    from lightning_obc.report import html

    def missing(name: str) -> object:
        raise ImportError(name)

    html._environment.cache_clear()
    monkeypatch.setattr(files_module, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"lightning-obc\[report\]"):
        save_report(sample_record(), tmp_path / "run", formats=["json", "html"])
    assert not list(tmp_path.iterdir())
    save_report(sample_record(), tmp_path / "run", formats=["json", "md"])


def test_histograms_lie_on_the_grid():
    report, dense = sample_report(bits=3)
    record = report_record(report, dense=dense)
    for name, data in record["histograms"].items():
        weight = report.solutions[name].weight
        assert sum(data["after"]) == weight.numel() == sum(data["before"])
        width = (data["high"] - data["low"]) / len(data["after"])
        centres = [data["low"] + (i + 0.5) * width for i, count in enumerate(data["after"]) if count]
        assert len(centres) <= 8
        assert all(abs(centre - round(centre)) <= width for centre in centres)
        assert data["levels"] == 8
    without = report_record(report)
    assert all(data["before"] is None for data in without["histograms"].values())


def test_sizes_count_kept_bits_and_masks():
    report, _ = sample_report(bits=4)
    sizes = report_record(report)["sizes"]
    rows = report.layers.values()
    total = sum(math.prod(row.shape) for row in rows)
    bits = sum(math.prod(row.shape) * (0.5 * row.bits + 1) for row in rows)
    assert sizes["bits_per_weight"] == pytest.approx(bits / total)
    assert sizes["ratio"] == pytest.approx(32 * total / bits)


def test_axes_and_ticks():
    axis = charts.Axis(0.001, 10, 0, 100, log=True)
    assert axis(0.001) == 0
    assert axis(10) == 100
    assert axis(0.1) == pytest.approx(50)
    assert axis.ticks() == [0.001, 0.01, 0.1, 1, 10]
    assert charts.Axis(0, 0.97, 0, 1).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert charts.Axis(3, 3, 0, 10)(3) == 5
    assert [charts.number(value) for value in (0, 0.5, 12345, 1e-5)] == ["0", "0.5", "1e4", "1e-5"]


def test_points_of_a_curve_lie_where_their_values_say():
    svg = charts.curve([(0, 1e-3), (1, 1e-1), (0.5, 1e-2)], "sparsity", "error", "curve")
    dots = [tuple(map(float, pair)) for pair in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert [x for x, _ in dots] == pytest.approx([44, 177, 310])
    heights = [y for _, y in dots]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert heights[0] > heights[2]
    assert charts.curve([(0, 0.0)], "x", "y", "empty") == ""


def test_bars_are_as_long_as_their_values():
    assert charts.shares([1, 2, 4]) == [25, 50, 100]
    logarithmic = charts.shares([0.0, 1e-3, 1e-1], log=True)
    assert logarithmic[0] == 0
    assert 0 < logarithmic[1] < logarithmic[2] == 100
    record = sample_record()
    error, sparsity, seconds = bar_charts(record["stages"][1]["layers"])
    assert [row["share"] for row in sparsity["rows"]] == [50] * 4
    assert error["rows"][3]["bad"]
    assert seconds["rows"][-1]["share"] == 100


def test_runs_side_by_side(tmp_path):
    records = {"a": sample_record(4, 0), "b": sample_record(3, 1)}
    comparison = compare_records(records)
    summary = {row[0]: row[1:] for row in comparison["summary"]}
    assert summary["accuracy, compressed"] == ["0.9800", "0.9700"]
    assert float(summary["bits per weight"][0]) > float(summary["bits per weight"][1])
    assert comparison["layers"][0]["runs"][0]["bits"] == 4
    assert comparison["layers"][0]["runs"][1]["bits"] == 3
    assert [point["label"] for point in comparison["trade_off"]["points"]] == ["a", "b"]
    for label, record in records.items():
        save_report(record, tmp_path / label, formats=["json"])
    paths = compare_reports([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "both")
    assert [path.suffix for path in paths] == [".html", ".md", ".json"]
    page = Balanced()
    page.feed(paths[0].read_text())
    assert not page.open
    assert "| layer | a " in paths[1].read_text()
    with pytest.raises(SpecError, match="several runs"):
        compare_reports([tmp_path / "a.json"], tmp_path / "one")


def test_a_layer_that_only_one_run_has_is_shown_as_missing():
    first, second = sample_record(), sample_record(3, 1)
    for stage in second["stages"]:
        stage["layers"] = [row for row in stage["layers"] if row["name"] != "1"]
    second["environment"]["torch"] = "1.0"
    comparison = compare_records({"first": first, "second": second})
    row = next(layer for layer in comparison["layers"] if layer["name"] == "1")
    assert row["runs"][1] is None
    assert ["torch", version("torch"), "1.0"] in comparison["summary"]
