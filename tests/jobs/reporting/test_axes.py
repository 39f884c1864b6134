"""Tests of grids: their axes, the order and columns of the results table, the table of two axes, and the headline."""

import pytest

from flip.monitoring.results import read_outcomes
from jobs.pages.document import Fold, Table
from jobs.reporting import axes, ranking, seed_groups
from jobs.reporting.report import findings
from tests.jobs.outcomes import make

MASKS = ("0.5", "0", "0.75")
RATES = (0.002, 0.0005)
SCORES = {
    ("0", 0.0005): (0.20, 0.21, 0.22),
    ("0", 0.002): (0.26, 0.26, 0.29),
    ("0.5", 0.0005): (0.21, 0.21, 0.21),
    ("0.5", 0.002): (0.26, 0.27, 0.25),
    ("0.75", 0.0005): (0.15, 0.16, 0.15),
    ("0.75", 0.002): (0.20, 0.21, 0.20),
}
"""(mask, rate) -> top-1 of three seeds."""


def grid(folder, seeds=3, left_out=()):
    for mask in MASKS:
        for rate in RATES:
            if (mask, rate) in left_out:
                continue
            for seed in range(seeds):
                name = f"mask{mask}-base_lr{rate:g}-s{seed}"
                make(folder, name, mask, seed=seed, top1=SCORES[mask, rate][seed], rate=rate)
    return read_outcomes(folder)


def axes_of(outcomes):
    groups = axes.in_order(seed_groups.group_by_seed(outcomes))
    return groups, axes.axes(groups)


def test_axes_are_sorted_whatever_the_order_of_the_sweep(tmp_path):
    groups, (mask, rate) = axes_of(grid(tmp_path / "demo", seeds=1))
    assert (mask.name, list(mask.values), mask.positions) == ("mask", ["0", "0.5", "0.75"], [0, 0, 1, 1, 2, 2])
    assert (rate.name, list(rate.values), rate.positions) == ("base_lr", ["0.0005", "0.002"], [0, 1, 0, 1, 0, 1])
    assert groups[0].name == "mask0-base_lr0.0005"


def test_grid_may_lack_a_design(tmp_path):
    outcomes = grid(tmp_path / "demo", seeds=1, left_out=[("0.75", 0.002)])
    groups, (mask, rate) = axes_of(outcomes)
    assert len(groups) == 5 and mask.value(4) == "0.75" and rate.value(4) == "0.0005"


@pytest.mark.parametrize("left", [3, 4])
def test_designs_that_are_no_grid_have_no_axes(tmp_path, left):
    for i in range(left):
        make(tmp_path / "demo", f"r{i}", f"0.{i}5", rate=0.001 * i)
    groups, found = axes_of(read_outcomes(tmp_path / "demo"))
    assert found == [] and [group.name for group in groups] == [f"r{i}" for i in range(left)]


def test_results_have_a_column_for_each_axis_and_a_table_of_both(tmp_path):
    outcomes = grid(tmp_path / "demo")
    tables = [block for block in findings(outcomes) if isinstance(block, Table)]
    crossed = next(table for table in tables if "base_lr 0.002" in table.rows[0])
    assert [list(row.values()) for row in crossed.rows] == [
        ["0", "21.0 (20.0-22.0)", "27.0 (26.0-29.0)"],
        ["0.5", "21.0 (21.0-21.0)", "26.0 (25.0-27.0)"],
        ["0.75", "15.3 (15.0-16.0)", "20.3 (20.0-21.0)"],
    ]
    results = next(table for table in tables if table.links)
    assert [(row["mask"], row["base_lr"]) for row in results.rows] == [
        (mask, rate) for mask in ("0", "0.5", "0.75") for rate in ("0.0005", "0.002")
    ]
    folds = [block.summary for block in findings(outcomes) if isinstance(block, Fold)]
    assert "The other sets by both" in folds


def test_headline_names_what_is_clear_along_each_axis(tmp_path):
    """Mask 0 minus 0.5 has six pairs: differences -1 0 1, 0 -1 4 (mean 0.5, not clear)."""
    outcomes = grid(tmp_path / "demo")
    (headline,) = ranking.headlines(seed_groups.group_by_seed(outcomes), outcomes)
    better, _, highest = headline.sentence.partition(". Highest: ")
    assert better == "On twemoji: mask 0 is better than 0.75, not clearly than 0.5; base_lr 0.002 is better than 0.0005"
    assert highest == "mask0-base_lr0.002 27.0 % (3 seeds, chance 0.0853 %); openmoji agrees"
    # rates: differences 6 5 7, 5 6 4, 5 5 5: mean 5.333, standard deviation 0.8660, t(8) 2.306; half 0.666
    assert "base_lr 0.002 minus 0.0005 +5.3 points (+4.7 to +6.0)" in headline.explanation
    # masks 0 and 0.5: standard deviation 1.871, t(5) 2.571; half 1.963
    assert "mask 0 minus 0.5 +0.5 points (-1.5 to +2.5)" in headline.explanation


def test_grid_with_too_few_pairs_has_the_headline_of_single_designs(tmp_path):
    """One seed: three pairs of rates, two of masks. With one mask less there are too few of either."""
    outcomes = grid(tmp_path / "demo", seeds=1)
    (headline,) = ranking.headlines(seed_groups.group_by_seed(outcomes), outcomes)
    assert headline.sentence.startswith("On twemoji: base_lr 0.002 is better than 0.0005. Highest: ")
    few = [outcome for outcome in outcomes if "mask0.75" not in outcome.run.name]
    (headline,) = ranking.headlines(seed_groups.group_by_seed(few), few)
    assert headline.sentence.startswith("No clear winner on twemoji: ")
