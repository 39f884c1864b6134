"""Tests of the watcher of a batch script, which restarts the job if its shell is killed or reaches its limit."""

import os
import signal
import subprocess
import sys
import time

import pytest

from flip.runs import attempts
from flip.runs.restart_policy import EndFacts
from flip.runs.rundir import read_json, write_json
from jobs.host import batch_hooks
from tests.harness.common import wait_until


@pytest.mark.long
def test_watcher_requeues_job_at_time_limit_before_kill(stage, tmp_path):
    """Slurm kills the shell at the limit, and the exit trap with it, so only the watcher can requeue the job."""
    limit = "JobState=COMPLETING Reason=TimeLimit Restarts=0 RunTime=00:30:20 TimeLimit=00:30:00"
    running = "JobState=RUNNING Restarts=0 RunTime=00:29:59 TimeLimit=00:30:00"
    stage.commands("srun", f"touch {tmp_path}/up; sleep 60")
    stage.commands(
        "scontrol", f"[ $1 = show ] && {{ [ -e {tmp_path}/up ] && echo '{limit}' || echo '{running}'; }}; exit 0"
    )
    bash = stage.start()
    wait_until(lambda: "scontrol requeue 57_1" in stage.commands.calls() or bash.poll() is not None, "a requeue")
    assert bash.poll() is None
    os.killpg(bash.pid, signal.SIGKILL)
    bash.wait(60)
    calls = [call.split()[1] for call in stage.commands.calls() if call.startswith("scontrol")]
    assert calls == ["show"] * (len(calls) - 1) + ["requeue"], "the watcher does not poll again before it is killed"
    assert stage.run.hit_time_limit(1) and stage.end() is None
    attempts.end_abandoned(stage.run)
    assert (stage.end()["cause"], stage.end()["action"]) == ("timeout", "requeue")


def test_watcher_notices_lowered_time_limit_on_sigterm(stage, tmp_path):
    """The watcher has read a limit of a day and asks Slurm every 15 minutes; Slurm sends TERM when a job ends."""
    (tmp_path / "shown").write_text("JobState=RUNNING Reason=None Restarts=0 RunTime=00:10:00 TimeLimit=1-00:00:00")
    stage.commands("scontrol", f"[ $1 = show ] && cat {tmp_path}/shown; exit 0")
    stage.commands("srun", f"touch {tmp_path}/up; exec sleep 60")
    bash = stage.start()
    command = ["pgrep", "-f", f"batch_hooks.py watch {stage.run.path}"]
    wait_until((tmp_path / "up").exists, "srun")
    wait_until(lambda: "scontrol show job 57_1" in stage.commands.calls(), "the watcher")
    (tmp_path / "ending").write_text(
        "JobState=COMPLETING Reason=TimeLimit Restarts=0 RunTime=00:15:00 TimeLimit=00:15:00"
    )
    (tmp_path / "ending").replace(tmp_path / "shown")  # atomic: the watcher may read the file at this moment
    for pid in subprocess.run(command, capture_output=True, text=True).stdout.split():
        os.kill(int(pid), signal.SIGTERM)
    wait_until(lambda: "scontrol requeue 57_1" in stage.commands.calls(), "a requeue")
    assert stage.run.hit_time_limit(1) and read_json(stage.run.attempt(1) / "wall.json") == {"limit": 900}
    os.killpg(bash.pid, signal.SIGKILL)
    bash.wait(60)
    attempts.end_abandoned(stage.run)
    assert "the wall limit of 15 min passed, and nothing new was kept" in stage.end()["reason"]


@pytest.mark.long
def test_watcher_requeues_job_after_kill_of_batch_shell(stage, tmp_path):
    """The exit trap does not run then. The next start records the end of the attempt."""
    running = "JobState=RUNNING Restarts=0 RunTime=00:00:20 TimeLimit=10:00:00"
    killed = running.replace("RUNNING", "COMPLETING Reason=RaisedSignal:9(Killed)")
    stage.commands("srun", f"touch {tmp_path}/up; sleep 60")
    show = f"[ -e {tmp_path}/killed ] && echo '{killed}' || echo '{running}'"
    stage.commands("scontrol", f"[ $1 = show ] && {{ {show}; }}; exit 0")
    bash = stage.start()
    wait_until((tmp_path / "up").exists, "srun")
    wait_until(lambda: "scontrol show job 57_1" in stage.commands.calls(), "the watcher")
    (tmp_path / "killed").touch()
    bash.kill()
    bash.wait(60)
    wait_until(lambda: "scontrol requeue 57_1" in stage.commands.calls(), "a requeue")
    os.killpg(bash.pid, signal.SIGKILL)  # the ranks
    assert stage.end() is None
    attempts.end_abandoned(stage.run)
    assert (stage.end()["cause"], stage.end()["action"]) == ("node", "requeue")


SLOW = """#!/bin/sh
# The batch script's Python, slow to start one of the hooks: its process id is in the file of that name.
case $3 in {hook}) echo $$ > {folder}/{hook}; sleep {seconds};; esac
exec {python} "$@"
"""


@pytest.mark.long
@pytest.mark.parametrize("hook, seconds", [("begin", 60), ("watch", 1)])
def test_job_of_shell_that_is_killed_during_start_up_is_requeued(stage, tmp_path, hook, seconds):
    """``begin`` has not won an attempt yet, or the watcher's Python has not started: its parent is another process."""
    failed = "JobState=FAILED Reason=RaisedSignal:9(Killed) Restarts=0 RunTime=00:00:02 TimeLimit=10:00:00"
    running = failed.replace("FAILED Reason=RaisedSignal:9(Killed)", "RUNNING")
    stage.commands("srun", "sleep 60")
    stage.commands(
        "scontrol", f"case $2 in job) [ -e {tmp_path}/killed ] && echo '{failed}' || echo '{running}';; esac"
    )
    (tmp_path / "slow").write_text(SLOW.format(hook=hook, folder=tmp_path, seconds=seconds, python=sys.executable))
    (tmp_path / "slow").chmod(0o755)
    stage.script.write_text(stage.script.read_text().replace(f"{sys.executable} -I", f"{tmp_path}/slow -I"))
    bash = stage.start()
    if hook == "begin":
        wait_until(lambda: "scontrol show job 57_1" in stage.commands.calls(), "the watcher")
    wait_until((tmp_path / hook).exists, hook)
    (tmp_path / "killed").touch()
    bash.kill()
    bash.wait(60)
    wait_until(lambda: "scontrol requeue 57_1" in stage.commands.calls(), "a requeue")
    if hook == "begin":  # Slurm changes no comment of a job that has ended
        failure = "scontrol update JobId=57_1 Comment=away:1:0:0:137:n7"
        wait_until(lambda: stage.commands.calls()[-1] == failure, "the comment, after the requeue")
        assert stage.run.newest_attempt() == 0
    os.killpg(bash.pid, signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize("ends", ["complete", "folder"])
def test_watcher_ends_with_script_that_starts_no_attempt(stage, ends):
    """It must not take the end of the shell for a kill."""
    if ends == "complete":
        write_json(stage.run.result, {})
    else:
        text = stage.script.read_text()
        stage.script.write_text(
            text.replace("FLIP_ATTEMPT=$(", "sleep 0.3; FLIP_ATTEMPT=$(mv /nowhere /nowhere2 || exit 2; ")
        )
        stage.commands(
            "scontrol", "case $2 in job) printf 'JobId=58\\n   Comment=away:100:-1:12 \\n';; hostnames) echo $3;; esac"
        )
    assert stage.start().wait(60) == (0 if ends == "complete" else 2)
    time.sleep(batch_hooks.SHELL_EXIT_SECONDS + 0.5)
    assert not subprocess.run(["pgrep", "-f", f"batch_hooks.py watch {stage.run.path}"], capture_output=True).stdout
    assert "scontrol requeue 57_1" not in stage.commands.calls()


@pytest.mark.parametrize(
    "state, what, requeued",
    [
        ("RUNNING", "", True),
        ("FAILED Reason=RaisedSignal:9(Killed)", "", True),
        ("COMPLETING Reason=TimeLimit", "", True),
        ("COMPLETING Reason=None", "", False),  # cancelled
        ("PENDING Reason=BeginTime", "", False),
        ("COMPLETING Reason=SomethingNew", "", False),
        ("RUNNING", "complete", False),
        ("RUNNING", "cancelled", False),
        ("RUNNING", "stop", False),
    ],
)
def test_on_shell_gone_requeues_job_depending_on_job_and_run_state(stage, slept, monkeypatch, state, what, requeued):
    stage.commands("scontrol", f"[ $1 = show ] && echo 'JobState={state} Restarts=0'; exit 0")
    n = stage.run.start_attempt({})
    if what == "stop":
        stage.run.write_cause(n, 0, "config", 78, "a key is unknown")
        attempts.end_attempt(stage.run, n, EndFacts(78, "RUNNING"))
    elif what:
        write_json(stage.run.result if what == "complete" else stage.run.cancel, {})
    monkeypatch.setenv("SLURM_JOB_ID", "58")
    assert batch_hooks.on_shell_gone(batch_hooks.OwnAttempt(stage.run, n)) == 0
    assert ("scontrol requeue 58" in stage.commands.calls()) == requeued
    assert stage.run.hit_time_limit(n) == ("TimeLimit" in state)


def test_watcher_detects_time_limit_while_exit_trap_waits(stage, tmp_path):
    """The trap waits up to ten minutes for storage or Slurm. The job may reach its limit first, which ends the trap."""
    limit = "JobState=COMPLETING Reason=TimeLimit Restarts=0 RunTime=00:30:20 TimeLimit=00:30:00"
    stage.commands("srun", "exit 1")
    stage.commands(
        "scontrol",
        f"""[ $1 = show ] || exit 0
    case $(tr '\\0' ' ' < /proc/$PPID/cmdline) in *batch_hooks.py\\ watch*)
        while [ ! -e {tmp_path}/end ]; do sleep 0.05; done; echo '{limit}';;
    *) touch {tmp_path}/end; exit 1;; esac""",
    )
    bash = stage.start()
    wait_until(lambda: "scontrol requeue 57_1" in stage.commands.calls(), "the watcher's requeue", seconds=120)
    assert stage.end() is None, "the exit trap still waits"
    os.killpg(bash.pid, signal.SIGKILL)
    bash.wait(60)
    assert stage.run.hit_time_limit(1)
