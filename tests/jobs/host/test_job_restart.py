"""Tests of the restart of a job by its owner, and by the guard of an owner that was killed or hangs."""

import os

import pytest

from flip.runs import attempts
from flip.runs.errors import KILLED
from flip.runs.next_step import FAILED_START_DELAY, MAX_FAILED_STARTS, REQUEUE, Step
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.host import requeue, slurm_cli
from jobs.host.failed_starts import FailedStarts
from jobs.host.job_restart import LOOK_SECONDS, JobRestart, StandIn
from jobs.host.scheduler import LEFT, JobSeen
from tests.harness.job_records import write_job
from tests.jobs.host.owned import NODE, ON_NODES, WrittenScheduler

STEP = Step(REQUEUE, "node", "why", delay=30.0)
NO_ANSWER = slurm_cli.SlurmUnavailable("no answer")
DISABLED = requeue.SuccessorRefused("too many")
STARTS = FailedStarts(4, 2, 127, "n3")


@pytest.fixture
def run(tmp_path, monkeypatch, clock):
    """A run whose attempt 1 has ended, to be requeued."""
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    write_job(run)
    attempts.start_attempt(run, {})
    end = {"attempt": 1, "action": "requeue", "cause": "crash", "reason": "it broke", "delay": 0.0, "exclude": []}
    write_json(run.attempt(1) / "end.json", {**end, "committed": False, "time": 1.0})
    monkeypatch.setenv("SLURMD_NODENAME", NODE)
    return run


class Restarted:
    """A restart by its owner."""

    def __init__(self, run, scheduler):
        self.logged = []
        self.naps = []
        self.scheduler = scheduler
        self.restart = JobRestart(run, scheduler, self.log, self.naps.append)

    def log(self, text, name="job.err"):
        self.logged.append((name, str(text)))


# -- now ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exclude, n, attempt", [(None, 1, 1), (["n1"], 1, 1), (None, 0, None)])
def test_restart_now_requeues_with_delay_nodes_and_attempt(run, exclude, n, attempt):
    restarted = Restarted(run, WrittenScheduler())
    assert restarted.restart.now(STEP, exclude, n) is True
    assert restarted.scheduler.did == [("requeue", 30.0, exclude, attempt)]
    assert restarted.logged == [("job.out", "requeued")]


@pytest.mark.parametrize(
    "refusal, urgent, failed, words",
    [
        (NO_ANSWER, False, None, "the requeue was refused (no answer); it broke"),
        (DISABLED, False, None, "requeue is disabled here, and a new job was refused (too many); it broke"),
        (DISABLED, True, None, "requeue is disabled here, and a new job was refused (too many); it broke"),
        (NO_ANSWER, True, None, "it broke"),  # the end of the attempt tries again
        (NO_ANSWER, False, STARTS, "it broke"),  # its files cannot be written
    ],
)
def test_refusal_is_recorded_unless_another_try_follows(run, refusal, urgent, failed, words):
    restarted = Restarted(run, WrittenScheduler())
    restarted.scheduler.refusal = refusal
    assert restarted.restart.now(STEP, None, 1, urgent, failed) is False
    assert read_json(run.attempt(1) / "end.json")["reason"] == words
    assert restarted.logged[0][1].endswith("; submit again")


def test_refusal_before_an_attempt_is_only_logged(run):
    restarted = Restarted(run, WrittenScheduler())
    restarted.scheduler.refusal = NO_ANSWER
    assert restarted.restart.now(STEP, None, 0) is False
    assert read_json(run.attempt(1) / "end.json")["reason"] == "it broke"


# -- later -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before, n, delay, avoid, did",
    [
        (FailedStarts(), 0, None, False, [("note", 1, 0, 69, NODE), ("requeue", 0.0, None, None)]),
        (STARTS, 0, None, False, [("note", 5, 2, 69, NODE), ("requeue", 4 * FAILED_START_DELAY, None, None)]),
        (STARTS, 7, 1800.0, False, [("note", 5, 7, 69, NODE), ("requeue", 1800.0, None, 7)]),
        (STARTS, 0, None, True, [("note", 5, 2, 69, NODE), ("requeue", 4 * FAILED_START_DELAY, [NODE], None)]),
        (FailedStarts(MAX_FAILED_STARTS, 2), 0, None, False, []),
    ],
)
def test_restart_later_counts_the_failed_start_before_the_requeue(run, before, n, delay, avoid, did):
    """After the requeue this process may be killed at once."""
    restarted = Restarted(run, WrittenScheduler(seen=ON_NODES._replace(failed=before)))
    restarted.restart.later(69, n, delay, avoid)
    assert restarted.scheduler.did == did


@pytest.mark.parametrize(
    "state, ending, did",
    [
        ("RUNNING", "", ["note", "requeue"]),
        ("SUSPENDED", "", ["note", "requeue"]),
        ("FAILED", LEFT, ["requeue", "note"]),  # Slurm refuses a comment of a job that ends, until the requeue
        ("TIMEOUT", "TIMEOUT", ["requeue", "note"]),
        ("NODE_FAIL", "NODE_FAIL", ["requeue", "note"]),
        ("PENDING", LEFT, ["note", "requeue"]),  # requeued already: `requeue` leaves it alone
        ("CANCELLED", LEFT, []),
    ],
)
def test_restart_later_by_state_of_the_job(run, state, ending, did):
    restarted = Restarted(run, WrittenScheduler(seen=JobSeen(state, failed=FailedStarts(), ending=ending)))
    restarted.restart.later(69, 0)
    assert [what[0] for what in restarted.scheduler.did] == did


def test_restart_later_waits_for_slurm_as_long_as_a_requeue(run):
    restarted = Restarted(run, WrittenScheduler(seen=ON_NODES._replace(failed=STARTS)))
    restarted.scheduler.answers_in = 9
    restarted.restart.later(69, 0)
    assert restarted.naps == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    assert restarted.scheduler.did[0] == ("note", 5, 2, 69, NODE), "the count is not lost"


def test_restart_later_is_tried_although_slurm_is_silent_for_half_a_day(run, monkeypatch):
    monkeypatch.setattr(slurm_cli, "OUTAGE_SECONDS", 0.0)
    restarted = Restarted(run, WrittenScheduler(seen=JobSeen()))
    restarted.restart.later(69, 0)
    assert [what[0] for what in restarted.scheduler.did] == ["note", "requeue"]


# -- the guard ---------------------------------------------------------------------------------------------------------

CALM = ("RUNNING", "SUSPENDED")


class Guarded:
    """What a guard does that has heard these facts of its owner."""

    def __init__(self, run, state, **heard):
        ending = "" if state in CALM else LEFT
        self.scheduler = WrittenScheduler(seen=JobSeen(state, failed=STARTS, ending=ending))
        self.stand_in = StandIn(run, self.scheduler, print)
        self.heard = heard

    def gone(self):
        """The owner is gone; returns what was done to the job."""
        self.stand_in.on_gone(self.heard)
        return self.scheduler.did


@pytest.mark.parametrize("state", ["RUNNING", "SUSPENDED", "FAILED", "NODE_FAIL", "PREEMPTED", "TIMEOUT"])
def test_guard_requeues_job_with_what_the_owner_has_said(run, state):
    """The owner has decided it, and was killed before or after its request."""
    did = Guarded(run, state, attempt="1", delay="1800.0", exclude="n3,n4").gone()
    assert did == [("requeue", 1800.0, ["n3", "n4"], 1)]
    assert run.hit_time_limit(1) is (state == "TIMEOUT") and os.environ["FLIP_ATTEMPT"] == "1"


def test_guard_requeues_job_at_once_if_nothing_was_decided(run):
    assert Guarded(run, "RUNNING", attempt="1").gone() == [("requeue", 0.0, None, 1)]


@pytest.mark.parametrize("state", [None, "UNSEEN", "PENDING", "CANCELLED", "CANCELLED+"])
def test_guard_leaves_job_that_was_ended_or_requeued(run, state, monkeypatch):
    monkeypatch.setattr(slurm_cli, "OUTAGE_SECONDS", 0.0)
    guarded = Guarded(run, state, attempt="1", delay="0.0", exclude="")
    if state == "CANCELLED+":  # by a user while Slurm preempted it
        guarded.scheduler.seen = JobSeen("PREEMPTED CANCELLED", failed=STARTS, ending=LEFT)
    assert guarded.gone() == []


@pytest.mark.parametrize(
    "state, did", [("RUNNING", ["note", "requeue"]), ("FAILED", ["requeue", "note"]), ("PENDING", [])]
)
def test_owner_killed_before_an_attempt_counts_as_failed_start_of_its_node(run, state, did):
    """As by a host without memory: the next start avoids it."""
    done = Guarded(run, state).gone()
    assert [what[0] for what in done] == did
    for what in done:
        if what[0] == "requeue":
            assert what == ("requeue", 4 * FAILED_START_DELAY, [NODE], None)
        else:
            assert what == ("note", 5, 2, KILLED, NODE)


def test_guard_waits_until_slurm_answers(run, clock):
    guarded = Guarded(run, "RUNNING", attempt="1")
    guarded.scheduler.answers_in = 3
    assert guarded.gone() == [("requeue", 0.0, None, 1)] and clock[1:] == [1002.0, 1003.0, 1005.0, 1009.0]


def test_refused_requeue_of_guard_is_no_error(run):
    """The next process of the job may try it, such as an agent's task."""
    guarded = Guarded(run, "RUNNING", attempt="1")
    guarded.scheduler.refusal = NO_ANSWER
    guarded.gone()
    assert read_json(run.attempt(1) / "end.json")["reason"] == "it broke"


@pytest.mark.parametrize(
    "seen, pause, did",
    [
        (JobSeen(), 1.0, []),
        (ON_NODES, LOOK_SECONDS, []),
        (ON_NODES._replace(seconds_left=30.0), 30.0, []),
        (ON_NODES._replace(seconds_left=-3.0), 1.0, []),
        (ON_NODES._replace(state="SUSPENDED", seconds_left=4000.0), LOOK_SECONDS, []),
        (JobSeen("TIMEOUT", ending="TIMEOUT"), None, [("requeue", 0.0, None, 1)]),
        (JobSeen("NODE_FAIL", ending="NODE_FAIL"), None, [("requeue", 0.0, None, 1)]),
        (JobSeen("CANCELLED", ending=LEFT), None, []),
        (JobSeen("PENDING", ending=LEFT), None, []),
    ],
)
def test_guard_looks_at_job_while_its_owner_hangs(run, seen, pause, did):
    """It restarts the job only when Slurm ends it: until then the owner may go on."""
    guarded = Guarded(run, "RUNNING", attempt="1")
    guarded.scheduler.seen = seen
    assert guarded.stand_in.on_silent({"attempt": "1"}) == pause and guarded.scheduler.did == did


def test_guard_opens_no_file_before_the_requeue(run, monkeypatch):
    """The file system that has stopped its owner would stop it, too."""
    opened = []
    guarded = Guarded(run, "TIMEOUT", attempt="1")
    monkeypatch.setattr(RunDir, "record_time_limit", lambda run, n: opened.append(list(guarded.scheduler.did)))
    guarded.gone()
    assert opened == [[("requeue", 0.0, None, 1)]]
