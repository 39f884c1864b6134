"""Charts as inline SVG: no script, no library, readable on a phone, in black and white and by the colour-blind.

Own code, since what is wanted is small and a library's is not: a page of 200 runs carries a dozen charts in a few
hundred kilobytes, in the fonts and widths of the page around them; figures of a plotting library bring their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float]

WIDTH, HEIGHT = 420, 290
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 46

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#3a9bd0", "#000000")
"""Okabe and Ito's palette, its yellow tones darkened: told apart by colour-blind readers; shapes tell the same."""
GREY = "#b4b4b4"

DASHES = ("", "7 3", "2 3", "9 3 2 3")
SHAPES = ("circle", "square", "triangle", "diamond", "down", "plus", "cross")

STYLE = """
svg text { fill: #333; font: 13px system-ui, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
svg .line, svg .bar { fill: none; stroke-width: 1.8; stroke-linejoin: round; } svg .line { opacity: .85; }
svg .grey { stroke-width: 1; opacity: .55; } svg .fit { fill: none; stroke-width: 1.4; stroke-dasharray: 5 4; }
svg .band { opacity: .13; stroke: none; }
svg .grid { stroke: #e6e6e6; } svg .axis { stroke: #555; fill: none; }
svg .level { stroke: #777; stroke-dasharray: 3 4; }
"""


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
    """One arm: lines (one per run) with small dots, final marks, a fitted line and its band."""

    name: str
    lines: Sequence[Sequence[Point]] = ()
    marks: Sequence[Mark] = ()
    style: int | None = 0
    """Its look; None: grey, behind the others."""
    fit: Sequence[Point] = ()
    band: Sequence[tuple[float, float, float]] = ()
    """(x, low, high) around ``fit``."""


@dataclass(frozen=True)
class Axis:
    """A scale from ``low`` to ``high`` on pixels ``start`` to ``stop``; logarithmic ones are above 0."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        value, low, high = (math.log(v) if self.log else v for v in (value, self.low, self.high))
        share = (value - low) / (high - low)
        return round(self.start + share * (self.stop - self.start), 1)

    def ticks(self, about: int = 6) -> list[float]:
        """Round numbers in the range: steps of 1, 2 or 5 times a power of ten; on a logarithmic axis such numbers."""
        if self.log:
            return self._log_ticks(about)
        raw = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]

    def _log_ticks(self, about: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)) - 1, math.ceil(math.log10(self.high)) + 1)
        found: list[float] = []
        for factors in ((1,), (1, 3), (1, 2, 5)):
            values = [m * 10.0**decade for decade in decades for m in factors]
            found = [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]
            if len(found) >= 3:
                return found[:: max(1, math.ceil(len(found) / (about + 1)))]
        return Axis(self.low, self.high, self.start, self.stop).ticks(about)  # too narrow for powers


@dataclass(frozen=True)
class Plot:
    """One chart. ``x``, ``y``: labels of the axes. ``zero``: the vertical axis begins at 0, unless all values are in
    the upper half. ``level``: a horizontal line and its name. ``log_x``, ``log_y``: logarithmic axes, of values above
    0."""

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

    def svg(self, alone: bool = False) -> str:
        """An SVG element; ``alone``: a file's, with its style. A paragraph where there is no point and not alone."""
        if self.empty and not alone:
            return '<p class="quiet">Nothing to draw yet.</p>'
        name = f"{escape(self.y)} against {escape(self.x)}"
        where = f' xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{2 * HEIGHT}"' if alone else ""
        parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}"{where}>']
        if alone:
            parts.append(f'<style>{STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>')
        if self.empty:
            return "\n".join([*parts, f'<text x="{LEFT}" y="{HEIGHT / 2}">Nothing to draw yet.</text>', "</svg>"])
        across, up = self._axes()
        parts += _frame(across, up, self.x, self.y)
        if self.level is not None and up.low <= self.level[0] <= up.high:
            at = up(self.level[0])
            parts.append(f'<path d="M{LEFT} {at}H{WIDTH - RIGHT}" class="level"/>')
            parts.append(f'<text x="{WIDTH - RIGHT - 4}" y="{at - 4}" text-anchor="end">{escape(self.level[1])}</text>')
        for item in sorted(self.series, key=lambda s: s.style is not None):
            parts += _series(item, across, up)
        return "\n".join([*parts, "</svg>"])

    def _axes(self) -> tuple[Axis, Axis]:
        points = [p for s in self.series for line in s.lines for p in line]
        marks = [m for s in self.series for m in s.marks]
        xs = [p[0] for p in points] + [m.x for m in marks]
        ys = [p[1] for p in points] + [v for m in marks for v in (m.low, m.high)]
        across = _axis(xs, LEFT, WIDTH - RIGHT, self.log_x, True, 0.04)
        return across, _axis(ys, HEIGHT - BOTTOM, TOP, self.log_y, self.zero and min(ys) < max(ys) / 2, 0.06)


def _axis(values: Sequence[float], start: float, stop: float, log: bool, zero: bool, margin: float) -> Axis:
    low, high = min(values), max(values)
    if log:
        low = max(low, high * 1e-12)
        wider = (high / low) ** margin if high > low else 1.5
        return Axis(low / wider, high * wider, start, stop, True)
    low = 0.0 if zero else low
    slack = margin * ((high - low) or 1.0)
    return Axis(low if zero else low - slack, high + slack, start, stop)


def look(i: int | None) -> tuple[str, str, str]:
    """(colour, dash pattern, shape of marker) of the i-th series; the first 28 all differ. None: grey."""
    if i is None:
        return GREY, "", "circle"
    return COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)], SHAPES[i % len(SHAPES)]


def legend(names: Sequence[tuple[str, int | None]]) -> str:
    """A list of the series' markers and names, in HTML so that it wraps on a narrow screen."""
    items = []
    for name, style in names:
        colour, dash, shape = look(style)
        sample = (
            f'<svg class="key" viewBox="0 0 34 14" aria-hidden="true"><path d="M1 7H33" stroke="{colour}"'
            f' stroke-dasharray="{dash}"/>{_shape(shape, 17, 7, 5, colour)}</svg>'
        )
        items.append(f"<li>{sample} {escape(name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def thin(xs: NDArray[np.float64], ys: NDArray[np.float64], most: int = 300) -> list[Point]:
    """At most ``most`` points: means of equal groups of neighbours."""
    starts = np.arange(0, len(xs), max(1, -(-len(xs) // most)))
    if not len(starts):
        return []
    sizes = np.diff(starts, append=len(xs))
    across, up = (np.add.reduceat(values, starts) / sizes for values in (xs, ys))
    return list(zip(across.tolist(), up.tolist(), strict=True))


def number(value: float) -> str:
    """A tick's number: 0.25, 400, 12.8k, 2.5M, 12.8B, 1e21."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-3:
        return f"{value:.3g}".replace("e+", "e").replace("e0", "e").replace("e-0", "e-")
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= scale * 0.9995:
            return f"{value / scale:.4g}{unit}"
    return f"{value:.4g}"


def _frame(across: Axis, up: Axis, x: str, y: str) -> list[str]:
    parts, foot = [], HEIGHT - BOTTOM
    for value in up.ticks():
        at = up(value)
        parts.append(f'<path d="M{LEFT} {at}H{WIDTH - RIGHT}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{at + 4}" text-anchor="end">{number(value)}</text>')
    for value in across.ticks(5):
        at = across(value)
        parts.append(f'<path d="M{at} {foot}v5" class="axis"/>')
        parts.append(f'<text x="{at}" y="{foot + 18}" text-anchor="middle">{number(value)}</text>')
    parts.append(f'<path d="M{LEFT} {TOP}V{foot}H{WIDTH - RIGHT}" class="axis"/>')
    middle = (TOP + foot) / 2
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x)}</text>')
    parts.append(
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{escape(y)}</text>'
    )
    return parts


def _series(item: Series, across: Axis, up: Axis) -> list[str]:
    colour, dash, shape = look(item.style)
    grey = " grey" if item.style is None else ""
    parts = [f"<g><title>{escape(item.name)}</title>"]
    if item.band:
        edge = [(x, low) for x, low, _ in item.band] + [(x, high) for x, _, high in reversed(item.band)]
        corners = "L".join(f"{across(px)} {_within(up(py))}" for px, py in edge)
        parts.append(f'<path d="M{corners}Z" class="band" fill="{colour}"/>')
    if item.fit:
        path = "L".join(f"{across(px)} {_within(up(py))}" for px, py in item.fit)
        parts.append(f'<path d="M{path}" class="fit" stroke="{colour}"/>')
    for line in item.lines:
        path = "L".join(f"{across(px)} {up(py)}" for px, py in line)
        parts.append(f'<path d="M{path}" class="line{grey}" stroke="{colour}" stroke-dasharray="{dash}"/>')
        if len(line) <= 40 and not grey:
            parts += [_shape(shape, across(px), up(py), 2.5, colour) for px, py in line]
    for mark in item.marks:
        px, low, high = across(mark.x), up(mark.low), up(mark.high)
        bar = f"M{px} {low}V{high}M{px - 4} {low}h8M{px - 4} {high}h8"
        parts.append(f'<path d="{bar}" class="bar{grey}" stroke="{colour}"/>')
        size = 4 if grey else 5.5
        parts.append(f"<g><title>{escape(mark.label)}</title>{_shape(shape, px, up(mark.y), size, colour)}</g>")
    return [*parts, "</g>"]


def _within(y: float) -> float:
    """Inside the frame: an interval of a fit may leave it."""
    return min(max(y, TOP), HEIGHT - BOTTOM)


def _shape(shape: str, x: float, y: float, r: float, colour: str) -> str:
    if shape == "circle":
        return f'<circle cx="{x}" cy="{y}" r="{r}" fill="{colour}"/>'
    outlines: dict[str, list[tuple[float, float]]] = {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1.2), (1.1, 0.9), (-1.1, 0.9)],
        "diamond": [(0, -1.3), (1.1, 0), (0, 1.3), (-1.1, 0)],
        "down": [(0, 1.2), (1.1, -0.9), (-1.1, -0.9)],
        "plus": [(-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4),
                 (0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)],
        "cross": [(-1.1, -0.6), (-0.6, -1.1), (0, -0.5), (0.6, -1.1), (1.1, -0.6), (0.5, 0),
                  (1.1, 0.6), (0.6, 1.1), (0, 0.5), (-0.6, 1.1), (-1.1, 0.6), (-0.5, 0)],
    }  # fmt: skip
    corners = "L".join(f"{x + r * dx:.1f} {y + r * dy:.1f}" for dx, dy in outlines[shape])
    return f'<path d="M{corners}Z" fill="{colour}"/>'
