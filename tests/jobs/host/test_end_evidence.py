"""Tests of the evidence of an end of which srun alone has seen the cause: real exit codes, and srun's own lines."""

import errno
import os
import subprocess
import sys

import pytest

from flip.runs import attempts, checkpoint_folder, wall_limit
from flip.runs.errors import UNSTARTED
from flip.runs.next_step import next_step
from flip.runs.rundir import RunDir
from flip.runs.wall_limit import TimeUsed
from jobs.host.end_evidence import evidence_of_end
from jobs.host.scheduler import RUNNING, JobSeen
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
    """The step after an attempt with this exit code of srun, and these lines of it."""
    (run.logs / "1" / "job.err").write_text(errors)
    return attempts.record_step(run, 1, evidence(run, code))


ON_NODES = JobSeen(RUNNING)


def evidence(run, code, seen=ON_NODES, **known):
    return evidence_of_end(run, 1, code, RUNNING, seen, {}, **known)


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
    step = ended(run, 137, EXITED.format(rank.returncode))
    assert (step.action, step.cause, step.exclude) == ("requeue", "storage", ())
    assert "a rank on n2 could not write to the disk of the run" in step.reason and step.delay == 30.0


def test_node_without_the_mount_is_still_excluded(run, tmp_path):
    own = {"FLIP_RUN": str(tmp_path / "unmounted"), "FLIP_ATTEMPT": "1", "FLIP_SNAPSHOT": str(ROOT)}
    command = [sys.executable, ROOT / "jobs" / "host" / "rank_entry.py", "tests.jobs.runtime.agent_rank"]
    rank = subprocess.run(command, env={**os.environ, **TASK, **own}, capture_output=True, text=True)
    assert rank.returncode == UNSTARTED
    step = ended(run, 137, EXITED.format(rank.returncode))
    assert (step.action, step.cause, step.exclude) == ("requeue", "node", ("n2",))


def test_node_without_slurmd_is_the_end_of_a_node_and_excluded(run):
    step = ended(run, 233, NO_SLURMD)
    assert (step.action, step.cause, step.exclude) == ("requeue", "node", ("n2",))
    assert "n2" in step.reason and "slurmd" in step.reason


@pytest.mark.parametrize("code", [233, 234, 235])
def test_srun_that_reaches_no_slurmd_is_no_crash_even_if_it_names_no_node(run, code):
    step = ended(run, code, "")
    assert (step.action, step.cause, step.exclude) == ("requeue", "node", ())


@pytest.mark.parametrize("number, cause", [(errno.ENOSPC, "storage"), (errno.EDQUOT, "storage"), (errno.EIO, "crash")])
def test_full_disk_that_this_process_met_is_the_cause(run, number, cause):
    """Of an earlier try to record the end. Other errors of files say nothing of the ranks."""
    step = next_step(evidence(run, 70, last_error=OSError(number, os.strerror(number))))
    assert (step.cause, step.action) == (cause, "requeue")


def test_limit_that_was_lowered_since_the_start_is_recorded(run):
    wall_limit.record_limit(run, 1, 86400)
    evidence(run, 75, JobSeen(RUNNING, limit=3600))
    assert wall_limit.recorded_limit(run, 1) == 3600
    evidence(run, 75, JobSeen(RUNNING))
    assert wall_limit.recorded_limit(run, 1) == 3600, "an unknown limit changes nothing"


@pytest.mark.parametrize("progressed, late", [(False, True), (True, False)])
def test_attempt_that_used_its_wall_limit_without_progress_is_late(run, progressed, late):
    run.write_cause(1, 0, "stopped", 75, "signal SIGUSR2", signal="SIGUSR2")
    if progressed:
        folder = checkpoint_folder.folder(run, "pretrain", 8, 1)
        folder.mkdir(parents=True)
        checkpoint_folder.complete_checkpoint(folder, {"stage": "pretrain", "samples": 8, "attempt": 1})
    step = next_step(evidence(run, 75, JobSeen(RUNNING, TimeUsed(86390, 86400, False, False), 86400, 10.0)))
    assert (step.cause == "timeout") is late
