"""Tests of charts: their numbers, styles and SVG."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from jobs.pages.charts import LARGE, LINE, Level, Mark, Plot, Series, inline, look, png, smooth, spread, svg, thin, tick
from tests.jobs.pages.svg_lines import lines_of


def test_thin_averages_points_and_tick_formats_numbers():
    assert thin(np.arange(1000), 2 * np.arange(1000), 10)[0] == (49.5, 99) and thin(np.empty(0), np.empty(0)) == []
    assert [tick(v) for v in (0, 0.25, 400, 12_800, 2.56e9, 5.1e20, 1e-5)] == [
        "0", "0.25", "400", "12,800", "2.56 B", "5.1e20", "1e-5",
    ]  # fmt: skip


def test_look_gives_28_styles_distinct_without_colour():
    styles = [look(i) for i in range(28)]
    assert len(set(styles)) == len({(dash, shape) for _, dash, shape in styles}) == 28


def test_svg_draws_empty_and_single_point_plots():
    assert "Nothing to draw" in svg(Plot("x", "y", [Series("a")]))
    assert lines_of(svg(Plot("x", "y", [Series("a", [[(0.0, 0.0)]])]))) == [("a", 1)], "one point at the origin"
    assert lines_of(svg(Plot("x", "y", [Series("a", [[(3.0, 2.0)]])], log_x=True, log_y=True))) == [("a", 1)]


def test_markers_at_the_end_of_an_axis_are_whole():
    marks = [Mark(9, 2, 1, 3)]
    drawn = ElementTree.fromstring(svg(Plot("x", "y", [Series("a", [[(0, 1), (9, 2)]], marks, dots=[(9, 2)])])))
    clipped = [element for element in drawn.iter() if element.get("clip-path")]
    assert not any(part.tag.endswith("use") for element in clipped for part in element.iter())
    assert sum(element.tag.endswith("use") for element in drawn.iter()) >= 5


def test_charts_are_deterministic_and_escape_names():
    harm = "$x^2$ <script>&\x1b"
    plot = Plot(
        harm, "y", [Series(harm, [[(1.0, 2.0), (2.0, 3.0)]], [Mark(1, 2, 1, 3, harm)])], levels=[Level(2, harm)]
    )
    assert svg(plot) == svg(plot) and png(plot) == png(plot)
    texts = [element.text for element in ElementTree.fromstring(svg(plot)).iter() if element.text]
    assert texts.count("$x^2$ <script>&\\x1b") == 5, "labels of axis, level and end, and titles of line and mark"
    assert not re.search(r"<metadata|date|id=\"\w+_\d+\"", svg(plot))


def test_spread_separates_overlapping_labels():
    boxes = [(0, 50, 100.0), (40, 90, 101.0), (60, 99, 99.0), (200, 250, 100.0), (0, 9, -5.0)]
    heights = spread(boxes, 0, 200)
    assert heights[3] == 100 and heights[4] == 0, "an isolated label stays in place; every label stays inside the frame"
    assert heights[1] == 101 and heights[1] - heights[0] >= LINE and heights[1] - heights[2] >= LINE
    assert min(spread([(0, 9, 1.0)] * 5, 0, 200)) == 0
    drawn = svg(Plot("x", "y", [Series(f"name{i}", [[(0.0, 0.0), (1.0, 5.0)]], label=f"name{i} 5") for i in range(3)]))
    assert all(f">name{i} 5<" in drawn for i in range(3))


def test_svg_shows_axis_break_if_axis_does_not_start_at_zero():
    def broken(*ys, **more):
        plot = Plot("x", "y", [Series("a", [list(enumerate(ys))])], **more)
        return svg(plot).count("#ffffff") > svg(Plot("x", "y", [Series("a", [[(0, 0.0), (1, 1.0)]])], **more)).count(
            "#ffffff"
        )

    assert not broken(1.0, 5.0) and not broken(-1.0, 5.0) and broken(4.0, 5.0)


def test_charts_draw_raw_values_behind_smoothed_values(tmp_path):
    values = np.arange(100.0) + 10 * (-1.0) ** np.arange(100)
    assert np.abs(np.diff(smooth(values), 2)[2:-2]).max() < 9 and np.abs(np.diff(values, 2)).max() == 40
    assert smooth(values[:19]) == pytest.approx(values[:19]) and len(smooth(np.empty(0))) == 0
    assert smooth(np.arange(100.0)) == pytest.approx(np.arange(100.0)), "no bias at the ends"
    chart = svg(Plot("x", "y", [Series("a", [[(0, 1), (9, 2)]], faint=[[(0, 3), (9, 1)]])]))
    assert chart.count("stroke-opacity: 0.45") == 1
    assert inline(chart).count("var(--c0072b2, #0072b2)") >= 3 and "var(" not in chart, "a file has plain colours"
    assert f'viewBox="0 0 {LARGE[0]} {LARGE[1]}"' in svg(Plot("x", "y", [Series("a", [[(0, 1)]])], large=True))
