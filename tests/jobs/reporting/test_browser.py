"""The report's page in a real browser: on a desk, on a phone, on paper, and with names that mean harm."""

import os
import re
import shutil

import pytest

from flip.runs.rundir import write_json
from jobs import report
from tests.jobs import gallery
from tests.jobs.outcomes import make

pytestmark = pytest.mark.browser

CHROMIUMS = ("chromium-headless-shell", "chromium", "google-chrome")
A4 = 688
"""Width of a page of A4 in pixels, without its margins of 14 mm."""


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if path is None:
        assert os.environ.get("FLIP_REQUIRE_BROWSER") != "1", "no Chromium here: make browser"
        pytest.skip("no Chromium here: make browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # as root in a container its own sandbox cannot start; what it opens is ours
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Kind of sweep -> its page, as the command writes it."""
    root = tmp_path_factory.mktemp("gallery")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLIP_CACHE", str(root / "cache"))
        folders = gallery.build(root / "runs")
    for name in folders.values():
        assert report.main([name.name, "--root", str(root / "runs")]) == 0
    return {kind: folder / "report.html" for kind, folder in folders.items()}


class Look:
    """A page that is open, and what it did."""

    def __init__(self, browser, path, width, media="screen"):
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.emulate_media(media=media)
        self.page.goto(path.as_uri())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.page.close()

    def of(self, script):
        return self.page.evaluate(script)


KINDS = ("paper", "table", "half", "failed", "seeds")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_fits_its_screen(browser, pages, kind, width):
    with Look(browser, pages[kind], width) as look:
        assert look.said == [] and look.asked == [pages[kind].as_uri()], "nothing is fetched, nothing goes wrong"
        assert look.of("document.documentElement.scrollWidth") == width, "the page itself does not scroll sideways"
        letters = look.of(
            "[...document.querySelectorAll('figure svg:not(.key) text')].map(t => t.getBoundingClientRect().height)"
        )
        assert letters and min(letters) >= 10, "letters of charts can be read"
        outside = look.of(
            "[...document.querySelectorAll('figure svg:not(.key)')].flatMap(svg => {"
            " const box = svg.getBoundingClientRect();"
            " return [...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect())"
            " .filter(t => t.left < box.left - 1 || t.right > box.right + 1 || t.bottom > box.bottom + 1) }).length"
        )
        assert outside == 0, "no label is cut off"


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_fits_on_paper(browser, pages, kind):
    with Look(browser, pages[kind], A4, "print") as look:
        wide = "[...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect().right)"
        assert max(look.of(wide)) <= A4 + 1, "nothing runs over the edge"
        assert look.page.pdf(format="A4").startswith(b"%PDF")


def test_what_needs_a_look_stands_first(browser, pages):
    with Look(browser, pages["failed"], 390) as look:
        words = look.page.inner_text("p.bad")
        assert "mask0 is failed: CUDA error" in words and "jobs/explain.py masking_small/mask0" in words
        assert look.of("document.querySelector('p.bad').getBoundingClientRect().top") < 900, "without scrolling"
        assert look.page.locator("tr.trouble").count() == 2
    with Look(browser, pages["half"], 390) as look:
        assert "3 of 8 runs complete, 2 running, 3 queued" in look.page.inner_text("p.quiet >> nth=0")
        assert look.page.locator("p.bad").count() == 0


def test_names_that_mean_harm_are_text(browser, tmp_path):
    harm = "<img src=x onerror=alert(1)><script>alert(2)<!--&\"'"
    folder = tmp_path / "runs" / "<svg onload=alert(3)>"
    end = {"action": "stop", "cause": "crash", "reason": harm, "code": 70}
    make(folder, harm, steps=60, end=end, complete=False)
    make(folder, "b", "0.75")
    rows = [{"row": harm, "imagenet": 50.0, "not_yet": harm}]
    paper = {"b": {"row": harm, "twemoji": 20.0}}
    write_json(folder / "sweep.json", {"title": harm, "notes": harm, "runs": [], "paper": paper, "rows": rows})
    assert report.main([str(folder), "--root", str(tmp_path)]) == 0
    with Look(browser, folder / "report.html", 1280) as look:
        assert look.said == [] and len(look.asked) == 1
        assert look.page.locator("script, img, [onload], [onerror]").count() == 0
        assert look.page.inner_text("body").count(harm) >= 5 and look.page.title() == harm


def test_without_colours_shapes_tell_series_apart(browser, pages):
    with Look(browser, pages["half"], 1280) as look:
        keys = look.of("[...document.querySelector('.legend').querySelectorAll('svg')].map(s => s.innerHTML)")
        assert len({re.sub("#[0-9a-f]{6}", "", key) for key in keys}) == len(keys) == 8
