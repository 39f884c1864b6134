"""Tests of the figures of the studies: a legend in each, and axes that start alike. They are drawn, not compared."""

from __future__ import annotations

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from jobs.pages import charts
from jobs.pages.charts import Plot
from jobs.pages.document import Figure
from lab.studies.engine.study import read
from tests.lab.studies.test_engine import DOCS, study_of, trained


def drawn(plot: Plot) -> Axes:
    canvas = Canvas((plot.size[0] / 72, plot.size[1] / 72), dpi=72)
    charts._plot(plot, [], canvas)
    (axes,) = canvas.axes
    return axes


@pytest.mark.long
@pytest.mark.parametrize("name", trained())
def test_figures_have_legends_and_axes_that_start_alike(name: str) -> None:
    """Accuracies start at 0 in every panel, so that heights can be compared; differences have 0 inside."""
    study = study_of(name)
    blocks = study.sections(read(study, DOCS))
    plots = [plot for block in blocks if isinstance(block, Figure) for plot in block.plots]
    assert len(plots) >= 2
    for plot in plots:
        axes = drawn(plot)
        legend = axes.get_legend()
        assert legend is not None and [text.get_text() for text in legend.get_texts()] == [s.name for s in plot.series]
        if plot.rows:
            low, high = axes.get_xlim()
            assert low < 0 < high
            continue
        assert plot.y.endswith("top-1, %") and axes.get_yscale() == "linear" and axes.get_ylim()[0] == 0
        assert plot.log_x or axes.get_xlim()[0] == 0
