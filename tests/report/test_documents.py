"""Records and what is drawn from them."""

from __future__ import annotations

import dataclasses
import itertools
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
from lightning_obc.export.bits import entropy_bits
from lightning_obc.report import (
    CompressionReport,
    WeightSample,
    charts,
    code,
    compare_records,
    compare_reports,
    load_record,
    render_html,
    render_markdown,
    report_record,
    save_report,
)
from lightning_obc.report.bars import bar_charts, logarithmic
from lightning_obc.report.html import layer_rows
from lightning_obc.report.scatter import scatter
from lightning_obc.report.tables import figure_cells

pytest.importorskip("jinja2")


class Balanced(HTMLParser):
    """Checks that elements are closed in order, and collects what a browser would load."""

    VOID = frozenset({"meta", "link", "line", "circle", "rect", "path", "br", "wbr"})

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


def test_reports_print_in_a_line():
    report, _ = sample_report(bits=4)
    sizes = {row.name: math.prod(row.shape) for row in report.layers.values()}
    bits = sum(size * (32 if name == "4" else 4) for name, size in sizes.items()) / sum(sizes.values())
    text = repr(report)
    assert text.startswith(f"<CompressionReport 2 stages, 4 of 4 layers compressed: 50.0 % zeros, {bits:.3g} bits; ")
    assert "table()" in text
    assert repr(report.stages[1]).startswith(
        "<StageReport Quantize(int4 asym per channel): 3 layers compressed, 1 not, "
    )
    assert len(text) < 140
    empty = CompressionReport(torch.nn.Linear(2, 2), [])
    assert repr(empty) == (
        "<CompressionReport 0 stages, 0 of 0 layers compressed; table() has stages and layers, save() writes them>"
    )


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
    # The layer that failed has no mask on record: its zeros count as one.
    kept = {name: float(solution.mask.double().mean()) for name, solution in report.solutions.items()}
    bits = sum(
        math.prod(row.shape) * (kept.get(row.name, 0.5) * row.bits + entropy_bits(kept.get(row.name, 0.5)))
        for row in rows
    )
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
    assert [charts.number(value) for value in (0, 0.5, 1234.5, 123456, 0.0025, 1e-5)] == [
        "0",
        "0.5",
        "1234",
        "1.2e5",
        "0.0025",
        "1e-5",
    ]


def test_points_of_a_curve_lie_where_their_values_say():
    svg = charts.curve([(0, 1e-3), (1, 1e-1), (0.5, 1e-2)], "sparsity", "error", "curve")
    dots = [tuple(map(float, pair)) for pair in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert [x for x, _ in dots] == pytest.approx([50, 190, 330])
    heights = [y for _, y in dots]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert heights[0] > heights[2]
    assert charts.curve([(0, 0.0)], "x", "y", "empty") == ""


def test_bars_are_as_long_as_their_values():
    axis = logarithmic([0.0, 1e-3, 1e-1])
    assert [axis(value) for value in (1e-4, 1e-3, 1e-2, 1e-1)] == pytest.approx([0, 100 / 3, 200 / 3, 100])
    record = sample_record()
    names = [row["name"] for row in record["stages"][1]["layers"]]
    error, sparsity, seconds = bar_charts(layer_rows(record, names))
    assert [[bar["share"] for bar in row["bars"]] for row in sparsity["rows"]] == [[50]] * 4
    assert [tick["text"] for tick in sparsity["ticks"]] == ["0 %", "50 %", "100 %"]
    # One bar per stage; the layer that the second stage could not solve has an empty one.
    assert [bar["series"] for bar in error["rows"][3]["bars"]] == [0, 1]
    assert [bar["bad"] for bar in error["rows"][3]["bars"]] == [False, True]
    assert error["rows"][3]["bars"][1]["share"] == 0
    assert seconds["rows"][-1]["bars"][0]["share"] == 100
    for chart in (error, sparsity, seconds):
        assert all(0 <= tick["left"] <= 100 for tick in chart["ticks"])


def names_of(svg: str) -> dict[str, tuple[float, float, float, float]]:
    """Boxes of the names of points: left, top, right, bottom, at 6 units a letter."""
    boxes = {}
    for x, y, anchor, text in re.findall(r'class="tick" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([a-z]+)<', svg):
        left = float(x) - (6 * len(text) if anchor == "end" else 0)
        boxes[text] = (left, float(y) - 9, left + 6 * len(text), float(y) + 1)
    return boxes


def covered(svg: str) -> list[tuple[str, str]]:
    """Names that cover another name, a point or the dashed level."""
    boxes = names_of(svg)
    for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg):
        boxes[f"{x} {y}"] = (float(x) - 3, float(y) - 3, float(x) + 3, float(y) + 3)
    for y in re.findall(r'class="level" x1="[\d.]+" x2="[\d.]+" y1="([\d.]+)"', svg)[:1]:
        boxes["level"] = (50, float(y), 330, float(y))
    pairs = [(a, b) for a in names_of(svg) for b in boxes if a != b]
    return [
        (a, b) for a, b in pairs if all(boxes[a][i] < boxes[b][i + 2] and boxes[b][i] < boxes[a][i + 2] for i in (0, 1))
    ]


def test_a_trade_off_names_its_series_and_its_baseline():
    points = [{"x": x, "y": y, "series": name} for name in ("uniform", "SPDY") for x, y in ((0.1, 0.9), (0.01, 0.8))]
    svg = scatter({"x": "share", "y": "accuracy", "points": points, "dense": 0.95, "log": True}, "Trade-off")
    assert ">0.01</text>" in svg
    assert ">0.1</text>" in svg
    assert ">dense 0.95</text>" in svg
    assert svg.count("<path") == 2
    lone = [{"x": 1, "y": 0.5, "label": name * 20} for name in "ab"]
    svg = scatter({"x": "bits", "y": "accuracy", "points": lone, "joined": False}, "Runs")
    assert "<path" not in svg
    assert len(names_of(svg)) == 2
    assert not covered(svg), "labels of equal points must not cover each other"


def test_specifications_are_shown_as_code_that_makes_them_again():
    import lightning_obc as obc

    for stage in (
        obc.Prune("2:4", at={"epoch": 3}, exclude=["stem"], refine=obc.Refine(sweeps=2)),
        obc.Quantize(obc.IntGrid(3, granularity="group", group_size=8), layers=["a", "b"]),
        obc.Prune(obc.Block(4, 0.5)),
        obc.Calibration(samples=7),
    ):
        assert eval(code(stage)) == stage
    assert code(obc.Prune(0.5)) == "obc.Prune(pattern=0.5)"


def test_quantized_inputs_and_the_work_of_processes_are_shown():
    record = sample_record()
    record["stages"][1]["layers"][0]["input_bits"] = 7
    record["stages"][0]["work"] = [{"rank": 1, "layers": 2.5, "flops": 3e9, "seconds": 0.25}]
    for text in (render_html(record), render_markdown(record)):
        assert "4, input 7" in text
        assert "estimated Gflop" in text
    assert "**Trade-off**" in render_markdown(record)


def test_a_layer_that_no_stage_selects_is_named():
    report, _ = sample_report()
    stages = [dataclasses.replace(stage, layers=stage.layers[:2], skipped={}) for stage in report.stages]
    record = report_record(dataclasses.replace(report, stages=stages))
    assert record["left_dense"]["3"] == "no stage selects it"
    assert "no stage selects it" in render_markdown(record)


def test_samples_of_weights_are_whole_rows_of_all_problems():
    matrix = torch.arange(2 * 30 * 4.0).reshape(2, 30, 4)
    sample = WeightSample.of(matrix, most=40)
    assert sample.values.shape == (10, 4)
    assert (sample.rows[0], sample.rows[-1]) == (0, 59)
    assert torch.equal(sample.select(matrix), sample.values.double())
    assert WeightSample.of(matrix, most=1).values.shape == (1, 4)
    assert torch.equal(WeightSample.of(matrix).values, matrix.reshape(60, 4))


def test_a_run_saves_its_own_report(tmp_path):
    """Recipe, plan, loss curves and weights before come with what ``compress`` returns."""
    import lightning_obc as obc

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    dense = model[0].weight.detach().clone()
    report = obc.compress(model, torch.randn(64, 16), [obc.Prune(0.5, exclude=["2"]), obc.Quantize(4, layers=["0"])])
    paths = report.save(tmp_path / "run", title="Two layers")
    record = load_record(tmp_path / "run.json")
    assert [path.suffix for path in paths] == [".html", ".md", ".json"]
    assert record["recipe"] == ["obc.Prune(pattern=0.5, exclude=['2'])", "obc.Quantize(grid=4, layers=['0'])"]
    assert len(record["plans"]) == 2
    assert sum(record["histograms"]["0"]["before"]) == dense.numel()
    pruned, rounded = record["curves"]
    assert [(one["name"], one["stage"], one["x"]) for one in (pruned, rounded)] == [
        ("0", "Prune(0.5)", "sparsity"),
        ("0", report.stages[1].stage, "share rounded"),
    ]
    curve = pruned["points"]
    # A float32 sweep of 16 columns adds up rounding of some 1e-6; the measure it is compared with is float64.
    assert [round(curve[0][0] * 128), curve[-1]] == [4, [1.0, pytest.approx(1.0, rel=1e-4)]]
    assert all(a[1] <= b[1] for points in (curve, rounded["points"]) for a, b in itertools.pairwise(points))
    assert not any("curve" in row for stage in record["stages"] for row in stage["layers"])
    assert record["left_dense"] == {"2": "no stage selects it"}
    page = paths[0].read_text()
    assert "Loss curves of the sweep" in page
    assert page.count('aria-label="Loss curve of 0') == 2
    assert "share rounded" in page
    assert "before" in page


def test_the_error_of_all_stages_is_in_every_page():
    """Of layer 0 it is known, of 1 and 3 something has moved the weights in between; 4 is kept after one stage."""
    record = sample_record()
    for row in record["stages"][0]["layers"]:
        row["total_error"] = row["relative_error"]
    for row in record["stages"][1]["layers"]:
        row["total_error"] = 0.375 if row["name"] == "0" else None
    html, text = render_html(record), render_markdown(record)
    assert html.count('<th class="n">all stages</th>') == 1
    assert html.count("37.5 %") >= 2, "in the table and at its bar"
    assert "Error of all stages together" in html
    assert text.count("all stages [%]") == 1
    for page in (html, text):
        assert "2 layers have no error of all stages: training or a correction" in page
    runs = {row["name"]: row["runs"] for row in compare_records({"a": record, "b": sample_record(3)})["layers"]}
    assert [runs[name][0]["total_error"] for name in "0134"] == [0.375, None, None, pytest.approx(1e-4)]
    older = sample_record()
    for stage in older["stages"]:
        for row in stage["layers"]:
            del row["total_error"]
    assert "all stages" not in render_html(older).replace("no error of all stages", "")
    assert compare_records({"a": older, "b": record})["layers"][3]["runs"][0]["total_error"] == pytest.approx(1e-4)


def test_a_layer_that_was_kept_has_no_error():
    record = sample_record()
    kept = next(line for line in render_markdown(record).splitlines() if "Cholesky" in line and line.startswith("|"))
    assert [cell.strip() for cell in kept.split("|")[6:8]] == ["–", "–"]
    error = bar_charts(layer_rows(record, ["4"]))[0]
    assert error["rows"][0]["text"].endswith(" · kept")


def test_figures_and_times_have_digits_enough():
    assert figure_cells(0.99, 0.97) == ("0.9900", "0.9700", "-0.0200")
    assert figure_cells(0.002483, 0.002405) == ("0.002483", "0.002405", "-0.000078")
    assert figure_cells(0.0, 0.0) == ("0.0000", "0.0000", "+0.0000")
    assert figure_cells(math.nan, 0.5)[1] == "0.5000"
    assert [charts.seconds(value) for value in (0, 1e-5, 0.0123, 2.5)] == ["–", "< 0.001 s", "0.012 s", "2.50 s"]


def test_every_one_of_six_stages_has_a_colour_of_its_own():
    rows = [{"name": "a", "relative_error": 0.1, "sparsity": 0.5, "seconds": 1.0, "series": k} for k in range(6)]
    bars = bar_charts([[row | {"compressed": True, "status": "ok"} for row in rows]])[0]["rows"][0]["bars"]
    assert [bar["series"] for bar in bars] == list(range(6))
    page = render_html(sample_record())
    colours = [re.findall(rf"\.fill\.series{k}{{background:([^}}]+)}}", page) for k in range(1, 6)]
    assert len({colour[0] for colour in colours} | {"var(--first)"}) == 6


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


def test_small_times_and_errors_are_told_apart_from_zero():
    rows = [
        [{"name": "a", "relative_error": 3e-6, "sparsity": 0.5, "seconds": seconds, "series": 0}]
        for seconds in (0.004, 0.01, 9.0)
    ]
    for (row,) in rows:
        row |= {"compressed": True, "status": "ok"}
    error, _, time = bar_charts(rows)
    assert error["rows"][0]["text"] == "0.0003 %"
    assert [tick["text"] for tick in time["ticks"]] == ["0.001 s", "0.1 s", "10 s"]


def test_a_layer_that_a_search_leaves_dense_has_not_failed():
    row = {"name": "a", "relative_error": 0.0, "sparsity": 0.0, "seconds": 0.0, "series": 0, "compressed": False}
    for status, bad in (("dense", False), ("kept: no solution", True)):
        (bar,) = bar_charts([[row | {"status": status}]])[0]["rows"][0]["bars"]
        assert bar["bad"] is bad


def test_names_of_points_keep_their_place_unless_they_cover_each_other():
    points = [{"x": x, "y": 1.0, "label": label} for x, label in ((1, "left"), (2, "near"), (1.001, "same"))]
    svg = scatter({"x": "bits", "y": "accuracy", "points": points}, "Trade-off")
    names = names_of(svg)
    assert names["left"][1] == names["near"][1]
    assert not covered(svg)
    # A point on the level to compare with is named below it, not across it.
    svg = scatter({"x": "bits", "y": "accuracy", "points": points[:1], "dense": 1.0}, "Trade-off")
    assert not covered(svg)


def test_ticks_close_to_each_other_have_digits_enough():
    points = [{"x": x, "y": y} for x, y in ((1, 0.002405), (2, 0.002481))]
    svg = scatter({"x": "bits", "y": "loss", "points": points}, "Trade-off")
    ticks = re.findall(r'text-anchor="end">(0\.00[\d]+)<', svg)
    assert ticks == ["0.0024", "0.00242", "0.00244", "0.00246", "0.00248"]


def test_runs_that_cannot_be_compared_are_named(tmp_path):
    for label in ("a", "b"):
        save_report(sample_record(), tmp_path / label, formats=["json"])
    good, other = tmp_path / "a.json", tmp_path / "b.json"
    with pytest.raises(SpecError, match=r"compared with itself.*a\.json"):
        compare_reports([good, other, tmp_path / "." / "a.json"], tmp_path / "all")
    (tmp_path / "binary.json").write_bytes(b"\x80\x02\xff")
    (tmp_path / "cut.json").write_text(good.read_text()[:500])
    with pytest.raises(FingerprintError, match=r"cannot be read.*cut\.json"):
        compare_reports([good, other, tmp_path / "cut.json"], tmp_path / "all")
    with pytest.raises(FingerprintError, match=r"2 of 4 files are no reports.*binary\.json.*cut\.json"):
        compare_reports([good, tmp_path / "binary.json", other, tmp_path / "cut.json"], tmp_path / "all")
    assert not list(tmp_path.glob("all*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda record: record.pop("sizes"), "no sizes"),
        (lambda record: record["stages"][1].pop("layers"), "stage 1 has no layers"),
        (lambda record: record["stages"][0]["layers"][2].pop("loss"), "a layer of stage 0 has no loss"),
    ],
)
def test_a_report_with_parts_missing_is_named(damage, message, tmp_path):
    record = sample_record()
    damage(record)
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(FingerprintError, match=rf"run\.json: {message}"):
        load_record(tmp_path / "run.json")


def test_runs_of_other_layers_and_recipes_stand_side_by_side(tmp_path):
    """Neither a layer nor a figure in common, and one run without any stage."""
    first, second = sample_record(), sample_record(3, 1)
    for stage in second["stages"]:
        for row in stage["layers"]:
            row["name"] = f"other.{row['name']}"
    second["figures"] = {"loss": [0.1, 0.2]}
    third = report_record(CompressionReport(torch.nn.Linear(2, 2), []))
    for label, record in {"a": first, "b": second, "c": third}.items():
        save_report(record, tmp_path / label, formats=["json"])
    html, text, _ = compare_reports([tmp_path / f"{label}.json" for label in "abc"], tmp_path / "all")
    page = Balanced()
    page.feed(html.read_text())
    assert not page.open
    comparison = json.loads((tmp_path / "all.json").read_text())
    assert comparison["trade_off"] is None
    assert [len(layer["runs"]) for layer in comparison["layers"]] == [3] * 8
    assert all(sum(run is not None for run in layer["runs"]) == 1 for layer in comparison["layers"])
    assert "| accuracy, compressed" in text.read_text()


def test_labels_of_long_names_stay_different():
    plain = {"relative_error": 0.1, "sparsity": 0.5, "seconds": 1.0, "series": 0, "compressed": True, "status": "ok"}
    names = [f"backbone.features.stage{i}.block0.conv_depthwise_expansion.0.weight_proj" for i in range(9)]
    for chart in bar_charts([[plain | {"name": name}] for name in names]):
        labels = [row["label"] for row in chart["rows"]]
        assert len(set(labels)) == 9
        assert labels[3].startswith("stage3.block0.")
        assert labels[3].endswith("weight_proj")
        assert max(map(len, labels)) <= 30
        assert [row["name"] for row in chart["rows"]] == names
    assert [row["label"] for row in bar_charts([[plain | {"name": "a.b"}]])[0]["rows"]] == ["a.b"]
