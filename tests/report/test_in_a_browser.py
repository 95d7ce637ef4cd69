"""The report's pages in headless Chromium, from files: no error in its console, and what a person does there works."""

import shutil
from collections.abc import Iterator
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest

from dwc.report.predictions import NIIVUE, write_predictions_report
from tests.report.made_predictions import write_cohort

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SOFTWARE_WEBGL = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"]
SLOW_MS = 240_000  # on a loaded machine, where the GPU is simulated

pytestmark = [
    pytest.mark.skipif(not find_spec("playwright"), reason="playwright is not installed: pip install '.[dev]'"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]
ATTACK = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, [*(f"sub-{n:02d}" for n in range(10)), ATTACK], failed={"sub-99": "truncated"})
    table = (folder / "volumes.tsv").read_text()
    (folder / "volumes.tsv").write_text(table.replace("\t1030.0\t", "\t1900.0\t"))
    return write_predictions_report(folder, folder / "report")


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=SOFTWARE_WEBGL, timeout=SLOW_MS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser) -> Iterator:
    """A page, which at the end must have had no error, dialog or request to elsewhere."""
    page, odd = browser.new_page(viewport={"width": 700, "height": 500}), []
    page.set_default_timeout(SLOW_MS)
    page.on("console", lambda message: odd.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: odd.append(str(error)))
    page.on("dialog", lambda dialog: (odd.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else odd.append(request.url))
    yield page
    page.close()
    assert not odd


def names(page) -> list[str]:
    return page.eval_on_selector_all("#scans tbody tr:not([hidden]) th", "cells => cells.map(cell => cell.innerText)")


def test_the_table_is_sorted_filtered_and_given_columns_by_hand(page, report):
    page.goto(report.as_uri())
    assert page.title() == "Segmentations: " + report.parent.parent.name
    assert len(names(page)) == 12
    page.click("#scans th:has-text('Thalamus') button")
    assert names(page)[0] == "sub-00"
    page.click("#scans th:has-text('Thalamus') button")
    assert names(page)[0] == "sub-03"
    assert names(page)[-1] == "sub-99"  # no value, last in both directions
    page.select_option("#which", "look")
    assert names(page) == ["sub-03", "sub-99"]
    assert page.inner_text("#shown") == "2 of 12 scans"
    page.select_option("#which", "")
    page.fill("#find", "SUB-04")
    assert names(page) == ["sub-04"]
    page.click("summary")
    page.uncheck(".columns label:has-text('Hippocampus') input")
    assert not page.is_visible("#scans th:has-text('Hippocampus')")
    page.uncheck("#pictures")
    assert not page.is_visible("#scans img")


def test_the_table_can_be_used_with_the_keyboard_alone(page, report):
    page.goto(report.as_uri())
    page.focus("#scans th:has-text('Scan') button")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert page.get_attribute("#scans th.scan", "aria-sort") == "descending"
    assert names(page)[0] == "sub-99"


def test_a_scans_name_is_text_and_leads_to_its_page(page, report):
    page.goto(report.as_uri())
    page.click(f"#scans a:text-is('{ATTACK}')")
    assert page.inner_text("h1") == ATTACK


@pytest.mark.skipif(
    not (files("dwc.report") / "vendor" / NIIVUE).is_file(), reason="NiiVue is not vendored: make viewer"
)
def test_the_viewer_shows_the_scan_and_names_its_structures(page, report):
    (path,) = (report.parent / "scans").glob("*-sub-00.html")
    page.goto(path.as_uri())
    page.wait_for_function("!document.getElementById('where').textContent.startsWith('Loading')")
    page.select_option("#view", "axial")
    for name in ("Thalamus", "Hippocampus"):
        page.click(f"button:text-is('{name}')")
        assert page.inner_text("#where").startswith(f"{name}; ")
        assert page.inner_text("#where").endswith("entropy 1.00")
    dull = page.locator("#canvas").screenshot()
    page.locator("#classes").fill("1")
    page.locator("#uncertainty").fill("0.5")
    assert page.locator("#canvas").screenshot() != dull
    page.focus("#canvas")
    for _ in range(12):
        page.keyboard.press("ArrowUp")
    assert page.inner_text("#where").startswith("background; ")
