"""Tables, displays and progress bars on a pseudo-terminal and on a pipe."""

import io
import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from jobs.common import terminal
from jobs.common.terminal import Display, Page, ProgressBar, Share, TextTable, Verbatim, show
from tests.harness.common import ROOT, wait_until
from tests.harness.terminal import Terminal
from tests.test_imports import FILES, imports

HOSTILE = "[red]a\x1b[2J\x07\nb[/red]"
ROWS = [
    {"run": "mask50-long-name-seed1", "state": "running", "samples": "1 / 2", "loss": "2.500", "why": None},
    {"run": HOSTILE, "state": "failed", "samples": "12 / 24", "loss": None, "why": f"{HOSTILE} and a long reason"},
]
TABLE = TextTable(ROWS, cut={"why": 10}, drop=("loss", "why"), indent="  ")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def render(page, columns, lines=24):
    with Terminal(columns, lines) as screen:
        show(page, screen.file)
        text = screen.close().text()
        assert not screen.wrapped
        return text, screen.raw


@pytest.mark.parametrize("columns", [36, 40, 60, 80, 200])
def test_text_table_fits_terminal_of_any_width(columns):
    text, _ = render(Page(TABLE), columns)
    head, first, second = text.split("\n")
    for line, cells in ((head, ["run", "state"]), (first, ["mask5", "eed1", "running"]), (second, ["failed"])):
        assert len(line) <= columns and all(cell in line for cell in cells)
    assert ("loss" in head) == (columns >= 80) and ("why" in head) == (columns >= 60)
    assert ("…" in second) == (columns < 100) and "[red]" in text


def test_text_table_drops_columns_without_values_first():
    rows = [{"run": "a" * 20, "loss": "1.0", "step": "-", "why": ""}]
    assert list(TextTable(rows, drop=("loss", "step", "why")).widths(26)) == ["run", "loss"]


def test_page_escapes_control_characters_and_ignores_markup():
    raw = render(Page(TABLE, HOSTILE, Verbatim(HOSTILE)), 80)[1].decode()
    assert raw.count("[red]a\\x1b[2J\\x07") >= 2 and "\x1b[2J" not in raw and "\x07" not in raw


def test_show_colours_states_unless_no_color_is_set_or_terminal_is_dumb(monkeypatch):
    assert b"\x1b[1;31mfailed" in render(Page(TABLE), 80)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert b"31m" not in render(Page(TABLE), 80)[1]
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert b"\x1b" not in render(Page(TABLE), 80)[1]


def test_show_writes_full_width_plain_text_to_pipe_unless_overridden(monkeypatch):
    out = io.StringIO()
    show(Page("head", TABLE), out)
    assert out.getvalue() == f"head\n{TABLE}\n" and "\x1b" not in out.getvalue()
    monkeypatch.setenv("FORCE_COLOR", "1")
    show(Page(TABLE), coloured := io.StringIO())
    assert "\x1b[1;31mfailed" in coloured.getvalue() and "and a long reason" in coloured.getvalue()
    monkeypatch.setenv("COLUMNS", "40")
    show(Page(TABLE), narrow := io.StringIO())
    assert "why" not in narrow.getvalue()


def test_show_wraps_words_but_not_paths_or_verbatim_text():
    path = "/a/long/path/" + "x" * 40
    text, _ = render(Page("  warning: some words that do not fit", "one", Verbatim("#SBATCH words")), 24)
    assert text == "  warning: some words\n    that do not fit\none\n#SBATCH words"
    with Terminal(24) as screen:
        show(f"see {path}", screen.file)
        assert path.encode() in screen.close().raw


def test_share_is_ascii_bar_as_text_and_line_bar_on_terminal():
    assert str(Share(0.5)) == "#" * 10 + "." * 10 and str(Share(7)) == "#" * 20 and str(Share(-1)) == "." * 20
    assert "━━━━────" in render(Page(TextTable([{"run": "a", "bar": Share(0.5)}], {"bar": 8})), 13)[0]


def test_display_is_redrawn_below_prints_and_log_lines(monkeypatch):
    with Terminal(40, 8) as screen:
        monkeypatch.setattr(sys, "stdout", screen.file)
        handler = logging.StreamHandler(screen.file)
        monkeypatch.setattr(logging.root, "handlers", [handler])
        with Display(screen.file) as display:
            for number in range(3):
                display.draw(lambda width, height, n=number: Page(f"line {n} of {width} x {height}", "second"))
                print(f"printed {HOSTILE}")
                logging.error("logged %d", number)
                print("half a ", end="")
                print("line")
        assert sys.stdout is screen.file and handler.stream is screen.file
        lines = screen.close().text().split("\n")
        assert lines[-2:] == ["line 2 of 40 x 8", "second"] and screen.cursor
        assert [line for line in lines if "logged" in line] == [f"logged {n}" for n in range(3)]
        assert lines.count("half a line") == 3 and sum("[red]" in line for line in lines) == 3
        assert sum("second" in line for line in lines) == 1


def test_display_does_not_redirect_piped_stdout(monkeypatch):
    monkeypatch.setattr(sys, "stdout", piped := io.StringIO())
    with Terminal() as screen:
        with Display(screen.file):
            print("data")
        assert piped.getvalue() == "data\n" and b"data" not in screen.close().raw


def test_display_follows_terminal_size():
    sizes = []
    with Terminal(80, 24) as screen:
        with Display(screen.file) as display:
            for size in ((80, 24), (40, 10), (60, 10)):
                screen.resize(*size)
                display.draw(lambda *now: sizes.append(now) or Page("x" * 100))
        assert sizes == [(80, 24), (40, 10), (60, 10)]
        # The screen is cleared only when the terminal becomes narrower.
        assert screen.close().raw.count(b"\x1b[2J") == 1


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_display_restores_cursor_on_signal(number, code):
    script = (
        "import sys, time; from jobs.common.cli import run_main; from jobs.common.terminal import Display, Page\n"
        "def main():\n  with Display(sys.stdout) as display:\n"
        "    display.draw(lambda *_: Page('drawn')); time.sleep(60)\n"
        "sys.exit(run_main(main))"
    )
    with Terminal() as screen:
        process = screen.start(sys.executable, "-c", script, cwd=ROOT)
        wait_until(lambda: b"drawn" in screen.raw or process.poll() is not None, "the first screen")
        assert b"\x1b[?25l" in screen.raw, "the cursor is hidden"
        process.send_signal(number)
        assert process.wait(20) == code
        screen.close().text()
        assert screen.cursor


def test_progress_bar_is_erased_from_terminal_at_end(monkeypatch):
    monkeypatch.setattr(ProgressBar, "REDRAW", 0.0)
    with Terminal(60) as screen:
        monkeypatch.setattr(sys, "stderr", screen.file)
        with ProgressBar("indexing", "B") as bar:
            for done in (0, 5 * 10**8, 10**9):
                bar(done, 2 * 10**9, "1 of 2 shards")
        assert screen.close().text() == "" and screen.cursor
        assert b"indexing" in screen.raw and "━".encode() in screen.raw and b"1 GB of 2 GB" in screen.raw


def test_progress_bar_prints_periodic_lines_without_terminal(capsys):
    with ProgressBar("indexing", "B") as bar:
        bar(4 * 10**12, 92 * 10**12)
    assert not capsys.readouterr().err, "no line is due yet"
    with ProgressBar("indexing", "B", every=0) as bar:
        bar(4 * 10**12, 92 * 10**12, "1 of 23 shards")
        bar(5 * 10**12, 92 * 10**12, "2 of 23 shards")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "indexing: 4 %, 4 TB of 92 TB, 0 B/s, 1 of 23 shards" and second.endswith("left, 2 of 23 shards")


def test_progress_bar_prints_lines_while_the_work_reports_nothing(capsys, monkeypatch):
    monkeypatch.setattr(ProgressBar, "FIRST", 0.02)
    monkeypatch.setattr(ProgressBar, "TICK", 0.01)
    with ProgressBar("exporting"):
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1 and set(lines) == {"exporting: 0 s"}


def test_progress_bar_without_total_shows_amount_and_speed(capsys, monkeypatch):
    monkeypatch.setattr(ProgressBar, "FIRST", 0.0)
    with ProgressBar("reading") as bar:
        for done, total in ((0, 0), (2000, 0), (10, 20)):
            bar(done, total, "a.txt")
    _, second, third = capsys.readouterr().err.splitlines()
    assert "2,000" in second and "left" not in second
    assert third.startswith("reading: 50 %, 10 of 20, ") and third.endswith("a.txt")


@pytest.mark.long
def test_rich_is_imported_lazily_and_only_for_terminals_and_their_images():
    importers = {name for name, path in FILES.items() if any(other.split(".")[0] == "rich" for other in imports(path))}
    assert importers == {"jobs.common.terminal", "lab.documentation.figures"}
    script = "import sys, jobs.common.terminal as t; t.show(t.Page(t.TextTable([{'run': 'a'}])))"
    script += "; assert 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_terminal_size_defaults_to_80x24_or_columns_variable(monkeypatch):
    with Terminal(0, 0) as screen:
        assert terminal._size(screen.file) == (80, 24)
        monkeypatch.setenv("COLUMNS", "33")
        assert terminal._size(screen.file) == (33, 24)
        os.environ.pop("COLUMNS")
