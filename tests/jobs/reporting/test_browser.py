"""Tests of the report's page in a real browser: on wide and narrow screens, in print, and with hostile names."""

import io
import os
import shutil

import pytest
from PIL import Image

from flip.runs import attempts
from flip.runs.lifecycle import ACTIVE, QUEUED, SchedulerView
from flip.runs.rundir import write_json
from jobs.commands import report
from jobs.submitted_runs import clusters
from tests.jobs import gallery
from tests.jobs.outcomes import make

pytestmark = pytest.mark.browser

CHROMIUMS = ("chromium-headless-shell", "chromium", "google-chrome")
A4 = 688
"""Width of an A4 page in pixels, without its margins of 14 mm."""


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if path is None:
        assert os.environ.get("FLIP_REQUIRE_BROWSER") != "1", "no Chromium here: make browser"
        pytest.skip("no Chromium here: make browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's sandbox cannot start as root in a container; the pages are our own
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Kind of sweep -> its page, written by the report command while runs without an end are active or queued."""
    root = tmp_path_factory.mktemp("gallery")

    def seen(runs):
        return {run.path: SchedulerView(ACTIVE if attempts.unended(run) else QUEUED) for run in runs}

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLIP_CACHE", str(root / "cache"))
        patch.setattr(clusters, "seen", seen)
        folders = gallery.build(root / "runs")
        for name in folders.values():
            assert report.main([name.name, "--root", str(root / "runs")]) == 0
    return {kind: folder / "report.html" for kind, folder in folders.items()}


class PageView:
    """An open page, with its console output, errors and dialogs (``messages``) and its ``requests``."""

    def __init__(self, browser, path, width, media="screen"):
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.messages = []
        self.requests = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.messages.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.emulate_media(media=media)
        self.page.goto(path.as_uri())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.page.close()

    def evaluate(self, script):
        return self.page.evaluate(script)


KINDS = ("paper", "table", "half", "failed", "seeds")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", KINDS)
def test_page_fits_screen_width_without_cut_off_labels(browser, pages, kind, width):
    with PageView(browser, pages[kind], width) as view:
        # The page has no errors and requests only itself.
        assert view.messages == []
        assert view.requests == [pages[kind].as_uri()]
        # The page itself does not scroll sideways.
        assert view.evaluate("document.documentElement.scrollWidth") == width
        view.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
        # The page does not scroll sideways with all details open.
        assert view.evaluate("document.documentElement.scrollWidth") == width
        letters = view.evaluate(
            "[...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height)"
            ".filter(height => height)"
        )
        assert letters and min(letters) >= 10, "text in charts is at least 10 pixels high"
        outside = view.evaluate(
            "[...document.querySelectorAll('figure svg')].flatMap(svg => {"
            " const box = svg.getBoundingClientRect();"
            " return [...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect())"
            " .filter(t => t.left < box.left - 1 || t.right > box.right + 1 || t.bottom > box.bottom + 1) }).length"
        )
        assert outside == 0, "no label is cut off"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_contrast_meets_wcag_ratio(browser, pages, scheme):
    """All text, also in charts, has at least WCAG's ratio of 4.5."""
    ratios = """
        const light = colour => { const [r, g, b] = colour.match(/[0-9.]+/g).slice(0, 3).map(Number)
            .map(c => c / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b };
        const ground = e => { for (; e; e = e.parentElement) {
            const colour = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(colour)) return colour } };
        [...document.querySelectorAll('p, a, td, th, li, summary, figcaption, svg text')].map(e => {
            const style = getComputedStyle(e), ink = e.tagName == 'text' ? style.fill : style.color;
            const [a, b] = [light(ink), light(ground(e))].sort((x, y) => y - x); return (a + 0.05) / (b + 0.05) })"""
    with PageView(browser, pages["failed"], 1280) as view:
        view.page.emulate_media(color_scheme=scheme)
        assert view.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
        assert min(view.evaluate(f"(() => {{ {ratios.replace('[...document', 'return [...document', 1)} }})()")) >= 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_shows_that_columns_continue(browser, pages, scheme):
    """The right edge of a table is shaded until its last column is reached."""
    with PageView(browser, pages["failed"], 390) as view:
        view.page.emulate_media(color_scheme=scheme)
        table = view.page.locator(".wide").first
        assert table.evaluate("e => e.scrollWidth > e.clientWidth")
        assert _edge(table) > 20, "more columns follow"
        table.evaluate("e => e.scrollLeft = e.scrollWidth")
        assert _edge(table) <= 3, "this is the last column"


def _edge(element):
    """How much the right edge of an element differs from its middle above the first line of text, 0 to 255."""
    image = Image.open(io.BytesIO(element.screenshot())).convert("L")
    return abs(image.getpixel((image.width - 4, 3)) - image.getpixel((image.width // 2, 3)))


def test_page_links_runs_to_details_and_contents_to_sections(browser, pages):
    with PageView(browser, pages["failed"], 390) as view:
        assert view.page.locator("h1, h2").count() == view.page.locator("nav a").count() + 1
        view.page.click("tbody a >> text=mask50")
        assert view.page.url.endswith("#run-mask50")
        assert -1 <= view.evaluate("document.querySelector('h3:target').getBoundingClientRect().top") < 900


def test_folded_sections_are_visible_in_print(browser, pages):
    with PageView(browser, pages["half"], A4, "print") as view:
        assert view.evaluate("document.querySelector('details figure').checkVisibility()")


@pytest.mark.parametrize("kind", KINDS)
def test_page_fits_a4_in_print(browser, pages, kind):
    with PageView(browser, pages[kind], A4, "print") as view:
        wide = "[...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect().right)"
        assert max(view.evaluate(wide)) <= A4 + 1, "all elements fit the page width"
        assert view.page.pdf(format="A4").startswith(b"%PDF")


def test_page_shows_problems_at_top_without_scrolling(browser, pages):
    with PageView(browser, pages["failed"], 390) as view:
        text = view.page.inner_text("p.bad")
        assert "mask0 is failed: CUDA error" in text and "explain" in text and "masking_small/mask0" in text
        # The problem is visible without scrolling.
        assert view.evaluate("document.querySelector('p.bad').getBoundingClientRect().top") < 900
        assert view.page.locator("tr.trouble").count() == 2
    with PageView(browser, pages["half"], 390) as view:
        assert "3 of 8 runs complete, 2 running, 3 queued" in view.page.inner_text("p.quiet:has-text('runs complete')")
        assert view.page.locator("p.bad").count() == 0


def test_page_escapes_html_in_names(browser, tmp_path):
    harm = "<img src=x onerror=alert(1)><script>alert(2)<!--&\"'"
    folder = tmp_path / "runs" / "<svg onload=alert(3)>"
    end = {"action": "stop", "cause": "crash", "reason": harm, "code": 70}
    make(folder, harm, steps=60, end=end, complete=False)
    make(folder, "b", "0.75")
    rows = [{"row": harm, "imagenet": 50.0, "not_yet": harm}]
    paper = {"b": {"row": harm, "twemoji": 20.0}}
    write_json(folder / "sweep.json", {"title": harm, "notes": harm, "runs": [], "paper": paper, "rows": rows})
    assert report.main([str(folder), "--root", str(tmp_path)]) == 0
    with PageView(browser, folder / "report.html", 1280) as view:
        assert view.messages == [] and len(view.requests) == 1
        assert view.page.locator("script, img, [onload], [onerror]").count() == 0
        assert view.page.locator("meta[http-equiv='Content-Security-Policy']").count() == 1
        assert view.page.inner_text("body").count(harm) >= 5 and view.page.title() == harm


def test_chart_labels_series_on_wide_screen_and_switches_to_narrow_svg(browser, pages):
    with PageView(browser, pages["half"], 1280) as view:
        assert view.page.locator(".large svg.full").is_visible()
        assert not view.page.locator(".large svg.narrow").is_visible()
        texts = view.evaluate("[...document.querySelectorAll('.large svg.full text')].map(t => t.textContent)")
        assert {"s-half-113k 19.5", "s-half-225k 23.3", "s-all-225k"} <= set(texts)
    with PageView(browser, pages["half"], 390) as view:
        assert view.page.locator(".large svg.narrow").is_visible()
