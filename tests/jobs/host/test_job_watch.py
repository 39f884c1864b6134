"""Tests of the watch of a job's wall limit, and of a canary, without waiting."""

import pytest

from flip.runs import canary
from flip.runs.rundir import RunDir
from jobs.host import held_jobs, job_watch, own_job, slurm_cli
from jobs.host.job_watch import CANARY_SECONDS, FOREVER, CanaryWatch, LimitWatch
from jobs.host.scheduler import JobSeen, SlurmScheduler
from tests.jobs.host.scontrol_answers import show

HOUR = {"limit": "01:00:00"}
OVER = {"limit": "01:00:00", "ran": "01:00:20"}
ENDING = {**OVER, "state": "COMPLETING", "reason": "TimeLimit"}
GONE = {"gone": True}


class Watched:
    """A watch that has looked at these answers of scontrol in turn, each time as soon as a look was due."""

    def __init__(self, commands, tmp_path, monkeypatch, answers):
        self.now = 1000.0
        monkeypatch.setattr(job_watch.time, "monotonic", lambda: self.now)
        monkeypatch.setenv("SLURM_JOB_ID", "57")
        for i, fields in enumerate(answers):
            (tmp_path / f"answer{i}").write_text("exit 1" if fields.get("gone") else show(**fields))
        (tmp_path / "asked").write_text("")
        commands("scontrol", f"n=$(wc -l < {tmp_path}/asked); echo >> {tmp_path}/asked; . {tmp_path}/answer$n")
        self.ends = []
        self.limits = []
        self.naps = []
        self.watch = LimitWatch(SlurmScheduler(), self.ends.append, self.limits.append)
        for number in range(len(answers)):
            if number:
                self.naps.append(self.watch.due - self.now)
                self.now = self.watch.due
            self.watch.look()


@pytest.fixture
def watched(commands, tmp_path, monkeypatch):
    """``watched(*answers)`` returns (what ended the job, the seconds between the looks, whether it looks again)."""

    def look(*answers):
        seen = Watched(commands, tmp_path, monkeypatch, answers)
        return seen.ends, seen.naps, seen.watch.due < FOREVER

    return look


def test_watch_notices_a_lowered_limit(watched):
    half = {"limit": "00:26:00", "ran": "00:25:10"}
    ending = {"limit": "00:26:00", "ran": "00:26:00", "state": "COMPLETING", "reason": "TimeLimit"}
    assert watched(HOUR, half, ending) == (["TIMEOUT"], [900.0, 50.0], False)
    assert watched(HOUR, GONE, half, ending) == (["TIMEOUT"], [900.0, 60.0, 50.0], False)
    lowered = {"limit": "00:27:00"}
    silence = [GONE] * 3
    # The limit passes during the silence.
    assert watched(lowered, *silence, ending) == (["TIMEOUT"], [900.0, 60.0, 1.0, 1.0], False)


@pytest.mark.parametrize(
    "answers, ends, naps, looks",
    [
        ((HOUR, OVER, ENDING), ["TIMEOUT"], [3000.0, 1.0], False),
        (({"limit": "UNLIMITED"},), [], [], False),
        ((HOUR, {**HOUR, "state": "COMPLETING"}), [], [3000.0], False),
        ((HOUR, {**OVER, "restarts": 1}), [], [3000.0], False),
        ((HOUR, GONE, GONE, ENDING), ["TIMEOUT"], [3000.0, 1.0, 1.0], False),  # KillWait is short
        ((GONE, HOUR, ENDING), ["TIMEOUT"], [60.0, 3000.0], False),
        ((HOUR, {**HOUR, "state": "COMPLETING", "reason": "NodeDown"}), ["NODE_FAIL"], [3000.0], False),
        ((HOUR, {**HOUR, "state": "COMPLETING", "reason": "NodeDown", "restarts": 1}), [], [3000.0], False),
        ((HOUR, {**HOUR, "state": "STOPPED"}, ENDING), ["TIMEOUT"], [3000.0, 3000.0], False),  # scancel -s STOP
        ((HOUR, {**HOUR, "state": "STOPPED"}), [], [3000.0], True),
    ],
)
def test_watch_looks_at_the_limit_and_tells_what_ends_the_job(watched, monkeypatch, answers, ends, naps, looks):
    monkeypatch.setattr(own_job, "LIMIT_POLL_SECONDS", 3600.0)
    assert watched(*answers) == (ends, naps, looks)


def test_watch_ends_with_a_job_that_left_its_nodes_otherwise(watched, monkeypatch):
    monkeypatch.setattr(own_job, "LIMIT_POLL_SECONDS", 3600.0)
    longer = {"limit": "02:00:00", "ran": "01:00:00"}
    assert watched(HOUR, longer, {**longer, "state": "CANCELLED"}) == ([], [3000.0, 3600.0], False)


def test_limit_of_each_answer_is_reported(commands, tmp_path, monkeypatch):
    longer = {"limit": "02:00:00", "ran": "00:20:00"}
    over = {**longer, "ran": "02:00:00", "state": "COMPLETING", "reason": "TimeLimit"}
    assert Watched(commands, tmp_path, monkeypatch, (HOUR, longer, over)).limits == [3600, 7200, 7200]


class Deadlines(SlurmScheduler):
    """Answers nothing, and keeps the deadlines of the queries."""

    def __init__(self):
        self.deadlines = []

    def see(self, deadline=slurm_cli.DEADLINE):
        self.deadlines.append(deadline)
        return JobSeen()


def test_watch_asks_at_once_and_with_a_short_deadline_after_term(monkeypatch):
    """Slurm may be ending the job, and kills this process after KillWait."""
    scheduler = Deadlines()
    now = [1000.0]
    monkeypatch.setattr(job_watch.time, "monotonic", lambda: now[0])
    watch = LimitWatch(scheduler, print, print)
    watch.look()
    watch.look()
    assert scheduler.deadlines == [slurm_cli.DEADLINE] and watch.due == 1060.0
    watch.hurry()
    watch.look()
    assert scheduler.deadlines[1:] == [slurm_cli.SHORT_DEADLINE] and watch.due == 1001.0
    now[0] = 1001.0
    watch.look()
    assert scheduler.deadlines[2:] == [slurm_cli.SHORT_DEADLINE]


@pytest.mark.parametrize("answer", [JobSeen(), JobSeen("RUNNING", limit=3600, seconds_left=3000.0)])
def test_watch_asks_again_at_once_if_term_comes_while_it_waits_for_an_answer(monkeypatch, answer):
    class Slow(Deadlines):
        def see(self, deadline=slurm_cli.DEADLINE):
            if not self.deadlines:
                watch.hurry()
            return super().see(deadline)._replace(**answer._asdict())

    scheduler = Slow()
    monkeypatch.setattr(job_watch.time, "monotonic", lambda: 1000.0)
    watch = LimitWatch(scheduler, print, print)
    watch.look()
    assert watch.due <= 1000.0
    watch.look()
    assert scheduler.deadlines[1:] == [slurm_cli.SHORT_DEADLINE] and watch.due > 1000.0


# -- canaries ----------------------------------------------------------------------------------------------------------

RECORD = {"steps": 50, "releases": ["demo.77aa"]}


@pytest.fixture
def looked(tmp_path, monkeypatch):
    """``looked.at(passed, released)`` looks at a canary when that is due; ``looked.log`` has its errors."""

    class Looked:
        def __init__(self):
            self.now = 1000.0
            self.log = []
            self.asked = []
            self.watch = CanaryWatch(RunDir(tmp_path), self.log.append)

        def at(self, passed=False, released=True):
            def answer(value):
                if isinstance(value, Exception):
                    raise value
                return value

            monkeypatch.setattr(canary, "has_passed", lambda run, record: self.asked.append(record) or answer(passed))
            monkeypatch.setattr(held_jobs, "release_passed", lambda *rest: answer(released))
            self.now = max(self.now, min(self.watch.due, self.now + 3600.0))
            self.watch.look()
            return self.watch.due - self.now

    looked = Looked()
    monkeypatch.setattr(job_watch.time, "monotonic", lambda: looked.now)
    return looked


@pytest.mark.parametrize("record", [{}, {"steps": 50}, {"steps": 50, "releases": []}])
def test_run_that_releases_nothing_is_not_looked_at(looked, record):
    looked.watch.watch(record)
    assert looked.at() == FOREVER and looked.asked == []


def test_canary_is_looked_at_until_the_others_are_released(looked):
    looked.watch.watch(RECORD)
    assert looked.at(passed=False) == CANARY_SECONDS
    assert looked.at(passed=True, released=False) == CANARY_SECONDS
    assert looked.at(passed=True) == FOREVER
    assert looked.asked == [RECORD] * 3, "each time by the record that was checked"


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("damaged"), slurm_cli.SlurmUnavailable])
def test_canary_is_looked_at_again_after_an_error(looked, error):
    problem = error if isinstance(error, Exception) else error("no answer")
    looked.watch.watch(RECORD)
    assert looked.at(passed=problem) == CANARY_SECONDS and looked.log == [problem]
    assert looked.at(passed=True, released=problem) == CANARY_SECONDS
    assert looked.at(passed=True) == FOREVER
