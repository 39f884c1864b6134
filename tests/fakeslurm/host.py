"""The simulated batch script on its nodes: the lines of ``jobs.slurm.batch_script`` in Python, with calls of the real
``jobs.host.batch_hooks``.

tests/jobs/slurm/test_batch_script.py tests the script itself, against golden files and in a real bash.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from flip.runs.errors import STORAGE
from flip.runs.rundir import RunDir
from jobs.host import batch_hooks
from jobs.host.agents.channel import CONTACT
from jobs.host.agents.coordinator import NO_AGENTS
from tests.fakeslurm.agents import AgentsStep
from tests.fakeslurm.clock import Process

CONTACT_TRIES = 100
"""Looks for the coordinator of the agents, every 0.1 s: ten seconds, as in jobs/slurm/agent_functions.sh."""


@dataclass
class Script:
    """The options of a submitted batch script that a life of the job needs."""

    folder: Path
    """RUNS_ROOT/<sweep>/.slurm/<token>."""
    usable: list
    """Numbers of nodes on which it can train, descending."""
    ranks_per_node: int
    peer_seconds: float
    canary: bool = False
    """Whether others are held until it has passed."""
    agents: bool = False
    """Whether node agents start the ranks."""
    text: str = ""

    @classmethod
    def read(cls, text):
        """Parse a batch script; returns keywords for ``Controller.submit``."""
        options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
        folder = re.search(r"^log=(\S+)/\$id$", text, re.MULTILINE)[1].strip("'")
        least, _, most = options["nodes"].rpartition("-")
        sizes = re.search(r"^for nodes in ([\d ]+); do", text, re.MULTILINE)
        usable = [int(count) for count in (sizes[1] if sizes else most).split()]
        array = re.match(r"0-(\d+)", options.get("array", ""))
        agents = re.search(r"--agents \S+ --peer-seconds (\d+)", text)
        peers = float((agents or re.search(r"--wait=(\d+)", text))[1])
        canary = "releaser=$!" in text
        return {
            "name": options["job-name"],
            "nodes_wanted": int(most),
            "least_nodes": int(least or 0),
            "no_kill": "no-kill" in options,
            "limit": 60.0 * int(options["time"]),
            "lead": float(options["signal"].partition("@")[2]),
            "script": cls(Path(folder), usable, int(options["ntasks-per-node"]), peers, canary, bool(agents), text),
            "held": "hold" in options,
            "elements": int(array[1]) + 1 if array else None,
            "later": float(options.get("begin", "now+0").partition("+")[2]),
            "gpus": int(options.get("gpus-per-node", 0)),
        }

    def run(self, index):
        return Path((self.folder / "runs").read_text().splitlines()[index or 0])

    def size(self, nodes):
        """On how many of this number of nodes it trains."""
        return next((count for count in self.usable if count <= nodes), self.usable[-1])


@dataclass
class Place:
    """The caller of a command: a process of a life, on one of its nodes."""

    life: object
    by: str
    node: object

    @property
    def reachable(self):
        return self.node.reachable


@dataclass(eq=False)
class WonAttempt:
    """An attempt that a life has won, as the simulation saw it."""

    n: int
    began: float
    ended: float
    """When the last of its ranks ended; ``began`` if it had none."""
    events: list
    """What happened to it."""
    first: int | None = None
    """S at which its training started; None: it did not."""
    trained: float = 0.0
    """When its training started."""
    ranks: list = field(default_factory=list)
    """Numbers of the ranks that agents have started."""
    world: int = 0
    """W of these ranks."""


class Life:
    """One start of a job on nodes.

    ``body(life, run, n, over)`` creates its ranks; srun's end calls ``over(code)``. ``agent_ranks(life, run, n)``
    creates those of an attempt that agents start. ``loss_seconds()``: until connections to a lost node break.
    """

    def __init__(self, controller, job, body, storage=None, agent_ranks=None, loss_seconds=lambda: 0.0):
        self.controller = controller
        self.clock = controller.clock
        self.job = job
        self._make = body
        self.agent_ranks = agent_ranks
        self.loss_seconds = loss_seconds
        self.nodes = list(job.nodes)
        self.host = job.nodes[0]
        self.script = job.script
        self.restarts = job.restarts
        self.path = job.script.run(job.index)
        self.attempt = None
        """The first one."""
        self.won_attempts = []
        self.body = None
        self.listener = None
        """Where the coordinator of its agents can be reached."""
        self.agents_code = None
        """What the watcher has said to the shell of the end of the agents."""
        self._processes = []
        self._over = False
        self.events = []
        """(time, what) that happened to it, known only to the simulation."""
        self.born = self.clock.now
        self.through = float("inf")
        """When its exit trap was through."""
        self.left = float("inf")
        """When its job left the nodes."""
        self.deserted = False
        """Whether no task was left to requeue the job when it had lost its first node."""
        self.alone = False
        """Whether its wall limit came while Slurm had not yet found that its node is away."""
        self.cut_off = False
        """Whether preemption cancelled its job while its first node could not reach Slurm."""
        self._shell = True
        self._storage = storage or (lambda life: contextlib.nullcontext())
        self._resting = None
        self.clock.at(0.2, self._start)

    @property
    def unseen(self):
        """Whether its exit trap has not finished."""
        return self.through == float("inf")

    def happened(self, event):
        self.events.append((self.clock.now, event))
        if self.won_attempts:
            self.won_attempts[-1].events.append(event)

    def won(self, n):
        """A process of this life has won an attempt. What happened before belongs to the first one."""
        events = []
        if not self.won_attempts:
            events = [event for _, event in self.events]
        self.won_attempts.append(WonAttempt(n, self.clock.now, self.clock.now, events))

    def attempt_of(self, n):
        return next(attempt for attempt in self.won_attempts if attempt.n == n)

    @property
    def used_nodes(self):
        """Those on which srun starts ranks."""
        return self.nodes[: self.script.size(len(self.nodes))]

    @property
    def has_srun(self):
        return self.host.alive and not self._over

    # -- the script --------------------------------------------------------------------------------------------------

    def _environ(self, node):
        job = self.job
        environ = {"SLURM_JOB_ID": str(job.id), "SLURM_JOB_NAME": job.name, "SLURMD_NODENAME": node.name}
        environ["SLURM_NTASKS"] = str(len(self.used_nodes) * self.script.ranks_per_node)
        environ["SLURM_JOB_NODELIST"] = ",".join(each.name for each in self.nodes)
        environ["SLURM_JOB_NUM_NODES"] = str(len(self.nodes))
        if job.index is not None:
            environ |= {"SLURM_ARRAY_JOB_ID": str(job.array), "SLURM_ARRAY_TASK_ID": str(job.index)}
        if self.restarts:
            environ["SLURM_RESTART_COUNT"] = str(self.restarts)
        if job.follows:
            environ["FLIP_FOLLOWS"] = job.follows
        return environ

    def _process(self, by, do, over, node=None, **environ):
        node = node or self.host
        place = Place(self, by, node)
        process = Process(self.clock, do, self._environ(node) | environ, over, lambda: self._storage(self), place)
        self._processes.append(process)
        return process

    def task_process(self, node, do, over):
        """A process of the task on a node."""
        index = self.nodes.index(node)
        return self._process("task", do, over, node, SLURM_NODEID=str(index), FLIP_RUN=str(self.path))

    def processes_of(self, by):
        return [process for process in self._processes if process.about.by == by]

    def _python(self, by, over, command, **options):
        """Start ``python jobs/host/batch_hooks.py COMMAND RUN ...``."""
        fields = {"token": None, "attempt": self.attempt, "code": None, "state": None, "shell": None, "agents": None}
        fields["peer_seconds"] = None
        args = argparse.Namespace(what=command, run=str(self.path), **{**fields, **options})
        return self._process(by, lambda: batch_hooks.act(args, self._wait), over)

    def _wait(self, seconds):
        """Wait as the watcher does: TERM wakes it."""
        self._resting = self.clock.current
        self._resting.wait(seconds)
        self._resting = None

    def _start(self):
        if not self._over:
            self._process("shell", self._access_folder, self._opened)

    def _access_folder(self):
        """Access the folder of the script's log, which may be unavailable."""
        (self.script.folder / "runs").stat()
        return 0

    def _opened(self, code, out):
        if code:
            self._requeue_elsewhere(code)
        else:
            self._python("begin", self._begun, "begin", token=self.script.folder.name)

    def _begun(self, code, out):
        if code in (1, 2, 4, 126, 127, *range(130, 140)):
            self._requeue_elsewhere(code)
        elif code or not out.strip():
            self._done(code)
        else:
            self.attempt = int(out)
            options = {}
            if self.script.agents:
                options = {"agents": 0, "peer_seconds": self.script.peer_seconds}
            self._side_processes = [self._python("watcher", lambda code, out: None, "watch", **options)]
            if self.script.canary:
                self._side_processes.append(self._python("releaser", lambda code, out: None, "release"))
            if self.script.agents:
                self._start_agents()
            else:
                self._start_ranks()

    def _start_ranks(self):
        self.body = self._make(self, RunDir(self.path), self.attempt, self._srun_ended)

    def _start_agents(self, tries=CONTACT_TRIES):
        """The function srun of agent_functions.sh."""
        if self._over:
            return
        contact = RunDir(self.path).attempt(self.attempt) / CONTACT
        if contact.exists():
            self.body = AgentsStep(self, RunDir(self.path), self._agents_ended)
        elif tries:
            self.clock.at(0.1, self._start_agents, tries - 1)
        else:
            self._start_ranks()

    def _agents_ended(self, code):
        if self.agents_code is not None:
            code = self.agents_code
        unused = self.body.ranks is None and not (RunDir(self.path).attempt(self.attempt) / "end.json").exists()
        if code == NO_AGENTS and unused and not self._over:
            (RunDir(self.path).attempt(self.attempt) / CONTACT).unlink()
            self._start_ranks()
        else:
            self._srun_ended(code)

    def _requeue_elsewhere(self, code):
        """The function of this name in batch_functions.sh; tests/slurm/test_requeue.py shows that its twin is equal."""
        self._process("shell", lambda: batch_hooks.restart_later(code, leave_node=True), lambda *_: self._done(code))

    def _srun_ended(self, code):
        def exit_trap_ended(trap_code, _):
            self.through = self.clock.now
            if trap_code == STORAGE:  # the exit trap could not write the end
                self.happened("storage")
            for process in self._side_processes:
                if process.alive:
                    process.kill()
            self._done(code)

        if self._over:
            return
        if not self._shell:
            self._done(code, killed=True)
        else:
            self._python("trap", exit_trap_ended, "end", code=code)

    def _done(self, code, killed=False):
        if not self._over:
            self._over = True
            self.controller.batch_done(self, code, killed)

    # -- what comes from outside -------------------------------------------------------------------------------------

    def signal_steps(self, name):
        if self.body is not None:
            self.body.signal(name, {node.name for node in self.nodes if node.alive and node.reachable})

    def signal_shell(self, name, full):
        """Signal the shell, which forwards the signal to the ranks. ``full``: the ranks also get it directly."""
        self.happened("warned")
        for sent in {"USR1" if name == "TERM" else "USR2", *([name] if full else [])}:
            self.signal_steps(sent)

    @property
    def has_coordinator(self):
        return self.listener is not None and self.listener.server is not None

    def kill_coordinator(self):
        """Kill the watcher, and with it the coordinator of the agents."""
        self.happened("coordinator")
        self._side_processes[0].kill()

    def kill_shell(self):
        """Send SIGKILL to the batch shell alone: its exit trap does not run, and the watcher continues."""
        self.happened("shell")
        self._shell = False
        self.controller.shell_killed(self.job)
        for process in self._side_processes:
            process.interrupt(batch_hooks.ShellGone())

    def end(self):
        """Send TERM to all processes. The shell survives it."""
        self.signal_steps("TERM")
        if self._resting is not None and self._resting.alive:
            self._resting.wake()
        if self.body is not None:
            self.body.node_down({node.name for node in self.nodes if not node.up})

    def kill(self):
        """Send KILL to all processes on reachable nodes."""
        reached = [node for node in self.nodes if node.alive and node.reachable]
        if self.body is not None:
            self.body.kill({node.name for node in reached})
        self._end_processes(reached)
        if self.host in reached and not self._over:
            self._done(137, killed=True)
        else:
            self.controller.detached(self)

    def abort(self, node):
        """Kill all processes on a node that registers again after it was down."""
        if self.script.agents:
            self.happened("task")
        if self.body is not None:
            self.body.kill({node.name})
        self._end_processes([node])
        if node is self.host:
            if node in self.job.nodes:
                self._done(137, killed=True)
            self._over = True  # of a job that goes on without the node, Slurm learns of no end
            self._note_desertion()

    def node_down(self, node):
        """The job goes on without a node."""
        if self.body is not None:
            self.body.node_down({node.name})

    def lose(self, node):
        # of a job that knows its nodes, the controller records the event when it detects it
        if self.script.agents or self.controller.jobs.get(self.job.id) is not self.job:
            self.happened("node")
        if node is self.host:
            self._over = True
        if self.body is not None:
            self.body.lose(node.name)
        self._end_processes([node])
        if node is self.host:
            self._note_desertion()

    def _note_desertion(self):
        tasks = getattr(self.body, "agents", ())
        self.deserted = not any(task.code is None and task.node is not self.host for task in tasks)

    def _end_processes(self, nodes):
        for process in list(self._processes):
            if process.alive and process.about.node in nodes:
                process.kill()
