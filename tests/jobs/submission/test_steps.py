"""Tests the five steps of a submission: which data each takes and returns, and what it does not do yet."""

import os

import pytest

from flip.runs.checks import OK, Check
from flip.runs.errors import ConfigError
from jobs.planning import data_checks
from jobs.submission.check import CheckRows, check_runs
from jobs.submission.confirm import confirm_plan
from jobs.submission.plan_runs import plan_runs
from jobs.submission.request import SubmitOptions, read_request
from jobs.submission.resolve import resolve_runs
from jobs.submission.start_runs import SubmitOutcome, start_runs
from tests.test_imports import FILES, imports

STEPS = ("request", "resolve", "check", "plan_runs", "confirm", "start_runs", "submission")


def test_step_imports_only_earlier_steps():
    names = [f"jobs.submission.{step}" for step in STEPS]
    for at, name in enumerate(names):
        later = set(names[at + 1 :]) & {*imports(FILES[name])}
        assert not later, f"{name} imports {later}"


def test_three_steps_write_nothing_and_the_last_two_start_the_runs(typed, desk):
    request = read_request(SubmitOptions(sweep=str(desk.sweep), cluster="local"))
    planned = plan_runs(check_runs(resolve_runs(request)))
    assert [action.kind for action in planned.plan.actions] == ["new", "new"] and planned.question == ""
    assert not os.path.exists(request.folder) and not typed.started
    outcome = SubmitOutcome()
    os.makedirs(request.folder)
    start_runs(confirm_plan(planned), outcome)
    assert outcome.started == typed.started == ["half", "whole"] == typed.there()


def test_resolve_runs_no_check(typed, desk, monkeypatch):
    """A wrong value of the last run is reported before data of the first are read."""

    def fail(*_):
        pytest.fail("a check ran")

    monkeypatch.setattr(data_checks, "check_shards", fail)
    desk.sweep.write_text(desk.text + "  last: {stages.pretrain.batch: 15, resources.processes: 2}\n")
    request = read_request(SubmitOptions(sweep=str(desk.sweep), cluster="local"))
    with pytest.raises(ConfigError, match=r"run last: stages\.pretrain\.batch"):
        resolve_runs(request)


def test_plan_does_not_change_the_rows_of_checks(typed, desk):
    """A new sweep is planned twice: before its folder is locked, and under the lock."""
    checked = check_runs(resolve_runs(read_request(SubmitOptions(sweep=str(desk.sweep), cluster="local"))))
    before = checked.rows.by_runs(2)
    first = plan_runs(checked).rows.by_runs(2)
    second = plan_runs(checked).rows.by_runs(2)
    assert checked.rows.by_runs(2) == before and first == second
    assert [row.name for row in first if row not in before] == ["free space"]


def test_rows_name_their_runs_unless_they_are_about_all():
    rows = CheckRows()
    rows.add([Check(OK, "a"), Check(OK, "b")], "half")
    rows.add([Check(OK, "a")], "whole")
    rows.add([Check(OK, "c")])
    assert {row.text: names for row, names in rows.by_runs(2).items()} == {"a": [], "b": ["half"], "c": []}
