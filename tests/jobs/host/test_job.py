"""Tests of the owner of a job with real node agents and ranks; only the scheduler is a stand-in.

test_job_begin.py has what an owner does without agents, agents/test_kill_at_every_state.py kills its processes.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from flip.runs import attempts, node_address
from flip.runs.errors import CAUSES, NODE_LOST
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.host import job as job_module
from jobs.host import job_processes, rank_entry, scheduler, slurm_cli
from jobs.host.agents import node_pool
from jobs.host.agents.channel import CONTACT, NO_AGENTS
from jobs.host.job import JobOptions, Owner
from jobs.host.job_nodes import JobNodes
from jobs.host.scheduler import LEFT, JobSeen, SlurmScheduler
from tests.harness.common import ROOT, wait_until
from tests.harness.job_records import write_job
from tests.jobs.host.agent_job import ON_NODES, AgentJob, Guard, children, finish
from tests.jobs.host.scontrol_answers import show

pytestmark = pytest.mark.long

NEAR_END = ON_NODES._replace(limit=1680, seconds_left=1080.0)
"""Half of the nodes are worth less than a requeue."""


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    return run


@pytest.fixture
def make_job(run, monkeypatch):
    """Start a job on one node with two ranks, or on more with a rank each."""
    timings = node_pool.TIMINGS._replace(killed_grace=0.3)
    monkeypatch.setattr(node_pool, "TIMINGS", timings)
    monkeypatch.setattr(job_processes, "STEP_EXIT_SECONDS", 0.5)
    for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLIP_ATTEMPT", "1")  # the owner sets it: restored at the end
    monkeypatch.setenv("SLURM_JOB_ID", "57")
    jobs = []

    def make(nodes=1, usable=None, gpus=0, start=True, **fields):
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", str(nodes))
        monkeypatch.setenv("SLURM_NTASKS", str(max(2, nodes)))
        record = {}
        if nodes > 1:  # a killed agent of a lost node does not come back
            monkeypatch.setattr(node_pool, "TIMINGS", timings._replace(patience=2.0))
            record = {"usable": usable or [nodes], "shape": {"processes": 1, "gpus": gpus}}
        jobs.append(AgentJob(run, nodes, record, **fields))
        if nodes > 1:
            jobs[-1].scheduler.seen = NEAR_END
        return jobs[-1].start() if start else jobs[-1]

    yield make
    for job in jobs:
        job.close()


# -- the next attempt in the job, or after a requeue -------------------------------------------------------------------


def test_first_failure_restarts_in_job_and_second_is_requeued(make_job):
    job = make_job()
    agent = job.ranks(1)[0]["parent"]
    job.kill(1)
    assert job.ranks(2)[0]["parent"] == agent and job.ends() == ["crash", None]
    record = read_json(job.run.attempt(2) / "start.json")
    assert (record["job"], record["world"]) == ("57", "2") and job.owner.guard.facts["attempt"] == 2
    job.until((job.run.attempt(2) / "wall.json").exists)
    assert read_json(job.run.attempt(2) / "wall.json") == {"limit": 86400}
    assert job.scheduler.requeues == []
    job.kill(2)
    assert job.end() == 137 and job.ends() == ["crash", "crash"]
    (requeue,) = job.scheduler.requeues
    assert (requeue["attempt"], requeue["delay"], requeue["urgent"]) == (2, 0.0, False)
    assert requeue["living"], "it comes before the agents leave"
    assert job.run.newest_attempt() == 2 and job.owner.guard.facts["over"] == 1


def test_each_decision_is_a_line_of_the_log(make_job):
    job = make_job()
    job.kill(1)
    job.kill(2)
    job.end()
    lines = [line for n in (1, 2) for line in job.log(n, "job.out").splitlines() if line.startswith("{")]
    steps = [json.loads(line) for line in lines]
    assert [(step["do"], step["cause"], step["nodes"]) for step in steps] == [
        ("here", "crash", 1),
        ("requeue", "crash", 0),
    ]
    assert "crash: in this allocation" in job.log(1) and "failure 2 without a new checkpoint" in lines[1]


@pytest.mark.parametrize("code", [0, 69])
def test_srun_that_outlives_all_agents_is_killed_and_job_ends_with_their_code(make_job, code):
    """It waits for the task of a lost node."""
    job = make_job(lives=True)
    job.ranks(1)
    job.scheduler.seen = ON_NODES._replace(seconds_left=60.0)
    if code == 0:
        write_json(job.run.result, {})
    finish(job.run, code)
    assert job.end() == code and job.owner.processes.step.killed
    assert job.tasks[0].wait(60) == code
    assert "srun was killed: all node agents have left" in job.log()
    assert len(job.scheduler.requeues) == int(code != 0)


def test_killed_agent_counts_as_lost_node_and_run_goes_on(make_job):
    job = make_job()
    os.kill(job.ranks(1)[0]["parent"], signal.SIGKILL)
    job.ranks(2)
    assert job.ends() == ["node", None] and job.tasks[0].poll() is None


def test_node_with_broken_hardware_is_left_by_requeue(make_job):
    job = make_job()
    job.ranks(1)
    job.run.write_cause(1, 1, "crash", 70, "CUDA error: uncorrectable ECC error encountered", host="n7")
    job.kill(1)
    assert job.end() == 137 and job.ends() == ["crash"]
    assert [requeue["exclude"] for requeue in job.scheduler.requeues] == [("n7",)]


@pytest.mark.parametrize(
    "seen, cause, requeues",
    [
        (JobSeen("CANCELLED", ending=LEFT), "cancelled", 0),
        (JobSeen("PENDING", ending=LEFT), "stopped", 0),
        (JobSeen("NODE_FAIL", ending="NODE_FAIL"), "node", 1),
        (JobSeen(), "crash", 1),
    ],
)
def test_no_attempt_starts_in_a_job_that_slurm_ends_or_does_not_show(make_job, monkeypatch, seen, cause, requeues):
    monkeypatch.setattr(slurm_cli, "RETRY_SECONDS", 0.0)
    job = make_job()
    job.ranks(1)
    job.scheduler.seen = seen
    job.kill(1)
    assert job.end() == 137 and job.ends() == [cause] and len(job.scheduler.requeues) == requeues


def test_short_outage_of_slurm_does_not_prevent_restart_in_job(make_job):
    job = make_job()
    job.ranks(1)
    job.scheduler.answers = [JobSeen()]
    job.kill(1)
    job.ranks(2)
    assert job.ends() == ["crash", None] and job.scheduler.answers == []


@pytest.mark.parametrize("state, wins", [("RUNNING", 2), ("NODE_FAIL", 1)])
def test_no_attempt_starts_in_a_job_that_ended_during_a_wait(make_job, monkeypatch, state, wins):
    """A successor that was submitted meanwhile would find that attempt, and do nothing."""
    monkeypatch.setattr(job_module, "STATE_SECONDS", -1.0)
    job = make_job()
    job.ranks(1)
    job.scheduler.answers = [ON_NODES, ON_NODES._replace(state=state)]
    job.kill(1)
    job.until(lambda: job.run.newest_attempt() == 2 or job.scheduler.requeues)
    assert job.run.newest_attempt() == wins and len(job.scheduler.requeues) == 2 - wins


def test_attempt_of_another_process_is_not_followed(make_job):
    """Two owners, as after a partition of the network: the attempt that started last is the only one."""
    job = make_job()
    job.ranks(1)
    assert job.run.start_attempt({"job": "58"}) == 2
    job.kill(1)
    assert job.end() == 137 and job.run.newest_attempt() == 2
    assert job.ends()[1] is None and job.scheduler.requeues == []


def test_storage_is_awaited_in_the_job_for_two_minutes_and_in_the_queue_for_longer(make_job):
    """All ranks of each attempt end with 69."""
    job = make_job(start=False)
    finish(job.run, 69)
    job.start()
    assert job.end() == 69 and job.ends() == ["storage"] * 4
    assert job.owner.pauses == [30.0, 60.0, 120.0]
    assert [requeue["delay"] for requeue in job.scheduler.requeues] == [240.0]
    assert len(job.steps) == 1, "all attempts have the same agents"


def test_run_that_is_cancelled_between_two_attempts_stops(make_job):
    job = make_job(start=False)
    finish(job.run, 69)
    cancel = {"who": "tester", "why": "test", "time": time.time()}
    job.owner.meanwhile = lambda: write_json(job.run.cancel, cancel)
    job.start()
    assert job.end() == 69 and job.ends() == ["cancelled"] and job.scheduler.requeues == []
    end = job.record_of_end(1)
    assert end["action"] == "stop" and "before: " in end["reason"] and job.run.newest_attempt() == 1


def test_suspended_job_goes_on_here(make_job):
    """A process of a suspended job that runs is about to be resumed."""
    job = make_job()
    job.ranks(1)
    job.scheduler.seen = ON_NODES._replace(state="SUSPENDED")
    job.kill(1)
    job.ranks(2)
    assert job.record_of_end(1)["state"] == "RUNNING"


@pytest.mark.parametrize("state, cause", [("SUSPENDED", "complete"), ("RUNNING", "node")])
def test_silent_agents_of_a_suspended_job_are_not_lost(make_job, monkeypatch, state, cause):
    monkeypatch.setattr(node_pool, "TIMINGS", node_pool.TIMINGS._replace(silence=1.5, killed_grace=0.3))
    monkeypatch.setattr(node_pool, "RETURN_SECONDS", 1.0)
    job = make_job()
    agent = job.ranks(1)[0]["parent"]
    job.scheduler.seen = ON_NODES._replace(state=state, seconds_left=60.0)
    looks = job.scheduler.looks
    for pid in (job.tasks[0].pid, agent):
        os.kill(pid, signal.SIGSTOP)
    job.until(lambda: job.scheduler.looks >= looks + 3 or "lost n7" in job.log(), "looks at the job")
    write_json(job.run.result, {})
    finish(job.run, 0)
    for pid in (agent, job.tasks[0].pid):
        os.kill(pid, signal.SIGCONT)
    job.end()
    assert ("lost n7" in job.log()) == (state == "RUNNING")


# -- stop, wall limit, refused records ---------------------------------------------------------------------------------


@pytest.mark.parametrize("what, cause, requeues", [("stop", "crash", 1), ("cancel", "cancelled", 0)])
def test_run_that_was_asked_to_end_starts_no_attempt_here(make_job, what, cause, requeues):
    job = make_job()
    records = job.ranks(1)
    if what == "stop":
        job.run.record_stop_request(1, "SIGUSR2")
    else:
        write_json(job.run.cancel, {"who": "tester", "why": "test", "time": time.time()})
    os.kill(records[1]["pid"], signal.SIGKILL)
    assert job.end() == 137 and job.ends() == [cause] and len(job.scheduler.requeues) == requeues


@pytest.mark.parametrize("early", [True, False])
def test_ranks_save_at_a_signal_of_the_cluster_and_job_is_requeued(make_job, early):
    """Also at one that comes while the agents import the trainer."""
    job = make_job(TEST_PRELOAD="tests.jobs.runtime.held_import")
    if early:
        job.until(lambda: job.owner.pool is not None and job.owner.pool.coordinator.agents, "an agent")
        job.owner.on_signal(signal.SIGUSR2)
    (job.run.path / "imported").touch()
    if not early:
        job.ranks(1)
        job.owner.on_signal(signal.SIGUSR2)
    assert job.end() == 75 and job.ends() == ["stopped"] and len(job.scheduler.requeues) == 1
    assert all((job.run.path / f"stopped.{rank}").exists() for rank in (0, 1))


def test_job_at_its_wall_limit_is_requeued_while_its_ranks_save(make_job):
    """Slurm kills all after KillWait. The end of the attempt changes nothing any more."""
    job = make_job()
    job.ranks(1)
    job.scheduler.seen = JobSeen("TIMEOUT", limit=900, ending="TIMEOUT")
    for pid in (job.tasks[0].pid, *children(job.tasks[0].pid)):  # the ranks save for a long time
        os.kill(pid, signal.SIGSTOP)
    job.owner.on_signal(signal.SIGTERM)
    job.until(lambda: job.run.hit_time_limit(1), "the record of the limit")
    (requeue,) = job.scheduler.requeues
    assert requeue["urgent"] and requeue["living"] >= 3 and job.ends() == [None]
    job.until(lambda: read_json(job.run.attempt(1) / "wall.json") == {"limit": 900}, "the lowered limit")
    for pid in (*children(job.tasks[0].pid), job.tasks[0].pid):
        os.kill(pid, signal.SIGCONT)
    assert job.end() == 75 and job.ends() == ["timeout"] and len(job.scheduler.requeues) == 1


def test_job_whose_record_is_refused_meanwhile_stops(make_job):
    job = make_job()
    job.ranks(1)
    (job.run.path / "job.json").chmod(0o666)
    job.kill(1)
    assert job.end() == 137 and job.ends() == ["permission"] and job.scheduler.requeues == []


def test_job_whose_record_is_refused_starts_no_attempt(make_job, capsys):
    job = make_job(start=False)
    (job.run.path / "job.json").chmod(0o666)
    job.start()
    assert job.end() == CAUSES["permission"] and job.run.attempt_numbers() == [] and job.steps == []
    assert job.scheduler.requeues == [] and "job.json" in capsys.readouterr().err


# -- agents that do not come -------------------------------------------------------------------------------------------


def test_agents_that_do_not_come_leave_their_nodes_to_srun(make_job, monkeypatch):
    """One of two nodes has an agent. The ranks of srun crash; after that the job is requeued."""
    monkeypatch.setattr(node_pool, "CONNECT_SECONDS", 1.0)
    job = make_job(2, absent=[1])
    assert job.end() == 70 and job.steps == [("agents", 2), ("ranks", 2)]
    assert job.tasks[0].wait(60) == NO_AGENTS and not (job.run.attempt(1) / CONTACT).exists()
    assert "1 of 2 node agents are ready: srun starts the ranks" in job.log()
    assert job.ends() == ["crash"] and len(job.scheduler.requeues) == 1 and job.run.newest_attempt() == 1


def test_ranks_are_started_by_srun_if_no_port_is_free(make_job, monkeypatch):
    job = make_job(start=False)

    def refuse(nodes):
        raise OSError("no free port on 127.0.0.1")

    job.scheduler.place_for_agents = refuse
    job.start()
    assert job.end() == 70 and job.steps == [("ranks", 1)]
    assert "no node agents: no free port on 127.0.0.1" in job.log()


def test_step_of_agents_that_ends_before_they_come_is_a_failed_attempt(make_job):
    """The code of the run is not on the node."""
    job = make_job(FLIP_SNAPSHOT="/nowhere")
    code = job.end()
    assert code == job.tasks[0].returncode != 0 and job.steps == [("agents", 1)]
    assert len(job.scheduler.requeues) == 1 and job.run.newest_attempt() == 1


def test_owner_has_limit_of_open_files_raised_to_hard_limit(run, commands, monkeypatch):
    """It has a connection per node. Slurm passes on the limit of the submitting shell, usually 1024."""
    monkeypatch.setenv("SLURM_JOB_ID", "57")
    write_job(run)
    commands("scontrol", show())
    (run.path / "script").write_text("sleep 60\n")
    own = f"{sys.executable} {ROOT}/jobs/host/job.py {run.path} --script {run.path}/script"
    owner = subprocess.Popen(["bash", "-c", f"ulimit -Sn 64 && exec {own}"], start_new_session=True)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        wait_until(
            lambda: owner.poll() is not None or resource.prlimit(owner.pid, resource.RLIMIT_NOFILE) == (hard, hard),
            "the raised limit",
        )
        assert owner.poll() is None
    finally:
        os.killpg(owner.pid, signal.SIGKILL)
        owner.wait()


# -- several nodes -----------------------------------------------------------------------------------------------------


def test_run_goes_on_with_fewer_nodes_of_range_after_loss(make_job):
    job = make_job(2, [1, 2])
    assert [row["environment"]["WORLD_SIZE"] for row in job.ranks(1)] == ["2", "2"]
    job.lose(1)
    (rank,) = job.ranks(2, 1)
    assert rank["environment"]["WORLD_SIZE"] == "1" and job.record_of_end(1)["cause"] == "node"
    assert read_json(job.run.attempt(2) / "start.json")["world"] == "1"


def test_run_with_fewer_nodes_is_requeued_if_that_costs_less(make_job):
    """Until the end of the day, it would lose half of it."""
    job = make_job(2, [1, 2])
    job.ranks(1)
    job.scheduler.seen = ON_NODES
    job.lose(1)
    assert job.end() == NODE_LOST and job.run.newest_attempt() == 1
    assert job.record_of_end(1)["action"] == "requeue" and len(job.scheduler.requeues) == 1


def test_spare_node_replaces_lost_one(make_job):
    job = make_job(2, [1])
    (rank,) = job.ranks(1, 1)
    job.lose(0)
    (other,) = job.ranks(2, 1)
    assert (other["environment"]["WORLD_SIZE"], other["parent"] == rank["parent"]) == ("1", False)
    assert job.record_of_end(1)["cause"] == "node"


@pytest.fixture
def broken(tmp_path):
    """A PATH on which the driver reports GPU memory that cannot be repaired."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho '0, Yes, No, No, 1'\n")
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


EVIDENCE = "n7 (GPU memory errors: GPU 0: remapped_rows.failure is Yes)"


@pytest.mark.parametrize("answers", [True, False])
def test_unhealthy_node_without_spare_is_left_by_requeue(make_job, broken, monkeypatch, answers):
    """No rank starts. Also if Slurm does not answer."""
    monkeypatch.setattr(slurm_cli, "RETRY_SECONDS", 0.0)
    job = make_job(2, [2], gpus=1, PATH=broken, start=False)
    if not answers:
        job.scheduler.seen = JobSeen()
    job.start()
    assert job.end() == NODE_LOST
    assert [task.wait(60) for task in job.tasks] == [NODE_LOST, NODE_LOST]
    end = job.record_of_end(1)
    assert (end["cause"], end["action"], end["exclude"]) == ("node", "requeue", ["n7"]) and EVIDENCE in end["reason"]
    assert [requeue["exclude"] for requeue in job.scheduler.requeues] == [("n7",)]
    assert not (job.run.path / "rank.1.0").exists()


def test_run_goes_on_without_unhealthy_node_of_its_range(make_job, broken):
    job = make_job(2, [1, 2], gpus=1, PATH=broken)
    (rank,) = job.ranks(2, 1)
    assert rank["environment"]["WORLD_SIZE"] == "1" and job.tasks[0].wait(30) == 0
    assert job.record_of_end(1)["exclude"] == ["n7"]
    assert read_json(job.run.attempt(2) / "start.json")["world"] == "1"


def test_unhealthy_node_is_left_out_if_a_spare_is_there(make_job, broken):
    """GPUs are missing on both nodes, which is no reason."""
    job = make_job(2, [1], gpus=1, PATH=broken)
    job.ranks(1, 1)
    assert job.tasks[0].wait(30) == 0, "its agent was asked to leave"
    assert job.tasks[1].poll() is None
    assert "health of n7: GPU memory errors: GPU 0: remapped_rows.failure is Yes" in job.log()
    assert "health of most nodes: GPUs on 2 of 2 nodes, as n" in job.log()


def test_network_is_measured_between_nodes_before_ranks_start(make_job, monkeypatch):
    monkeypatch.setenv("TEST_PRELOAD", "torch.distributed tests.jobs.runtime.patient_network")
    monkeypatch.setattr(node_pool, "NETWORK_SECONDS", 60.0)
    job = make_job(2)
    job.ranks(1)
    (line,) = [line for line in job.log().splitlines() if line.startswith("network: ")]
    assert line.startswith("network: all-reduce of 2 ranks: ") and "links to n8 (" in line


def test_ranks_start_although_a_node_does_not_join_the_measurement(make_job, monkeypatch):
    monkeypatch.setenv("TEST_PRELOAD", "torch.distributed")
    job = make_job(2, TEST_PRELOAD="torch.distributed tests.jobs.runtime.absent_rank")
    job.ranks(1)
    assert "network: not measured: n7: no answer in 8 s; n8: " in job.log()
    assert "health of" not in job.log() and job.owner.pool.coordinator.excluded == {}


# -- nodes that Slurm takes away ---------------------------------------------------------------------------------------


@pytest.fixture
def own_slurm_job(run, monkeypatch):
    """The owner of job 57, of which nothing runs."""
    monkeypatch.setenv("SLURM_JOB_ID", "57")
    for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    attempts.start_attempt(run, {})
    return Owner(run, JobOptions(agents=True), SlurmScheduler(), Guard)


@pytest.mark.parametrize(
    "state, held, lost",
    [("RUNNING", "n7 n8", ["n9"]), ("RUNNING", "n7 n8 n9", []), ("RUNNING", "n8", []), ("COMPLETING", "n7", [])],
)
def test_nodes_that_slurm_has_taken_out_of_the_job_are_lost(own_slurm_job, commands, monkeypatch, state, held, lost):
    """A list without the node of this process, n7, says nothing of others."""
    job = show(state=state).replace("NumNodes=2", "NumNodes=2 NodeList=n[7-9]")
    commands("scontrol", f'[ "$2" != hostnames ] || {{ echo {held}; exit; }}\n{job}')
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    own_slurm_job.nodes = JobNodes(3, [1, 2, 3], 1)
    assert list(own_slurm_job._lost_nodes(["n8", "n9"])) == lost


@pytest.mark.parametrize(
    "total, usable, calls", [(2, [2], 0), (3, [2], 1), (1, [1], 0), (2, [1, 2], 1), (3, [1, 2], 1)]
)
def test_no_node_is_lost_if_slurm_does_not_answer_and_it_is_asked_only_with_spares_or_a_range(
    own_slurm_job, commands, total, usable, calls
):
    commands("scontrol", "exit 1")
    own_slurm_job.nodes = JobNodes(total, usable, 1)
    assert own_slurm_job._lost_nodes(["n8"]) == () and len(commands.calls()) == calls


@pytest.mark.parametrize(
    "master, nodes, address",
    [
        ("", 1, "127.0.0.1"),
        ("", 2, "10.0.0.1"),  # the way to the last node
        ("n7-ib", 2, "10.9.0.1"),
        ("elsewhere", 2, "10.0.0.1"),
        ("n7-loopback", 2, "10.0.0.1"),
    ],
)
def test_owner_listens_at_the_address_that_peers_use(master, nodes, address, monkeypatch):
    """Not at all addresses of its node."""
    here = {"n7-ib": "10.9.0.1", "n7-loopback": "127.0.1.1"}
    monkeypatch.setattr(node_address, "address_here", lambda name: here.get(name, ""))
    monkeypatch.setattr(rank_entry, "own_address", {"n9": "10.0.0.1"}.__getitem__)
    environ = {"SLURM_JOB_NODELIST": "n[7-9]", "MASTER_ADDR": master}
    assert scheduler.listening_address(nodes, environ) == address


@pytest.mark.parametrize("answer, address", [("NodeAddr=127.0.0.2", "127.0.0.1"), ("", "")])
def test_owner_asks_slurm_for_the_address_of_a_node_that_no_name_service_knows(commands, answer, address):
    """Without any it listens at all addresses, as agents may know one that works."""
    commands("scontrol", f"echo '{answer}'")
    environ = {"SLURM_JOB_NODELIST": "n7,m9.invalid"}
    assert scheduler.listening_address(2, environ) == address
    assert "scontrol show node m9.invalid" in commands.calls()
    assert scheduler.listening_address(2, {}) == ""
