"""Tests of a step of ranks, and that an srun ends that waits for ranks whose end Slurm did not notice, with real
processes."""

import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from flip.runs.rundir import RunDir, write_json
from jobs.host import processes, rank_step
from jobs.host.rank_step import LOOK_SECONDS, MARGIN_SECONDS, RankStep, exit_code
from tests.harness.common import wait_until

PEER_SECONDS = 20.0


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    run.start_attempt({})
    return run


@pytest.fixture
def start(run):
    """``start(name, **environment)`` starts a process of the attempt, which is killed after the test."""
    started = []

    def spawn(name, attempt=1, **environment):
        named = {"FLIP_RUN": str(run.path), "FLIP_ATTEMPT": str(attempt), **environment}
        words = [name, "-c", "import time; time.sleep(60)"]
        started.append(subprocess.Popen(words, executable=sys.executable, env={**os.environ, **named}))
        wait_until(lambda: processes.arguments(started[-1].pid)[:1] == [name], "its command line")
        return started[-1]

    yield spawn
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def later(monkeypatch):
    """``later(seconds)`` lets time pass."""
    now = [1000.0]
    monkeypatch.setattr(rank_step.time, "monotonic", lambda: now[0])

    def pass_time(seconds):
        now[0] += seconds

    return pass_time


def step_of(run, srun, log=print):
    return RankStep(run, 1, srun, PEER_SECONDS, log)


@pytest.mark.parametrize("evidence", ["cause", "result", "no rank"])
def test_srun_is_killed_after_its_wait_and_margin(run, start, later, evidence):
    srun = start("srun")
    rank = start("python", RANK="0")
    start("python", attempt=2, RANK="0")  # says nothing of attempt 1
    logged = []
    step = step_of(run, srun, logged.append)
    later(10_000)
    step.poll(0)
    later(10_000)
    step.poll(0)
    assert step.code() is None and srun.poll() is None, "the ranks are running"
    if evidence == "cause":
        run.write_cause(1, 1, "crash", 70, "it broke")
    if evidence == "result":
        write_json(run.result, {})
    if evidence == "no rank":
        rank.kill()
        rank.wait()
    later(LOOK_SECONDS)
    step.poll(0)
    later(PEER_SECONDS + MARGIN_SECONDS - 1)
    step.poll(0)
    assert srun.poll() is None, "srun lets the other ranks run"
    later(LOOK_SECONDS)
    step.poll(0)
    assert srun.wait(60) == -9 and step.code() == 137
    assert logged == ["srun was killed: its ranks have ended, and Slurm did not notice"]


def test_srun_waits_for_ranks_that_have_not_started_on_this_host(run, start, later):
    """Ranks of other hosts may run."""
    srun = start("srun")
    step = step_of(run, srun)
    for _ in range(3):
        later(10_000)
        step.poll(0)
    assert srun.poll() is None
    run.write_cause(1, 0, "stopped", 75, "signal")
    for _ in range(2):
        later(10_000)
        step.poll(0)
    assert srun.wait(60) == -9


def test_srun_is_not_killed_while_files_are_away(run, start, later):
    """Whether a rank has left its cause is not known."""
    srun = start("srun")
    step = step_of(run, srun)
    run.write_cause(1, 0, "crash", 70, "it broke")
    later(LOOK_SECONDS)
    step.poll(0)
    shutil.move(run.path, run.path.with_name("away"))
    later(10_000)
    step.poll(0)
    shutil.move(run.path.with_name("away"), run.path)
    later(LOOK_SECONDS)
    step.poll(0)
    assert srun.poll() is None, "the time counts from the last sight"
    later(10_000)
    step.poll(0)
    assert srun.wait(60) == -9


def test_poll_waits_for_the_time_or_for_the_end_of_the_step(run, start):
    srun = start("srun")
    step = step_of(run, srun)
    begun = time.monotonic()
    step.poll(0.2)
    assert 0.2 <= time.monotonic() - begun < 30 and step.code() is None
    threading.Timer(0.2, srun.kill).start()
    begun = time.monotonic()
    step.poll(60)
    assert time.monotonic() - begun < 30 and step.code() == 137


@pytest.mark.parametrize("code, shown", [(None, None), (0, 0), (75, 75), (-9, 137), (-15, 143)])
def test_exit_code_is_that_of_a_shell(code, shown):
    assert exit_code(code) == shown
