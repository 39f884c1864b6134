"""A task whose agent has lost its coordinator requeues the job if the first node is lost, and otherwise ends."""

import socket

import pytest

from jobs.host.agents import lost_batch_host

SHOWN = "JobId=57 Requeue=1 Restarts=0 JobState={state} Reason=None NodeList={nodes} BatchHost=n1\n"


def environ(node, port=0):
    return {
        "SLURM_JOB_ID": "57", "SLURMD_NODENAME": node, "SLURM_SRUN_COMM_HOST": "127.0.0.1",
        "SLURM_SRUN_COMM_PORT": str(port),
    }  # fmt: skip


@pytest.fixture
def slurm(tmp_path, commands):
    """``slurm(nodes, state)`` sets what Slurm shows of the job; ``.calls()``: its commands."""

    def show(nodes, state="RUNNING"):
        shown = tmp_path / "shown"
        shown.write_text(SHOWN.format(nodes=nodes, state=state))
        commands("scontrol", f'[ "$1" != show ] || cat {shown}')

    show.requeues = lambda: [call for call in commands.calls() if call.startswith("scontrol requeue")]
    return show


def test_first_node_that_is_left_requeues_job(slurm):
    slurm("n[2-3]")
    assert "has lost its first node: n2 requeues it" in lost_batch_host.requeue_if_lost(environ("n3"))
    assert not slurm.requeues()
    assert "has lost its first node: requeued" in lost_batch_host.requeue_if_lost(environ("n2"))
    assert slurm.requeues() == ["scontrol requeue 57"]


def test_it_waits_until_slurm_has_noticed(slurm):
    slurm("n[1-3]")
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            slurm("n[2-3]")

    assert "requeued" in lost_batch_host.requeue_if_lost(environ("n2"), sleep)
    assert len(waits) == 3


def test_job_that_has_lost_no_node_or_ends_is_left_alone(slurm):
    slurm("n[1-3]")
    assert "does not say that its first node is lost" in lost_batch_host.requeue_if_lost(environ("n2"), lambda _: None)
    slurm("n[1-3]", "CANCELLED")
    assert "it is CANCELLED" in lost_batch_host.requeue_if_lost(environ("n2"))
    assert not slurm.requeues()


def test_task_with_srun_leaves_job_to_exit_trap(slurm):
    slurm("n[2-3]")
    with socket.create_server(("127.0.0.1", 0)) as srun:
        assert "left to its exit trap" in lost_batch_host.requeue_if_lost(environ("n2", srun.getsockname()[1]))
    assert not slurm.requeues()
