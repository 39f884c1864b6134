"""Tests of the chart of accuracy against training time beside the paper's points."""

from pathlib import Path

import pytest

from flip.monitoring.results import read_run
from jobs.pages import charts
from jobs.pages.document import Figure
from jobs.reporting import seed_groups
from jobs.reporting.paper_figure import time_figure
from tests.jobs import gallery


def drawn(folder: Path) -> Figure | None:
    outcomes = [read_run(path) for path in sorted(folder.iterdir()) if path.is_dir()]
    figures = [block for block in time_figure(seed_groups.group_by_seed(outcomes)) if isinstance(block, Figure)]
    return figures[0] if figures else None


def test_headline_sweep_is_drawn_beside_points_of_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path / "cache"))
    queued = {"mask75-12.8b": (0.0, "queued")}
    figure = drawn(gallery.sweep(tmp_path, "headline", queued, lines=5))
    assert figure is not None
    (plot,) = figure.plots
    series = {each.name: each for each in plot.series}
    assert set(series) == {f"{who}, mask {mask}" for who in ("paper", "ours") for mask in ("0", "0.5", "0.75")}
    paper = {name: [(mark.x, mark.y) for mark in series[f"paper, mask {name}"].marks] for name in ("0", "0.5", "0.75")}
    assert paper == {
        "0": [(1, 68.6), (5, 72.4)],
        "0.5": [(0.5, 69.6), (2.5, 73.3)],
        "0.75": [(0.33, 68.2), (1.72, 73.0)],
    }
    ours = [mark.x for mark in series["ours, mask 0"].marks]
    assert ours == pytest.approx([1, 2, 5], rel=0.05), "three lengths, the middle one without a published number"
    assert [mark.x for mark in series["ours, mask 0.5"].marks] == pytest.approx([0.517, 1.03, 2.58], rel=0.05)
    assert len(series["ours, mask 0.75"].marks) == 2, "a run that waits has no point"
    assert "paper, mask 0.5" in charts.svg(plot)


def test_points_of_paper_are_drawn_before_the_first_run_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path / "cache"))
    figure = drawn(gallery.sweep(tmp_path, "headline", {"mask0-2.56b": (0.0, "queued")}, lines=5))
    assert figure is not None and [each.name[:5] for each in figure.plots[0].series] == ["paper"] * 3
    assert "need the complete run of time 1" in figure.caption
    assert drawn(gallery.sweep(tmp_path, "masking", lines=5)) is None, "its rows have no time"
