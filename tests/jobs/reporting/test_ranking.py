"""Tests of verdicts between designs: paired differences of seeds, intervals of single runs, and foreign models."""

import json

import pytest

from flip.evaluation.encoding.open_clip_folder import register
from flip.evaluation.metrics.result_files import write_result
from flip.monitoring.results import read_outcomes, read_runs
from flip.runs.rundir import RunDir, read_json
from jobs.pages.document import Figure, Fold, Table
from jobs.reporting import outcomes as short
from jobs.reporting import ranking, seed_groups
from jobs.reporting.figures import accuracy, focus
from jobs.reporting.report import findings
from tests.jobs.outcomes import make, score
from tests.jobs.outcomes import write_result as store_result

LUCKY = (0.41, 0.25, 0.36)
"""Scores of three seeds whose mean is the highest by luck."""
OTHER = (0.26, 0.35, 0.24)


def seeds(folder, name, mask, values):
    for seed, value in enumerate(values):
        make(folder, f"{name}-s{seed}", mask, seed=seed, top1=value)


def foreign(folder, name, results):
    """A scored open_clip model, as an evaluation job leaves it."""
    run = RunDir(folder / name)
    register(run, f"/models/{name}")
    for result in results:
        write_result(run, result, {"stage": "foreign", "samples": 0, "digest": "x"}, "job")


def grouped(folder):
    outcomes = read_outcomes(folder)
    return seed_groups.group_by_seed(outcomes), outcomes


def charts_of(blocks, name):
    flat = [inner for block in blocks for inner in (block.blocks if isinstance(block, Fold) else [block])]
    figures = [block for block in flat if isinstance(block, Figure)]
    return [plot for figure in figures for plot in figure.plots if plot.y.startswith(f"{name}, ")]


def test_headline_without_winner_has_paired_difference_and_seeds(tmp_path):
    folder = tmp_path / "demo"
    seeds(folder, "mask0", "0", LUCKY)
    seeds(folder, "mask50", "0.5", OTHER)
    (headline,) = ranking.headlines(*grouped(folder))
    explanation = headline.explanation
    scores = "mask0 34.0 %, mask50 28.3 % (3 seeds, chance 0.0853 %)"
    assert headline.sentence == f"No clear winner on twemoji: {scores}; openmoji agrees"
    assert [text.startswith("Paired by seed on openmoji") for text in headline.further] == [True]
    # differences 15, -10 and 12 points: mean 5.667, standard deviation 13.65, t(2) 4.303
    assert explanation.startswith("Paired by seed on twemoji, with 95 % intervals: ")
    assert explanation.endswith(": mask0 minus mask50 +5.7 points (-28.2 to +39.6).")
    tables = [block for block in findings(grouped(folder)[1]) if isinstance(block, Table)]
    assert all("twemoji" not in table.best for table in tables), "no star without a clear winner"


def test_paired_seeds_show_winner_although_ranges_overlap(tmp_path):
    """All seeds vary alike, so that every pair has the same difference."""
    folder = tmp_path / "demo"
    seeds(folder, "mask0", "0", (0.20, 0.30, 0.40))
    seeds(folder, "mask50", "0.5", (0.15, 0.251, 0.349))
    groups, outcomes = grouped(folder)
    (headline,) = ranking.headlines(groups, outcomes)
    sentence = headline.sentence
    assert sentence.startswith("Best on twemoji: mask0 30.0 %, mask50 25.0 % (3 seeds")
    assert ranking.clear_best(groups, "twemoji").label == "mask0"
    (results,) = [block for block in findings(outcomes) if isinstance(block, Table) and block.best]
    assert results.best["twemoji"] == [0]
    assert sentence in short.terminal_page(outcomes), "also on the terminal"


def test_single_seeds_are_compared_by_intervals(tmp_path):
    folder = tmp_path / "demo"
    make(folder, "far", "0", top1=0.4)
    make(folder, "near", "0.5", top1=0.3)
    groups, outcomes = grouped(folder)
    (headline,) = ranking.headlines(groups, outcomes)
    assert headline.sentence.startswith("Highest on twemoji: far 40.0 %, near 30.0 % (one seed each")
    make(folder, "close", "0.75", top1=0.39)
    groups, outcomes = grouped(folder)
    (headline,) = ranking.headlines(groups, outcomes)
    assert headline.sentence.startswith("No clear winner") and headline.explanation.endswith("overlap: far and close.")
    (headline,) = ranking.headlines([group for group in groups if group.name != "near"], outcomes)
    assert headline.sentence.startswith("No clear winner on twemoji: far")
    assert headline.explanation == "Their intervals overlap." and not headline.further


def test_chance_is_written_alike_in_headline_and_figure(tmp_path):
    folder = tmp_path / "demo"
    run = make(folder, "only")
    result = read_json(run.result)
    for evaluation in result["evaluations"]:
        evaluation["chance"] = 0.125
    store_result(run, result)
    groups, outcomes = grouped(folder)
    assert ranking.headlines(groups, outcomes)[0].sentence.endswith("chance 12.5 %); openmoji 19.0 %")
    assert {level.name for plot in charts_of(findings(outcomes), "twemoji") for level in plot.levels} == {
        "chance, 12.5 %"
    }
    assert seed_groups.seeds_caution(groups).startswith("One seed: intervals cover the choice of test images, ")


def test_foreign_model_has_no_seed_no_star_of_its_own_and_level_line(tmp_path):
    folder = tmp_path / "demo"
    seeds(folder, "mask0", "0", LUCKY)
    foreign(folder, "published", [score("twemoji", "test", 0.6), score("validation", "test", 0.5)])
    groups, outcomes = grouped(folder)
    assert seed_groups.seeds_caution(groups) == "", "a foreign model has no seeds to add"
    (headline,) = ranking.headlines(groups, outcomes)
    assert headline.sentence == (
        "mask0 34.0 % on twemoji (3 seeds, chance 0.0853 %); published 60.0 %; openmoji 33.0 %"
    )
    blocks = findings(outcomes)
    assert all("twemoji" not in block.best for block in blocks if isinstance(block, Table))
    plots = charts_of(blocks, "twemoji")
    assert plots
    assert all([level.name for level in plot.levels] == ["chance, 0.0853 %", "published 60.0"] for plot in plots)
    assert all([series.name for series in plot.series] == ["mask0"] for plot in plots)
    make(folder, "single", "0.75", top1=0.1)
    assert seed_groups.seeds_caution(grouped(folder)[0]).startswith("One seed of single cannot rank the runs: ")


def test_set_has_same_name_for_own_runs_and_foreign_models(tmp_path):
    """Evaluation jobs record the role ``test``; the configuration calls the set a validation set."""
    make(tmp_path / "demo", "own")
    foreign(tmp_path / "others", "published", [score("validation", "test", 0.5), score("extra", "test", 0.4)])
    rows = {row["run"]: row for row in read_runs(tmp_path)}
    assert (rows["own"]["validation.validation.top1"], rows["published"]["validation.validation.top1"]) == (0.2, 0.5)
    assert rows["published"]["test.extra.top1"] == 0.4
    assert not any(key.startswith("test.validation.") for row in rows.values() for key in row)
    assert set(short.rows(read_outcomes(tmp_path))[0]) >= {"validation.validation.top1", "test.extra.top1"}


def test_chart_draws_mean_of_seeds_and_each_seed_faintly(tmp_path):
    folder = tmp_path / "demo"
    seeds(folder, "mask0", "0", LUCKY)
    blocks = findings(grouped(folder)[1])
    for plot in charts_of(blocks, "validation"):
        (series,) = plot.series
        (mark,) = series.marks
        assert series.label == "mask0 34.0" and series.end == (mark.x, mark.y), "the label is at the mean"
        assert (mark.y, mark.low, mark.high) == (pytest.approx(34.0), pytest.approx(25.0), pytest.approx(41.0))
        assert mark.label == "mask0: 34.0 % (mean of 3, 25.0 to 41.0)"
        (line,) = series.lines
        assert [y for _, y in line] == [pytest.approx(34.0 * i / 4) for i in (1, 2, 3, 4)]
        assert len(series.faint) == 3 and sorted(y for _, y in series.dots) == pytest.approx([25.0, 36.0, 41.0])


def test_metric_is_named_in_table_chart_and_headline(tmp_path):
    run = make(tmp_path / "demo", "own", top1=0.9)
    result = read_json(run.result)
    item = next(item for item in result["evaluations"] if item["name"] == "twemoji")
    item |= {"metric": "worst_group_top5", "score": 0.326}
    store_result(run, result)
    groups, outcomes = grouped(tmp_path / "demo")
    (headline,) = ranking.headlines(groups, outcomes)
    assert headline.sentence == "own 32.6 % on twemoji, worst-group top-5 (one seed); openmoji 89.0 %"
    blocks = findings(outcomes)
    tables = [block.rows for block in blocks if isinstance(block, Table)]
    assert any(row.get("twemoji (worst-group top-5)") == "32.6" for rows in tables for row in rows)
    plots = charts_of(blocks, "twemoji")
    assert plots and all(plot.y == "twemoji, worst-group top-5, %" and not plot.levels for plot in plots)
    (details,) = [block.blocks[0].rows for block in blocks if isinstance(block, Fold) and "Scores" in block.summary]
    (shown,) = [row for row in details if row["set"] == "twemoji"]
    assert (shown["metric"], shown["score"], shown["chance"]) == ("worst-group top-5", "32.6", "-")
    (row,) = json.loads(json.dumps(short.rows(outcomes)))
    assert (row["test.twemoji.score"], row["test.twemoji.metric"], row["test.twemoji.top1"]) == (
        0.326,
        "worst-group top-5",
        0.9,
    )


def test_note_on_axis_that_does_not_start_at_0_stands_only_below_such_charts(tmp_path):
    for name, (twemoji, openmoji) in {"a": (0.4, 0.4), "b": (0.3, 0.01)}.items():
        run = make(tmp_path / "demo", name, "0")
        result = read_json(run.result)
        scores = [score("twemoji", "test", twemoji), score("openmoji", "test", openmoji)]
        store_result(run, result | {"evaluations": [{**item, "chance": None} for item in scores]})
    groups, outcomes = grouped(tmp_path / "demo")
    blocks = accuracy(groups, outcomes, focus(groups, outcomes))
    figures = [item for block in blocks for item in getattr(block, "blocks", [block]) if isinstance(item, Figure)]
    noted = {figure.name: "Two strokes" in figure.caption for figure in figures}
    assert noted == {figure.name: any(plot.is_broken for plot in figure.plots) for figure in figures}
    assert noted["accuracy-twemoji"] and not noted["accuracy-openmoji"]
