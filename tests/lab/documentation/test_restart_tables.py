"""Tests that the tables of docs/restarts.md are those of the code."""

import re

from flip.runs import next_step
from flip.runs.next_step import DONE, HERE, LEAVE, REQUEUE, STOP
from jobs.host import job
from lab.documentation import restart_tables

PAGE = restart_tables.PAGE.read_text(encoding="utf-8")


def test_page_has_the_tables_of_the_code():
    printed = restart_tables.with_tables(PAGE)
    assert printed == PAGE, "run `python -m lab.documentation.restart_tables`"


def test_changed_rule_changes_both_tables(monkeypatch):
    monkeypatch.setattr(next_step, "ONCE", ())
    changed = restart_tables.with_tables(PAGE)
    rows = {line.split(" | ")[0].lstrip("| ") for line in changed.splitlines() if line not in PAGE.splitlines()}
    assert {"crash", "hang", "port", "`kill -9` of a rank, with agents"} <= rows


def test_cases_are_distinct_and_have_each_step():
    events = [case.event for case in restart_tables.CASES if not case.event.startswith("the same")]
    assert len(events) == len(set(events)) > 12
    steps = {step.do for case in restart_tables.CASES if (step := case.step)}
    assert steps == {HERE, REQUEUE, STOP, LEAVE}  # done: of a complete run
    deciders = {case.decided_by for case in restart_tables.CASES}
    assert deciders == {"owner", "guard", "owner; guard if the owner hangs, too", "task", "next start", "script", ""}


def test_row_without_decision_says_what_follows():
    assert all(case.otherwise for case in restart_tables.CASES if case.step is None)


def test_page_describes_each_state_of_the_owner():
    """The drawing of job.py and the table of the page have the same states."""
    drawn = set(re.findall(r"\b(?:BEGIN|[A-Z]{3,})\b", job.__doc__.split("\n\n")[2])) - {"DIR", "TOKEN"}
    assert drawn == set(re.findall(r"^\| ([A-Z]+) \|", PAGE, re.MULTILINE)), drawn
    assert DONE in job.__doc__
