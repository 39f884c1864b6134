"""A task whose agent has lost its coordinator restarts the job if its first node is lost, or if all processes of its
batch script were killed, and otherwise ends."""

import os
import socket
import subprocess
import sys
import time

import pytest

from flip.runs import attempts, lifecycle
from flip.runs.restart_policy import EndFacts
from flip.runs.rundir import RunDir, write_json
from jobs.host import own_job, slurm_cli
from jobs.host.agents import orphaned_task
from tests.harness.job_records import write_job

SHOWN = "JobId=57 Requeue=1 Restarts=0 JobState={state} Reason={reason} NodeList={nodes} BatchHost=n1\n"
KILLED = "RaisedSignal:9(Killed)"
"""Reason of a job that ends because its batch script was killed."""


@pytest.fixture
def environ(run):
    def environ(node, port=0):
        return {
            "SLURM_JOB_ID": "57", "SLURMD_NODENAME": node, "SLURM_SRUN_COMM_HOST": "127.0.0.1",
            "SLURM_SRUN_COMM_PORT": str(port), "SLURM_NODEID": str(int(node[1:]) - 1), "FLIP_RUN": str(run.path),
        }  # fmt: skip

    return environ


@pytest.fixture
def run(tmp_path):
    """A run whose first attempt has lost the first node of its job."""
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    write_job(run)
    run.start_attempt({"resumes_from": 0, "after": 0})
    return run


@pytest.fixture
def slurm(tmp_path, commands):
    """``slurm(nodes, state, reason)`` sets what Slurm shows of the job; ``.requeues()``: what was called."""

    def show(nodes, state="RUNNING", reason="None"):
        shown = tmp_path / "shown"
        shown.write_text(SHOWN.format(nodes=nodes, state=state, reason=reason))
        commands("scontrol", f'[ "$1" != show ] || cat {shown}')

    show.requeues = lambda: [call for call in commands.calls() if call.startswith("scontrol requeue")]
    return show


@pytest.mark.parametrize("node, turn", [("n2", 0.0), ("n3", 60.0), ("n4", 120.0)])
def test_nodes_that_are_left_requeue_job_in_turn(slurm, environ, node, turn):
    """Any of them may be the first with a task: an excluded node has none, and Slurm counts it as one of the job."""
    slurm("n[2-4]")
    waits = []
    assert "has lost its first node: requeued" in orphaned_task.restart_if_orphaned(environ(node), waits.append)
    assert (waits, slurm.requeues()) == ([turn], ["scontrol requeue 57"])


def test_job_that_another_node_has_requeued_is_left_alone(slurm, environ):
    slurm("n[2-3]")
    text = orphaned_task.restart_if_orphaned(environ("n3"), lambda _: slurm("(null)", "PENDING"))
    assert "left alone: it is PENDING" in text and not slurm.requeues()


def test_it_waits_until_slurm_has_noticed(slurm, environ):
    slurm("n[1-3]")
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            slurm("n[2-3]")

    assert "requeued" in orphaned_task.restart_if_orphaned(environ("n2"), sleep)
    assert waits == 3 * [orphaned_task.POLL_SECONDS] + [0.0]


@pytest.mark.parametrize("reason", ["Slurm does not answer", "Slurm has not noticed that"])
def test_it_waits_for_slurm_as_long_as_the_job_lasts(slurm, environ, commands, run, reason):
    """After a while ``status`` says what the user can do, because some nodes can never ask Slurm."""
    slurm("n[1-3]")
    if reason == "Slurm does not answer":
        commands("scontrol", "exit 1")
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if sum(waits) == 2 * orphaned_task.PATIENCE_SECONDS:
            assert f"could not restart job 57: {reason}; `scancel 57`" in attempts.last_end(run)["remedy"]
            slurm("n[2-3]")

    assert "requeued" in orphaned_task.restart_if_orphaned(environ("n2"), sleep)
    assert sum(waits) == 2 * orphaned_task.PATIENCE_SECONDS


class JobEnded(Exception):
    """The task is killed."""


def ask_for(seconds, environ, before=lambda: None):
    """Let a task without Slurm look for so long."""
    waits = []

    def sleep(pause):
        before()
        waits.append(pause)
        if sum(waits) > seconds:
            raise JobEnded()

    with pytest.raises(JobEnded):
        orphaned_task.restart_if_orphaned(environ, sleep)


@pytest.mark.parametrize(
    "state, reason, what",
    [
        ("COMPLETING", "None", "CANCELLED"),
        ("CANCELLED", "None", "CANCELLED"),
        ("PENDING", "BeginTime", "PENDING"),
        ("COMPLETED", "None", "COMPLETED"),
        ("COMPLETING", "ReasonOfAnotherRelease", "UNSEEN"),
    ],
)
def test_job_that_was_cancelled_requeued_or_has_ended_is_left_alone(slurm, environ, state, reason, what):
    slurm("n[1-3]", state, reason)
    assert f"left alone: it is {what}" in orphaned_task.restart_if_orphaned(environ("n1"))
    assert not slurm.requeues()


@pytest.mark.parametrize("node, turns", [("n1", []), ("n2", [2.0]), ("n3", [4.0])])
@pytest.mark.parametrize("reason", [KILLED, "NonZeroExitCode", "OutOfMemory", "NodeDown"])
def test_job_whose_batch_script_was_killed_is_requeued_in_turn(slurm, environ, reason, node, turns):
    """Also by a task on the first node, which lives. Before it Slurm is asked once more."""
    slurm("n[1-3]", "COMPLETING", reason)
    waits = []
    text = orphaned_task.restart_if_orphaned(environ(node), waits.append)
    assert "job 57 has lost its batch script" in text and text.endswith(": requeued")
    assert (waits, slurm.requeues()) == (turns, ["scontrol requeue 57"])


def test_job_that_another_task_has_requeued_in_its_turn_is_left_alone(slurm, environ):
    slurm("n[1-3]", "COMPLETING", KILLED)
    text = orphaned_task.restart_if_orphaned(environ("n2"), lambda _: slurm("n[1-3]", "PENDING"))
    assert "left alone: it is PENDING" in text and not slurm.requeues()


@pytest.mark.parametrize("state, requeues", [("PENDING", 0), ("FAILED", 1)])
def test_requeue_that_a_killed_controller_has_forgotten_is_repeated(slurm, environ, state, requeues):
    """It had accepted the requeue, and was killed before it had saved its state."""
    slurm("n[1-3]", "PENDING")
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        slurm("n[1-3]", state, KILLED)

    text = orphaned_task.restart_if_forgotten(environ("n1"), sleep)
    assert (len(slurm.requeues()), "requeued" in text, waits) == (requeues, bool(requeues), [6.0])


def test_job_that_was_not_requeued_is_not_looked_at_again(slurm, environ):
    slurm("n[1-3]", "CANCELLED")
    waits = []
    assert orphaned_task.restart_if_forgotten(environ("n1"), waits.append) == "" and not waits


def test_term_wakes_task_before_slurm_kills_it(slurm, environ):
    """It has asked Slurm before Slurm had noticed that the batch script is gone."""
    slurm("n[1-3]")
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        slurm("n[1-3]", "COMPLETING", KILLED)
        return True

    assert "requeued" in orphaned_task.restart_if_orphaned(environ("n1"), sleep)
    assert waits == [orphaned_task.POLL_SECONDS]


def test_term_ends_sleep():
    text = "import os, signal, time; from jobs.host.agents.orphaned_task import sleep_until_term as sleep"
    text += "; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); os.kill(os.getpid(), signal.SIGTERM)"
    text += "; print(sleep(60.0), sleep(0.01))"
    done = subprocess.run([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, timeout=50)
    assert done.stdout == "True False\n"


def test_turn_of_a_job_without_its_first_node_ends_with_the_job(slurm, environ):
    """At its wall limit a minute would be too long."""
    slurm("n[2-4]")
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        slurm("n[2-4]", "COMPLETING", "TimeLimit")
        return True

    assert "has lost its batch script (TIMEOUT): requeued" in orphaned_task.restart_if_orphaned(environ("n3"), sleep)
    assert waits == [60.0, 4.0]


def test_slurm_that_does_not_answer_is_asked_every_second_at_first(slurm, environ, commands, monkeypatch):
    """It may kill the task after KillWait."""
    slurm("n[1-3]")
    commands("scontrol", "exit 1")
    deadlines = []
    job_state = own_job.job_state

    def ask(job, restarts, deadline, fields):
        deadlines.append(deadline)
        return job_state(job, restarts, deadline, fields)

    monkeypatch.setattr(own_job, "job_state", ask)
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if sum(waits) > orphaned_task.URGENT_SECONDS + 60.0:
            slurm("n[1-3]", "COMPLETING", KILLED)

    assert "requeued" in orphaned_task.restart_if_orphaned(environ("n1"), sleep)
    assert waits[0] == orphaned_task.URGENT_POLL_SECONDS and waits[-1] == own_job.UNANSWERED_POLL_SECONDS
    assert deadlines[0] == slurm_cli.SHORT_DEADLINE and deadlines[-1] == slurm_cli.DEADLINE


@pytest.mark.parametrize("over", ["complete", "cancelled", "stopped", "stopped without this node"])
def test_run_that_is_over_is_left_alone(slurm, environ, run, over):
    """A job that has ended shows the same state if its owner has stopped the run."""
    slurm("n[1-3]", "COMPLETING", "NonZeroExitCode")
    if over == "complete":
        run.result.write_text("{}")
    elif over == "cancelled":
        write_json(run.cancel, {"who": "ann", "why": "test", "time": 0})
    else:
        if over == "stopped without this node":
            attempts.end_attempt(run, 1, EndFacts(68, "RUNNING"))
            run.start_attempt({"resumes_from": 0, "after": 0})
        attempts.end_attempt(run, run.newest_attempt(), EndFacts(78, "RUNNING"))
    assert "left alone: it is FAILED" in orphaned_task.restart_if_orphaned(environ("n1"))
    assert not slurm.requeues()


def test_restart_that_was_recorded_is_made_up_for_with_its_delay(slurm, environ, run):
    """The coordinator was killed before the next attempt."""
    slurm("n[1-3]", "COMPLETING", KILLED)
    attempts.end_attempt(run, 1, EndFacts(69, "RUNNING"))
    text = orphaned_task.restart_if_orphaned(environ("n1"))
    assert text.endswith(": requeued StartTime=now+30") and len(slurm.requeues()) == 1


def test_job_whose_run_cannot_be_read_is_restarted(slurm, environ, run, monkeypatch, capsys):
    """The next start looks whether the run is over."""
    slurm("n[1-3]", "COMPLETING", KILLED)

    def away(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(orphaned_task, "exists", away)
    assert "requeued" in orphaned_task.restart_if_orphaned(environ("n1"))
    assert "Input/output error" in capsys.readouterr().err


def test_wall_limit_is_recorded_after_the_restart(slurm, environ, run, commands):
    slurm("n[1-3]", "COMPLETING", "TimeLimit")
    assert "requeued" in orphaned_task.restart_if_orphaned(environ("n1"))
    assert run.hit_time_limit(1) and len(slurm.requeues()) == 1


def test_status_says_why_a_task_could_not_restart_the_job(slurm, environ, run, commands, naps, monkeypatch):
    slurm("n[1-3]", "COMPLETING", KILLED)
    commands("scontrol", f"case $1 in show) cat {run.path.parents[1] / 'shown'};; *) exit 1;; esac")
    monkeypatch.setattr(slurm_cli, "RETRY_SECONDS", 0.0)
    text = orphaned_task.restart_if_orphaned(environ("n1"))
    assert text.endswith("; submit again")
    state = lifecycle.state_of(lifecycle.read_run_facts(run), lifecycle.SchedulerView(lifecycle.ABSENT))
    assert state.state == "stopped"
    assert "its job has lost its batch script (FAILED), and n1 could not restart it: scontrol: exit" in state.reason


def test_wait_goes_on_if_files_of_the_run_are_away(slurm, environ, commands, monkeypatch):
    slurm("n[1-3]")

    def away(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(attempts, "record_failed_restart", away)
    ask_for(2 * orphaned_task.PATIENCE_SECONDS, environ("n2"))


def test_task_with_srun_leaves_job_to_exit_trap(slurm, environ):
    slurm("n[2-3]")
    with socket.create_server(("127.0.0.1", 0)) as srun:
        assert "left to its owner" in orphaned_task.restart_if_orphaned(environ("n2", srun.getsockname()[1]))
    assert not slurm.requeues()


@pytest.mark.parametrize(
    "reason, is_restarted", [(KILLED, True), ("OutOfMemory", True), ("TimeLimit", False), ("None", False)]
)
def test_srun_may_outlive_its_batch_shell(slurm, environ, reason, is_restarted):
    """Slurm ends the job because the batch script has ended, or for another reason: then its owner decides."""
    slurm("n[1-3]", "COMPLETING", reason)
    with socket.create_server(("127.0.0.1", 0)) as srun:
        for act in (orphaned_task.restart_if_orphaned, orphaned_task.restart_if_ending):
            text = act(environ("n1", srun.getsockname()[1]))
            assert text.endswith(": requeued") if is_restarted else "left to its owner" in text
    assert len(slurm.requeues()) == 2 * is_restarted


def test_task_acts_while_ranks_save_only_if_slurm_ends_the_job(slurm, environ, commands):
    slurm("n[1-3]")
    assert orphaned_task.restart_if_ending(environ("n1")) == ""
    slurm("n[2-3]")
    assert orphaned_task.restart_if_ending(environ("n2")) == "", "its ranks have time"
    commands("scontrol", "exit 1")
    assert orphaned_task.restart_if_ending(environ("n1")) == ""
    slurm("n[1-3]", "COMPLETING", "None")
    assert "left alone: it is CANCELLED" in orphaned_task.restart_if_ending(environ("n1"))
    assert not slurm.requeues()
    slurm("n[1-3]", "COMPLETING", KILLED)
    waits = []
    assert orphaned_task.restart_if_ending(environ("n2"), waits.append).endswith(": requeued")
    assert (waits, len(slurm.requeues())) == ([2.0], 1)


DISABLED = """case $1 in
  show) cat {shown};;
  requeue) echo 'Requested operation is presently disabled for job 57' >&2; exit 1;;
  write) echo '#!/bin/bash';;
esac"""


#: A task of the job, in which rank_entry.py has set what belongs to its nodes.
TASK = """
import os
from jobs.host.agents import orphaned_task
os.environ.update(MASTER_ADDR="of-a-lost-node", GLOO_SOCKET_IFNAME="of-a-lost-node")
print(orphaned_task.restart_if_orphaned(os.environ))
"""


def test_job_that_slurm_does_not_requeue_gets_a_successor_and_ends(slurm, environ, commands, tmp_path):
    """Without its end, which nothing else brings, the successor would wait until the wall limit."""
    slurm("n[2-3]")
    commands("scontrol", DISABLED.format(shown=tmp_path / "shown"))
    commands("squeue", "")
    commands("sbatch", f"env > {tmp_path}/environ; cat > /dev/null; echo 58")
    commands("scancel", "")
    own = {"SLURM_JOB_NAME": "demo.77aa77aa", "GLOO_SOCKET_IFNAME": "of-the-profile", "FLIP_AGENTS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TASK], env={**os.environ, **environ("n2"), **own}, stdout=subprocess.PIPE, check=True
    )
    assert b"submitted its successor 58" in done.stdout
    assert [call.split()[0] for call in commands.calls()[-2:]] == ["sbatch", "scancel"]
    names = dict(line.split("=", 1) for line in (tmp_path / "environ").read_text().splitlines() if "=" in line)
    assert (names["FLIP_FOLLOWS"], names["GLOO_SOCKET_IFNAME"]) == ("1", "of-the-profile")
    assert not {"MASTER_ADDR", "FLIP_RUN", "FLIP_AGENTS", "SLURM_JOB_ID"} & names.keys()


def test_job_that_slurm_has_ended_gets_a_successor_without_a_cancel(slurm, environ, commands, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NAME", "demo.77aa77aa")
    slurm("n[1-3]", "COMPLETING", KILLED)
    commands("scontrol", DISABLED.format(shown=tmp_path / "shown"))
    commands("squeue", "")
    commands("sbatch", "cat > /dev/null; echo 58")
    commands("scancel", "")
    assert "submitted its successor 58" in orphaned_task.restart_if_orphaned(environ("n1"))
    assert not [call for call in commands.calls() if call.startswith("scancel")]


def test_status_says_what_to_do_if_slurm_cannot_be_asked_on_the_node(run, environ, commands):
    """A container without scontrol. Several nodes record it once."""
    commands("scontrol", "exit 1")
    for node in ("n2", "n3"):
        ask_for(orphaned_task.PATIENCE_SECONDS, environ(node))
    state = lifecycle.state_of(lifecycle.read_run_facts(run), lifecycle.SchedulerView(lifecycle.ACTIVE))
    assert state.state == "running"
    assert state.reason.startswith("its first node does not answer, and n2 could not restart job 57: ")
    assert state.reason.endswith(": Slurm does not answer; `scancel 57`, then submit again")
    gone = lifecycle.state_of(lifecycle.read_run_facts(run), lifecycle.SchedulerView(lifecycle.ABSENT))
    assert gone.state == "stopped" and gone.reason.startswith("the job has lost its first node; ")


def test_job_that_cannot_be_ended_after_its_successor_is_left_to_user(slurm, environ, commands, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NAME", "demo.77aa77aa")
    slurm("n[2-3]")
    commands("scontrol", DISABLED.format(shown=tmp_path / "shown"))
    commands("squeue", "")
    commands("sbatch", "cat > /dev/null; echo 58")
    commands("scancel", "exit 1")
    text = orphaned_task.restart_if_orphaned(environ("n2"), lambda _: None)
    assert "successor 58, which waits for the end of this job" in text and text.endswith("; `scancel 57`")


def test_node_without_network_leaves_running_attempt_alone(run, environ, commands):
    """The coordinator goes on without it: another attempt has started since, or ranks of the same one write."""
    commands("scontrol", "exit 1")

    def start_next():
        if run.newest_attempt() == 1:
            run.start_attempt({"resumes_from": 0, "after": 0})

    patience = orphaned_task.PATIENCE_SECONDS
    ask_for(patience, environ("n2"), start_next)
    run.status.write_text("{}")
    ask_for(patience, environ("n2"))
    assert not [n for n in (1, 2) if (run.attempt(n) / "end.json").exists()]
    before = time.time() - patience
    os.utime(run.status, (before, before))
    ask_for(patience, environ("n2"))
    assert "could not restart job 57" in attempts.last_end(run)["remedy"]
