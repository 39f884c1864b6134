"""Tests of the coordinator of a Slurm job with a real agent and stand-ins for Slurm's commands."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from flip.runs import attempts
from flip.runs.restart_policy import NODE_LOST
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.host import batch_hooks, lost_step, rank_entry, slurm_cli
from jobs.host.agents import job_coordinator
from jobs.host.agents.coordinator import AttemptOutcome, Coordinator
from tests.jobs.host.agents.task import ROOT, end_task, processes_of, start_task
from tests.jobs.host.scontrol_answers import NODES, show

pytestmark = pytest.mark.long


class Start:
    """A start of job 57 that has won attempt 1, with the watcher's coordinator and one agent with two ranks."""

    def __init__(self, run):
        self.run = run
        self.own = batch_hooks.OwnAttempt(run)
        attempts.start_attempt(run, batch_hooks.start_record())
        run.open_logs(1)
        self.codes = []
        """What the batch shell reads."""
        self.own.start_coordinator(self.codes.append)
        self.coordinator = self.own.coordinator
        self.process = start_task(run)

    def until(self, condition, seconds=60.0):
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, self.ends()
            time.sleep(0.02)

    def ranks(self, n):
        """The records of the ranks of attempt n, when they have started."""
        files = [self.run.path / f"rank.{n}.{rank}" for rank in (0, 1)]
        self.until(lambda: all(file.exists() for file in files))
        return [read_json(file) for file in files]

    def kill(self, n):
        os.kill(self.ranks(n)[1]["pid"], signal.SIGKILL)

    def code(self):
        """The exit code of srun, which is that of its task."""
        code = self.process.wait(60)
        self.coordinator.join()
        assert processes_of(self.run) == []
        return code

    def ends(self):
        rows = [read_json(self.run.attempt(n) / "end.json") for n in self.run.attempt_numbers()]
        return [row and row["cause"] for row in rows]

    def trap(self, code):
        """What the exit trap does, which knows attempt 1."""
        return batch_hooks.end(str(self.run.path), 1, code, None)


@pytest.fixture
def start(tmp_path, monkeypatch, commands):
    monkeypatch.setattr(job_coordinator, "TIMINGS", job_coordinator.TIMINGS._replace(killed_grace=0.3))
    monkeypatch.setattr(lost_step, "AFTER_AGENTS_SECONDS", 0.5)
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    write_json(run.path / "job.json", {"token": "t", "after": 0})
    for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLIP_ATTEMPT", "1")  # the watcher sets it: restored at the end
    for name, value in {"SLURM_JOB_ID": "57", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    commands("scontrol", show())
    start = Start(run)
    yield start
    end_task(start.process, run)


def test_first_failure_restarts_in_job_and_second_is_left_to_requeue(start, commands):
    agent = start.ranks(1)[0]["parent"]
    start.kill(1)
    assert start.ranks(2)[0]["parent"] == agent and start.ends() == ["crash", None]
    record = read_json(start.run.attempt(2) / "start.json")
    assert (record["job"], record["world"]) == ("57", "2") and start.own.number == 2
    assert read_json(start.run.attempt(2) / "wall.json") == {"limit": 86400}
    start.kill(2)
    assert start.code() == 137 and start.ends() == ["crash", "crash"]
    assert "scontrol requeue 57" not in commands.calls()
    assert start.trap(137) == 0 and "scontrol requeue 57" in commands.calls(), "the recorded decision"
    assert start.run.newest_attempt() == 2


@pytest.fixture
def srun(start):
    """A process that looks like the srun of the agents, and does not end with them."""
    environ = {**os.environ, "FLIP_RUN": str(start.run.path), "FLIP_ATTEMPT": "1"}
    process = subprocess.Popen(["srun", "-c", "import time; time.sleep(60)"], executable=sys.executable, env=environ)
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("code", [0, 69])
def test_srun_that_outlives_all_agents_is_killed_and_shell_reads_their_code(start, srun, code):
    """It waits for the task of a lost node."""
    start.ranks(1)
    start.coordinator.may_restart = False
    for rank in (0, 1):
        write_json(start.run.path / f"end.{rank}", code)
    assert start.process.wait(60) == code
    start.coordinator.join()
    assert srun.wait(10) == -signal.SIGKILL and start.codes == [code]
    assert "srun was killed: all node agents have left" in (start.run.logs / "1" / "job.err").read_text()


def test_killed_agent_counts_as_lost_node_and_run_goes_on(start):
    os.kill(start.ranks(1)[0]["parent"], signal.SIGKILL)
    start.ranks(2)
    assert start.ends() == ["node", None]


def test_node_with_broken_hardware_is_left_by_requeue(start, commands):
    start.ranks(1)
    start.run.write_cause(1, 1, "crash", 70, "CUDA error: uncorrectable ECC error encountered", host="n7")
    commands("sinfo", NODES)
    start.kill(1)
    assert start.code() == 137 and start.ends() == ["crash"]
    assert start.trap(137) == 0
    assert "scontrol update JobId=57 ExcNodeList=n7" in commands.calls()


@pytest.mark.parametrize(
    "answer", [show(state="COMPLETING"), show(state="PENDING", restarts=1), show(state="CANCELLED"), "exit 1"]
)
def test_run_whose_job_slurm_ends_is_left_to_exit_trap(start, commands, answer, monkeypatch):
    monkeypatch.setattr(slurm_cli, "RETRY_SECONDS", 0.0)
    start.ranks(1)
    commands("scontrol", answer)
    start.kill(1)
    assert start.code() == 137 and start.ends() == [None]


@pytest.mark.parametrize("what", ["stop", "cancel", "shell"])
def test_run_that_ends_is_left_to_exit_trap(start, what):
    records = start.ranks(1)
    if what == "stop":
        start.run.record_stop_request(1, "SIGUSR2")
    elif what == "cancel":
        write_json(start.run.cancel, {"who": "tester", "why": "test", "time": time.time()})
    else:
        start.coordinator.may_restart = False
    os.kill(records[1]["pid"], signal.SIGKILL)
    assert start.code() == 137 and start.ends() == [None]


def test_attempt_of_another_process_is_not_followed(start):
    """Two coordinators, as after a partition of the network: the attempt that started last is the only one."""
    start.ranks(1)
    assert start.run.start_attempt({"job": "58"}) == 2
    start.kill(1)
    assert start.code() == 137 and start.run.newest_attempt() == 2
    assert start.ends()[1] is None


@pytest.mark.parametrize("state, wins", [("RUNNING", 2), ("COMPLETING", 0)])
def test_no_attempt_starts_in_a_job_that_ended_during_a_wait(tmp_path, monkeypatch, commands, state, wins):
    """A successor that was submitted meanwhile would find that attempt, and do nothing."""
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    write_json(run.path / "job.json", {"token": "t", "after": 0})
    attempts.start_attempt(run, {})
    started = []
    coordinator = job_coordinator.JobCoordinator(run, ("57", 0), lambda: 1, started.append, print, dict, print)
    coordinator.attempt = 1
    commands("scontrol", show())
    assert coordinator._reason_of_job() == ""
    commands("scontrol", show(state=state, reason="NodeDown"))
    monkeypatch.setattr(job_coordinator, "STATE_SECONDS", -1.0)
    assert coordinator._win_next(1) == bool(wins) and sum(started) == wins
    assert run.newest_attempt() == max(1, wins)


@pytest.fixture
def unasked(tmp_path):
    """The coordinator of attempt 1 of job 57, without agents."""
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    attempts.start_attempt(run, {})
    coordinator = job_coordinator.JobCoordinator(run, ("57", 0), lambda: 1, print, print, dict, print)
    coordinator.attempt = 1
    return coordinator


def test_end_excludes_unhealthy_node_although_slurm_does_not_answer(unasked, commands, monkeypatch):
    """The exit trap does not know which node that is."""
    monkeypatch.setattr(slurm_cli, "RETRY_SECONDS", 0.0)
    commands("scontrol", "exit 1")
    outcome = AttemptOutcome(None, (), False, "")
    assert unasked._prepare_next(outcome, {"n7": "GPUs: 3 of 4"}) == (0, job_coordinator.NO_ANSWER)
    end = read_json(unasked.run.attempt(1) / "end.json")
    assert (end["cause"], end["action"], end["exclude"]) == ("node", "requeue", ["n7"])


@pytest.mark.parametrize(
    "code, lost, expected", [(70, (), 70), (70, ("n8",), NODE_LOST), (None, ("n8",), NODE_LOST), (75, (), 75)]
)
def test_code_of_attempt_with_lost_node_says_so(code, lost, expected):
    """The exit trap, which may decide, learns of it by the code alone."""
    assert job_coordinator.exit_code(AttemptOutcome(code, lost, False, "")) == expected


def test_short_outage_of_slurm_does_not_prevent_restart_in_job(unasked, commands, naps, tmp_path):
    commands("scontrol", f"[ -e {tmp_path}/answers ] || {{ touch {tmp_path}/answers; exit 1; }}\n{show()}")
    assert unasked._reason_of_job() == "" and naps == [1.0]


@pytest.mark.parametrize(
    "state, held, lost",
    [("RUNNING", "n7 n8", ["n9"]), ("RUNNING", "n7 n8 n9", []), ("RUNNING", "n8", []), ("COMPLETING", "n7", [])],
)
def test_nodes_that_slurm_has_taken_out_of_the_job_are_lost(unasked, commands, monkeypatch, state, held, lost):
    """A list without the node of this process, n7, says nothing of others."""
    job = show(state=state).replace("NumNodes=2", "NumNodes=2 NodeList=n[7-9]")
    commands("scontrol", f'[ "$2" != hostnames ] || {{ echo {held}; exit; }}\n{job}')
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    unasked.is_elastic = True
    assert list(unasked._lost_nodes(["n8", "n9"])) == lost


@pytest.mark.parametrize("usable, nodes, calls", [([], 2, 0), ([2], 2, 0), ([2], 3, 1), ([1, 2], 1, 1), ([1, 2], 2, 1)])
def test_no_node_is_lost_if_slurm_does_not_answer_and_it_is_asked_only_with_spares_or_a_range(
    unasked, commands, usable, nodes, calls
):
    """Also if the job has the least nodes of its range."""
    commands("scontrol", "exit 1")
    write_json(unasked.run.path / "job.json", {"usable": usable})
    unasked.nodes = nodes
    unasked._read_job()
    assert unasked._lost_nodes(["n8"]) == () and len(commands.calls()) == calls


@pytest.mark.parametrize("seconds, graces", [(None, (20.0, 2.0)), (120, (20.0, 2.0)), (5, (5, 2.0)), (1, (1, 1))])
def test_profile_limits_the_time_of_peers(tmp_path, seconds, graces):
    coordinator = job_coordinator.JobCoordinator(RunDir(tmp_path), ("57", 0), int, print, print, dict, print, seconds)
    timing = coordinator._timing
    assert (timing.peer_grace, timing.killed_grace) == graces


def test_ranks_that_save_end_with_75_and_the_trap_decides(start, commands):
    start.ranks(1)
    os.kill(start.process.pid, signal.SIGUSR2)
    assert start.code() == 75 and start.ends() == [None]
    assert start.trap(75) == 0 and start.ends() == ["stopped"] and "scontrol requeue 57" in commands.calls()


def test_agents_that_do_not_come_leave_their_nodes_to_srun(start, srun, monkeypatch):
    """One of two nodes has an agent. The batch script starts another srun."""
    start.process.kill()
    start.process.wait()
    start.coordinator.nodes = 2
    start.coordinator.usable = [2]
    monkeypatch.setattr(job_coordinator, "CONNECT_SECONDS", 1.0)
    start.process.stderr.close()
    start.process = start_task(start.run)
    assert start.process.wait(60) == job_coordinator.NO_AGENTS
    start.coordinator.join()
    assert not start.coordinator.has_started and srun.poll() is None


def test_code_without_health_checks_runs_on_its_only_node(start, tmp_path):
    """A run of an older release: its code has no agent and no checks, so nothing is known of the node."""
    end_task(start.process, start.run)
    code = tmp_path / "code"
    (code / "jobs").mkdir(parents=True)
    (code / "jobs" / "__init__.py").touch()
    for name in ("flip", "tests"):
        (code / name).symlink_to(ROOT / name)
    start.process = start_task(start.run, FLIP_SNAPSHOT=str(code), PYTHONPATH=str(code))
    start.ranks(1)
    assert start.ends() == [None]


class Nodes:
    """A start of job 57 on nodes n7 and n8, with a rank each."""

    def __init__(self, run, usable, gpus=0, **environ):
        self.run = run
        write_json(
            run.path / "job.json", {"token": "t", "after": 0, "usable": usable, "shape": {"processes": 1, "gpus": gpus}}
        )
        self.own = batch_hooks.OwnAttempt(run)
        attempts.start_attempt(run, batch_hooks.start_record())
        run.open_logs(1)
        self.own.start_coordinator(lambda code: None)
        self.tasks = [start_task(run, "n7", 0, **environ), start_task(run, "n8", 1)]

    def ranks(self, n, world):
        files = [self.run.path / f"rank.{n}.{rank}" for rank in range(world)]
        limit = time.monotonic() + 60
        while not all(file.exists() for file in files):
            assert time.monotonic() < limit, self.run.causes(n)
            time.sleep(0.02)
        return [read_json(file) for file in files]

    def errors(self):
        """What the job has logged in attempt 1."""
        return (self.run.logs / "1" / "job.err").read_text()

    def lose(self, index):
        """Kill all that runs on a node."""
        task = self.tasks[index]
        os.kill(task.pid, signal.SIGSTOP)  # it starts no other agent
        for pid in children(task.pid):
            os.kill(pid, signal.SIGSTOP)  # it reports no end of a rank
            for own in children(pid):
                os.kill(own, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
        task.kill()


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def nodes(tmp_path, monkeypatch, commands):
    """In the last 20 minutes of the job: half of the nodes are worth less than a requeue."""
    timings = job_coordinator.TIMINGS._replace(killed_grace=0.3, patience=2.0)
    monkeypatch.setattr(job_coordinator, "TIMINGS", timings)
    monkeypatch.setattr(lost_step, "AFTER_AGENTS_SECONDS", 0.5)
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLIP_ATTEMPT", "1")  # the watcher sets it: restored at the end
    for name, value in {"SLURM_JOB_ID": "57", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    commands("scontrol", show(limit="00:28:00"))
    starts = []

    def make(usable, **fields):
        starts.append(Nodes(run, usable, **fields))
        return starts[-1]

    yield make
    for task in starts[0].tasks:
        end_task(task, run)


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
def test_coordinator_listens_at_the_address_that_peers_use(master, nodes, address, monkeypatch):
    """Not at all addresses of its node."""
    here = {"n7-ib": "10.9.0.1", "n7-loopback": "127.0.1.1"}
    monkeypatch.setattr(rank_entry, "address_here", lambda name: here.get(name, ""))
    monkeypatch.setattr(rank_entry, "own_address", {"n9": "10.0.0.1"}.__getitem__)
    environ = {"SLURM_JOB_NODELIST": "n[7-9]", "MASTER_ADDR": master}
    assert job_coordinator.listening_address(nodes, environ) == address


@pytest.mark.parametrize("answer, address", [("NodeAddr=127.0.0.2", "127.0.0.1"), ("", "")])
def test_coordinator_asks_slurm_for_the_address_of_a_node_that_no_name_service_knows(commands, answer, address):
    """Without any it listens at all addresses, as agents may know one that works."""
    commands("scontrol", f"echo '{answer}'")
    environ = {"SLURM_JOB_NODELIST": "n7,m9.invalid"}
    assert job_coordinator.listening_address(2, environ) == address
    assert "scontrol show node m9.invalid" in commands.calls()
    assert job_coordinator.listening_address(2, {}) == ""


class ImportingAgents:
    """In place of the sockets: agents of n0, n1, ... that have said hello, and are ready after so many seconds."""

    def __init__(self, coordinator, clock, ready):
        self.coordinator = coordinator
        self.clock = clock
        self.ready = ready
        self.agents = [coordinator.connected(AgentConnection()) for _ in ready]
        for i, agent in enumerate(self.agents):
            coordinator.received(agent, {"is": "hello", "node": f"n{i}", "index": i})

    def poll(self, seconds=0.0):
        self.clock[0] += seconds
        for i, agent in enumerate(self.agents):
            if not agent.is_ready and self.clock[0] >= self.ready[i]:
                self.coordinator.received(agent, {"is": "ready", "health": []})


@pytest.mark.parametrize("ready, gathers", [((90.0, 100.0), 100.0), ((90.0,), None), ((1.0, 2.0, 110.0), 110.0)])
def test_first_start_waits_for_agents_that_import_although_a_spare_node_has_none(unasked, monkeypatch, ready, gathers):
    clock = [0.0]
    monkeypatch.setattr(job_coordinator, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    unasked.nodes = 3
    unasked.usable = [2]
    unasked.coordinator = Coordinator(job_coordinator.TIMINGS, clock=lambda: clock[0])
    unasked.server = ImportingAgents(unasked.coordinator, clock, ready)
    assert unasked._gather_first() == bool(gathers)
    assert clock[0] == pytest.approx(gathers or job_coordinator.CONNECT_SECONDS, abs=0.5)


def test_node_that_was_excluded_and_lost_counts_once(unasked, commands, monkeypatch):
    """Of n7 to n10, n10 was excluded, and Slurm has dropped n9 and n10."""
    job = show().replace("NumNodes=2", "NumNodes=2 NodeList=n[7-8]")
    commands("scontrol", f'[ "$2" != hostnames ] || {{ echo n7 n8; exit; }}\n{job}')
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    unasked.nodes = 4
    unasked.usable = [2]
    unasked.coordinator = Coordinator(job_coordinator.TIMINGS)
    unasked.server = ImportingAgents(unasked.coordinator, [0.0], (0.0, 0.0))
    unasked.server.poll()
    unasked.coordinator.excluded = {"n10": "it is excluded"}
    assert unasked._prepare_next(AttemptOutcome(None, ("n9",), False, ""), {}) == (2, "")


def test_run_goes_on_with_fewer_nodes_of_range_after_loss(nodes):
    two = nodes([1, 2])
    assert [row["environment"]["WORLD_SIZE"] for row in two.ranks(1, 2)] == ["2", "2"]
    two.lose(1)
    (rank,) = two.ranks(2, 1)
    assert rank["environment"]["WORLD_SIZE"] == "1"
    assert read_json(two.run.attempt(1) / "end.json")["cause"] == "node"
    assert read_json(two.run.attempt(2) / "start.json")["world"] == "1"


def test_run_with_fewer_nodes_is_requeued_if_that_costs_less(nodes, commands):
    """Until the end of the day, it would lose half of it."""
    two = nodes([1, 2])
    two.ranks(1, 2)
    commands("scontrol", show())
    two.lose(1)
    assert two.tasks[0].wait(60) == NODE_LOST and two.run.newest_attempt() == 1
    assert read_json(two.run.attempt(1) / "end.json")["action"] == "requeue"


def test_spare_node_replaces_lost_one(nodes):
    one = nodes([1])
    (rank,) = one.ranks(1, 1)
    one.lose(0)
    (other,) = one.ranks(2, 1)
    assert (other["environment"]["WORLD_SIZE"], other["parent"] == rank["parent"]) == ("1", False)
    assert read_json(one.run.attempt(1) / "end.json")["cause"] == "node"


@pytest.fixture
def broken(tmp_path):
    """A PATH on which the driver reports GPU memory that cannot be repaired."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho '0, Yes, No, No, 1'\n")
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


EVIDENCE = "n7 (GPU memory errors: GPU 0: remapped_rows.failure is Yes)"


def test_unhealthy_node_without_spare_is_left_by_requeue(nodes, broken, commands):
    """No rank starts. If Slurm gives it again nevertheless, it is used."""
    two = nodes([2], gpus=1, PATH=broken)
    assert [task.wait(60) for task in two.tasks] == [NODE_LOST, NODE_LOST]
    end = read_json(two.run.attempt(1) / "end.json")
    assert (end["cause"], end["action"], end["exclude"]) == ("node", "requeue", ["n7"]) and EVIDENCE in end["reason"]
    commands("sinfo", NODES)
    assert batch_hooks.end(str(two.run.path), 1, NODE_LOST, None) == 0
    assert "scontrol update JobId=57 ExcNodeList=n7" in commands.calls()
    two.own.coordinator.join()
    assert two.own.coordinator._unhealthy() == {} and not two.own.coordinator.has_started


def test_run_goes_on_without_unhealthy_node_of_its_range(nodes, broken):
    two = nodes([1, 2], gpus=1, PATH=broken)
    (rank,) = two.ranks(2, 1)
    assert rank["environment"]["WORLD_SIZE"] == "1" and two.tasks[0].wait(30) == 0
    assert read_json(two.run.attempt(1) / "end.json")["exclude"] == ["n7"]
    assert read_json(two.run.attempt(2) / "start.json")["world"] == "1"


def test_unhealthy_node_is_left_out_if_a_spare_is_there(nodes, broken):
    """GPUs are missing on both nodes, which is no reason."""
    two = nodes([1], gpus=1, PATH=broken)
    two.ranks(1, 1)
    assert two.tasks[0].wait(30) == 0, "its agent was asked to leave"
    assert two.tasks[1].poll() is None
    errors = two.errors()
    assert "health of n7: GPU memory errors: GPU 0: remapped_rows.failure is Yes" in errors
    assert "health of most nodes: GPUs on 2 of 2 nodes, as n" in errors


def test_network_is_measured_between_nodes_before_ranks_start(nodes, monkeypatch):
    monkeypatch.setenv("TEST_PRELOAD", "torch.distributed tests.jobs.runtime.patient_network")
    monkeypatch.setattr(job_coordinator, "NETWORK_SECONDS", 60.0)
    two = nodes([2])
    two.ranks(1, 2)
    (line,) = [line for line in two.errors().splitlines() if line.startswith("network: ")]
    assert line.startswith("network: all-reduce of 2 ranks: ") and "links to n8 (" in line


def test_ranks_start_although_a_node_does_not_join_the_measurement(nodes, monkeypatch):
    monkeypatch.setenv("TEST_PRELOAD", "torch.distributed")
    two = nodes([2], TEST_PRELOAD="torch.distributed tests.jobs.runtime.absent_rank")
    two.ranks(1, 2)
    errors = two.errors()
    assert "network: not measured: n7: no answer in 8 s; n8: " in errors
    assert "health of" not in errors and two.own.coordinator.coordinator.excluded == {}


class AnsweringServer:
    """In place of the sockets: agents that answer at once with these checks, node by node."""

    def __init__(self, coordinator, answers):
        self.coordinator = coordinator
        self.answers = answers

    def poll(self, seconds=0.0):
        for agent in list(self.coordinator.measuring):
            message = {"is": "health", "health": [self.answers[agent.node]]}
            self.coordinator.received(agent, message)


class AgentConnection:
    """In place of the connection to an agent."""

    def __init__(self):
        self.messages = []

    def send(self, message):
        if message["is"] != "accepted":
            self.messages.append(message)

    def close(self):
        pass


@pytest.fixture
def measuring(tmp_path, monkeypatch):
    """Make the coordinator of a job whose nodes n0, n1, ... have these rates of the faster of their links."""

    def make(rates, lines, can=True):
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", str(len(rates)))
        monkeypatch.setenv("SLURM_NTASKS", str(len(rates)))
        run = RunDir(tmp_path / "sweep" / "run")
        run.path.mkdir(parents=True)
        log = lambda text: lines.append(str(text))  # noqa: E731
        job = job_coordinator.JobCoordinator(run, ("57", 0), lambda: 1, print, print, dict, log)
        job.coordinator = Coordinator()
        answers = {}
        for i, rate in enumerate(rates):
            agent = job.coordinator.connected(AgentConnection())
            job.coordinator.received(agent, {"is": "hello", "node": f"n{i}", "index": i})
            job.coordinator.received(agent, {"is": "ready", "network": can})
            found = {"evidence": f"all-reduce: {rate} GB/s", "rates": {"links, to its peers": 1e9 * rate}}
            answers[f"n{i}"] = {"check": "network", "result": "ok", **found}
        job.server = AnsweringServer(job.coordinator, answers)
        return job

    return make


SLOW_LINKS = "network: links, to its peers: 2 GB/s over the faster one; the median of all nodes is 10"


def test_node_with_slow_links_is_left_out_if_a_spare_is_there(measuring):
    lines = []
    job = measuring([10, 2, 10], lines)
    job._measure_network()
    assert lines == ["network: all-reduce: 10 GB/s"]
    assert job._exclude_unhealthy(2) == {} and job.coordinator.excluded == {"n1": SLOW_LINKS}
    assert f"health of n1: {SLOW_LINKS}" in lines


def test_node_with_slow_links_without_a_spare_stops_the_start(measuring):
    job = measuring([10, 2, 10], [])
    job._measure_network()
    assert job._exclude_unhealthy(3) == {"n1": SLOW_LINKS}


def test_network_is_measured_again_only_with_a_new_node(measuring):
    job = measuring([10, 10, 10], [])
    job._measure_network()
    channels = [agent.channel for agent in job.coordinator.ready()]
    assert [message["is"] for channel in channels for message in channel.messages] == ["network"] * 3
    job.coordinator.lost(job.coordinator.ready()[2], "killed")
    job._measure_network()
    assert [len(channel.messages) for channel in channels] == [1, 1, 1]
    agent = job.coordinator.connected(AgentConnection())
    job.coordinator.received(agent, {"is": "hello", "node": "n9", "index": 9})
    job.coordinator.received(agent, {"is": "ready", "network": True})
    job.server.answers["n9"] = job.server.answers["n0"]
    job._measure_network()
    assert [len(channel.messages) for channel in channels] == [2, 2, 1] and len(agent.channel.messages) == 1


@pytest.mark.parametrize(("rates", "can", "logged"), [([10], True, []), ([10, 10], False, ["network: not measured: "])])
def test_single_rank_and_agents_without_torch_measure_no_network(measuring, rates, can, logged):
    lines = []
    job = measuring(rates, lines, can)
    job._measure_network()
    assert [line[:23] for line in lines] == logged
    assert not any(agent.channel.messages for agent in job.coordinator.ready())


def test_coordinator_has_limit_of_open_files_raised_to_hard_limit(tmp_path, commands, monkeypatch):
    """It has a connection per node. Slurm passes on the limit of the submitting shell, usually 1024."""
    monkeypatch.setenv("SLURM_JOB_ID", "57")
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    commands("scontrol", show())
    watch = f"{sys.executable} {ROOT}/jobs/host/batch_hooks.py watch {run.path} --agents 2"
    watcher = subprocess.Popen(["bash", "-c", f"ulimit -Sn 64 && exec {watch}"])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        limit = time.monotonic() + 60.0
        while resource.prlimit(watcher.pid, resource.RLIMIT_NOFILE) != (hard, hard):
            assert watcher.poll() is None and time.monotonic() < limit
            time.sleep(0.02)
    finally:
        watcher.kill()
        watcher.wait()
