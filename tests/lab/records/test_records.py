"""Tests of the record page: the rule and its rate of false records, the cost of a row, and the committed page."""

import json
from dataclasses import replace

import numpy as np
import pytest

import flip
from flip.runs.errors import ConfigError
from jobs.common.paths import REPOSITORY
from lab.records import __main__ as command
from lab.records import measure, page, rows, rule
from lab.records.rows import GOAL, REFERENCE_SECONDS, RecordRow

DOCS = REPOSITORY / "docs"


def row(run="fast", mean=GOAL + 0.02, seconds=150.0, spread=0.005, date="2026-11-30 08:00"):
    scores = {str(100 + i): mean + spread * (i - 2) for i in range(5)}
    return RecordRow(run, scores, seconds, {}, 1000, "c0ffee", date, {"processor": "a processor", "load": 2.04})


def test_rule_needs_five_seeds_whose_lower_bound_is_at_the_goal():
    values = row(mean=GOAL).values
    error = np.std(values, ddof=1) / np.sqrt(5)
    assert not rule.has_reached(values, GOAL)
    assert rule.has_reached([value + 2.777 * error for value in values], GOAL)
    assert not rule.has_reached([value + 2.775 * error for value in values], GOAL)
    assert not rule.has_reached([value + 1 for value in values[:4]], GOAL)


def test_rule_gives_at_most_one_false_record_in_twenty():
    """Of normal scores half as many; of the seeds of the committed studies, whose deviations are not normal, more."""
    normal = np.random.default_rng(1).normal(size=20_000)
    assert rule.false_rate([normal], 100_000) == pytest.approx(0.025, abs=0.003)
    groups = page.seed_groups(DOCS)
    assert len(groups) >= 12 and all(len(group) >= 2 for group in groups)
    assert 0.02 < rule.false_rate(groups) <= 0.05


def test_record_is_cheaper_than_all_rows_before_it():
    first = row("first", seconds=340.0, date="2026-11-30 08:00")
    slower = row("slower", seconds=350.0, date="2026-11-30 07:00")  # not 5 % cheaper than the reference
    equal = row("equal", seconds=330.0, date="2026-11-30 09:00")
    wrong = row("wrong", mean=GOAL, seconds=100.0, date="2026-11-30 09:30")
    fast = row("fast", seconds=150.0, date="2026-11-30 10:00")
    assert rows.records([fast, wrong, equal, first, slower]) == {"first", "fast"}


def test_cost_is_relative_to_the_reference_on_the_same_machine(monkeypatch, tmp_path):
    """Twice as slow a machine gives the same number."""

    def curve(factor):
        def read(run):
            stages = ["pretrain"] * 6 + ["full"] * 6
            seconds = np.cumsum([factor * 128 * 1e-3] * 6 + [factor * 128 * 4e-3] * 6)
            return {"stage": stages, "cpu_seconds": seconds, "samples": 128 * np.arange(1, 13)}

        return read

    for factor in (1, 2):
        monkeypatch.setattr(flip, "read_metrics", curve(factor))
        times = measure.stage_times([tmp_path])
        assert times == pytest.approx({"pretrain": factor * 1e-3, "full": factor * 4e-3})
        assert measure.stage_lengths(tmp_path) == {"pretrain": 6 * 128, "full": 6 * 128}
        unit = measure.cost(times, {"pretrain": 80_000, "full": 20_000}) / REFERENCE_SECONDS
        assert measure.cost(times, {"pretrain": 40_000, "full": 10_000}) / unit == pytest.approx(180)


def test_runs_of_a_row_have_new_seeds_and_probes_of_the_reference_between_them():
    stages = measure.reference_stages(json.loads((DOCS / measure.REFERENCE).read_text()))
    assert stages["pretrain"]["image.size"] == 24 and stages["full"]["mask"] == "0"
    entries = measure._entries("fast", {"optim.name": "muon"}, stages)
    names = ["reference-0", "fast-s100", "fast-s101", "reference-2", "fast-s102", "fast-s103", "fast-s104"]
    assert list(entries) == names
    assert entries["fast-s102"] == {"optim.name": "muon", "seed": 102}
    assert entries["reference-0"]["stages.pretrain"]["image"] == {"size": 24}
    assert "optim.name" not in entries["reference-0"]


def test_page_lists_rows_rule_and_trials(tmp_path, capsys):
    folder = tmp_path / "records"
    rows.write(folder, row())
    rows.write(folder, row("weak", mean=0.2, seconds=120.0))
    (folder / "tried.json").write_text(json.dumps([{"date": "2026-11-30", "what": "a wish", "result": "1 %"}]))
    for study in page.STUDIES:
        (tmp_path / study).symlink_to(DOCS / study)
    assert command.main(["--docs", str(tmp_path)]) == 0
    text = (tmp_path / "records.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == str(tmp_path / "records.md")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert any("weak" in line and "not reached" in line and "120" in line for line in lines)
    assert any("weak" in line and line.endswith("| a processor | 2.0 |") for line in lines)
    assert any("fast" in line and "record" in line and "23.3 (22.3 to 24.3)" in line for line in lines)
    assert any("a wish" in line for line in lines)
    assert "| nearest training picture | 0 | 48.0 | - | - | - | - | - | - |" in lines
    assert "no recipe reaches its 48.0 %, so that all are early training" in text
    rows.write(folder, row("strong", mean=0.5))
    assert command.main(["--docs", str(tmp_path)]) == 0
    assert "strong exceed its 48.0 %" in (tmp_path / "records.md").read_text(encoding="utf-8")


def test_damaged_row_and_unknown_recipe_are_refused(tmp_path):
    (tmp_path / "broken.json").write_text('{"run": "broken"}')
    with pytest.raises(ConfigError, match="broken.json: is no row of the record page"):
        rows.read(tmp_path)
    with pytest.raises(ConfigError, match="no such recipe .*none-such.*There are"):
        measure._entry("none-such")


def test_committed_page_is_that_of_the_committed_rows(tmp_path):
    for name in ("records", *page.STUDIES):
        (tmp_path / name).symlink_to(DOCS / name)
    written = page.write(tmp_path).read_text(encoding="utf-8")
    assert written == (DOCS / "records.md").read_text(encoding="utf-8"), "run: python -m lab.records"
    for each in rows.read(DOCS / "records"):
        assert replace(each) == each and len(each.scores) == rule.SEEDS and min(map(int, each.scores)) >= 100
