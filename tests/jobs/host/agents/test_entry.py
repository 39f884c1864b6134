"""Tests of the agent of a Slurm task with real processes, over TCP, without Slurm."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from flip.runs.errors import CRASH
from flip.runs.rundir import RunDir, read_json
from jobs.host import rank_entry, sessions
from jobs.host.agents import contact, entry
from jobs.host.agents.channel import CONTACT, GONE_CODE, NO_AGENTS, ChannelError, listen, new_key, publish, read_contact
from jobs.host.agents.coordinator import Coordinator, State, Timing
from jobs.host.agents.server import AgentServer
from jobs.runtime import node_agent
from tests.harness.common import wait_until
from tests.jobs.host.agents.task import ROOT, TASK, end_task, processes_of, start_task


class Task:
    """A task of a step of agents on a node n7 of a job whose first attempt is 1, and the coordinator of the job."""

    def __init__(self, run, **environ):
        self.run = run
        self.coordinator = Coordinator(Timing(peer_grace=1.0, killed_grace=0.5))
        self.key = new_key()
        listener = listen("127.0.0.1", 20000, 29000)
        self.server = AgentServer(self.coordinator, self.key, listener)
        self.n = run.start_attempt({})
        run.open_logs(self.n)
        publish(run.attempt(self.n) / CONTACT, "", listener.getsockname()[1], self.key)
        self.process = start_task(run, **environ)

    def until(self, condition, seconds=30.0):
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, self.coordinator.state
            self.server.poll(0.02)

    def start(self):
        """Start attempt n with two ranks; returns their records."""
        self.until(self.coordinator.ready)
        self.coordinator.start(self.n, [range(2)], {})
        files = [self.run.path / f"rank.{self.n}.{rank}" for rank in range(2)]
        self.until(lambda: all(file.exists() for file in files))
        return [read_json(file) for file in files]

    def start_next(self):
        self.until(lambda: self.coordinator.state is State.DECIDE)
        self.coordinator.gather()
        self.n = self.run.start_attempt({})
        self.run.open_logs(self.n)
        return self.start()

    def left(self):
        return processes_of(self.run)

    def close(self):
        self.server.close()
        end_task(self.process, self.run)


@pytest.fixture
def task(tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    task = Task(run)
    yield task
    task.close()


@pytest.mark.long
def test_task_ends_with_code_of_coordinator_and_leaves_nothing(task):
    records = task.start()
    assert [record["environment"]["RANK"] for record in records] == ["0", "1"]
    assert all(record["forked"] for record in records)
    (agent,) = task.coordinator.ready()
    assert (agent.node, agent.index) == ("n7", 0)
    task.coordinator.leave(75, "the run is requeued")
    assert task.process.wait(30) == 75 and task.left() == []
    assert "the run is requeued" in task.process.stderr.read()


class StoppedAgent:
    pid = 2**22

    def __init__(self):
        self.code = None

    def poll(self):
        return self.code

    def kill(self):
        self.code = -9


@pytest.mark.parametrize("naps, is_killed", [([0.2, 3600.0, 0.2, 0.2], False), ([0.2] * 12, True)])
def test_agent_of_suspended_job_is_left_alone(monkeypatch, naps, is_killed):
    """The task sees the agent stopped, an instant before it is stopped itself and after it is continued."""
    clock = [1000.0]
    agent = StoppedAgent()

    def nap(*_):
        """As Python 3.11 returns when the process is continued."""
        if not naps:
            agent.code = agent.code or 0
            return None
        clock[0] += naps.pop(0)
        return signal.struct_siginfo((0,) * 7)

    monkeypatch.setattr(entry.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(entry.signal, "sigtimedwait", nap)
    monkeypatch.setattr(sessions, "is_stopped", lambda pid: True)
    assert entry._wait(agent, []) == (-9 if is_killed else 0)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_next_agent_follows_one_that_dies_when_its_ranks_have_died(task, number):
    before = task.start()
    (agent,) = task.coordinator.ready()
    starts = {record["pid"]: sessions.start_time(record["pid"]) for record in before}
    os.kill(agent.reported["pid"], number)
    task.until(lambda: task.coordinator.ready() and task.coordinator.ready()[0] is not agent)
    assert not any(sessions.alive(pid, start) for pid, start in starts.items())
    assert task.coordinator.outcome.lost == ("n7",)
    after = task.start_next()
    assert {record["parent"] for record in after} == {task.coordinator.ready()[0].reported["pid"]}
    task.coordinator.leave()
    assert task.process.wait(30) == 0 and task.left() == []


@pytest.mark.long
def test_ranks_of_killed_task_have_ended_when_the_coordinator_learns_of_it(task):
    """It then starts the next attempt, on other nodes."""
    starts = {record["pid"]: sessions.start_time(record["pid"]) for record in task.start()}
    os.kill(task.process.pid, signal.SIGKILL)
    task.until(lambda: not task.coordinator.agents)
    assert not any(sessions.alive(pid, start) for pid, start in starts.items())
    assert task.coordinator.outcome.lost == ("n7",)
    task.until(lambda: not task.left())


def test_task_waits_only_for_a_while_for_a_process_that_cannot_be_killed():
    """It looks for children in an empty list, as if the signal did not reach its child."""
    text = "import subprocess; from jobs.host.agents import entry; find = entry._children"
    text += "; child = subprocess.Popen(['sleep', '60']); entry._children = dict"
    text += "; left = entry.kill_children(0.05); entry._children = find"
    text += "; print(left, entry.kill_children())"
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=50)
    assert done.stdout == "False True\n"


WITHOUT_COORDINATOR = """
import sys
from jobs.host.agents import entry, orphaned_task
entry.agent_command = lambda *_: [sys.executable, "-c", "import sys; sys.exit(int(sys.argv[1]))", sys.argv[1]]
orphaned_task.restart_if_orphaned = lambda environ: "Slurm is asked"
orphaned_task.restart_if_forgotten = lambda environ: "and asked again"
print(entry.supervise("module", [], {}))
"""


@pytest.mark.parametrize(
    "code, expected, asks", [(GONE_CODE, 70, True), (NO_AGENTS, 74, True), (75, 75, False), (0, 0, False)]
)
def test_task_without_coordinator_asks_slurm(code, expected, asks):
    """Also that of a job of one node, whose batch script may have been killed."""
    command = [sys.executable, "-c", WITHOUT_COORDINATOR, str(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert (done.stdout, "Slurm is asked" in done.stderr) == (f"{expected}\n", asks)
    assert ("and asked again" in done.stderr) == asks


SLURM_ENDS_JOB = """case $1 in
  show) echo "JobId=7 Restarts=0 JobState=COMPLETING Reason=RaisedSignal:9(Killed) NodeList=n7 BatchHost=n7";;
esac"""


@pytest.mark.long
@pytest.mark.parametrize("is_gone", [True, False])
def test_task_restarts_job_at_term_while_its_ranks_save(tmp_path, commands, is_gone):
    """If its coordinator is gone, and srun. Slurm would kill it before they have saved."""
    commands("scontrol", SLURM_ENDS_JOB)
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    task = Task(run, SLURM_SRUN_COMM_PORT="1")
    try:
        task.start()
        (run.path / "slow").touch()
        if is_gone:
            task.server.close()
        os.kill(task.process.pid, signal.SIGTERM)
        if is_gone:
            wait_until(lambda: "scontrol requeue 7" in commands.calls(), "the requeue", 30, story=commands.calls)
        else:
            time.sleep(1.0)
            assert commands.calls() == []
        assert task.process.poll() is None
        (run.path / "slow").unlink()
        if is_gone:
            assert task.process.wait(30) == CRASH
            assert (run.path / "stopped.0").exists()
    finally:
        task.close()


@pytest.mark.long
def test_signal_between_attempts_stops_those_that_start_later(task):
    for record in task.start():
        os.kill(record["pid"], signal.SIGKILL)
    task.until(lambda: task.coordinator.state is State.DECIDE)
    os.kill(task.process.pid, signal.SIGUSR2)
    task.start_next()
    task.until(lambda: task.coordinator.state is State.DECIDE)
    assert task.coordinator.outcome.code == 75
    assert read_json(task.run.path / "stopped.0") == {"reason": "signal SIGUSR2"}


@pytest.mark.long
def test_task_without_coordinator_acts_at_term(tmp_path):
    """Slurm ends the job before the agent has reached the coordinator, and kills the task after KillWait. The agent
    looks for it for 60 s."""
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    listener = listen("127.0.0.1", 20000, 29000)
    publish(run.attempt(run.start_attempt({})) / CONTACT, "", listener.getsockname()[1], new_key())
    listener.close()
    process = start_task(run)
    try:
        wait_until(lambda: len(processes_of(run)) == 2, "its agent", 30)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(contact.CONNECT_SECONDS / 2) == NO_AGENTS
    finally:
        end_task(process, run)


def test_agent_without_coordinator_says_so(tmp_path, capfd):
    run = RunDir(tmp_path / "run")
    n = run.start_attempt({})
    assert node_agent.find_coordinator(run, n, ["127.0.0.1"], 0.1) is None
    assert "cannot be reached: it has not published its port" in capfd.readouterr().err
    listener = listen("127.0.0.1", 20000, 29000)
    port = listener.getsockname()[1]
    listener.close()
    publish(run.attempt(n) / CONTACT, "", port, new_key())
    assert node_agent.find_coordinator(run, n, ["127.0.0.1"], 0.1) is None
    assert f"127.0.0.1, port {port}: " in capfd.readouterr().err
    publish(run.attempt(n) / CONTACT, "127.0.0.1", port, new_key())
    assert node_agent.find_coordinator(run, n, [], 0.1) is None
    assert f"127.0.0.1, port {port}: " in capfd.readouterr().err
    start = time.monotonic()
    assert node_agent.find_coordinator(run, n, [], 60.0, lambda: True) is None
    assert time.monotonic() - start < 30.0, "its task must act before KILL"
    assert "; Slurm ends the job" in capfd.readouterr().err


def test_contact_is_private_and_refused_if_another_user_may_have_written_it(tmp_path):
    path = tmp_path / CONTACT
    assert read_contact(path) is None
    key = new_key()
    publish(path, "10.0.0.1", 12345, key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and read_contact(path) == ("10.0.0.1", 12345, key)
    path.chmod(0o602)
    with pytest.raises(ChannelError, match="coordinator.json"):
        read_contact(path)
    publish(path, "", 12345, b"short")
    with pytest.raises(ChannelError, match="5 bytes instead of 32"):
        read_contact(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="host"):
        read_contact(path)


def test_agent_is_of_the_code_of_the_run():
    environ = {**TASK, "FLIP_RUN": "/runs/a"}
    own = [sys.executable, "-m", "jobs.runtime.node_agent", "/runs/a", "jobs.worker", "--connect", "127.0.0.1"]
    assert entry.agent_command("jobs.worker", ["127.0.0.1"], environ) == own


def test_coordinator_is_looked_for_on_first_node():
    several = {**TASK, "SLURM_NNODES": "2", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}
    assert rank_entry.coordinator_hosts(several) == ["127.0.0.1", "10.0.0.7"]
    assert rank_entry.coordinator_hosts({**several, "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}) == ["127.0.0.1"]
    assert rank_entry.coordinator_hosts(TASK) == ["127.0.0.1"]
