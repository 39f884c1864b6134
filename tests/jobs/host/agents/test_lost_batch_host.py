"""A task whose agent has lost its coordinator restarts the job if the first node is lost, and otherwise ends."""

import os
import socket
import subprocess
import sys
import time

import pytest

from flip.runs import attempts, lifecycle
from flip.runs.rundir import RunDir, write_json
from jobs.host.agents import lost_batch_host

SHOWN = "JobId=57 Requeue=1 Restarts=0 JobState={state} Reason=None NodeList={nodes} BatchHost=n1\n"


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
    write_json(run.path / "job.json", {"token": "t", "after": 0, "folder": str(run.path)})
    run.start_attempt({"resumes_from": 0, "after": 0})
    return run


@pytest.fixture
def slurm(tmp_path, commands):
    """``slurm(nodes, state)`` sets what Slurm shows of the job; ``.calls()``: its commands."""

    def show(nodes, state="RUNNING"):
        shown = tmp_path / "shown"
        shown.write_text(SHOWN.format(nodes=nodes, state=state))
        commands("scontrol", f'[ "$1" != show ] || cat {shown}')

    show.requeues = lambda: [call for call in commands.calls() if call.startswith("scontrol requeue")]
    return show


@pytest.mark.parametrize("node, turn", [("n2", 0.0), ("n3", 60.0), ("n4", 120.0)])
def test_nodes_that_are_left_requeue_job_in_turn(slurm, environ, node, turn):
    """Any of them may be the first with a task: an excluded node has none, and Slurm counts it as one of the job."""
    slurm("n[2-4]")
    waits = []
    assert "has lost its first node: requeued" in lost_batch_host.requeue_if_lost(environ(node), waits.append)
    assert (waits, slurm.requeues()) == ([turn], ["scontrol requeue 57"])


def test_job_that_another_node_has_requeued_is_left_alone(slurm, environ):
    slurm("n[2-3]")
    text = lost_batch_host.requeue_if_lost(environ("n3"), lambda _: slurm("(null)", "PENDING"))
    assert "left alone: it is PENDING" in text and not slurm.requeues()


def test_it_waits_until_slurm_has_noticed(slurm, environ):
    slurm("n[1-3]")
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            slurm("n[2-3]")

    assert "requeued" in lost_batch_host.requeue_if_lost(environ("n2"), sleep)
    assert waits == 3 * [lost_batch_host.POLL_SECONDS] + [0.0]


@pytest.mark.parametrize("reason", ["Slurm does not answer", "Slurm has not noticed that"])
def test_it_waits_for_slurm_as_long_as_the_job_lasts(slurm, environ, commands, run, reason):
    """After a while ``status`` says what the user can do, because some nodes can never ask Slurm."""
    slurm("n[1-3]")
    if reason == "Slurm does not answer":
        commands("scontrol", "exit 1")
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if sum(waits) == 2 * lost_batch_host.PATIENCE_SECONDS:
            assert f"could not restart job 57: {reason}; `scancel 57`" in attempts.last_end(run)["remedy"]
            slurm("n[2-3]")

    assert "requeued" in lost_batch_host.requeue_if_lost(environ("n2"), sleep)
    assert sum(waits) == 2 * lost_batch_host.PATIENCE_SECONDS


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
        lost_batch_host.requeue_if_lost(environ, sleep)


def test_job_that_ends_is_left_alone(slurm, environ):
    slurm("n[1-3]", "CANCELLED")
    assert "it is CANCELLED" in lost_batch_host.requeue_if_lost(environ("n2"))
    assert not slurm.requeues()


def test_task_with_srun_leaves_job_to_exit_trap(slurm, environ):
    slurm("n[2-3]")
    with socket.create_server(("127.0.0.1", 0)) as srun:
        assert "left to its exit trap" in lost_batch_host.requeue_if_lost(environ("n2", srun.getsockname()[1]))
    assert not slurm.requeues()


DISABLED = """case $1 in
  show) cat {shown};;
  requeue) echo 'Requested operation is presently disabled for job 57' >&2; exit 1;;
  write) echo '#!/bin/bash';;
esac"""


#: A task of the job, in which rank_entry.py has set what belongs to its nodes.
TASK = """
import os
from jobs.host.agents import lost_batch_host
os.environ.update(MASTER_ADDR="of-a-lost-node", GLOO_SOCKET_IFNAME="of-a-lost-node")
print(lost_batch_host.requeue_if_lost(os.environ))
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


def test_status_says_what_to_do_if_slurm_cannot_be_asked_on_the_node(run, environ, commands):
    """A container without scontrol. Several nodes record it once."""
    commands("scontrol", "exit 1")
    for node in ("n2", "n3"):
        ask_for(lost_batch_host.PATIENCE_SECONDS, environ(node))
    state = lifecycle.state_of(lifecycle.read_facts(run), lifecycle.Seen(lifecycle.ACTIVE))
    assert state.state == "running"
    assert state.detail == (
        "its first node does not answer, and n2 could not restart job 57: Slurm does not answer; "
        "`scancel 57`, then submit again"
    )
    gone = lifecycle.state_of(lifecycle.read_facts(run), lifecycle.Seen(lifecycle.ABSENT))
    assert gone.state == "stopped" and gone.detail.startswith("the job has lost its first node; ")


def test_job_that_cannot_be_ended_after_its_successor_is_left_to_user(slurm, environ, commands, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NAME", "demo.77aa77aa")
    slurm("n[2-3]")
    commands("scontrol", DISABLED.format(shown=tmp_path / "shown"))
    commands("squeue", "")
    commands("sbatch", "cat > /dev/null; echo 58")
    commands("scancel", "exit 1")
    text = lost_batch_host.requeue_if_lost(environ("n2"), lambda _: None)
    assert "successor 58, which waits for the end of this job" in text and text.endswith("; `scancel 57`")


def test_node_without_network_leaves_running_attempt_alone(run, environ, commands):
    """The coordinator goes on without it: another attempt has started since, or ranks of the same one write."""
    commands("scontrol", "exit 1")

    def start_next():
        if run.newest_attempt() == 1:
            run.start_attempt({"resumes_from": 0, "after": 0})

    patience = lost_batch_host.PATIENCE_SECONDS
    ask_for(patience, environ("n2"), start_next)
    run.status.write_text("{}")
    ask_for(patience, environ("n2"))
    assert not [n for n in (1, 2) if (run.attempt(n) / "end.json").exists()]
    before = time.time() - patience
    os.utime(run.status, (before, before))
    ask_for(patience, environ("n2"))
    assert "could not restart job 57" in attempts.last_end(run)["remedy"]
