"""Tests of the node agent with real processes and signals, under a real coordinator."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flip.runs.errors import CAUSES
from flip.runs.rundir import RunDir, read_json
from jobs.host import processes, sessions
from jobs.host.agents.channel import GONE_CODE, KEY_VARIABLE, new_key
from jobs.host.agents.coordinator import Coordinator, State, Timing
from jobs.host.agents.server import AgentServer
from jobs.runtime import node_agent

ROOT = Path(__file__).resolve().parents[3]
MODULE = "tests.jobs.runtime.agent_rank"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc"),
]


class Node:
    """A run with one agent, which the test commands as its coordinator."""

    def __init__(self, run):
        self.run = run
        self.processes = []
        self.server = None

    def start_agent(self, *options, key=None, module=MODULE, **environ):
        own, other = socket.socketpair()
        key = key or new_key()
        self.coordinator = Coordinator(Timing(peer_grace=1.0, killed_grace=0.5))
        self.server = AgentServer(self.coordinator, key)
        self.server.add(own)
        command = [sys.executable, "-m", "jobs.runtime.node_agent", str(self.run.path), module]
        base = {name: value for name, value in os.environ.items() if not name.startswith("FLIP_")}
        own_environ = {"FLIP_RUN": str(self.run.path), "FLIP_NODE_AGENT": "1", "PYTHONPATH": str(ROOT)}
        self.agent = subprocess.Popen(
            [*command, "--socket", str(other.fileno()), *options],
            cwd=ROOT,
            env={**base, **own_environ, KEY_VARIABLE: environ.pop("agent_key", key).hex(), **environ},
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        other.close()
        self.processes.append(self.agent)
        return self

    def until(self, condition, seconds=30.0):
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, self.coordinator.state
            self.server.poll(0.02)

    def start(self, world=2, **environment):
        """Start the next attempt and wait until its ranks have; returns their records."""
        n = self.run.start_attempt({})
        self.run.open_logs(n)
        self.until(self.coordinator.ready)
        self.coordinator.start(n, [range(world)], {"environment": environment})
        return self.records(n, world)

    def records(self, n, world=2):
        files = [self.run.path / f"rank.{n}.{rank}" for rank in range(world)]
        self.until(lambda: all(file.exists() for file in files))
        return [read_json(file) for file in files]

    def end(self, rank, code=0):
        (self.run.path / f"end.{rank}").write_text(str(code))

    def until_decision(self, seconds=30.0):
        self.until(lambda: self.coordinator.state is State.DECIDE, seconds)
        return self.coordinator.outcome

    def left(self):
        """Pids of living processes that name this run."""
        mine = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        named = [pid for pid in mine if str(self.run.path) in processes.arguments(pid)]
        return [pid for pid in named if not processes.has_ended(processes.read_stat(pid)[1])]

    def close(self):
        if self.server is not None:
            self.server.close()
        for process in self.processes:
            process.kill()
            process.wait()
            process.stderr.close()
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def node(tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    node = Node(run)
    yield node
    node.close()


def test_ranks_are_forked_with_environment_of_their_own(node):
    records = node.start_agent(EXTRA="of the agent").start(EXTRA="of the attempt")
    for rank, record in enumerate(records):
        expected = {"RANK": str(rank), "WORLD_SIZE": "2", "FLIP_ATTEMPT": "1", "EXTRA": "of the attempt"}
        assert record["environment"] == expected
        assert record["forked"] and record["parent"] == node.agent.pid and record["session"] == record["pid"]
        assert record["main"] == "blank" and record["hidden"] == [] and record["handlers"] == [True]
        assert record["wakeup"] == -1
        pipes = [name for name in record["open"] if name.startswith(("pipe:", "socket:"))]
        assert len(pipes) == 1, "of the lifeline, without anything of the agent"
    node.end(0)
    node.end(1)
    assert node.until_decision().code == 0
    assert (node.run.logs / "1" / "node0.out").read_text().count("rank ") == 2
    node.coordinator.leave()
    assert node.agent.wait(10) == 0 and node.left() == []


@pytest.mark.parametrize("preload", ["tests.jobs.runtime.thread_starter", "no_such_library"])
def test_agent_that_cannot_fork_starts_new_interpreters_and_says_so(node, preload):
    (record,) = node.start_agent(TEST_PRELOAD=preload).start(world=1)
    assert not record["forked"]
    node.coordinator.leave()
    node.end(0)
    node.agent.wait(10)
    said = node.agent.stderr.read()
    assert "ranks start in new interpreters: " in said
    assert ("2 threads" in said) or ("no_such_library" in said)


def test_ranks_do_not_inherit_variables_that_imports_of_the_agent_set(node):
    """Otherwise torch would keep compiled code in its own folder, where the next attempt does not look."""
    (record,) = node.start_agent(TEST_PRELOAD="tests.jobs.runtime.variable_setter").start(world=1)
    assert record["forked"] and record["environment"]["EXTRA"] == ""
    node.coordinator.leave()
    node.end(0)


def test_agent_adds_the_network_to_its_health(node):
    """It has imported no torch, so that its rank imports it, which a coordinator avoids."""
    node.start_agent()
    node.until(node.coordinator.ready)
    (agent,) = node.coordinator.ready()
    assert agent.reported["network"] is False
    node.coordinator.measure_network([agent], [[0, 1]], {"environment": {"MASTER_PORT": "none"}})
    node.until(lambda: not node.coordinator.measuring)
    (row,) = agent.reported["health"]
    assert row["name"] == "network" and row["state"] == "unknown"
    (record, _) = node.start()
    assert record["forked"]


def test_start_ends_a_measurement_that_still_runs(node):
    node.start_agent(TEST_PRELOAD="tests.jobs.runtime.absent_rank tests.jobs.runtime.patient_network")
    node.until(node.coordinator.ready)
    node.coordinator.measure_network(node.coordinator.ready(), [[0, 1]], {})
    node.until(lambda: len(node.left()) == 4)  # the agent, the process of the node and two ranks
    node.start(world=1)
    node.until(lambda: len(node.left()) == 2)


def test_killed_rank_ends_its_peers_and_next_attempt_starts_on_same_agent(node):
    records = node.start_agent().start()
    for n in (1, 2, 3):
        pids = [record["pid"] for record in records]
        starts = [sessions.start_time(pid) for pid in pids]
        for pid, start in zip(pids, starts, strict=True):
            assert sessions.is_rank(pid, start, node.run, n)
            assert not sessions.is_rank(pid, start, node.run, n - 1)
            assert not sessions.is_rank(pid, start, node.run, n + 1)
        recorded = node.run.attempt(n) / "pids.json"
        node.until(lambda recorded=recorded: len(read_json(recorded)) == 2)  # a rank may run before its row is written
        assert [(row["rank"], row["pid"]) for row in read_json(recorded)] == [(0, pids[0]), (1, pids[1])]
        os.kill(pids[1], signal.SIGKILL)
        outcome = node.until_decision()
        assert (outcome.code, outcome.reason) == (137, "rank 1 ended with 137")
        assert not any(sessions.alive(pid, start) for pid, start in zip(pids, starts, strict=True))
        node.coordinator.gather()
        records = node.start()
        assert {record["parent"] for record in records} == {node.agent.pid}
    assert len(os.listdir(f"/proc/{node.agent.pid}/fd")) < 12, "no descriptor is left of earlier attempts"


def test_children_of_a_rank_end_with_it(node):
    (record,) = node.start_agent(module="tests.jobs.runtime.rank_with_child").start(world=1)
    child = record["child"]
    start = sessions.start_time(child)
    assert sessions.alive(child, start)
    os.kill(record["pid"], signal.SIGKILL)
    node.until_decision()
    node.until(lambda: not sessions.alive(child, start), 5.0)


def test_stopped_rank_counts_as_hung(node):
    records = node.start_agent().start()
    os.kill(records[0]["pid"], signal.SIGSTOP)
    outcome = node.until_decision(seconds=20.0)
    assert outcome.code == CAUSES["hang"]
    (cause,) = node.run.causes(1)
    assert cause["cause"] == "hang" and cause["rank"] == 0 and "SIGSTOP" in cause["reason"]


@pytest.mark.parametrize("kills, is_killing, causes", [([1, 2], False, 1), ([1, 1], False, 0), ([1, 2], True, 0)])
def test_rank_that_was_killed_for_memory_has_a_cause(node, monkeypatch, kills, is_killing, causes):
    """The agent outlives its ranks, so that the scheduler does not see how they end."""
    counts = iter(kills)
    monkeypatch.setattr(node_agent, "memory_kills", lambda: next(counts))
    agent = node_agent.NodeAgent(node.run, "tests.jobs.runtime.agent_rank")
    agent.attempt = node.run.start_attempt({})
    agent._memory_kills = node_agent.memory_kills()
    agent._is_killing = is_killing
    sent = []
    monkeypatch.setattr(agent, "_send", lambda **message: sent.append(message["code"]))
    rank = subprocess.Popen(["sleep", "60"], start_new_session=True)
    agent.ranks = [node_agent.RankProcess(3, rank.pid)]
    rank.kill()
    os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOWAIT)
    agent._reap()
    rank.returncode = -9  # it was waited for
    records = node.run.causes(1)
    assert sent == [137] and [(record["rank"], record["cause"]) for record in records] == [(3, "crash")] * causes


def test_rank_of_suspended_job_is_left_alone(node, monkeypatch):
    """The agent sees the rank stopped an instant before it is stopped itself, and again when it is continued first."""
    clock = [1000.0]
    monkeypatch.setattr(node_agent.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sessions, "is_stopped", lambda pid: True)
    agent = node_agent.NodeAgent(node.run, "tests.jobs.runtime.agent_rank")
    agent.ranks = [node_agent.RankProcess(0, 2**22)]
    ended = []
    monkeypatch.setattr(agent, "_end_hung", lambda rank, reason: ended.append(rank))
    for seconds in (0.5, 3600.0, 0.5, 0.5, 0.5):
        clock[0] += seconds
        agent._look_for_stopped()
    assert not ended
    for _ in range(4):
        clock[0] += 0.5
        agent._look_for_stopped()
    assert ended[:1] == agent.ranks


def test_rank_that_continues_at_once_is_left_alone(node):
    (record,) = node.start_agent().start(world=1)
    for _ in range(4):
        os.kill(record["pid"], signal.SIGSTOP)
        time.sleep(node_agent.LOOK_SECONDS + 0.2)
        os.kill(record["pid"], signal.SIGCONT)
        time.sleep(node_agent.LOOK_SECONDS + 0.2)
        node.server.poll()
    assert node.coordinator.state is State.RUN


def test_signal_of_coordinator_lets_ranks_stop(node):
    node.start_agent().start()
    node.coordinator.stop("TERM", 30.0)
    outcome = node.until_decision()
    assert outcome.code == 75 and outcome.stop_requested
    assert read_json(node.run.path / "stopped.0") == {"reason": "signal SIGTERM"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1])
def test_signal_to_agent_is_passed_on(node, number):
    node.start_agent().start()
    os.kill(node.agent.pid, number)
    assert node.until_decision().code == 75
    assert read_json(node.run.path / "stopped.1") == {"reason": f"signal {number.name}"}
    assert node.agent.poll() is None


@pytest.mark.parametrize("how", ["coordinator ends", "leave", "agent is killed"])
def test_ranks_save_and_nothing_is_left(node, how):
    node.start_agent().start()
    if how == "coordinator ends":
        node.server.close()
    elif how == "leave":
        node.coordinator.leave()
    else:
        node.agent.kill()
    assert node.agent.wait(20) == {"coordinator ends": GONE_CODE, "leave": 0}.get(how, -signal.SIGKILL)
    limit = time.monotonic() + 20
    while node.left():
        assert time.monotonic() < limit
        time.sleep(0.02)
    for rank in range(2):
        assert read_json(node.run.path / f"stopped.{rank}") == {"reason": "the supervisor is gone"}
    if how == "agent is killed":
        node.until(lambda: node.coordinator.state is State.DECIDE)
        assert node.coordinator.outcome.lost == (socket.gethostname(),)


def test_agent_with_another_key_ends(node):
    node.start_agent(agent_key=new_key())
    assert node.agent.wait(30) == CAUSES["crash"]
    assert "not signed with the key of this run" in node.agent.stderr.read()
    node.server.poll(0.1)
    assert node.coordinator.agents == []


def test_agent_refuses_attempt_that_is_not_newer(node):
    node.start_agent().start(world=1)
    node.end(0)
    node.until_decision()
    node.coordinator.gather()
    node.coordinator.attempt = 0  # as a second coordinator
    node.coordinator.start(1, [[0]], {})
    node.until_decision()
    assert node.coordinator.outcome.lost and node.agent.wait(10) == CAUSES["crash"]
    assert "another coordinator" in node.agent.stderr.read()


def test_rank_whose_log_cannot_be_opened_ends_as_storage_or_permission(node):
    node.start_agent()
    n = node.run.start_attempt({})  # without a folder for its logs
    node.until(node.coordinator.ready)
    node.coordinator.start(n, [[0, 1]], {})
    assert node.until_decision().code == 73
    assert {cause["cause"] for cause in node.run.causes(n)} == {"storage"}
    node.coordinator.gather()
    n = node.run.start_attempt({})
    (node.run.open_logs(n) / "node0.out").symlink_to("/dev/null")  # as another user may prepare
    node.coordinator.start(n, [[0, 1]], {})
    assert node.until_decision().code == CAUSES["permission"]
    assert {cause["cause"] for cause in node.run.causes(n)} == {"permission"}
    assert not sessions.session_pids(node.agent.pid) or node.left() == [node.agent.pid]


def test_each_rank_is_recorded_before_next_rank_starts(node, monkeypatch):
    """Whoever adopts the ranks of an agent that is killed meanwhile knows as many as possible."""
    n = node.run.start_attempt({})
    node.run.open_logs(n)
    agent = node_agent.NodeAgent(node.run, MODULE)
    counts = []

    def fork(*_):
        counts.append(len(read_json(node.run.attempt(n) / "pids.json") or []))
        return os.getpid()

    monkeypatch.setattr(agent, "_fork", fork)
    agent._start({"attempt": n, "node": 0, "world": 3, "ranks": [0, 1, 2]})
    assert counts == [0, 1, 2]


def test_module_that_fails_ends_with_its_code_and_traceback(node):
    node.start_agent(module="tests.jobs.runtime.no_such_module")
    n = node.run.start_attempt({})
    node.run.open_logs(n)
    node.until(node.coordinator.ready)
    node.coordinator.start(n, [[0]], {})
    assert node.until_decision().code == 1
    assert "no_such_module" in (node.run.logs / str(n) / "node0.err").read_text()
