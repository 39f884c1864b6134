"""Charts of a report, drawn by matplotlib as SVG (inline in pages, or files) and PNG.

Markers and line styles tell series apart without colour. The same plot always gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.common.text import count, plain, without_middle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]

SMALL = 420, 290
LARGE = 800, 420
"""Width and height of a chart among others, and of one across the page."""
LEFT = 62
RIGHT = 12
BOTTOM = 46
TOP = 12
"""Margins around the axes; labels of series may widen the right one."""
LEGEND = 22
"""Height of a legend."""
ROW = 30
"""Height of a row of a forest plot."""
LETTER = 7.8
LINE = 16
"""About the width of a letter and the height of a line of text."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#3a9bd0", "#000000")
"""The palette of Okabe and Ito, for colour-vision deficiency; its yellow tones are darker here."""
GREY = "#b4b4b4"
DARK = {
    **dict(zip(COLOURS, ("#56b4e9", "#ff8a3d", "#2cc79a", "#e79fc8", "#e0ac2b", "#9ad4f5", "#f2f2f2"), strict=True)),
    **{GREY: "#6d6d6d", "#555555": "#a6a6a6", "#777777": "#9a9a9a", "#e6e6e6": "#33373d", "#ffffff": "#16181c"},
}
"""Colour in a chart -> its counterpart on a dark page."""
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
    faint: Sequence[Sequence[Point]] = ()
    """Lines behind all others: the values that ``lines`` smooth, or the runs of which they are the mean."""
    dots: Sequence[Point] = ()
    """Small markers behind all others: the runs of which a mark is the mean."""
    label: str = ""
    """Text at its end; empty: its name."""

    @property
    def end(self) -> Point | None:
        """The rightmost mark, or else the rightmost end of a line."""
        return max([(mark.x, mark.y) for mark in self.marks] or [line[-1] for line in self.lines if line], default=None)


@dataclass(frozen=True)
class Level:
    """A horizontal line and its name. ``must_show``: the axis reaches to it; else it is left out if it is outside."""

    y: float
    name: str
    must_show: bool = False


@dataclass(frozen=True)
class Plot:
    """One chart. Its axes start at 0; the vertical one does not, and shows a break, if all values are in its upper
    half.

    ``x``, ``y``: labels of the axes. ``log_x``, ``log_y``: logarithmic axes, for values above 0. ``large``: spans the
    page.
    """

    x: str
    y: str
    series: Sequence[Series]
    levels: Sequence[Level] = ()
    log_x: bool = False
    log_y: bool = False
    large: bool = False
    rows: Sequence[str] = ()
    """Names at the heights 1, 2, ... from the top: a forest plot, whose marks have their x there and their intervals
    across."""
    legend: bool = False
    """A legend above the axes in place of labels at the ends of the series."""

    @property
    def size(self) -> tuple[int, int]:
        if self.rows:
            return LARGE[0], BOTTOM + TOP + LEGEND + ROW * len(self.rows)
        if self.large:
            return LARGE
        return SMALL

    @property
    def is_broken(self) -> bool:
        """Whether the vertical axis does not start at 0."""
        if self.log_y or self.rows:
            return False
        heights = [level.y for level in self.levels if level.must_show]
        for item in self.series:
            heights += [y for line in (*item.lines, *item.faint, item.dots) for _, y in line]
            heights += [y for mark in item.marks for y in (mark.low, mark.high, mark.y)]
        if not heights:
            return False
        low = min(heights)
        high = max(heights)
        return high < 0 or (low > 0 and low >= high / 2)

    @property
    def summary(self) -> str:
        """The content in words, for readers who do not see it."""
        labels = [plain(mark.label) for item in self.series for mark in item.marks]
        labels = labels or [plain(item.name) for item in self.series if item.lines]
        labels += [plain(level.name) for level in self.levels if level.must_show]
        more = ""
        if len(labels) > 20:
            more = f"; and {len(labels) - 20} more"
        return f"{plain(self.y or ', '.join(self.rows))} against {plain(self.x)}. {'; '.join(labels[:20])}{more}"

    @property
    def empty(self) -> bool:
        return not any(line for s in self.series for line in s.lines) and not any(s.marks for s in self.series)


def look(i: int | None) -> tuple[str, Any, str]:
    """(colour, line style, name of the shape) of series i; the first 28 differ, also without colour. None: grey."""
    if i is None:
        return GREY, DASHES[0], "circle"
    return COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)], list(SHAPES)[i % len(SHAPES)]


def svg(plot: Plot, small: bool = False) -> str:
    """The plot as an SVG file. Titles of marks and lines are shown as tooltips. ``small``: for narrow screens."""
    titles: list[str] = []
    text = _save(partial(_plot, plot, titles), SMALL if small else plot.size, "svg").decode("utf-8")
    for i, title in enumerate(titles):
        text = text.replace(f'<g id="title{i}">', f"<g><title>{escape(title)}</title>", 1)
    text = re.sub(r' id="[\w.]+_\d+"', "", text)  # names of artists, which repeat in every SVG of a page
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(plot.summary)}" ', 1)


def png(plot: Plot) -> bytes:
    return _save(partial(_plot, plot, []), plot.size, "png")


def inline(file: str) -> str:
    """The element of an SVG file, for a page: the variable ``--cRRGGBB`` replaces the colour RRGGBB (``DARK``)."""
    element = file[file.index("<svg") :]
    return re.sub("(fill|stroke): #([0-9a-f]{6})", r"\1: var(--c\2, #\2)", element)


def thin(xs: NDArray[np.float64], ys: NDArray[np.float64], most: int = 300) -> list[Point]:
    """At most ``most`` points: means of equal groups of neighbours."""
    starts = np.arange(0, len(xs), max(1, -(-len(xs) // most)))
    if not len(starts):
        return []
    sizes = np.diff(starts, append=len(xs))
    across, up = (np.add.reduceat(values, starts) / sizes for values in (xs, ys))
    return list(zip(across.tolist(), up.tolist(), strict=True))


def smooth(ys: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over a tenth of the values around each, over fewer near the ends; less than 20 values stay."""
    total = np.concatenate([[0.0], np.cumsum(ys)])
    index = np.arange(len(ys))
    reach = np.minimum(len(ys) // 20, np.minimum(index, index[::-1]))
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)


def _save(draw: Callable[[Figure], None], size: tuple[int, int], kind: str) -> bytes:
    """What ``draw(figure)`` draws on an empty figure, as the bytes of a file; PNG with twice the pixels."""
    from flip.files import current_folder

    with current_folder.outside():
        return _rendered(draw, size, kind)


def _rendered(draw: Callable[[Figure], None], size: tuple[int, int], kind: str) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type") if kind == "svg" else ("Software",))
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure((size[0] / 72, size[1] / 72), dpi=72)
        out = io.BytesIO()
        draw(figure)
        figure.savefig(out, format=kind, dpi=144, metadata=metadata)
    return out.getvalue()


def _plot(plot: Plot, titles: list[str], figure: Figure) -> None:
    """Draw the plot; the group of SVG with the id ``titleN`` belongs to ``titles[N]``."""
    axes = figure.add_axes((0, 0, 1, 1))
    _place(axes, RIGHT)
    if plot.empty:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "Nothing to draw yet.", ha="center")
        return
    axes.set_xlabel(plain(plot.x), parse_math=False)
    axes.set_ylabel(plain(plot.y), parse_math=False)
    axes.grid(axis="x" if plot.rows else "y")
    axes.margins(0.04, 0.06)
    axes.set_xscale("log" if plot.log_x else "linear")
    axes.set_yscale("log" if plot.log_y else "linear")
    if plot.rows:
        _forest(plot, axes, titles)
        return
    for item in plot.series:
        _series(item, axes, titles)
    _set_limits(plot, axes)
    for item in plot.series:
        if item.fit:
            axes.plot(*zip(*item.fit, strict=True), color=look(item.style)[0], ls=(0, (5, 4)), lw=1.4)
        if item.band:
            xs, lows, highs = zip(*item.band, strict=True)
            axes.fill_between(xs, lows, highs, color=look(item.style)[0], alpha=0.13, lw=0)
    if plot.legend:
        _place_below_legend(plot, axes, LEFT)
        _legend(plot, axes)
    else:
        _label_ends(plot.series, axes)
    _set_ticks(plot, axes)
    axes.yaxis.set_label_coords(-44 / axes.bbox.width, 0.5)
    if plot.is_broken:
        _mark_break(axes)
    low, high = axes.get_ylim()
    _draw_levels([level for level in plot.levels if low <= level.y <= high], axes)


def _forest(plot: Plot, axes: Axes, titles: list[str]) -> None:
    """Intervals across, one row per name; a line at 0."""
    _place_below_legend(plot, axes, LETTER * max(map(len, plot.rows)) + 16)
    for item in plot.series:
        colour, _, shape = look(item.style)
        for mark in item.marks:
            titles.append(plain(mark.label))
            axes.plot([mark.low, mark.high], [mark.x] * 2, color=colour, lw=1.6, marker="|", ms=8)
            gid = f"title{len(titles) - 1}"
            axes.plot([mark.y], [mark.x], color=colour, marker=SHAPES[shape], ms=8, ls="", mew=0, gid=gid)
    axes.axvline(0, color="#777", ls=(0, (3, 4)), lw=1, zorder=1)
    axes.set_ylim(len(plot.rows) + 0.6, 0.4)
    axes.set_yticks(range(1, len(plot.rows) + 1), [plain(name) for name in plot.rows], parse_math=False)
    axes.tick_params(axis="y", length=0)
    _legend(plot, axes)


def _columns(plot: Plot) -> int:
    """Columns of the legend that fit into the width of the chart."""
    longest = max(len(plain(item.label or item.name)) for item in plot.series)
    return max(1, min(len(plot.series), int((plot.size[0] - LEFT - RIGHT) // (LETTER * longest + 50))))


def _place_below_legend(plot: Plot, axes: Axes, left: float) -> None:
    width, height = axes.figure.bbox.size
    above = TOP + LEGEND * -(-len(plot.series) // _columns(plot))
    axes.set_position((left / width, BOTTOM / height, 1 - (left + RIGHT) / width, 1 - (BOTTOM + above) / height))


def _legend(plot: Plot, axes: Axes) -> None:
    """Names of the series above the axes, with their marker and line."""
    from matplotlib.lines import Line2D

    handles = []
    for item in plot.series:
        colour, dash, shape = look(item.style)
        if plot.rows:
            dash = "solid"
        label = plain(item.label or item.name)
        handles.append(Line2D([], [], color=colour, ls=dash, marker=SHAPES[shape], ms=6, label=label))
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=_columns(plot), frameon=False,
        borderaxespad=0.2, columnspacing=1.2, handletextpad=0.4, labelspacing=0.25,
    )  # fmt: skip


def _draw_levels(levels: Sequence[Level], axes: Axes) -> None:
    """Lines across the axes, with their names above them at the right; names of neighbours are moved apart."""
    if not levels:
        return
    heights = axes.transData.transform([(axes.get_xlim()[1], level.y) for level in levels])[:, 1]
    boxes = [(0.0, 1.0, float(height)) for height in heights]
    places = spread(boxes, axes.bbox.y0, axes.bbox.y1)
    for level, height, place in zip(levels, heights, places, strict=True):
        axes.axhline(level.y, color="#777", ls=(0, (3, 4)), lw=1)
        offset = (-4, place - height + 2)
        axes.annotate(
            plain(level.name), (1, level.y), offset, xycoords=axes.get_yaxis_transform(), textcoords="offset points",
            ha="right", va="bottom", parse_math=False, annotation_clip=False,
        )  # fmt: skip


def _series(item: Series, axes: Axes, titles: list[str]) -> None:
    def titled(text: str) -> str:
        titles.append(plain(text))
        return f"title{len(titles) - 1}"

    colour, dash, shape = look(item.style)
    grey = item.style is None
    thick: dict[str, Any] = {"color": colour, "lw": 1 if grey else 1.6, "alpha": 0.5 if grey else 0.9}
    thick["zorder"] = 2 if grey else 3
    thick["clip_on"] = False  # markers at the ends of an axis are whole
    for line in item.faint:
        axes.plot(*zip(*line, strict=True), color=colour, lw=0.8, alpha=0.45, zorder=1.5)
    if item.dots:
        axes.plot(
            *zip(*item.dots, strict=True),
            color=colour,
            marker=SHAPES[shape],
            ms=5,
            ls="",
            mew=0,
            alpha=0.45,
            clip_on=False,
        )
    for line in item.lines:
        every: int | tuple[int, int] = 1
        if len(line) > 40:  # about eight marks, at other places for each style
            every = (item.style or 0) % 7 * len(line) // 56, len(line) // 8
        marker = None if grey else SHAPES[shape]
        axes.plot(
            *zip(*line, strict=True), ls=dash, marker=marker, ms=5, markevery=every, gid=titled(item.name), **thick
        )
    for mark in item.marks:
        axes.plot([mark.x, mark.x], [mark.low, mark.high], marker="_", ms=8, **thick)
        size = 7 if grey else 9
        axes.plot([mark.x], [mark.y], marker=SHAPES[shape], ls="", ms=size, mew=0, gid=titled(mark.label), **thick)


def _set_limits(plot: Plot, axes: Axes) -> None:
    """Fix the limits to lines, marks and levels that must show, so that bands and fits may leave the frame."""
    shown = [level.y for level in plot.levels if level.must_show]
    if shown:
        axes.update_datalim([(axes.dataLim.x0, y) for y in shown], updatex=False)
    axes.autoscale_view()
    axes.autoscale(False)
    if not plot.log_x:
        axes.set_xlim(left=0)
    if not plot.log_y and not plot.is_broken and axes.dataLim.y0 >= 0:
        axes.set_ylim(bottom=0)


def _set_ticks(plot: Plot, axes: Axes) -> None:
    """Ticks at round numbers, as many as there is room for."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    room = max(3, int(axes.bbox.width // 75))
    for axis, log, most_ticks in ((axes.xaxis, plot.log_x, room), (axes.yaxis, plot.log_y, 6)):
        low, high = axis.get_view_interval()
        powers = None
        if log:
            powers = LogLocator(subs=(1.0,) if high > 1e3 * low else (1.0, 3.0), numticks=most_ticks + 1)
        narrow = MaxNLocator(most_ticks, steps=[1, 2, 5, 10])
        axis.set_major_locator(powers if powers and high > 20 * low else narrow)
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda value, _: tick(value))


def _place(axes: Axes, right: float) -> None:
    """Leave a margin of ``right`` beside the axes."""
    width, height = axes.figure.bbox.size
    axes.set_position((LEFT / width, BOTTOM / height, 1 - (LEFT + right) / width, 1 - (BOTTOM + TOP) / height))


def _mark_break(axes: Axes) -> None:
    """Interrupt the vertical axis near its foot: it does not start at 0."""
    foot: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
    axes.plot([0, 0], [0.035, 0.055], color="#ffffff", lw=3, zorder=4, **foot)
    axes.plot([0, 0], [0.035, 0.055], marker=[(-1, -0.5), (1, 0.5)], ms=8, ls="", color="#555", zorder=5, **foot)


def _label_ends(series: Sequence[Series], axes: Axes) -> None:
    """Label every series that is not grey at its end, at its side or connected by a thin line."""
    ends = [(item, end) for item in series if item.style is not None and (end := item.end) is not None]
    if not ends:
        return
    most = 20 if axes.figure.bbox.width < LARGE[0] else 32
    texts = [without_middle(plain(item.label or item.name), most) for item, _ in ends]
    room = [LETTER * len(text) + 16 for text in texts]
    space = axes.bbox.width + RIGHT
    shares = axes.transAxes.inverted().transform(axes.transData.transform([end for _, end in ends]))[:, 0]
    _place(axes, max([RIGHT, *(space - (space - need) / share for need, share in zip(room, shares, strict=True))]))
    points = axes.transData.transform([end for _, end in ends])
    boxes = [(x, x + need, y) for (x, y), need in zip(points, room, strict=True)]
    heights = spread(boxes, axes.bbox.y0 + LINE / 2, axes.bbox.y1)
    for (item, end), text, height, (_, _, y) in zip(ends, texts, heights, boxes, strict=True):
        line: dict[str, Any] = {
            "arrowstyle": "-",
            "color": look(item.style)[0],
            "lw": 0.8,
            "relpos": (0, 0.5),
            "shrinkA": 1,
        }
        axes.annotate(
            text, end, (10, height - y), textcoords="offset points", va="center", parse_math=False,
            annotation_clip=False, arrowprops=None if abs(height - y) < LINE / 3 else line,
        )  # fmt: skip


def spread(boxes: Sequence[tuple[float, float, float]], low: float, high: float) -> list[float]:
    """Heights of texts (left, right, wanted height), moved apart; from ``low`` to ``high`` if there is room."""
    heights = [min(max(y, low), high) for _, _, y in boxes]

    def push(order: Sequence[int], step: float) -> None:
        """Move each text, in this order, by ``step`` past those before it that it overlaps."""
        for n, i in enumerate(order):
            left, right, _ = boxes[i]
            for j in order[:n]:
                if boxes[j][0] < right and left < boxes[j][1] and abs(heights[i] - heights[j]) < LINE:
                    heights[i] = heights[j] + step

    push(sorted(range(len(boxes)), key=lambda i: -heights[i]), -LINE)  # down from the top
    upwards = sorted(range(len(boxes)), key=lambda i: heights[i])
    heights[:] = [max(height, low) for height in heights]
    push(upwards, LINE)  # and up from the floor
    return heights


def tick(value: float) -> str:
    """The number of a tick: 0.25, 400, 12,800, 2.5 M, 5.1e20."""
    if abs(value) >= 1000:
        return count(value)
    return f"{value:.4g}".replace("e-0", "e-")
