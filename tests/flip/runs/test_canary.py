"""Tests of the rule of canaries: its tables, which are also in docs/cluster.md, and what counts as passed."""

import json
import shutil
from pathlib import Path

import pytest

from flip.runs import canary, lifecycle
from flip.runs.canary import CANCEL, FREE, LEAVE, LOST, RELEASE, WAITING, Wait, at_end, choose, hold_state
from flip.runs.lifecycle import ABSENT, ACTIVE, QUEUED, SchedulerView
from flip.runs.rundir import RunDir, write_json

PAGE = Path(__file__).resolve().parents[3] / "docs" / "cluster.md"

#: What is known of the canary -> what holds a run whose job is held, and one whose job is gone. In the documentation
#: "waits", "stopped", and "as without a canary".
STANDING = {
    "has passed, or its jobs were released": (Wait(released=True), FREE, FREE),
    "is queued, running, waiting or unknown": (Wait(canary="running"), WAITING, FREE),
    "is complete, and its owner is at work": (Wait(canary="complete", ending=True), WAITING, LOST),
    "is complete, and has released nothing": (Wait(canary="complete"), LOST, LOST),
    "is failed, cancelled or stopped": (Wait(canary="failed"), LOST, LOST),
    "was submitted again, without this run": (Wait(canary="running", current=False), LOST, LOST),
    "is complete, and the run is another user's": (Wait(released=None, canary="complete"), FREE, FREE),
}

#: End of an attempt of a canary -> (action, whether it has passed, what happens to the held jobs).
ENDS = {
    "complete, also after fewer steps": ("done", False, RELEASE),
    "for good, after its steps": ("stop", True, RELEASE),
    "for good, before": ("stop", False, CANCEL),
    "and it starts again": ("requeue", False, LEAVE),
    "and Slurm has requeued it": ("nothing", False, LEAVE),
}
WORDS = {FREE: "as without a canary", WAITING: "waits", LOST: "stopped"}
WORDS |= {RELEASE: "released", CANCEL: "removed from the queue", LEAVE: "stay held"}


@pytest.mark.parametrize("row", STANDING)
def test_run_waits_while_its_canary_may_pass(row):
    wait, held, gone = STANDING[row]
    assert (hold_state(wait), hold_state(wait._replace(job="gone"))) == (held, gone)
    assert hold_state(wait._replace(job="queued")) == FREE, "a user has released it"


def test_every_state_of_a_canary_has_an_answer():
    going = {state for state in lifecycle.STATES if hold_state(Wait(canary=state)) == WAITING}
    assert going == {"queued", "running", "waiting", "unknown"}
    assert {hold_state(Wait(canary=state)) for state in set(lifecycle.STATES) - going} == {LOST}


@pytest.mark.parametrize("row", ENDS)
def test_end_of_canary_decides_about_held_jobs(row):
    action, has_passed, expected = ENDS[row]
    assert at_end(action, has_passed) == expected


@pytest.mark.parametrize("groups, steps, proven, expected", [
    ("aab", 50, "", [0, 0, None]),  # the first of several with equal resources and code
    ("abab", 50, "", [0, 1, 0, 1]),  # one for each kind of resources and code
    ("a", 50, "", [None]),
    ("aa", 0, "", [None, None]),  # --no-canary
    ("aabb", 50, "a", [None, None, 2, 2]),  # an equal run has passed before
])  # fmt: skip
def test_first_run_of_each_unproven_group_goes_ahead(groups, steps, proven, expected):
    assert choose(groups, steps, proven.__contains__) == expected


def test_tables_are_in_the_documentation():
    section = PAGE.read_text(encoding="utf-8").partition("\n### Runs that wait for a canary\n")[2].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert lines[2 : 2 + len(STANDING)] == [
        [row, WORDS[held], WORDS[gone]] for row, (_, held, gone) in STANDING.items()
    ]
    assert lines[4 + len(STANDING) :] == [[row, WORDS[expected]] for row, (_, _, expected) in ENDS.items()]


# -- real files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    """A canary and a run that waits for it, submitted to Slurm."""
    first, other = (RunDir(tmp_path / "demo" / name) for name in "ab")
    for run, fields in ((first, {"canary": {"steps": 50, "releases": ["demo.77aa"]}}), (other, {"waits_for": "a"})):
        run.path.mkdir(parents=True)
        token = {"name": "demo.77aa", "token": "77aa", "index": 0}
        write_json(run.path / "job.json", {"kind": "slurm", "after": 0, **token, **fields})
    return first, other


def log(run, n, *steps):
    run.metrics.mkdir(exist_ok=True)
    with open(run.metrics / f"{n}.jsonl", "a") as file:
        file.writelines(json.dumps({"step": step, "samples": 8 * step, "loss": 2.0}) + "\n" for step in steps)


def state_of(run, **seen):
    state = lifecycle.states([run], {run.path.parent / name: SchedulerView(kind) for name, kind in seen.items()})[
        run.path
    ]
    return state.state, state.reason


def test_states_of_a_run_that_waits(runs):
    first, other = runs
    assert state_of(other, a=ACTIVE, b=lifecycle.HELD) == ("queued", "waits for its canary a")
    assert state_of(other, a=ACTIVE, b=QUEUED) == ("queued", ""), "a user has released it"
    write_json(first.result, {})
    assert state_of(other, a=ACTIVE, b=lifecycle.HELD)[0] == "queued", "the exit trap of its canary releases it"
    assert state_of(other, a=ABSENT, b=lifecycle.HELD) == ("stopped", "its canary a is complete: submit again")
    canary.released_file(first, "demo.77aa").parent.mkdir(parents=True)
    canary.record_release(first, "demo.77aa")
    assert state_of(other, a=ABSENT, b=lifecycle.HELD) == ("queued", ""), "somebody else holds it now"


def test_run_whose_canary_is_lost_is_stopped(runs):
    first, other = runs
    job = (first.path / "job.json").read_text()
    write_json(first.path / "job.json", {**json.loads(job), "canary": {"steps": 50, "releases": ["demo.88bb"]}})
    assert state_of(other, a=ACTIVE, b=lifecycle.HELD)[0] == "stopped", "its canary was submitted again without it"
    (first.path / "job.json").write_text(job)
    assert state_of(other, a=ABSENT, b=lifecycle.HELD)[0] == "stopped", "the job of its canary is gone"
    shutil.rmtree(first.path)
    expected = "its canary a is stopped (its folder does not exist): submit again"
    assert state_of(other, a=ABSENT, b=lifecycle.HELD) == ("stopped", expected)
    record = {"kind": "local", "waits_for": "a", "after": 0}
    write_json(other.path / "job.json", record)
    assert state_of(other, a=ABSENT, b=lifecycle.HELD) == ("stopped", expected), "locally as on Slurm"


def test_passed_counts_steps_over_attempts_since_submission(tmp_path):
    run = RunDir(tmp_path / "demo" / "a")
    run.path.mkdir(parents=True)
    write_json(run.path / "job.json", {"after": 1})
    for n, steps in ((1, (1, 100)), (2, (10, 30)), (3, (31, 59))):
        run.start_attempt({})
        log(run, n, *steps)
    assert not canary.passed(run, 50)
    log(run, 3, 60)
    assert canary.passed(run, 50)


def test_passed_accepts_complete_run_without_logged_steps(tmp_path):
    run = RunDir(tmp_path / "demo" / "a")
    run.path.mkdir(parents=True)
    write_json(run.result, {})
    assert canary.passed(run, 50)
