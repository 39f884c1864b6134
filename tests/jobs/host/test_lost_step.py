"""Tests that an srun ends that waits for ranks whose end Slurm did not notice, with real processes."""

import os
import subprocess
import sys

import pytest

from flip.runs.rundir import RunDir, write_json
from jobs.host import lost_step, processes
from jobs.host.lost_step import LostStep
from tests.harness.common import wait_until


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    run.start_attempt({})
    return run


@pytest.fixture
def start(run):
    """``start(name, *options, **environment)`` starts a process of the attempt, which is killed after the test."""
    started = []

    def spawn(name, *options, attempt=1, **environment):
        named = {"FLIP_RUN": str(run.path), "FLIP_ATTEMPT": str(attempt), **environment}
        words = [name, "-c", "import time; time.sleep(60)", *options]
        started.append(subprocess.Popen(words, executable=sys.executable, env={**os.environ, **named}))
        wait_until(lambda: processes.arguments(started[-1].pid)[:1] == [name], "its command line")
        return started[-1]

    yield spawn
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def clock(monkeypatch):
    """A list whose only element is the monotonic time in seconds."""
    now = [1000.0]
    monkeypatch.setattr(lost_step.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("evidence", ["cause", "result", "no rank"])
def test_check_kills_srun_after_its_wait_and_margin(run, start, clock, evidence):
    step = LostStep(run, 1)
    srun = start("srun", "--wait=20")
    other = start("srun", "--wait=20", attempt=2)
    rank = start("python", RANK="0")
    assert step.check() == []
    clock[0] += 10_000
    assert step.check() == [], "the ranks are running"
    if evidence == "cause":
        run.write_cause(1, 1, "crash", 70, "it broke")
    if evidence == "result":
        write_json(run.result, {})
    if evidence == "no rank":
        rank.kill()
        rank.wait()
    assert step.check() == []
    clock[0] += 20 + lost_step.MARGIN_SECONDS - 1
    assert step.check() == [], "srun lets the other ranks run"
    clock[0] += 1
    assert step.check() == [srun.pid] and srun.wait(60) == -9 and other.poll() is None
    assert step.check() == []


def test_check_waits_for_default_of_srun_and_for_ranks_that_have_not_started(run, start, clock):
    step = LostStep(run, 1)
    srun = start("srun")
    assert step.check() == []
    clock[0] += 10_000
    assert step.check() == [], "no rank has run on this host: the others may"
    run.write_cause(1, 0, "stopped", 75, "signal")
    assert step.check() == []
    clock[0] += lost_step.DEFAULT_WAIT + lost_step.MARGIN_SECONDS
    assert step.check() == [srun.pid]


def test_srun_of_one_attempt_is_killed(run, start):
    srun = start("srun")
    others = [start("srun", attempt=2), start("python")]
    assert lost_step.kill_srun(run, 1) == [srun.pid] and srun.wait(60) == -9
    assert [other.poll() for other in others] == [None, None]
