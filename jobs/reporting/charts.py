"""Charts of a report, drawn by matplotlib as SVG (inline in pages, or files) and PNG.

Markers and line styles tell series apart without colour. The same plot always gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.common.text import count, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]

WIDTH, HEIGHT = 420, 290
FRAME = (62 / WIDTH, 46 / HEIGHT, 346 / WIDTH, 232 / HEIGHT)
"""Left, bottom, width and height of the axes, as shares of the figure."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#3a9bd0", "#000000")
"""The palette of Okabe and Ito, for colour-vision deficiency; its yellow tones are darker here."""
GREY = "#b4b4b4"
DASHES = ("solid", (0, (4, 2)), (0, (1.2, 1.8)), (0, (5, 2, 1.2, 2)))
SHAPES = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "down": "v", "plus": "P", "cross": "X"}
"""Name of a shape -> matplotlib's marker."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small files, readable by screen readers
    "svg.hashsalt": "flip",
    "font.size": 12.5,
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "axes.edgecolor": "#555",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Mark:
    """A large marker with an interval."""

    x: float
    y: float
    low: float
    high: float
    label: str = ""


@dataclass(frozen=True)
class Series:
    """One seed group: lines (one per run) with small markers, final marks, a fitted line and its band."""

    name: str
    lines: Sequence[Sequence[Point]] = ()
    marks: Sequence[Mark] = ()
    style: int | None = 0
    """Number for ``look``; None: grey, behind the others."""
    fit: Sequence[Point] = ()
    band: Sequence[tuple[float, float, float]] = ()
    """(x, low, high) around ``fit``."""


@dataclass(frozen=True)
class Plot:
    """One chart.

    ``x``, ``y``: labels of the axes. ``zero``: the vertical axis starts at 0, unless all values are in the upper half.
    ``level``: a horizontal line and its name. ``log_x``, ``log_y``: logarithmic axes, for values above 0.
    """

    x: str
    y: str
    series: Sequence[Series]
    zero: bool = True
    level: tuple[float, str] | None = None
    log_x: bool = False
    log_y: bool = False

    @property
    def empty(self) -> bool:
        return not any(line for s in self.series for line in s.lines) and not any(s.marks for s in self.series)


def look(i: int | None) -> tuple[str, Any, str]:
    """(colour, line style, name of the shape) of series i; the first 28 differ, also without colour. None: grey."""
    if i is None:
        return GREY, DASHES[0], "circle"
    return COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)], list(SHAPES)[i % len(SHAPES)]


def svg(plot: Plot) -> str:
    """The plot as an SVG file. Titles of marks and lines are shown as tooltips."""
    titles: list[str] = []
    text = _save(partial(_plot, plot, titles), (WIDTH, HEIGHT), "svg").decode("utf-8")
    for i, title in enumerate(titles):
        text = text.replace(f'<g id="title{i}">', f"<g><title>{escape(title)}</title>", 1)
    text = re.sub(r' id="[\w.]+_\d+"', "", text)  # names of artists, which repeat in every SVG of a page
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(plain(f"{plot.y} against {plot.x}"))}" ', 1)


def png(plot: Plot) -> bytes:
    return _save(partial(_plot, plot, []), (WIDTH, HEIGHT), "png")


def inline(file: str) -> str:
    """The element of an SVG file, for a page."""
    return file[file.index("<svg") :]


@cache
def key(style: int | None) -> str:
    """The sample of a style in a legend: an inline SVG of class ``key``."""
    colour, dash, shape = look(style)

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, 2)
        axes.plot([0, 2], [0, 0], color=colour, ls=dash, lw=1.8)
        axes.plot([1], [0], color=colour, marker=SHAPES[shape], ms=8)

    text = _save(draw, (34, 14), "svg").decode("utf-8")
    return inline(text).replace("<svg ", '<svg class="key" aria-hidden="true" ', 1)


def thin(xs: NDArray[np.float64], ys: NDArray[np.float64], most: int = 300) -> list[Point]:
    """At most ``most`` points: means of equal groups of neighbours."""
    starts = np.arange(0, len(xs), max(1, -(-len(xs) // most)))
    if not len(starts):
        return []
    sizes = np.diff(starts, append=len(xs))
    across, up = (np.add.reduceat(values, starts) / sizes for values in (xs, ys))
    return list(zip(across.tolist(), up.tolist(), strict=True))


def _save(draw: Callable[[Figure], None], size: tuple[int, int], kind: str) -> bytes:
    """What ``draw(figure)`` draws on an empty figure, as the bytes of a file; PNG with twice the pixels."""
    import matplotlib
    from matplotlib.figure import Figure

    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type") if kind == "svg" else ("Software",))
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure, out = Figure((size[0] / 72, size[1] / 72)), io.BytesIO()
        draw(figure)
        figure.savefig(out, format=kind, dpi=144, metadata=metadata)
    return out.getvalue()


def _plot(plot: Plot, titles: list[str], figure: Figure) -> None:
    """Draw the plot; the group of SVG with the id ``titleN`` belongs to ``titles[N]``."""
    axes = figure.add_axes(FRAME)
    if plot.empty:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "Nothing to draw yet.", ha="center")
        return
    axes.set_xlabel(plain(plot.x), parse_math=False)
    axes.set_ylabel(plain(plot.y), parse_math=False)
    axes.yaxis.set_label_coords(-44 / 346, 0.5)
    axes.grid(axis="y")
    axes.margins(0.04, 0.06)
    axes.set_xscale("log" if plot.log_x else "linear")
    axes.set_yscale("log" if plot.log_y else "linear")
    for item in plot.series:
        _series(item, axes, titles)
    _set_limits(plot, axes)
    for item in plot.series:
        if item.fit:
            axes.plot(*zip(*item.fit, strict=True), color=look(item.style)[0], ls=(0, (5, 4)), lw=1.4)
        if item.band:
            xs, lows, highs = zip(*item.band, strict=True)
            axes.fill_between(xs, lows, highs, color=look(item.style)[0], alpha=0.13, lw=0)
    low, high = axes.get_ylim()
    if plot.level is not None and low <= plot.level[0] <= high:
        axes.axhline(plot.level[0], color="#777", ls=(0, (3, 4)), lw=1)
        place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
        axes.text(0.99, plot.level[0], plain(plot.level[1]), parse_math=False, **place)


def _series(item: Series, axes: Axes, titles: list[str]) -> None:
    def titled(words: str) -> str:
        titles.append(plain(words))
        return f"title{len(titles) - 1}"

    colour, dash, shape = look(item.style)
    grey = item.style is None
    thick: dict[str, Any] = {"color": colour, "lw": 1 if grey else 1.6, "alpha": 0.5 if grey else 0.9}
    thick["zorder"] = 2 if grey else 3
    for line in item.lines:
        every = 1 if len(line) <= 40 else ((item.style or 0) % 7 * len(line) // 56, len(line) // 8)
        marker = None if grey else SHAPES[shape]
        axes.plot(
            *zip(*line, strict=True), ls=dash, marker=marker, ms=5, markevery=every, gid=titled(item.name), **thick
        )
    for mark in item.marks:
        axes.plot([mark.x, mark.x], [mark.low, mark.high], marker="_", ms=8, **thick)
        size = 7 if grey else 9
        axes.plot([mark.x], [mark.y], marker=SHAPES[shape], ls="", ms=size, mew=0, gid=titled(mark.label), **thick)


def _set_limits(plot: Plot, axes: Axes) -> None:
    """Fix the limits to lines and marks, so that bands and fits may leave the frame; set ticks at round numbers."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes.autoscale_view()
    axes.autoscale(False)
    if not plot.log_x:
        axes.set_xlim(left=0)
    if plot.zero and not plot.log_y and 0 <= axes.dataLim.y0 < axes.dataLim.y1 / 2:
        axes.set_ylim(bottom=0)
    for axis, log, about in ((axes.xaxis, plot.log_x, 5), (axes.yaxis, plot.log_y, 6)):
        low, high = axis.get_view_interval()
        powers = LogLocator(subs=(1.0,) if high > 1e3 * low else (1.0, 3.0), numticks=about + 1) if log else None
        narrow = MaxNLocator(about, steps=[1, 2, 5, 10])
        axis.set_major_locator(powers if powers and high > 20 * low else narrow)
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda value, _: tick(value))


def tick(value: float) -> str:
    """The number of a tick: 0.25, 400, 12,800, 2.5 M, 5.1e20."""
    return count(value) if abs(value) >= 1000 else f"{value:.4g}".replace("e-0", "e-")
