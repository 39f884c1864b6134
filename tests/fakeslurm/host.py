"""The simulated batch script on its nodes: the real owner of the job (``jobs.host.job``), its guard, and the fallback
of the script (``jobs/slurm/fallback.sh``) in Python.

tests/jobs/slurm/test_batch_script.py tests the script itself, against golden files and in a real bash.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
from dataclasses import dataclass, field
from pathlib import Path

from flip.runs.errors import STORAGE
from flip.runs.next_step import MAX_FAILED_STARTS
from flip.runs.rundir import RunDir
from jobs.host import failed_starts, own_job, requeue, slurm_cli
from jobs.host.agents.channel import new_key, publish
from jobs.host.job import JobOptions, Owner
from jobs.host.scheduler import SlurmScheduler
from tests.fakeslurm.agents import AgentServer, AgentsStep
from tests.fakeslurm.clock import Process

FOREVER = 1e12
FALLBACK_TRIES = 1440
FALLBACK_SECONDS = 30.0


@dataclass
class Script:
    """The options of a submitted batch script that a life of the job needs."""

    folder: Path
    """RUNS_ROOT/<sweep>/.slurm/<token>."""
    ranks_per_node: int
    peer_seconds: float
    agents: bool = False
    """Whether node agents start the ranks."""
    text: str = ""

    @classmethod
    def read(cls, text):
        """Parse a batch script; returns keywords for ``Controller.submit``."""
        options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
        folder = re.search(r"^ *log=(\S+)/\$id$", text, re.MULTILINE)[1].strip("'")
        least, _, most = options["nodes"].rpartition("-")
        array = re.match(r"0-(\d+)", options.get("array", ""))
        owner = re.search(r"^exec .*/jobs/host/job\.py.*$", text, re.MULTILINE)[0]
        peers = float(re.search(r"--peer-seconds (\S+)", owner)[1])
        script = cls(Path(folder), int(options["ntasks-per-node"]), peers, "--agents" in owner, text)
        return {
            "name": options["job-name"],
            "nodes_wanted": int(most),
            "least_nodes": int(least or 0),
            "no_kill": "no-kill" in options,
            "limit": 60.0 * int(options["time"]),
            "lead": float(options["signal"].partition("@")[2]),
            "script": script,
            "held": "hold" in options,
            "elements": int(array[1]) + 1 if array else None,
            "later": float(options.get("begin", "now+0").partition("+")[2]),
            "gpus": int(options.get("gpus-per-node", 0)),
        }

    def run(self, index):
        return Path((self.folder / "runs").read_text().splitlines()[index or 0])


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
        self.listener = Listener()
        self.owner = None
        self.step = None
        """The process of srun, as the owner knows it."""
        self.usable = [len(job.nodes)]
        """Numbers of nodes on which it can train, ascending."""
        self.canary = False
        """Whether others are held until it has passed."""
        self._owner_process = None
        self._guard = None
        self._processes = []
        self._over = False
        self.events = []
        """(time, what) that happened to it, known only to the simulation."""
        self.born = self.clock.now
        self.through = float("inf")
        """When its owner had nothing left to do."""
        self.left = float("inf")
        """When its job left the nodes."""
        self.deserted = False
        """Whether no task was left to requeue the job when it had lost its first node."""
        self.alone = False
        """Whether its wall limit came while Slurm had not yet found that its node is away."""
        self.cut_off = False
        """Whether preemption cancelled its job while its first node could not reach Slurm."""
        self._has_batch_step = True
        self._storage = storage or (lambda life: contextlib.nullcontext())
        self.clock.at(0.2, self._start)

    @property
    def unseen(self):
        """Whether its owner has not finished."""
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
        return self.nodes[: self.usable[-1]]

    @property
    def has_srun(self):
        return self.host.alive and self._has_batch_step and not self._over

    # -- the script --------------------------------------------------------------------------------------------------

    def _environ(self, node):
        job = self.job
        environ = {"SLURM_JOB_ID": str(job.id), "SLURM_JOB_NAME": job.name, "SLURMD_NODENAME": node.name}
        environ["SLURM_NTASKS"] = str(len(self.nodes) * self.script.ranks_per_node)
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

    def _start(self):
        if not self._over:
            self._process("shell", self._access_folder, self._opened)

    def _access_folder(self):
        """Access the folder of the script's log, which may be unavailable."""
        (self.script.folder / "runs").stat()
        return 0

    def _opened(self, code, out):
        if code:
            self._process("shell", lambda: self._elsewhere(code), lambda *_: self._done(code))
        else:
            self._owner_process = self._process("owner", self._own, self._owner_ended)

    def _own(self):
        """The program jobs/host/job.py."""
        script = self.script
        options = JobOptions(script.folder.name, script.agents, script.peer_seconds)
        make_guard = functools.partial(SimulatedGuard, self)
        owner = Owner(RunDir(self.path), options, SimulatedScheduler(self), make_guard, self._serve_agents)
        self.owner = owner
        return owner.serve()

    def _serve_agents(self, coordinator, contact, place, log):
        publish(contact, "", 10000, new_key())
        return AgentServer(self, coordinator)

    def start_step(self, kind, count):
        """``bash SCRIPT step KIND COUNT``."""
        self.usable = self.owner.nodes.usable
        self.canary = bool(self.owner.canary.due < FOREVER)
        self.step = Step(self)
        run = RunDir(self.path)
        if kind == "agents":
            self.body = AgentsStep(self, run, self.step.ended)
        else:
            self.body = self._make(self, run, self.attempt, self.step.ended)
        return self.step

    def _elsewhere(self, code):
        """The function of this name in jobs/slurm/fallback.sh."""
        job = own_job.own_job(os.environ)
        for _ in range(FALLBACK_TRIES):
            try:
                fields = slurm_cli.job_fields(job)
                if fields["JobState"] != "RUNNING" or own_job.state_of(fields, self.restarts) != "RUNNING":
                    return code
                before = failed_starts.before(fields, self.restarts)
                if before.starts >= MAX_FAILED_STARTS:
                    return code
                failed = before._replace(starts=before.starts + 1, code=code, node=self.host.name)
                slurm_cli.call("scontrol", "update", "JobId=" + job, "Comment=" + failed.comment(self.restarts))
                slurm_cli.call("scontrol", "requeue", job)
                break
            except slurm_cli.RequeueDisabled:
                return code
            except slurm_cli.SlurmUnavailable:
                self.clock.sleep(FALLBACK_SECONDS)
        else:
            return code
        updates = [f"StartTime=now+{60 * before.starts}"]
        if requeue.affordable(fields, [self.host.name]):
            updates.append("ExcNodeList=" + self.host.name)
        with contextlib.suppress(slurm_cli.SlurmUnavailable):
            slurm_cli.call("scontrol", "update", "JobId=" + job, *updates)
        return code

    def _owner_ended(self, code, out):
        """The owner has ended by itself: the batch script has, too."""
        self.through = self.clock.now
        if code == STORAGE:  # it could not write the end
            self.happened("storage")
        self._guard.owner_ended()
        self._done(code)

    def _done(self, code, killed=False):
        if not self._over:
            self._over = True
            self.controller.batch_done(self, code, killed)

    # -- what comes from outside -------------------------------------------------------------------------------------

    def signal_steps(self, name):
        if self.body is not None:
            self.body.signal(name, {node.name for node in self.nodes if node.alive and node.reachable})

    def signal_shell(self, name, full):
        """Signal the owner, which passes the signal on. ``full``: the ranks also get it directly."""
        self.happened("warned")
        self._signal_owner(name)
        if full:
            self.signal_steps(name)

    def _signal_owner(self, name):
        if self.owner is None:
            return
        number = getattr(signal, f"SIG{name}")
        if self._owner_process.alive and number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            self.owner.on_signal(number)
            self._owner_process.look_up()

    @property
    def is_owned(self):
        """Whether its owner runs."""
        return self.owner is not None and self._owner_process.alive

    @property
    def has_coordinator(self):
        return self.listener.server is not None

    def kill_owner(self):
        """Send SIGKILL to the owner: its connections end, and Slurm notices that the batch script is gone."""
        if not self._owner_process or not self._owner_process.alive:
            return
        self.happened("owner")
        self._owner_process.kill()
        if self.listener.server is not None:
            self.listener.server.vanish()
        self._guard.owner_ended()
        self.controller.shell_killed(self.job)

    def kill_guard(self):
        """Send SIGKILL to the guard: the owner forks another one."""
        self._guard.kill()

    def kill_batch_step(self):
        """Kill the owner, its guard and srun at once, as cgroups do: the node lives, and so do the tasks of agents."""
        self.happened("batch step")
        self._has_batch_step = False
        for process in self._processes:
            if process.alive and process.about.by != "task":
                process.kill()
        if self.listener.server is not None:
            self.listener.server.vanish()
        if self.job.state == "RUNNING":
            self.controller.shell_killed(self.job)

    def end(self):
        """Send TERM to all processes."""
        self.signal_steps("TERM")
        self._signal_owner("TERM")
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
        if self.host in nodes and self.listener.server is not None:
            self.listener.server.vanish()


class Listener:
    """Where agents find the server of their owner."""

    server = None


class Step:
    """In place of subprocess.Popen for srun."""

    def __init__(self, life):
        self._life = life
        self._code = None

    def poll(self):
        return self._code

    def wait(self, seconds):
        """While srun runs, nothing happens without an event until something is due."""
        if self._code is None:
            due = self._life.owner.next_due() - self._life.clock.now
            self._life.clock.current.doze(max(seconds, min(due, FOREVER)))

    def send_signal(self, number):
        self._life.signal_steps(signal.Signals(number).name[3:])

    def kill(self):
        self._life.body.kill_srun()

    def ended(self, code):
        """srun has returned."""
        self._code = code
        if self._life._owner_process.alive:
            self._life._owner_process.look_up()
        else:  # the last process of a job whose batch script was killed
            self._life._done(code, killed=True)


class SimulatedScheduler(SlurmScheduler):
    """The simulated Slurm by its commands, and steps that it simulates."""

    def __init__(self, life):
        super().__init__()
        self._life = life

    def place_for_agents(self, nodes):
        return "", 0

    def end_leftovers(self, path, n):
        """Nothing of the simulation is a process of this host."""
        self._life.attempt = n

    def pause(self, seconds):
        self._life.clock.current.doze(seconds)

    def start_step(self, argv, environ, logs, name="job"):
        return self._life.start_step(argv[3], int(argv[4]))


class SimulatedGuard:
    """In place of ``jobs.host.guard.Guard``: a process of the simulated clock."""

    def __init__(self, life, on_gone, on_silent):
        self._life = life
        self._on_gone = on_gone
        self._facts = {}
        self._is_owner_gone = False
        life._guard = self
        self._fork()

    def say(self, **facts):
        self.beat()
        self._facts.update({name: str(value) for name, value in facts.items()})

    def beat(self):
        if not self._process.alive:
            self._fork()

    def hurry(self):
        """The simulated owner never hangs."""

    def kill(self):
        if self._process.alive:
            self._process.kill()

    def owner_ended(self):
        self._is_owner_gone = True
        if self._process.alive:
            self._process.look_up()

    def _fork(self):
        self._process = self._life._process("guard", self._serve, lambda code, out: None)

    def _serve(self):
        while not self._is_owner_gone:
            self._life.clock.current.doze(FOREVER)
        if self._facts.get("over") != "1":
            self._on_gone(self._facts)
