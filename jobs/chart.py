"""Line charts as inline SVG: a few hundred points, no script, no library, readable in black and white."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 48

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#3a9bd0", "#000000")
"""Okabe and Ito's palette, its yellow tones darkened: told apart by colour-blind readers; shapes tell the same."""

DASHES = ("", "7 3", "2 3", "9 3 2 3")
SHAPES = ("circle", "square", "triangle", "diamond", "down", "plus", "cross")


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
    """One arm: lines (one per run) with small dots, and final marks."""

    name: str
    lines: Sequence[Sequence[Point]] = ()
    marks: Sequence[Mark] = ()


@dataclass(frozen=True)
class Axis:
    """A linear scale from ``low`` to ``high`` on pixels ``start`` to ``stop``."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 1)

    def ticks(self, about: int = 6) -> list[float]:
        """Round numbers in the range: steps of 1, 2 or 5 times a power of ten."""
        raw = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]


def look(i: int) -> tuple[str, str, str]:
    """(colour, dash pattern, shape of marker) of the i-th series; the first 28 all differ."""
    return COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)], SHAPES[i % len(SHAPES)]


def chart(series: Sequence[Series], x: str, y: str, zero: bool = True, level: tuple[float, str] | None = None) -> str:
    """An SVG element of the series, or a paragraph where they have no point.

    ``x``, ``y``: labels of the axes. ``zero``: the vertical axis begins at 0. ``level``: a horizontal
    line and its name.
    """
    xs = [p[0] for s in series for line in s.lines for p in line] + [m.x for s in series for m in s.marks]
    ys = [p[1] for s in series for line in s.lines for p in line]
    ys += [v for s in series for m in s.marks for v in (m.low, m.high)]
    if not xs:
        return '<p class="quiet">Nothing to draw yet.</p>'
    low, high = (0.0 if zero else min(ys)), max(ys)
    margin = 0.06 * ((high - low) or 1.0)
    across = Axis(0.0, max(xs) * 1.04 or 1.0, LEFT, WIDTH - RIGHT)
    up = Axis(low if zero else low - margin, high + margin, HEIGHT - BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y)} against {escape(x)}">']
    parts += _frame(across, up, x, y)
    if level is not None and up.low <= level[0] <= up.high:
        at = up(level[0])
        parts.append(f'<path d="M{LEFT} {at}H{WIDTH - RIGHT}" class="level"/>')
        parts.append(f'<text x="{WIDTH - RIGHT - 4}" y="{at - 4}" text-anchor="end">{escape(level[1])}</text>')
    for i, item in enumerate(series):
        parts += _series(item, i, across, up)
    return "\n".join([*parts, "</svg>"])


def legend(names: Sequence[str]) -> str:
    """A list of the series' markers and names, in HTML so that it wraps on a narrow screen."""
    items = []
    for i, name in enumerate(names):
        colour, dash, shape = look(i)
        sample = (
            f'<svg class="key" viewBox="0 0 34 14"><path d="M1 7H33" stroke="{colour}" stroke-dasharray="{dash}"/>'
            f"{_shape(shape, 17, 7, 5, colour)}</svg>"
        )
        items.append(f"<li>{sample} {escape(name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def thin(points: Sequence[Point], most: int = 300) -> list[Point]:
    """At most ``most`` points: means of equal groups of neighbours."""
    size = -(-len(points) // most) if points else 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups]


def _frame(across: Axis, up: Axis, x: str, y: str) -> list[str]:
    parts = []
    for value in up.ticks():
        at = up(value)
        parts.append(f'<path d="M{LEFT} {at}H{WIDTH - RIGHT}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4}" text-anchor="end">{value:g}</text>')
    for value in across.ticks():
        at, foot = across(value), HEIGHT - BOTTOM
        parts.append(f'<path d="M{at} {foot}v5" class="axis"/>')
        parts.append(f'<text x="{at}" y="{foot + 19}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" class="axis"/>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x)}</text>')
    parts.append(
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{escape(y)}</text>'
    )
    return parts


def _series(item: Series, i: int, across: Axis, up: Axis) -> list[str]:
    colour, dash, shape = look(i)
    parts = [f"<g><title>{escape(item.name)}</title>"]
    for line in item.lines:
        path = "L".join(f"{across(px)} {up(py)}" for px, py in line)
        parts.append(f'<path d="M{path}" class="line" stroke="{colour}" stroke-dasharray="{dash}"/>')
        if len(line) <= 40:
            parts += [_shape(shape, across(px), up(py), 3, colour) for px, py in line]
    for mark in item.marks:
        px, low, high = across(mark.x), up(mark.low), up(mark.high)
        parts.append(
            f'<path d="M{px} {low}V{high}M{px - 5} {low}h10M{px - 5} {high}h10" class="bar" stroke="{colour}"/>'
        )
        parts.append(f"<g><title>{escape(mark.label)}</title>{_shape(shape, px, up(mark.y), 7, colour)}</g>")
    return [*parts, "</g>"]


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
