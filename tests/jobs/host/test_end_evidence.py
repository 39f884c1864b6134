"""Tests of what follows from an end of which srun alone has seen the cause: real exit codes, and srun's own lines."""

import os
import subprocess
import sys

import pytest

from flip.runs import attempts
from flip.runs.rundir import RunDir
from jobs.host import attempt_end, rank_entry
from tests.jobs.host.agents.task import ROOT, TASK

EXITED = "srun: error: n2: task 1: Exited with exit code {}\n"
NO_SLURMD = """\
srun: error: Task launch for StepId=6.0 failed on node n2: Communication connection failure
srun: error: Application launch failed: Communication connection failure
srun: Job step aborted
"""  # of Slurm 24.11.5, after SIGKILL to slurmd and the processes of n2: exit code 233


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose attempt 1 was on nodes n1 and n2."""
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    attempts.start_attempt(run, {})
    run.open_logs(1)
    return run


def ended(run, code, errors):
    """The decision after an attempt with this exit code of srun, and these lines of it."""
    (run.logs / "1" / "job.err").write_text(errors)
    return attempt_end.record_end(run, 1, code, "RUNNING", {})


def fill_inodes(folder):
    """Let no file be created on a file system of its own."""
    subprocess.run(["mount", "-o", "remount,nr_inodes=20", folder], check=True)
    for number in range(20):
        try:
            (folder / f"filler{number}").touch()
        except OSError:
            return


def test_full_shared_disk_that_one_node_notices_is_no_fault_of_that_node(run, small_disk):
    """The rank of n2 cannot open its log. The one of n1, which waits for it, is killed."""
    away = RunDir(small_disk / "run")
    (away.logs / "1").mkdir(parents=True)
    fill_inodes(small_disk)
    own = {"FLIP_RUN": str(away.path), "FLIP_ATTEMPT": "1", "FLIP_SNAPSHOT": str(ROOT)}
    command = [sys.executable, ROOT / "jobs" / "host" / "rank_entry.py", "tests.jobs.runtime.agent_rank"]
    rank = subprocess.run(command, env={**os.environ, **TASK, **own}, capture_output=True, text=True)
    assert "No space left on device" in rank.stderr
    decision = ended(run, 137, EXITED.format(rank.returncode))
    assert (decision.action, decision.cause, decision.exclude) == ("requeue", "storage", ())
    assert "a rank on n2 could not write to the disk of the run" in decision.reason and decision.delay == 30.0


def test_node_without_the_mount_is_still_excluded(run, tmp_path):
    own = {"FLIP_RUN": str(tmp_path / "unmounted"), "FLIP_ATTEMPT": "1", "FLIP_SNAPSHOT": str(ROOT)}
    command = [sys.executable, ROOT / "jobs" / "host" / "rank_entry.py", "tests.jobs.runtime.agent_rank"]
    rank = subprocess.run(command, env={**os.environ, **TASK, **own}, capture_output=True, text=True)
    assert rank.returncode == rank_entry.UNSTARTED
    decision = ended(run, 137, EXITED.format(rank.returncode))
    assert (decision.action, decision.cause, decision.exclude) == ("requeue", "node", ("n2",))


def test_node_without_slurmd_is_the_end_of_a_node_and_excluded(run):
    decision = ended(run, 233, NO_SLURMD)
    assert (decision.action, decision.cause, decision.exclude) == ("requeue", "node", ("n2",))
    assert "n2" in decision.reason and "slurmd" in decision.reason


@pytest.mark.parametrize("code", [233, 234, 235])
def test_srun_that_reaches_no_slurmd_is_no_crash_even_if_it_names_no_node(run, code):
    decision = ended(run, code, "")
    assert (decision.action, decision.cause, decision.exclude) == ("requeue", "node", ())
