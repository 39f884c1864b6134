"""A job with real node agents and ranks: its owner runs in a thread of the test, and a test writes what Slurm answers.

``AgentJob`` starts the tasks of its nodes, n7, n8, ..., where srun would.
"""

import os
import signal
import threading
from pathlib import Path

from flip.runs.rundir import read_json, write_json
from jobs.host import rank_entry
from jobs.host.agents.channel import listen
from jobs.host.failed_starts import FailedStarts
from jobs.host.job import JobOptions, Owner
from jobs.host.scheduler import RUNNING, JobSeen, Scheduler
from tests.harness.common import wait_until
from tests.harness.job_records import write_job
from tests.jobs.host.agents.task import end_task, processes_of, start_task

DAY = 86400
ON_NODES = JobSeen(RUNNING, limit=DAY, seconds_left=DAY - 600.0, failed=FailedStarts())


class Guard:
    """In place of ``jobs.host.guard.Guard``: nothing kills a thread."""

    def __init__(self, on_gone, on_silent):
        self.facts = {}

    def say(self, **facts):
        self.facts.update(facts)

    def beat(self):
        """Nothing listens."""

    def hurry(self):
        """Nothing listens."""


class Tasks:
    """The step of the agents, as srun: its code is the highest of its tasks. ``lives``: it does not end with them."""

    pid = 4711

    def __init__(self, tasks, lives=False):
        self.tasks = tasks
        self.lives = lives
        self.killed = False

    def poll(self):
        codes = [task.poll() for task in self.tasks]
        if self.killed:
            return -signal.SIGKILL
        if self.lives or None in codes:
            return None
        return max(codes)

    def send_signal(self, number):
        for task in self.tasks:
            if task.poll() is None:
                task.send_signal(number)

    def kill(self):
        self.killed = True


class Ranks:
    """A step whose ranks srun has started: it has ended."""

    pid = 4712

    def poll(self):
        return 70


class WrittenScheduler(Scheduler):
    """What Slurm shows of the job is written by a test."""

    def __init__(self, job):
        self._job = job
        self.seen = ON_NODES
        self.answers = []
        """Those to the next looks, in place of ``seen``."""
        self.held = None
        """Names of the nodes of the job."""
        self.requeues = []
        self.looks = 0

    def see(self, deadline=30.0):
        self.looks += 1
        return self.answers.pop(0) if self.answers else self.seen

    def requeue(self, delay, exclude, attempt, urgent=False, failed=None):
        living = len(processes_of(self._job.run))
        self.requeues.append(dict(delay=delay, exclude=exclude, attempt=attempt, urgent=urgent, living=living))
        return "requeued"

    def held_nodes(self, seen):
        return self.held

    def end_leftovers(self, path, n):
        """None is left."""

    def place_for_agents(self, nodes):
        port = listen("127.0.0.1", *rank_entry.PORTS)
        try:
            return port.getsockname()[:2]
        finally:
            port.close()

    def start_step(self, argv, environ, logs, name="job"):
        return self._job.start_step(argv[3], int(argv[4]))


class ImpatientOwner(Owner):
    """It notes long pauses in ``pauses`` instead, and calls ``meanwhile``."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.pauses = []
        self.meanwhile = lambda: None

    def pause(self, seconds):
        if seconds >= 10:
            self.pauses.append(seconds)
            self.meanwhile()
        else:
            super().pause(seconds)


class AgentJob:
    """A start of job 57 on ``nodes`` nodes; ``record``: job.json. ``environ``: of the first task, beside the usual.

    ``absent``: numbers of nodes whose tasks do not start.
    """

    def __init__(self, run, nodes=1, record=None, absent=(), lives=False, **environ):
        self.run = run
        self.absent = absent
        self.lives = lives
        self.environ = environ
        self.tasks = []
        self.steps = []
        self.code = None
        write_job(run, nodes, max(2, nodes) // nodes, **(record or {}))
        self.scheduler = WrittenScheduler(self)
        self.nodes = nodes
        self.owner = ImpatientOwner(run, JobOptions("t", True, 20.0, (), "/nowhere/script"), self.scheduler, Guard)
        self.thread = threading.Thread(target=self._serve, daemon=True)

    def start(self):
        self.thread.start()
        return self

    def _serve(self):
        self.code = self.owner.serve()

    def start_step(self, kind, count):
        self.steps.append((kind, count))
        if kind != "agents":
            return Ranks()
        for index in range(count):
            if index not in self.absent:
                environ = self.environ if index == 0 else {}
                self.tasks.append(start_task(self.run, f"n{7 + index}", index, **environ))
        return Tasks(self.tasks, self.lives)

    def until(self, condition, event="an event of the job", seconds=60.0):
        return wait_until(condition, event, seconds, 0.02, self.log)

    def ranks(self, n, world=2):
        """The records of the ranks of attempt n, when they have started."""
        files = [self.run.path / f"rank.{n}.{rank}" for rank in range(world)]
        self.until(lambda: all(file.exists() for file in files), f"the ranks of attempt {n}")
        return [read_json(file) for file in files]

    def kill(self, n, world=2):
        """Kill the last rank of attempt n."""
        os.kill(self.ranks(n, world)[-1]["pid"], signal.SIGKILL)

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

    def end(self):
        """Wait for the end of the owner; returns its exit code."""
        self.thread.join(90)
        assert not self.thread.is_alive(), self.log()
        self.until(lambda: processes_of(self.run) == [], "the end of all processes")
        return self.code

    def ends(self):
        rows = [read_json(self.run.attempt(n) / "end.json") for n in self.run.attempt_numbers()]
        return [row and row["cause"] for row in rows]

    def record_of_end(self, n):
        return read_json(self.run.attempt(n) / "end.json")

    def log(self, n=1, name="job.err"):
        path = self.run.logs / str(n) / name
        return path.read_text() if path.exists() else ""

    def close(self):
        self.owner.limit.due = self.owner.canary.due = float("inf")
        for task in self.tasks:
            end_task(task, self.run)
        self.thread.join(30)


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def finish(run, code, world=2):
    """Let all ranks end with a code."""
    for rank in range(world):
        write_json(run.path / f"end.{rank}", code)
