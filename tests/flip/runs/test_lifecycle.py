"""Tests of the states of runs: one table of files and of what the scheduler shows, on real files.

The table is also in docs/cluster.md, State of a run.
"""

import re
import shutil
from pathlib import Path

import pytest

from flip.runs import attempts, lifecycle
from flip.runs.lifecycle import (
    ABSENT,
    ACTIVE,
    ENDING,
    HELD,
    LISTED_AS_ENDED,
    QUEUED,
    UNKNOWN,
    RunFacts,
    RunState,
    SchedulerView,
    state_of,
)
from flip.runs.restart_policy import EndFacts
from flip.runs.rundir import RunDir, create_json, write_json

PAGE = Path(__file__).resolve().parents[3] / "docs" / "cluster.md"

#: Column of the table -> the kinds of ``SchedulerView`` that it stands for.
COLUMNS = {
    "nothing": (UNKNOWN,),
    "no job, or an ended one": (ABSENT, LISTED_AS_ENDED),
    "queued, held": (QUEUED, HELD),
    "on nodes, ending": (ACTIVE, ENDING),
}

#: Row of the table -> the states by column.
TABLE = {
    "result.json": ("complete", "complete", "complete", "complete"),
    "a damaged file": ("unknown", "failed", "failed", "running"),
    "cancel.json, and an attempt without end.json": ("unknown", "cancelled", "cancelled", "running"),
    "cancel.json": ("cancelled", "cancelled", "cancelled", "running"),
    "end.json with the action stop, cause cancelled": ("cancelled", "cancelled", "cancelled", "running"),
    "end.json with the action stop": ("failed", "failed", "failed", "running"),
    "a copy of another run directory": ("stopped", "stopped", "stopped", "stopped"),
    "no job.json": ("stopped", "stopped", "stopped", "running"),
    "an attempt without end.json": ("unknown", "stopped", "waiting", "running"),
    "end.json with another action": ("unknown", "stopped", "waiting", "running"),
    "no attempt since job.json": ("unknown", "stopped", "queued", "running"),
}


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "runs" / "demo" / "a")
    run.path.mkdir(parents=True)
    submit(run)
    return run


def submit(run):
    write_json(run.path / "job.json", {"kind": "slurm", "folder": str(run.path), "after": run.newest_attempt()})


def end(run, cause, state="RUNNING"):
    n = attempts.start_attempt(run, {})
    run.write_cause(n, 0, cause, 0, f"why {cause}")
    attempts.end_attempt(run, n, EndFacts(1, state))


def make(run, row):
    """Write the files of a row of the table; returns the run."""
    if row == "result.json":
        write_json(run.result, {})
    if row.startswith("cancel.json"):
        create_json(run.cancel, {"who": "ann", "why": "a mistake"})
    if row.endswith("an attempt without end.json"):
        attempts.start_attempt(run, {})
    if row == "end.json with the action stop, cause cancelled":
        end(run, "stopped", "CANCELLED")
    if row == "end.json with the action stop":
        end(run, "config")
    if row == "end.json with another action":
        end(run, "stopped")
    if row == "no job.json":
        (run.path / "job.json").unlink()
    if row == "a damaged file":
        attempts.start_attempt(run, {})
        (run.path / "job.json").write_text("{")
    if row == "a copy of another run directory":
        end(run, "config")
        copy = run.path.with_name("copy")
        shutil.copytree(run.path, copy)
        return RunDir(copy)
    return run


@pytest.mark.parametrize("row", TABLE)
def test_state_follows_from_files_and_scheduler(run, row):
    run = make(run, row)
    for kinds, expected in zip(COLUMNS.values(), TABLE[row], strict=True):
        for kind in kinds:
            state = lifecycle.states([run], {run.path: SchedulerView(kind, "why")})[run.path]
            assert (state.state, kind) == (expected, kind)
            assert state.state in lifecycle.STATES and state.attempt == run.newest_attempt()
    assert lifecycle.states([run], {})[run.path].state == TABLE[row][0], "nobody has asked a scheduler"


def test_earlier_submissions_do_not_count(run):
    """Their decisions and their attempts without end are over."""
    for row in ("end.json with the action stop", "an attempt without end.json"):
        make(run, row)
        submit(run)
        states = [
            lifecycle.states([run], {run.path: SchedulerView(kind)})[run.path].state
            for kind in (QUEUED, ABSENT, UNKNOWN)
        ]
        assert states == ["queued", "stopped", "unknown"]


def test_table_is_in_the_documentation():
    section = PAGE.read_text(encoding="utf-8").partition("\n## State of a run\n")[2].partition("\n##")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    head, _, *rows = [[re.sub("`", "", cell) for cell in line] for line in lines]
    assert head[1:] == list(COLUMNS)
    assert {row[0]: tuple(row[1:]) for row in rows} == TABLE
    assert [row[0] for row in rows] == list(TABLE), "the first row that fits counts"


END = {"action": "requeue", "cause": "storage", "reason": "503", "delay": 60.0}
OPEN = RunFacts(attempt=2, started=True, open=True)


@pytest.mark.parametrize("facts, seen, state, reason", [
    # what a job on nodes does
    (RunFacts(attempt=1), SchedulerView(ACTIVE), "running", "starting"),
    (OPEN, SchedulerView(ACTIVE), "running", ""),
    (OPEN, SchedulerView(ACTIVE, "in Slurm: SUSPENDED"), "running", "in Slurm: SUSPENDED"),
    (OPEN._replace(warnings="too short"), SchedulerView(ACTIVE), "running", "too short"),
    (OPEN._replace(stop_requested=True), SchedulerView(ACTIVE), "running", "stop requested"),
    (OPEN, SchedulerView(ENDING), "running", "stop requested"),
    (OPEN._replace(open=False), SchedulerView(ENDING), "running", "ending"),
    (OPEN, SchedulerView(ENDING, "its supervisor has died: it saves and stops"), "running",
     "its supervisor has died: it saves and stops"),
    (OPEN._replace(cancelled="cancelled by ann: x"), SchedulerView(ACTIVE), "running",
     "cancelled by ann: x: it saves and stops"),
    # why a job waits
    (RunFacts(), SchedulerView(QUEUED, "in Slurm: Priority"), "queued", "in Slurm: Priority"),
    (OPEN, SchedulerView(QUEUED), "waiting", "ended unseen: preempted, or its node failed"),
    (OPEN._replace(time_limit=True), SchedulerView(QUEUED), "waiting", "its wall limit came before it had saved"),
    (OPEN, SchedulerView(QUEUED, "in Slurm: X", evidence="a start failed"), "waiting", "a start failed; in Slurm: X"),
    (OPEN._replace(open=False, end=END), SchedulerView(QUEUED, "in Slurm: BeginTime"),
     "waiting", "503; in Slurm: BeginTime"),
    (OPEN._replace(open=False, end=END), SchedulerView(QUEUED), "waiting", "503; starts again 60 s after that"),
    # why nothing manages the run any more
    (RunFacts(), SchedulerView(ABSENT, "no supervisor is running"), "stopped",
     "no supervisor is running: submit again"),
    (OPEN._replace(open=False, end=END),
     SchedulerView(LISTED_AS_ENDED, "its job ended (FAILED)", evidence="its script failed"), "stopped",
     "503; its job ended (FAILED): submit again"),
    (OPEN, SchedulerView(LISTED_AS_ENDED, "its job ended (FAILED)", evidence="its script failed"), "stopped",
     "its job ended (FAILED); its script failed: submit again"),
    (RunFacts(copied=True), SchedulerView(ACTIVE), "stopped",
     "copied or moved to this folder, and not submitted since"),
    (RunFacts(submitted=False), SchedulerView(), "stopped", "never submitted"),
    (OPEN._replace(cancelled="cancelled by ann: x"), SchedulerView(UNKNOWN, "no answer"), "unknown",
     "cancelled by ann: x; no answer"),
])  # fmt: skip
def test_detail_names_the_evidence(facts, seen, state, reason):
    known = state_of(facts, seen)
    assert (known.state, known.reason, known.attempt) == (state, reason, facts.attempt)
    assert known.resubmit == reason.endswith("submit again")


def test_start_and_needed_hand_of_a_job_that_waits_are_passed_on():
    seen = SchedulerView(HELD, "in Slurm: JobHeldUser", "2026-11-25T14:00:00", "release it")
    expected = RunState("waiting", 2, "in Slurm: JobHeldUser", "2026-11-25T14:00:00", needs="release it")
    assert state_of(OPEN._replace(open=False), seen) == expected


def test_unreadable_file_is_unknown_whatever_the_scheduler_shows(run):
    run.cancel.mkdir()
    for kind in (UNKNOWN, QUEUED, ABSENT, ACTIVE):
        assert lifecycle.states([run], {run.path: SchedulerView(kind)})[run.path].state != "complete"
    run.attempts.write_text("no folder")
    for kind in (UNKNOWN, QUEUED, ABSENT, ACTIVE):
        state = lifecycle.states([run], {run.path: SchedulerView(kind)})[run.path]
        assert state.state == "unknown" and "it cannot be read" in state.reason
