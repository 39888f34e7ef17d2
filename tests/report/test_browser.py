"""The report in a real browser: no errors, nothing loaded, nothing cut off, at desktop and phone width."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

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
    return {"report": folder / "run0.html", "comparison": folder / "both.html"}


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


def _luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``."""
    parts = [float(part) / 255 for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
