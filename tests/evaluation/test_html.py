"""The page of the report, as text and in Chromium."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from percov2.evaluation import html_report
from percov2.evaluation.html_report import Page, write_html
from percov2.evaluation.plots import write_plots
from percov2.evaluation.report_curves import curves_of
from percov2.evaluation.report_data import read_results
from percov2.evaluation.report_tables import results_table
from tests.evaluation.fake_output import HEIGHT, WIDTH, write_fake_output

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from playwright.sync_api import Page as Tab

EVIL = '<img src=x onerror="hacked=1">&amp;'
"""A file name that is HTML; no slash, which no file name has."""
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Three images, one with an evil name, a codec with an evil label, and one plot."""
    folder = tmp_path_factory.mktemp("html") / "output"
    write_fake_output(folder, images=(EVIL, "kodim02", "kodim03"), metrics=["psnr"])
    results = read_results(folder)
    evil = replace(results.codecs[0], label="</script><script>hacked=1</script>")
    results = replace(results, codecs=(evil, *results.codecs[1:]))
    curves = curves_of(results)
    return Page(
        results=results,
        runs=[results],
        curves=curves,
        tables=[("Results", results_table(results, curves))],
        plots=write_plots(results, curves, folder / "plots"),
    )


@pytest.fixture(scope="module")
def path(page: Page) -> Path:
    """The page in a file."""
    path = page.results.directories[0] / "report.html"
    write_html(path, page, max_pictures=24, quality=90)
    return path


def _records(path: Path) -> list[dict]:
    pattern = r'<script type="application/json" id="image-\d+">(.*?)</script>'
    return [json.loads(text) for text in re.findall(pattern, path.read_text(encoding="utf-8"))]


def test_names_are_escaped(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "onerror=&#34;hacked" in text
    assert EVIL not in text
    assert "<script>hacked" not in text
    assert [record["name"] for record in _records(path)] == [EVIL, "kodim02", "kodim03"]


def test_refers_to_nothing_outside(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    targets = re.findall(r'\b(?:src|href)="([^"]*)"', text)
    assert targets
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert "@import" not in text


def test_ids_are_unique(path: Path) -> None:
    ids = re.findall(r'\sid="([^"]*)"', path.read_text(encoding="utf-8"))
    assert len(ids) == len(set(ids))


def test_records(path: Path, page: Page) -> None:
    first, _, last = _records(path)
    count = 1 + len(page.results.codecs)
    assert (first["width"], first["height"], first["scale"]) == (WIDTH, HEIGHT, 1)
    assert all(uri.startswith("data:image/webp;base64,") for uri in first["pictures"])
    assert len(first["pictures"]) == len(first["values"]) == count
    assert first["rows"] == ["Bytes", "bpp", "PSNR (dB) ↑"]
    order = [codec.label for curve in page.curves for codec in curve.points]
    smallest = 1 + order.index("JPEG, quality 1")
    assert first["values"][smallest][0] == "84 †"
    assert last["pictures"][smallest] is None
    assert last["values"][smallest] is None
    assert last["missing"][smallest] == "failed: encoder failed"


def test_fewer_and_smaller_pictures(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html_report, "PREVIEW_EDGE", 48)
    write_html(tmp_path / "few.html", page, max_pictures=2, quality=50)
    records = _records(tmp_path / "few.html")
    assert [record["name"] for record in records] == [EVIL, "kodim02"]
    assert {record["scale"] for record in records} == {0.5}
    text = (tmp_path / "few.html").read_text(encoding="utf-8")
    assert "2 of 3 images are shown" in text
    assert "WebP of quality 50" in text


def test_pictures_that_were_not_kept(page: Page, tmp_path: Path) -> None:
    results = replace(page.results, directories=(tmp_path,))
    write_html(tmp_path / "none.html", replace(page, results=results), max_pictures=9, quality=50)
    text = (tmp_path / "none.html").read_text(encoding="utf-8")
    assert "Side by side" not in text
    assert "<script" not in text
    assert "JPEG, quality 1 †" in text


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    with playwright.sync_playwright() as tools:
        # Chromium's sandbox refuses to run as root.
        browser = tools.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], timeout=180_000
        )
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Browser, path: Path) -> Iterator[Tab]:
    """The page as loaded from disk; no test may end with an error or a request."""
    tab = browser.new_page(viewport={"width": 1000, "height": 800})
    tab.set_default_timeout(120_000)
    faults: list[str] = []
    tab.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("request", lambda request: faults.append(f"request: {request.url[:80]}"))
    tab.goto(path.as_uri())
    yield tab
    expected = [f"request: {path.as_uri()[:80]}"]
    assert [fault for fault in faults if "request: data:" not in fault] == expected
    assert tab.evaluate("typeof hacked") == "undefined"
    tab.close()


def _clip(tab: Tab) -> str:
    return str(tab.evaluate("getComputedStyle(document.getElementById('picture-right')).clipPath"))


def _pixels(tab: Tab, target: Path) -> Image.Image:
    tab.locator("#stage").screenshot(path=target)
    with Image.open(target) as image:
        return image.convert("RGB")


def test_slider_moves_by_keys(tab: Tab, tmp_path: Path) -> None:
    assert _clip(tab) == "inset(0px 0px 0px 50%)"
    before = _pixels(tab, tmp_path / "before.png")
    tab.locator("#split").focus()
    for _ in range(20):
        tab.keyboard.press("ArrowRight")
    assert _clip(tab) == "inset(0px 0px 0px 70%)"
    after = _pixels(tab, tmp_path / "after.png")
    # Where the blurred picture was, the original now is; further right nothing has changed.
    width, height = before.size
    assert before.size == after.size
    moved = (round(0.52 * width), 0, round(0.66 * width), height)
    assert before.crop(moved).tobytes() != after.crop(moved).tobytes()
    same = (round(0.8 * width), 0, width, height)
    assert before.crop(same).tobytes() == after.crop(same).tobytes()
    tab.keyboard.press("Home")
    assert _clip(tab) == "inset(0px 0px 0px 0%)"


def test_slider_moves_by_pointer(tab: Tab) -> None:
    box = tab.locator("#stage").bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    tab.mouse.move(box["x"] + 0.5 * box["width"], middle)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 0.25 * box["width"], middle)
    tab.mouse.up()
    assert _clip(tab) == "inset(0px 0px 0px 25%)"
    assert tab.locator("#split").input_value() == "25"


def test_sides_can_be_chosen(tab: Tab) -> None:
    assert tab.locator("#tag-left").inner_text() == "Original"
    tab.select_option("#right", label="JPEG, quality 1")
    assert tab.locator("#tag-right").inner_text() == "JPEG, quality 1"
    details = [line.split("\t") for line in tab.locator("#details").inner_text().splitlines()]
    assert details[0] == ["Bytes", "-", "84 †"]
    tab.click("#swap")
    assert tab.locator("#tag-left").inner_text() == "JPEG, quality 1"
    assert tab.locator("#name-right").inner_text() == "Original"


def test_image_can_be_chosen(tab: Tab) -> None:
    first = tab.locator("#picture-left").get_attribute("src")
    assert tab.locator("#image-name").inner_text().startswith(EVIL)
    tab.click("#thumbnails button >> nth=2")
    assert tab.locator("#picture-left").get_attribute("src") != first
    assert tab.locator("#image-name").inner_text() == f"kodim03 ({WIDTH} × {HEIGHT})"
    assert tab.locator("#thumbnails [aria-pressed=true] span").inner_text() == "kodim03"
    tab.select_option("#right", label="JPEG, quality 1")
    assert tab.locator("#tag-right").inner_text() == "JPEG, quality 1: failed: encoder failed"
    assert tab.locator("#picture-right").is_hidden()


def test_zoom_and_narrow_screens(tab: Tab) -> None:
    tab.select_option("#zoom", "4")
    box = tab.locator("#stage").bounding_box()
    assert box is not None
    assert (box["width"], box["height"]) == (4 * WIDTH, 4 * HEIGHT)
    tab.select_option("#zoom", "fit")
    tab.set_viewport_size({"width": 360, "height": 700})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
