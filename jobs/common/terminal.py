"""Output on a terminal: tables that fit its width, a display that is redrawn in place, progress bars.

``rich`` formats them, and is imported only if the stream is a terminal or FORCE_COLOR is set. Elsewhere a table is
aligned text of full width. COLUMNS, LINES, NO_COLOR and TERM=dumb are honoured. Text is escaped
(``jobs.common.text.plain``) and never read as markup.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from jobs.common import cli
from jobs.common.text import cells, count, duration, plain, plain_lines, size, table, without_middle

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

GAP = 2
"""Spaces between columns."""
UNLIMITED = 100_000
"""Width of a stream that is no terminal."""
STYLES = {
    "complete": "green", "new": "green", "failed": "bold red", "unknown": "red", "changed": "bold yellow",
    "stopped": "yellow", "waiting": "yellow", "cancelled": "magenta", "queued": "dim",
}  # fmt: skip
"""First word of a state -> style. Other words are phases of a running run."""


class Verbatim(str):
    """Text to copy, whose lines are not wrapped."""


class Share(float):
    """A share in 0 .. 1, shown as a bar."""

    def __str__(self) -> str:
        return self.bar(20, "#.")

    def bar(self, width: int, marks: str = "━─") -> str:
        full = round(width * min(1.0, max(0.0, self)))
        return marks[0] * full + marks[1] * (width - full)


@dataclass(frozen=True)
class TextTable:
    """Rows of a table, by column. The first column names the row; the column ``state`` has colours.

    If a terminal is too narrow, the columns in ``cut`` shrink to their numbers of characters. Then columns in ``drop``
    disappear in this order, those without any value first. Then names are cut in the middle to ``NAME`` characters. If
    that is not enough, further columns follow in a second table below, with the names again.
    """

    rows: Sequence[Mapping[str, Any]]
    cut: Mapping[str, int] = field(default_factory=dict)
    drop: Sequence[str] = ()
    indent: str = ""
    header: bool = True

    NAME = 8
    """Fewest characters of the first column."""

    def __str__(self) -> str:
        return table(self.rows, indent=self.indent)

    def widths(self, width: int) -> dict[str, int]:
        """Column -> its width in a line of ``width`` characters, for the columns that are shown."""
        from rich.cells import cell_len

        columns, lines, _ = cells(self.rows)
        if not self.header:
            lines = lines[1:]
        full = {name: max(cell_len(line[i]) for line in lines) for i, name in enumerate(columns)}
        shown = {name: min(full[name], self.cut.get(name, full[name])) for name in columns}
        empty = [name for i, name in enumerate(columns) if {line[i] for line in lines[1:]} <= {"-", ""}]

        def spare() -> int:
            return width - len(self.indent) - sum(shown.values()) - GAP * (len(shown) - 1)

        for name in [*(name for name in self.drop if name in empty), *self.drop]:
            if spare() < 0:
                shown.pop(name, None)
        for name in self.cut:
            if name in shown:
                shown[name] += max(0, min(full[name] - shown[name], spare()))
        for name in columns[:1]:
            shown[name] = min(full[name], max(self.NAME, shown[name] + spare()))
        return shown

    def rendered(self, width: int, splits: bool = True) -> RenderableType:
        """The table for rich, in ``width`` characters. ``splits``: whether columns that do not fit follow below."""
        from rich.console import Group

        widths = self.widths(width)
        if splits:
            parts = self._parts(widths, width)
        else:
            parts = [widths]
        return Group(*(self._grid(part) for part in parts))

    def _parts(self, widths: Mapping[str, int], width: int) -> list[dict[str, int]]:
        """The columns of each of the tables that fit; all but the first repeat the column of names."""
        (name, first), *others = widths.items()
        parts = [{name: first}]
        for column, wide in others:
            used = len(self.indent) + sum(parts[-1].values()) + GAP * len(parts[-1])
            if used + wide > width and len(parts[-1]) > 1:
                parts.append({name: first})
            parts[-1][column] = wide
        return parts

    def _grid(self, widths: Mapping[str, int]) -> RenderableType:
        """The table for rich, with these columns."""
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        columns, lines, right = cells(self.rows)
        grid = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, show_header=self.header, header_style="bold")
        for name, numeric in zip(columns, right, strict=True):
            if name in widths:
                side = "right" if numeric else "left"
                grid.add_column(Text(plain(name)), width=widths[name], no_wrap=True, overflow="ellipsis", justify=side)  # type: ignore[arg-type]
        for row, line in zip(self.rows, lines[1:], strict=True):
            style = STYLES.get(str(row.get("state")).split(",")[0], "cyan")
            texts = []
            for name, cell in zip(columns, line, strict=True):
                if name in widths:
                    value = row.get(name)
                    if isinstance(value, Share):
                        cell = value.bar(widths[name])
                    if name == columns[0]:
                        cell = without_middle(cell, widths[name])
                    texts.append(Text(cell, style if name == "state" or isinstance(value, Share) else ""))
            grid.add_row(*texts)
        return Padding(grid, (0, 0, 0, len(self.indent)), expand=False)


def is_terminal(file: TextIO) -> bool:
    """Whether output to ``file`` is formatted for a person."""
    return file.isatty() or os.environ.get("FORCE_COLOR", "0") not in ("", "0")


def redraws(file: TextIO) -> bool:
    """Whether the cursor of ``file`` can move."""
    return file.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


class Page(str):
    """Texts and tables, one below the other. As text it is plain, with tables of full width; ``show`` formats it."""

    parts: tuple[str | TextTable, ...]

    def __new__(cls, *parts: str | TextTable) -> Page:
        texts = (str(part) if isinstance(part, TextTable) else plain_lines(part) for part in parts)
        page = super().__new__(cls, "\n".join(texts))
        page.parts = parts
        return page


def show(page: str, file: TextIO | None = None) -> None:
    """Print text, on a terminal with words wrapped and tables that fit its width."""
    file = file or sys.stdout
    if not isinstance(page, Page):
        page = Page(page)
    if not is_terminal(file):
        print(page, file=file, flush=True)
        return
    console = _console(file)
    for part in page.parts:
        if isinstance(part, TextTable):
            console.print(part.rendered(console.width))
        else:
            if isinstance(part, Verbatim):
                width = UNLIMITED
            else:
                width = console.width
            console.print("\n".join(_wrap(plain(line), width) for line in part.split("\n")), soft_wrap=True)


def _wrap(line: str, width: int) -> str:
    """A line in lines of at most ``width`` characters, except for longer words, such as paths."""
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def show_image(image: bytes, text: str, side: int = 24) -> None:
    """Print text, on a terminal with colours next to the encoded image, drawn in ``side`` columns of half blocks."""
    console = None
    if image and is_terminal(sys.stdout):
        console = _console(sys.stdout)
    if console is None or console.no_color or console.color_system is None:
        show(text)
        return
    import io

    from PIL import Image
    from rich.table import Table
    from rich.text import Text

    pixels = Image.open(io.BytesIO(image)).convert("RGB").resize((side, side)).tobytes()
    drawn = Text(no_wrap=True)
    grid = Table.grid(padding=(0, GAP))
    for y in range(0, side, 2):
        for x in range(side):
            at = 3 * (y * side + x)
            below = 3 * ((y + 1) * side + x)
            upper = f"#{pixels[at : at + 3].hex()}"
            lower = f"#{pixels[below : below + 3].hex()}"
            drawn.append("▀", f"{upper} on {lower}")
        drawn.append("\n")
    grid.add_row(drawn, Text(plain_lines(text)))
    console.print(grid)


def _console(file: TextIO) -> Console:
    from rich.console import Console

    if "utf" not in (getattr(file, "encoding", None) or "utf").lower() and hasattr(file, "reconfigure"):
        file.reconfigure(errors="replace")  # it cannot encode bars and ellipses
    width, height = _size(file)
    options = {"markup": False, "highlight": False, "emoji": False, "legacy_windows": False}
    return Console(file=file, force_terminal=True, width=width, height=height, **options)  # type: ignore[arg-type]


def _size(file: TextIO) -> tuple[int, int]:
    """(columns, lines) of a terminal; COLUMNS and LINES override them."""
    try:
        sizes = tuple(os.get_terminal_size(file.fileno()))
    except (OSError, ValueError):
        sizes = (UNLIMITED, 24)
    given = (os.environ.get("COLUMNS", ""), os.environ.get("LINES", ""))
    columns, lines = (int(text) if text.isdigit() else value for text, value in zip(given, sizes, strict=True))
    return columns or 80, lines or 24


class Display:
    """The lowest lines of a terminal, redrawn in place until the block ends.

    Everything that this process prints meanwhile to a terminal, log lines too, appears above them. The cursor is
    restored, on SIGTERM too (``cli.run_main``). ``transient``: the lines disappear at the end.
    """

    def __init__(self, file: TextIO, transient: bool = False) -> None:
        from rich.live import Live

        self._file = file
        self._console = _console(file)
        self._stack = ExitStack()
        self._live = Live(
            console=self._console, auto_refresh=False, transient=transient, redirect_stdout=False, redirect_stderr=False
        )

    def __enter__(self) -> Display:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream.isatty():
                above = _Above(stream, self._console)
                self._stack.callback(setattr, sys, name, stream)
                self._stack.callback(above.end_line)
                setattr(sys, name, above)
                for handler in logging.root.handlers:
                    if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                        self._stack.callback(handler.setStream, stream)
                        handler.setStream(above)
        self._stack.enter_context(self._live)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def draw(self, page: Callable[[int, int], Page]) -> None:
        """Show ``page(columns, lines)``; lines of text are cut to the width, after a word."""
        from rich.console import Group
        from rich.text import Text

        before = self._console.width
        width, height = _size(self._file)
        if width < before:
            self._console.clear()  # the terminal has wrapped the lines
        self._console.size = width, height  # type: ignore[assignment]
        rows: list[RenderableType] = []
        for part in page(width, height).parts:
            if isinstance(part, TextTable):
                rows.append(part.rendered(width, splits=False))
            else:
                rows.append(Text(_shortened(plain(part), width), no_wrap=True, overflow="ellipsis"))
        self._live.update(Group(*rows), refresh=True)


def _shortened(line: str, width: int) -> str:
    """The line in at most ``width`` characters: if it is longer, it ends in an ellipsis after a comma, else a word."""
    if len(line) <= width:
        return line
    head = line[: width - 1]
    parts, comma, _ = head.rpartition(", ")
    words, _, _ = head.rpartition(" ")
    return f"{parts or words or head}{comma or ' '}…"


class _Above:
    """A stream whose lines appear above a display."""

    def __init__(self, stream: TextIO, console: Console) -> None:
        self._stream = stream
        self._console = console
        self._line = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        if lines:
            self._console.print("\n".join(plain(line.expandtabs()) for line in lines), soft_wrap=True)
        return len(text)

    def end_line(self) -> None:
        if self._line:
            self.write("\n")


class ProgressBar:
    """Progress on standard error: a bar on a terminal, else lines. Nothing with --quiet.

    Lines come every ``FIRST`` seconds in the first minute, then every ``every`` seconds, also if the work in between
    reports nothing. Called with the amount done, the total (0: unknown) and a short note. The amount of the first call
    counts as done before the start: the estimate of the time left is based on the rest. A smaller amount than before
    starts another count. ``unit``: ``B`` for bytes.
    """

    REDRAW = 0.1
    """Fewest seconds between two redraws."""
    TICK = 1.0
    """Seconds between two looks whether a line or a redraw is due."""
    FIRST = 10.0
    """Seconds between two lines in the first minute."""

    def __init__(self, what: str, unit: str = "", every: float = 60.0) -> None:
        self.what = what
        self.unit = unit
        self.every = every
        self.display: Display | None = None
        if not cli.quiet() and redraws(sys.stderr):
            self.display = Display(sys.stderr, transient=True)
        self._begin = self._count_begin = self._shown = time.monotonic()
        self._initial = 0
        self._latest: tuple[int, int, str] | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> ProgressBar:
        if self.display:
            self.display.__enter__()
        if not cli.quiet():
            self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._ticker.is_alive():
            self._ticker.join()
        if self.display:
            self.display.__exit__()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        with self._lock:
            if self._latest is None or done < self._latest[0]:
                self._initial = done
                self._count_begin = time.monotonic()
            self._latest = (done, total, note)
            self._show()

    def _tick(self) -> None:
        while not self._ended.wait(self.TICK):
            with self._lock:
                self._show()

    def _interval(self, now: float) -> float:
        """Seconds between two lines or redraws."""
        if cli.quiet():
            return math.inf
        if self.display:
            return self.REDRAW
        if now - self._begin < 60.0 + self.TICK:
            return min(self.every, self.FIRST)
        return self.every

    def _show(self) -> None:
        """Print a line, or redraw the bar, if it is due."""
        now = time.monotonic()
        if now - self._shown < self._interval(now):
            return
        self._shown = now
        if self._latest is None:
            row = {"what": self.what, "note": duration(now - self._begin)}
        else:
            done, total, note = self._latest
            row = self.row(done, total, now - self._count_begin, note)
        if self.display:
            table = TextTable([row], {"note": 10, "bar": 8}, ["note", "speed", "left", "bar"], header=False)
            self.display.draw(lambda width, height: Page(table))
        else:
            row.pop("bar", None)
            line = f"{row.pop('what')}: {', '.join(filter(None, row.values()))}"
            print(plain(line), file=sys.stderr, flush=True)

    def row(self, done: int, total: int, seconds: float, note: str) -> dict[str, Any]:
        """The cells of the bar, in their order; without a total, no share and no time left."""
        amount = size if self.unit == "B" else count
        speed = 0.0
        if seconds:
            speed = (done - self._initial) / seconds
        cells: dict[str, Any] = {"what": self.what}
        if total:
            cells |= {"bar": Share(done / total), "share": f"{100 * done / total:.0f} %"}
            cells["amount"] = f"{amount(done)} of {amount(total)}"
        elif done:
            cells["amount"] = amount(done)
        else:
            return cells | {"note": ", ".join(filter(None, [note, duration(seconds)]))}
        cells["speed"] = f"{amount(speed)}/s"
        if speed and total:
            cells["left"] = f"{duration((total - done) / speed)} left"
        return cells | {"note": note}
