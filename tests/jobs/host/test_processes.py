"""Tests that the next start removes leftovers of earlier attempts, with real processes found in /proc."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flip.runs.rundir import RunDir
from jobs.host import processes

ROOT = Path(__file__).resolve().parents[3]
JOB = {"SLURM_JOB_ID": "58", "SLURM_JOB_NAME": "demo.77aa", "SLURM_CLUSTER_NAME": "lab"}


@pytest.fixture
def start():
    """``start(*argv, **environment)`` starts a process, which is killed after the test."""
    started = []

    def spawn(*argv, **environment):
        process = subprocess.Popen([str(arg) for arg in argv], env={**os.environ, **JOB, **environment})
        started.append(process)
        while not processes.arguments(process.pid):  # for an instant after exec they are empty
            time.sleep(0.001)
        return process

    yield spawn
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    run.start_attempt({})
    return run


def owner_of(start, path, **environment):
    """Start a process that looks as the owner of a job of the run at ``path``."""
    program = path.parent / "jobs" / "host" / "job.py"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text("import time; time.sleep(60)")
    return start(sys.executable, "-I", program, path, FLIP_RUN=str(path), **environment)


def test_kill_orphans_kills_owners_of_earlier_attempts_of_same_run(start, run, tmp_path):
    """Their environment may name an attempt."""
    other = RunDir(tmp_path / "sweep" / "other")
    old, new = (owner_of(start, run.path, FLIP_ATTEMPT=n) for n in ("1", "2"))
    peer = owner_of(start, other.path, FLIP_ATTEMPT="1")
    assert processes.kill_orphans(str(run.path), 2, "90", 0) == [old.pid]
    assert old.wait(60) == -9 and new.poll() is None and peer.poll() is None


def test_kill_orphans_kills_batch_shell_of_earlier_start_of_same_job(start, run, tmp_path, monkeypatch):
    script = tmp_path / "job00058" / "slurm_script"
    script.parent.mkdir()
    script.write_text(f"touch {tmp_path}/up.$1\nwhile :; do sleep 0.1; done\n")
    old = start("bash", script, "old")
    same = start("bash", script, "same", SLURM_RESTART_COUNT="1")
    other_jobs = [start("bash", script, name, **{name: "59"}) for name in JOB]
    while len(list(tmp_path.glob("up.*"))) < 5:
        time.sleep(0.01)
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    assert processes.kill_orphans(str(run.path), 2, "58", 1) == [old.pid]
    assert old.wait(60) == -9 and [process.poll() for process in (same, *other_jobs)] == [None] * 4


def test_kill_orphans_kills_srun_of_earlier_attempt(start, run, tmp_path):
    """The daemon of its step was killed: srun then waits for ever. It consists of two processes."""
    shutil.copy(shutil.which("sleep"), tmp_path / "srun")
    sruns = [
        start(tmp_path / "srun", "60", FLIP_RUN=str(path), FLIP_ATTEMPT=str(n))
        for path, n in ((run.path, 1), (run.path, 1), (run.path, 2), (tmp_path, 1))
    ]
    assert sorted(processes.kill_orphans(str(run.path), 2, "58", 1)) == sorted(srun.pid for srun in sruns[:2])
    assert [srun.wait(60) for srun in sruns[:2]] == [-9, -9] and [srun.poll() for srun in sruns[2:]] == [None, None]


def test_kill_orphans_kills_owner_of_earlier_start_without_attempt(start, run):
    """The batch script became it before it has won an attempt; that of the present start lives on."""
    old, own = (owner_of(start, run.path, SLURM_RESTART_COUNT=count) for count in ("0", "1"))
    assert processes.kill_orphans(str(run.path), 2, "58", 1) == [old.pid]
    assert old.wait(60) == -9 and own.poll() is None


@pytest.mark.parametrize("word", ["job.py", "/elsewhere/host/job.py", "/code/jobs/host/job.py.bak"])
def test_kill_orphans_leaves_programs_that_are_no_owner(start, run, word):
    process = start("sleep", "60", FLIP_RUN=str(run.path), FLIP_ATTEMPT="1")
    other = start("bash", "-c", "while :; do sleep 0.1; done", word, FLIP_RUN=str(run.path), FLIP_ATTEMPT="1")
    assert processes.kill_orphans(str(run.path), 2, "58", 1) == []
    assert process.poll() is None and other.poll() is None
