"""A sweep on a simulated cluster with all kinds of faults, and a user who resubmits it from time to time."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

from flip.config.schema import Config
from flip.runs.errors import FlipError
from flip.runs.rundir import RunDir, create_json, write_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job, JobResources
from jobs.host.agents.channel import UNANSWERED_SECONDS
from jobs.host.agents.entry import STOPPED_SECONDS
from jobs.host.slurm_cli import OUTAGE_SECONDS
from jobs.slurm.backend import SlurmBackend
from jobs.submission import apply
from jobs.submission import plan as planning
from jobs.submitted_runs.clusters import states
from jobs.workloads.training import TrainingWorkload
from tests.fakeslurm.agent_trainer import AgentTrainer
from tests.fakeslurm.agents import AgentsStep
from tests.fakeslurm.clock import Clock, Process
from tests.fakeslurm.commands import Commands
from tests.fakeslurm.controller import Controller
from tests.fakeslurm.host import Life
from tests.fakeslurm.seams import in_place
from tests.fakeslurm.site import Site
from tests.fakeslurm.storage import trouble
from tests.fakeslurm.trainer import BATCH, CANARY, Run, Trainer
from tests.fakeslurm.verdicts import EXCUSED
from tests.harness.job_records import write_formats

MINUTE = 60.0
HOUR = 3600.0
DAY = 86400.0
HOURS = 72.0
"""The wall limit."""
EVENTS = ("preemption", "node_lost", "node_cut_off", "controller_away", "storage", "reset", "touched", "cancelled")
EVENTS += ("owner_killed", "guard_killed", "batch_step_killed")
AGENT_EVENTS = ("agent_killed", "task_killed")
OVER = ("complete", "failed", "cancelled")
STUCK = re.compile(r"its canary (\w+) is ")


@dataclass
class Weather:
    """Mean days between two events of the whole cluster, or of a node or a run where stated."""

    preemption: float = 4.0
    """Per node."""
    node_lost: float = 4.0
    node_cut_off: float = 8.0
    controller_away: float = 6.0
    storage: float = 8.0
    outages: tuple = (2 * MINUTE, 30 * MINUTE, 2 * HOUR)
    """How long storage is away or full, about; seconds."""
    reset: float = 20.0
    """The controller loses its state: no jobs, and their numbers begin again at 1."""
    touched: float = 10.0
    """Somebody requeues a job by hand."""
    cancelled: float = 10.0
    bad_call: float = 0.02
    """Share of commands that Slurm does not answer, refuses, or whose answer is lost."""
    fates: dict = field(default_factory=lambda: {
        "crash": 25.0, "oom": 40.0, "hang": 60.0, "data": 300.0, "diverged": 300.0, "config": 300.0,
        "permission": 300.0,
    })  # fmt: skip
    """Per run."""
    ports: float = 0.01
    """Share of starts that find their port taken."""
    agent_killed: float = 3.0
    task_killed: float = 12.0
    owner_killed: float = 8.0
    guard_killed: float = 16.0
    batch_step_killed: float = float("inf")
    agent_fates: dict = field(default_factory=lambda: {"killed": 10.0, "frozen": 20.0})
    """As ``fates``, further ones of runs with node agents."""


class World:
    """``folder``: RUNS_ROOT/<sweep>. ``calm``: the day after which no faults occur. ``agents``: whether node agents
    start the ranks; then runs have spare nodes and ranges of nodes, too."""

    def __init__(self, folder, seed, runs=200, nodes=40, calm=330.0, weather=None, agents=False):
        self.rng = random.Random(seed)
        self.clock = Clock()
        self.folder = folder
        self.weather = weather or Weather()
        self.agents = agents
        self.calm = calm * DAY
        rng = self.rng
        site = Site(
            user_signal=rng.random() < 0.7, grace=rng.choice([0.0, 30.0, 300.0]),
            mode=rng.choice(["REQUEUE", "REQUEUE", "CANCEL"]), kill_wait=30.0, node_timeout=300.0,
        )  # fmt: skip
        names = [f"n{i}" for i in range(1, nodes + 1)]
        self.controller = Controller(self.clock, site, names, self._life, rng)
        self.controller.asleep = lambda: self.away in ("silent", "refused")
        self.commands = Commands(self.clock, self.controller, self._trouble, latency=0.05)
        self.likes = {f"run{i:03d}": self._like(i) for i in range(runs)}
        self.bodies = {}
        self.lives = []
        self.checkpoints = {}
        self.away = ""
        self.storage_kind = ""
        self.outages = []
        """(start, end) of those of storage."""
        self.over = False
        self.cancelled = set()
        self.errors = []
        self.orders = []
        self.excuses = []
        self.behind = set()
        """(time, run) of orders for runs whose canary had stopped: it takes a person to go on."""
        write_formats(folder / ".code")
        for name in self.likes:
            run = RunDir(folder / name)
            run.path.mkdir(parents=True)
            write_json(run.identity, {"hash": name, "schema": 2})

    def _like(self, number):
        rng = self.rng
        step = rng.uniform(2.0, 15.0)
        total = int(rng.uniform(0.5, 8.0) * DAY / step) * BATCH
        like = Run(
            total, nodes=rng.choice([1, 1, 1, 2]), startup=rng.uniform(60.0, 400.0), step=step, save=rng.uniform(5, 80)
        )
        if number % 20 == 3:
            like.save = 200.0  # its save takes longer than the warning time
        if number % 40 == 7:
            like.bug = int(rng.uniform(0.1, 0.9) * total)
        if number % 100 == 13:
            like.killer = True
            like.nodes = 1
        elif self.agents:
            self._make_elastic(like, number)
        return like

    def _make_elastic(self, like, number):
        """Of four runs, one has a spare node, and one a range of nodes."""
        if number % 4 == 1:
            like.nodes = 2
            like.spares = 1
        elif number % 4 == 2:
            like.nodes = 2
            like.least_nodes = 1

    # -- parts of jobs -----------------------------------------------------------------------------------------------

    def run(self, name):
        return RunDir(self.folder / name)

    def _life(self, controller, job):
        life = Life(controller, job, self._body, self.storage, self._agent_ranks, self._loss_seconds)
        self.lives.append(life)
        self.clock.at(0.15, self._catch_up, life.path.name)
        return life

    def _catch_up(self, name):
        for body in list(self.bodies.get(name, ())):
            body._catch_up_quietly()

    def _body(self, life, run, n, over):
        self._let_older_look(run)
        return Trainer(self, life, run, n, over)

    def _agent_ranks(self, life, run, n):
        self._let_older_look(run)
        return AgentTrainer(self, life, run, n)

    def _let_older_look(self, run):
        for older in self.bodies.get(run.name, ()):
            self.clock.at(older.like.step, older.look)

    def _loss_seconds(self):
        """A node that is lost may end its connections, or not."""
        return self.rng.choice([0.0, UNANSWERED_SECONDS])

    def storage(self, life):
        return trouble(self.folder, self.storage_kind)

    def fate(self, body):
        """(seconds, kind) of the next fault of the run itself."""
        if self.clock.now > self.calm:
            return 1e12, "nothing"
        if self.rng.random() < self.weather.ports:
            return 1.0, "port"
        fates = dict(self.weather.fates)
        if self.agents:
            fates |= self.weather.agent_fates
        return min((self.rng.expovariate(1 / (days * DAY)), kind) for kind, days in fates.items())

    # -- faults ------------------------------------------------------------------------------------------------------

    def start(self):
        self.clock.at(0.0, self._check_in)
        for event in EVENTS:
            self._next(event)
        for event in AGENT_EVENTS if self.agents else ():
            self._next(event)

    def _next(self, event):
        days = getattr(self.weather, event) / (len(self.controller.nodes) if event == "preemption" else 1)
        if days == float("inf"):
            return
        self.clock.at(self.rng.expovariate(1 / (days * DAY)), self._strike, event)

    def _strike(self, event):
        if self.clock.now < self.calm:
            getattr(self, f"_{event}")()
            self._next(event)

    def _preemption(self):
        busy = [node.name for node in self.controller.nodes.values() if node.up and node.job and node.job.script]
        chosen = self.rng.sample(busy, min(len(busy), self.rng.choice([1, 1, 1, 1, 3])))
        if chosen:
            seconds = self.rng.expovariate(1 / (4 * HOUR))
            self.controller.submit(
                name="high", nodes_wanted=len(chosen), limit=DAY, seconds=seconds, nodelist=tuple(chosen)
            )

    def _node_lost(self):
        self.lose(self.rng.choice(list(self.controller.nodes)), self.rng.expovariate(1 / (8 * HOUR)))

    def lose(self, name, seconds=HOUR):
        if self.controller.nodes[name].alive and self.controller.nodes[name].reachable:
            self.controller.lose(name)
            self.clock.at(20 * MINUTE + seconds, self.controller.bring_back, name)

    def _node_cut_off(self):
        name = self.rng.choice(list(self.controller.nodes))
        if self.controller.nodes[name].alive and self.controller.nodes[name].reachable:
            self.controller.cut_off(name)
            self.clock.at(self.rng.expovariate(1 / (2 * HOUR)), self.controller.bring_back, name)

    def _controller_away(self):
        self.away = self.rng.choice(["silent", "refused", "empty"])
        seconds = self.rng.choice([5 * MINUTE, 40 * MINUTE, 3 * HOUR, 16 * HOUR]) * self.rng.uniform(0.5, 1.2)
        jobs = self.controller.jobs.values()
        ending = any(job.state in ("TIMEOUT", "PREEMPTED") and job.completing for job in jobs)
        if seconds > OUTAGE_SECONDS or ending:  # between TERM and KILL an owner cannot ask Slurm
            self.excuses.append(self.clock.now + seconds)
        self.clock.at(seconds if self.away != "empty" else 60.0, setattr, self, "away", "")

    def _trouble(self, args):
        if self.clock.now > self.calm:
            return ""
        if self.away:
            if self.away != "empty" or args[0] == "squeue":
                return self.away
            return ""
        if self.rng.random() < self.weather.bad_call:
            return self.rng.choice(["silent", "refused", "dropped", "dropped"])
        return ""

    def _storage(self):
        if self.storage_kind:
            return
        kind = self.rng.choice(["away", "full"])
        bodies = [body for run_bodies in self.bodies.values() for body in run_bodies]
        for body in bodies:
            body._catch_up_quietly()
        self.storage_kind = kind
        for body in bodies:
            body.storage_changed()
        seconds = self.rng.choice([2 * MINUTE, 30 * MINUTE, 30 * MINUTE, 3 * HOUR, 12 * HOUR]) * self.rng.uniform(
            0.5, 1.5
        )
        self.outages.append((self.clock.now, self.clock.now + seconds))
        self.clock.at(seconds, setattr, self, "storage_kind", "")

    def _reset(self):
        self.excuses.append(self.clock.now)
        self.controller.forget()

    def _touched(self):
        running = [job for job in self.controller.jobs.values() if job.script and job.state == "RUNNING"]
        if running:
            job = self.rng.choice(running)
            job.life.happened("requeued")
            self.controller.requeue(job)

    def _cancelled(self):
        lives = [life.path.name for life in self.lives if life.body is not None and not life.body.over]
        if lives and not self.storage_kind:
            name = self.rng.choice(lives)
            self._act_as_user(lambda: self._cancel(name))

    def _agent_killed(self):
        """Kill an agent, or stop it: then its task kills it a little later."""
        agent = self._any_agent()
        if agent is not None:
            agent.step.life.happened("agent")
            self.clock.at(self.rng.choice([0.0, STOPPED_SECONDS]), agent.kill)

    def _task_killed(self):
        agent = self._any_agent()
        if agent is not None:
            agent.step.life.happened("task")
            agent.kill_task()

    def _any_agent(self):
        agents = [agent for step in self._steps() for agent in step.agents if agent.code is None and agent.node.alive]
        if agents:
            return self.rng.choice(agents)
        return None

    def _owner_killed(self):
        lives = self._owned_lives()
        if lives:
            self.rng.choice(lives).kill_owner()

    def _guard_killed(self):
        lives = self._owned_lives()
        if lives:
            self.rng.choice(lives).kill_guard()

    def _owned_lives(self):
        """Those of jobs that run, and whose owner is at work."""
        return [life for life in self.lives if life.is_owned and life.job.state == "RUNNING"]

    def _batch_step_killed(self):
        """Kill an owner together with its guard and srun.

        A task of node agents restarts the job. Ranks that srun started end with it, and only a person can."""
        if self.agents:
            steps = [step for step in self._steps() if step.ranks is not None and step.life.has_coordinator]
            if steps:
                self.rng.choice(steps).life.kill_batch_step()
            return
        lives = self._owned_lives()
        if lives:
            self.rng.choice(lives).kill_batch_step()
            self.excuses.append(self.clock.now)

    def _steps(self):
        """The steps of agents that run."""
        bodies = [life.body for life in self.lives]
        return [body for body in bodies if isinstance(body, AgentsStep) and not body.over]

    # -- the user ----------------------------------------------------------------------------------------------------

    def _act_as_user(self, do):
        def carefully():
            try:
                do()
            except FlipError as error:
                self.errors.append((self.clock.now, str(error)))
                return 1
            return 0

        def over(code, out):
            if code:
                self._extend_excuse()

        Process(self.clock, carefully, {"PATH": "/bin"}, over, lambda: self.storage(None))

    def _extend_excuse(self):
        """Extend the present excuse after a check without result: pending problems wait for the next check."""
        if any(start <= self.clock.now <= start + EXCUSED for start in self.excuses):
            self.excuses.append(self.clock.now)

    def _check_in(self):
        """Submit again: every 6 hours on the first day, then every 3 days until all runs are over."""
        self._act_as_user(self._submit)
        if not self.over:
            self.clock.at(6 * HOUR if self.clock.now < DAY else 3 * DAY, self._check_in)

    def _submit(self):
        """Submit as ``flip submit`` does, without the checks of configurations."""
        with apply.lock(self.folder):
            existing = planning.scan_runs(self.folder, list(self.likes))
            resolved_runs = [TrainingWorkload(name, Config(), {"hash": name}, None) for name in self.likes]
            # an interrupted submit leaves a directory without a job, which counts as a stopped run
            starting = planning.compare(resolved_runs, existing, self.folder).starting
            self.over = not starting and all(run.state in OVER for run in existing.values())
            jobs = [
                Job(
                    self.run(action.wanted.name),
                    self.folder / ".code",
                    self._shape(action.wanted.name),
                    cluster="fake",
                )
                for action in starting
            ]
            jobs = apply.assign_canaries(jobs, self.folder, CANARY)
            names = [job.run.name for job in jobs]
            if any(run.state == "unknown" for run in existing.values()):
                self._extend_excuse()
            self.orders.append((self.clock.now, names))
            for name in names:
                ahead = STUCK.match(existing[name].reason)
                if ahead and (ahead[1] in names or existing[ahead[1]].state in ("failed", "cancelled")):
                    self.behind.add((self.clock.now, name))
            try:
                SlurmBackend(self._profile).submit(jobs)
            except FlipError:
                self.excuses.append(self.clock.now)  # unknown whether the jobs are queued: the next check finds out
                raise

    def _shape(self, name):
        like = self.likes[name]
        usable = ()
        if like.least_nodes:
            usable = tuple(range(like.least_nodes, like.nodes + 1))
        return JobResources(
            like.nodes, 8, gpus=8, cpus=8, hours=HOURS, least_nodes=like.least_nodes, spares=like.spares, usable=usable
        )

    @property
    def _profile(self):
        return ClusterProfile(name="fake", kind="slurm", python="python3", agents=self.agents)

    def _cancel(self, name):
        run = self.run(name)
        self.cancelled.add(name)
        create_json(run.cancel, {"who": "ann", "why": "not needed any more", "time": 0})
        for body in list(self.bodies.get(name, ())):
            self.clock.at(body.like.step, body.look)
        SlurmBackend(ClusterProfile(kind="slurm")).cancel([run])

    def states(self):
        return {path.name: state for path, state in states([self.run(name) for name in self.likes]).items()}

    def pass_year(self):
        """Simulate 365 days; returns the final state of each run."""
        with in_place(self.clock, self.commands):
            self.start()
            self.clock.run(365 * DAY)
            return self.states()
