"""Tests that another user who reaches the port of a coordinator neither displaces an agent nor fills the log."""

import threading
import time
from pathlib import Path

import pytest

from flip.runs import attempts
from flip.runs.rundir import RunDir, read_json, write_json
from jobs.host import rank_entry
from jobs.host.agents.channel import CONTACT
from jobs.host.agents.node_pool import NodePool, open_server
from jobs.host.job_nodes import JobNodes
from tests.harness.common import wait_until
from tests.harness.job_records import write_job
from tests.jobs.host.agents.task import end_task, has_connection, start_task

pytestmark = pytest.mark.long

CONNECTIONS = 400
"""Open at the same time, and made anew when they are closed."""

FLOOD = """
import os, select, socket, sys
port, counter, number = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
held, made = {}, 0
poll = select.poll()
while not os.path.exists(counter + ".stop"):
    while len(held) < number:
        sock = socket.create_connection(("127.0.0.1", port), 30)
        held[sock.fileno()] = sock
        poll.register(sock, select.POLLRDHUP)
        made += 1
    for descriptor, _ in poll.poll(50):
        poll.unregister(descriptor)
        held.pop(descriptor).close()
    with open(counter + ".new", "w") as file:
        file.write(str(made))
    os.replace(counter + ".new", counter)
"""


class Job:
    """Attempt 1 of a run on nodes n7 and n8, with a rank each, and the agents of its job as their owner sees them."""

    def __init__(self, run):
        self.run = run
        run.path.mkdir(parents=True)
        write_job(run)
        attempts.start_attempt(run, {})
        run.open_logs(1)
        self.outcomes = []
        self.pool = NodePool(
            run,
            JobNodes(2, [2], 1),
            self.wait,
            self.log,
            lambda: False,
            lambda nodes: (),
            lambda: False,
            20.0,
            open_server,
        )
        self.pool.open(1, ("", rank_entry.PORTS[0]))
        self.tasks = []
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        assert self.pool.gather_first()
        self.outcomes.append(self.pool.run_attempt(1, 2))
        self.pool.leave(self.outcomes[0].code)

    def wait(self, seconds):
        self.pool.poll(seconds)

    def log(self, text):
        with open(self.run.logs / "1" / "job.err", "a") as file:
            file.write(f"{text}\n")

    def start_agents(self):
        for index, node in enumerate(("n7", "n8")):
            self.tasks.append(start_task(self.run, node, index, TEST_PRELOAD="tests.jobs.runtime.held_import"))
        wait_until(lambda: all(is_connected(task.pid) for task in self.tasks), "the connections of both agents")

    def errors(self):
        return (self.run.logs / "1" / "job.err").read_text()

    def close(self):
        for task in self.tasks:
            end_task(task, self.run)


def is_connected(task):
    """Whether the agent that a task has started has a connection."""
    agents = Path(f"/proc/{task}/task/{task}/children").read_text().split()
    return any(has_connection(int(pid)) for pid in agents)


class Flood:
    """Connections of Mallory's to a port."""

    def __init__(self, users, port):
        self.counter = users.shared / "connections"
        self.results = []
        arguments = ("-c", FLOOD, port, self.counter, CONNECTIONS)
        self.thread = threading.Thread(target=lambda: self.results.append(users.mallory.python(*arguments)))
        self.thread.start()

    def made(self):
        """Connections so far."""
        return int(self.counter.read_text()) if self.counter.exists() else 0

    def go_on(self, connections):
        """Wait until so many further connections were made."""
        goal = self.made() + connections
        wait_until(lambda: self.made() >= goal or self.results, "further connections", 100)
        assert not self.results, self.results

    def stop(self):
        self.counter.with_name("connections.stop").touch()
        self.thread.join(60)
        return self.results[0]


@pytest.fixture
def job(tmp_path, monkeypatch):
    for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_JOB_NODELIST", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_JOB_ID": "57", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    job = Job(RunDir(tmp_path / "sweep" / "run"))
    yield job
    job.close()


def test_connections_of_other_user_displace_no_agent_and_fill_no_log(users, job):
    """Agents connect while the flood lasts, and import the trainer longer than it needs to displace any connection."""
    flood = Flood(users, read_json(job.run.attempt(1) / CONTACT)["port"])
    try:
        flood.go_on(CONNECTIONS)
        job.start_agents()
        flood.go_on(2 * CONNECTIONS)
        (job.run.path / "imported").touch()
        ranks = [job.run.path / f"rank.1.{rank}" for rank in (0, 1)]
        wait_until(
            lambda: all(rank.exists() for rank in ranks) or job.tasks[0].poll() is not None,
            "the ranks of both agents",
            60,
            story=job.errors,
        )
        assert all(rank.exists() for rank in ranks), job.errors()
        flood.go_on(CONNECTIONS)
    finally:
        done = flood.stop()
    for rank in (0, 1):
        write_json(job.run.path / f"end.{rank}", 0)
    assert [task.wait(60) for task in job.tasks] == [0, 0]
    job.thread.join(60)
    assert [outcome.code for outcome in job.outcomes] == [0]
    assert done.returncode == 0, done.stderr
    lines = [line for line in job.errors().splitlines() if "no agents of this run" in line]
    elapsed = time.time() - read_json(job.run.attempt(1) / "start.json")["time"]
    assert 1 <= len(lines) <= 2 + elapsed / 60 and len(job.errors()) < 4096
    assert sum(int(line.split()[0]) for line in lines) > CONNECTIONS
