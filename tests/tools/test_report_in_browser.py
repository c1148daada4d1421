"""The page about runs in a real browser: Chromium, without a window or a network."""

import os
import shutil

import pytest

from tests.tools.test_report import HOSTILE, hostile_run, make, settings
from verl.tools.report import render
from verl.tools.runs import group_runs

NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def chromium():
    """The browser that is installed; CHROMIUM may name it."""
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not path:
        pytest.skip("no Chromium on PATH (on Debian and Ubuntu: apt install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """Two groups, of two runs and of one; hostile text wherever text comes from a run."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [make(folder / f"d{i}", shift=0.1 * i, config=settings(seed=i)) for i in (0, 1)]
    runs.append(hostile_run(folder / "<img src=x onerror=hacked=1>"))
    path = folder / "report #1.html"
    path.write_text(render(group_runs(runs), title=HOSTILE)[0], encoding="utf-8")
    return path


@pytest.fixture
def visit(chromium, page_file):
    """visit(width, scheme) → the page; no visit may end with an error or a request."""
    problems, requests, pages = [], [], []

    def open_page(width=1280, scheme="light"):
        page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_file.as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        assert page.evaluate("typeof hacked") == "undefined"
        page.close()
    assert problems == []
    assert requests == [page_file.as_uri()] * len(pages)


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_it_fits_and_draws(visit, width, scheme):
    page = visit(width, scheme)
    page.evaluate("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    figures = page.locator("figure").count()
    assert figures > 10
    assert page.locator("figure svg").count() == figures
    assert page.locator("figure svg :is(polyline, .area)").count() > figures
    assert page.locator("svg :is([points*=NaN], [x1=NaN], [transform*=NaN])").count() == 0
    assert "NaN" not in page.locator("main").inner_text()


def test_hostile_text_is_shown_as_it_is(visit):
    page = visit()
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.locator("pre").nth(1).inner_text() == HOSTILE
    assert page.locator("img").count() == 0


def test_colours_follow_the_system_and_the_button(visit):
    light, dark = visit(scheme="light"), visit(scheme="dark")
    colours = background(light), background(dark)
    assert colours[0] != colours[1]
    light.get_by_role("button", name="Dark", exact=True).click()
    assert background(light) == colours[1]
    light.get_by_role("button", name="Light", exact=True).click()
    assert background(light) == colours[0]


def test_the_legend_hides_a_line_everywhere(visit):
    page = visit()
    section = page.locator("section.charts").first
    button = section.get_by_role("button").first
    lines = section.locator("figure .line")
    before = lines.count()
    button.press("Enter")  # a keyboard will do
    assert button.get_attribute("aria-pressed") == "false"
    assert lines.count() == before / 2
    button.click()
    assert lines.count() == before
    raw = section.locator(".rawline").first
    assert raw.is_visible()
    page.get_by_label("unsmoothed curves").uncheck()
    assert raw.is_hidden()


def test_values_are_read_with_the_pointer_and_with_the_keyboard(visit):
    page = visit(400)
    tip = page.locator("#tip")
    chart = page.locator("figure svg").first
    assert tip.is_hidden()
    chart.hover(position={"x": 396 - 60, "y": 50})
    assert tip.inner_text().startswith("step 40\n")
    assert tip.bounding_box()["x"] + tip.bounding_box()["width"] <= 400
    chart.focus()
    chart.press("Home")
    assert tip.inner_text().splitlines()[::2] == ["step 0", "17.5 % (12.5 – 22.5)"]
    chart.press("ArrowRight")
    assert tip.inner_text().startswith("step 10\n")
    chart.press("Escape")
    assert tip.is_hidden()
    stack = page.locator("section.charts").last.locator("figure svg").first
    stack.hover()
    assert tip.inner_text().endswith("together 99.1 s")
