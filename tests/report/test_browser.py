"""The report in a real browser: no errors, nothing loaded, nothing cut off, at desktop and phone width."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, missing
from sample_reports import sample_record

from lightning_obc.report import compare_reports, save_report

pytest.importorskip("jinja2")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
VIEWS = {"desktop": (1280, 900, False), "phone": (390, 844, True)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    session = Browser()
    yield session
    session.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    for seed in (0, 1):
        save_report(sample_record(4 - seed, seed), folder / f"run{seed}")
    compare_reports([folder / "run0.json", folder / "run1.json"], folder / "both")
    save_report(long_names(), folder / "long", formats=["html"])
    return {"report": folder / "run0.html", "comparison": folder / "both.html", "names": folder / "long.html"}


def long_names() -> dict[str, Any]:
    """A record whose layers differ at the beginning and the end of names that are too long for any place."""
    record = sample_record()
    names = {name: f"encoder.{name}.attention_query_projection_with_rotary_embedding" for name in "0134"}
    for stage in record["stages"]:
        for row in stage["layers"]:
            row["name"] = names[row["name"]]
    for curve in record["curves"]:
        curve["name"] = names[curve["name"]]
    record["histograms"] = {names[name]: data for name, data in record["histograms"].items()}
    return record


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_the_page_looks_right(browser, pages, name, view, dark, tmp_path):
    width, height, mobile = VIEWS[view]
    browser.open(pages[name], width, height, mobile, dark)
    assert browser.messages() == []
    assert browser.run("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0
    assert browser.run("innerWidth") == width
    assert browser.run("document.documentElement.scrollWidth") <= width
    cut = """[...document.querySelectorAll('section, figure, .tile, svg')].filter(
        e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll')).length"""
    assert browser.run(cut) == 0
    smallest = """Math.min(...[...document.querySelectorAll('svg')].map(
        s => 10 * s.getBoundingClientRect().width / s.viewBox.baseVal.width))"""
    if browser.run("document.querySelectorAll('svg').length"):
        assert browser.run(smallest) >= 9
    ink, paper = (
        _luminance(browser.run(f"getComputedStyle(document.body).{key}")) for key in ("color", "backgroundColor")
    )
    assert (ink > paper) == dark
    assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 7
    shot = Path(os.environ.get("REPORT_SCREENSHOTS", tmp_path)) / f"{name}-{view}-{'dark' if dark else 'light'}.png"
    browser.screenshot(shot)
    assert shot.stat().st_size > 10_000


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["report", "comparison", "names"])
def test_nothing_is_cut_and_nothing_covers_another(browser, pages, name, view):
    width, height, mobile = VIEWS[view]
    browser.open(pages[name], width, height, mobile)
    cut = """[...document.querySelectorAll('.label, figcaption, .amount, .tile div, td, th, h1, h2, h3')].filter(
        e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)"""
    assert browser.run(cut) == []
    boxes = """[...document.querySelectorAll('svg, .ticks')].flatMap(s => {
        const texts = [...s.querySelectorAll('text, span')].map(e => [e.textContent, e.getBoundingClientRect()]);
        const frame = s.getBoundingClientRect();
        const outside = texts.filter(([_, r]) => s.tagName === 'svg' && (
            r.left < frame.left - 1 || r.right > frame.right + 1 || r.top < frame.top - 1));
        const covered = texts.filter(([_, r], i) => texts.some(([_, q], j) => i < j && r.left < q.right - 1
            && q.left < r.right - 1 && r.top + 2 < q.bottom - 1 && q.top + 2 < r.bottom - 1));
        return [...outside, ...covered].map(([text, _]) => text)})"""
    assert browser.run(boxes) == []
    # Next to names that leave no room, a bar or a table has still some.
    assert browser.run("Math.min(...[...document.querySelectorAll('.track')].map(e => e.clientWidth), 999)") >= 120
    assert (
        browser.run("Math.max(...[...document.querySelectorAll('td:first-child')].map(e => e.clientWidth))")
        < 0.5 * width
    )


def _luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``."""
    parts = [float(part) / 255 for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
