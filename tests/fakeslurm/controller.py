"""The simulated Slurm controller: it schedules jobs on nodes, and ends, requeues and purges them.

It behaves as Slurm 24.11 does in tests/slurm/scenarios.json. A job has whole nodes. ``host.Life`` simulates the
processes of a job, and ``commands`` the output of Slurm's commands.
"""

from __future__ import annotations

import random

from tests.fakeslurm.site import ENDED, Job, Node

LATENCY = 0.8
"""Seconds until the scheduler looks after something changed."""


class Refused(Exception):
    """The error message with which Slurm refuses a request."""


class Controller:
    """``lives(controller, job)`` starts the processes of a job on its nodes."""

    def __init__(self, clock, site, names, lives, rng=None):
        self.clock = clock
        self.site = site
        self.lives = lives
        self.nodes = {name: Node(name) for name in names}
        self.jobs = {}
        self.next_id = 1
        self.rng = rng or random.Random(0)
        self.asleep = lambda: False
        """Whether it does nothing by itself at this moment: one that is away does not look at limits either."""
        self._pass = None

    # -- the queue ---------------------------------------------------------------------------------------------------

    def submit(self, elements=None, later=0.0, only=None, **fields):
        """Submit a job, an array of ``elements``, or an array with the single index ``only``; returns the job id.

        The last element of an array has the array's id."""
        base = self.next_id
        count = elements or 1
        self.next_id += count
        for index in range(count):
            id_ = base if index == count - 1 else base + 1 + index
            array_fields = {}
            if elements:
                array_fields = {"array": base, "index": index}
            if only is not None:
                array_fields = {"array": base, "index": only}
            self.jobs[id_] = job = Job(id=id_, eligible=self.clock.now + later, **array_fields, **fields)
            job.reason = "JobHeldUser" if job.held else job.reason
        self.look()
        return base

    def find(self, text):
        """The job with the id ``57`` or ``57_3``. Raises Refused."""
        base, _, index = text.partition("_")
        for id_ in [int(base) + 1 + int(index), int(base)] if index else [int(base)]:
            job = self.jobs.get(id_)
            if job is not None and text in (job.key, str(job.id)):
                return job
        raise Refused("Invalid job id specified")

    def all_of(self, text):
        """The jobs with the id ``57``: a single job, or all elements of an array. Raises Refused."""
        array = [job for job in self.jobs.values() if job.array == int(text.partition("_")[0]) and "_" not in text]
        return array or [self.find(text)]

    def release(self, job):
        """``scontrol release``."""
        if job.state != "PENDING":
            raise Refused("Job is no longer pending execution")
        if job.held:
            job.held = False
            job.reason = "None"
            self.look()

    def look(self, delay=LATENCY):
        """Run the scheduler after ``delay`` seconds."""
        if self._pass is None or self._pass[0] > self.clock.now + delay or self._pass[2] is None:
            self.clock.cancel(self._pass)
            self._pass = self.clock.at(delay, self._schedule)

    def _schedule(self):
        self._pass = None
        if self.asleep():
            self.look(self.site.poll)
            return
        waiting = [job for job in self.jobs.values() if job.state == "PENDING" and not (job.completing or job.held)]
        waiting.sort(key=lambda job: (job.script is not None, job.id))
        free = [node for node in self.nodes.values() if node.up and node.job is None]
        later = None
        for job in waiting:
            if job.after in self.jobs and (self.jobs[job.after].state not in ENDED or self.jobs[job.after].completing):
                job.reason = "Dependency"
                continue
            if job.eligible > self.clock.now:
                later = min(later or job.eligible, job.eligible)
                continue
            if job.nodelist:
                held = [self.nodes[name] for name in job.nodelist]
                if not all(node.up and (node.job is None or node.job.script) for node in held):
                    continue
                fit = held if all(node in free for node in held) else []
                free = [node for node in free if node not in held]  # reserved for this job
                for other in {node.job for node in held if node.job is not None}:
                    self.preempt(other)
            else:
                fit = [node for node in free if node.name not in job.excluded.split(",")][: job.nodes_wanted]
                if len(fit) < (job.least_nodes or job.nodes_wanted):
                    fit = []
            if fit:
                free = [node for node in free if node not in fit]
                self._start(job, fit)
            else:
                job.reason = "Resources"
        if later is not None:
            self.look(later - self.clock.now)

    def _start(self, job, nodes):
        now = self.clock.now
        job.state = "RUNNING"
        job.reason = "None"
        job.start = now
        job.nodes = nodes
        job.end = now + job.limit
        job.preempt_time = None
        for node in nodes:
            node.job = job
        if job.script is None:
            job.timers = [self.clock.at(job.seconds, self._over, job)]
            return
        self._watch_limit(job)
        job.life = self.lives(self, job)

    def _watch_limit(self, job):
        ran = self.clock.now - job.start
        if job.lead:
            early = self.rng.uniform(0.0, max(0.0, min(self.site.poll, job.limit - job.lead) / 2))
            due = job.limit - job.lead - early - ran
            # a warning that is already due is sent at the next check of limits
            if due > 0:
                wait = due
            else:
                wait = self.rng.uniform(2.0, self.site.poll)
            job.timers.append(self.clock.at(wait, self._warn, job, job.restarts))
        late = self.rng.uniform(0.0, self.site.poll)
        job.timers.append(self.clock.at(max(0.0, job.limit - ran) + late, self._limit, job, job.restarts))

    def set_limit(self, job, seconds):
        """``scontrol update TimeLimit``."""
        job.limit = seconds
        if job.state == "RUNNING" and job.script is not None:
            for timer in job.timers:
                self.clock.cancel(timer)
            job.end = job.start + seconds
            job.timers = []
            self._watch_limit(job)

    # -- what happens to a job ---------------------------------------------------------------------------------------

    def preempt(self, job):
        """Preempt a job: a job of higher priority needs its nodes. A controller that is asleep preempts none."""
        if self.asleep() or job.state != "RUNNING" or job.completing or job.preempt_time is not None:
            return
        job.preempt_time = self.clock.now
        job.life.happened("preempted")
        if self.site.user_signal:
            job.life.signal_steps("USR2")
        if self.site.grace:
            job.in_grace = True
            job.end = self.clock.now + self.site.grace
            if not self.site.user_signal:
                job.life.signal_steps("TERM")
            job.timers.append(self.clock.at(self.site.grace, self._evict, job, job.restarts))
        else:
            self._evict(job, job.restarts)

    def _evict(self, job, restarts):
        if job.state != "RUNNING" or job.restarts != restarts:
            return
        if self.asleep():
            job.timers.append(self.clock.at(self.site.poll, self._evict, job, restarts))
            return
        job.preempt_time = self.clock.now
        if self.site.mode == "REQUEUE" and self.site.requeue:
            self._requeue_job(job)
        else:
            job.life.cut_off = not (job.life.host.alive and job.life.host.reachable)
            self._finish(job, "PREEMPTED")

    def _warn(self, job, restarts):
        if job.state == "RUNNING" and job.restarts == restarts:
            job.life.happened("warned")
            job.life.signal_steps("USR2")

    def _limit(self, job, restarts):
        if self.asleep():
            job.timers.append(self.clock.at(self.site.poll, self._limit, job, restarts))
            return
        if job.state == "RUNNING" and job.restarts == restarts:
            job.life.happened("limit")
            job.life.alone = not (job.life.host.alive and job.life.host.reachable)
            self._finish(job, "TIMEOUT", "TimeLimit")

    def requeue(self, job):
        """``scontrol requeue``."""
        if not self.site.requeue:
            raise Refused("Requested operation is presently disabled")
        if job.state == "PENDING":
            raise Refused("Job is pending execution")
        self._requeue_job(job)
        if not job.completing:
            self._settled(job)

    def cancel(self, job):
        """``scancel``."""
        if job.state in ENDED:
            raise Refused("Job/step already completing or completed")
        if job.life is not None:
            job.life.happened("cancelled")
        if job.state == "PENDING" and not job.completing:
            job.state = "CANCELLED"
            job.end = self.clock.now
            self._purge_later(job)
        elif job.state == "PENDING":
            job.state = "CANCELLED"
        else:
            self._finish(job, "CANCELLED")

    def _requeue_job(self, job):
        """Put a job back into the queue, after its processes have ended."""
        running = job.state == "RUNNING"
        job.state = "PENDING"
        job.restarts = job.restarts + 1
        job.eligible = self.clock.now + self.site.requeue_delay
        job.start = job.preempt_time = None
        job.end = self.clock.now
        if running:
            self._end_processes(job)

    def shell_killed(self, job):
        """Fail a job whose batch script was killed by SIGKILL, and end the processes of its steps."""
        if self.asleep():  # it does not learn of that, so it ends nothing
            job.timers.append(self.clock.at(self.site.poll, self.shell_killed, job))
            return
        job.exit_code = "0:9"
        self._finish(job, "FAILED", "RaisedSignal:9(Killed)")

    def _finish(self, job, state, reason="None"):
        job.state = state
        job.reason = reason
        job.end = self.clock.now
        if job.script is None:
            self._gone(job)
        else:
            self._end_processes(job)

    def _end_processes(self, job):
        job.completing = True
        for timer in job.timers:
            self.clock.cancel(timer)
        job.timers = [self.clock.at(self.site.kill_wait, job.life.kill)]
        job.life.end()

    def _over(self, job):
        """Complete a job of another user."""
        job.state = "COMPLETED"
        job.end = self.clock.now
        self._gone(job)

    def batch_done(self, life, code, killed):
        """Handle the end of a life's batch script and processes. slurmd reports it until the controller answers."""
        if self.asleep():
            self.clock.at(self.site.poll, self.batch_done, life, code, killed)
            return
        job = life.job
        if job.life is not life or job.id not in self.jobs or self.jobs[job.id] is not job:
            return
        if job.state == "RUNNING":
            job.end = self.clock.now
            job.state = "COMPLETED" if code == 0 else "FAILED"
            job.exit_code = f"{code}:0"
            if job.in_grace:  # also if the grace period was in an earlier life
                job.in_grace = False
                if self.site.mode == "REQUEUE":
                    job.state = "RUNNING"
                    self._requeue_job(job)
                else:
                    job.state = "PREEMPTED"
        elif job.state != "PENDING":
            job.exit_code = "0:9" if killed else f"{code}:0"
        job.completing = True
        for timer in job.timers:
            self.clock.cancel(timer)
        job.timers = [self.clock.at(0.3, self._gone, job)]

    def _gone(self, job):
        for node in job.nodes:
            if node.job is job:
                node.job = None
        job.nodes = []
        if job.life is not None:
            job.life.left = self.clock.now
        job.life = None
        job.timers = []
        self._settled(job)

    def _settled(self, job):
        job.completing = False
        if job.state == "PENDING":
            job.reason = "BeginTime"
        else:
            self._purge_later(job)
        self.look()

    def _purge_later(self, job):
        def purge():
            if job.state in ENDED and not job.completing:
                self.jobs.pop(job.id, None)

        self.clock.at(self.site.min_job_age, purge)

    # -- nodes -------------------------------------------------------------------------------------------------------

    def lose(self, name):
        """A node fails with all its processes; the controller detects it later."""
        node = self.nodes[name]
        node.alive = False
        if node.job is not None and node.job.life is not None:
            node.job.life.lose(node)
        self._detect_later(node)

    def cut_off(self, name):
        """A node loses its connection; its processes continue."""
        self.nodes[name].reachable = False
        self._detect_later(self.nodes[name])

    def _detect_later(self, node):
        self.clock.at(self.site.node_timeout * self.rng.uniform(1.0, 2.5), self._down, node)

    def _down(self, node):
        if (node.alive and node.reachable) or not node.up:
            return
        node.up = False
        job = node.job
        if job is None:
            return
        if job.script is None:
            self._over(job)
            return
        life = job.life
        life.happened("node")
        if node.alive:
            node.orphans.append(life)
        if job.state == "RUNNING" and job.no_kill and len(job.nodes) > 1:
            job.nodes.remove(node)
            node.job = None
            life.node_down(node)
        elif job.state == "RUNNING" and self.site.requeue:
            self._requeue_job(job)
        elif job.state == "RUNNING":
            self._finish(job, "NODE_FAIL", "NodeDown")
        if not any(other.alive and other.reachable for other in job.nodes):
            self.detached(life)

    def detached(self, life):
        """End a job whose batch script was on a node that is down, so its end is never reported."""
        if life.job.life is life:
            for timer in life.job.timers:
                self.clock.cancel(timer)
            self._gone(life.job)

    def bring_back(self, name):
        """A node registers again. Its remaining processes of a job that was restarted elsewhere are killed."""
        node = self.nodes[name]
        node.alive = node.reachable = node.up = True
        orphans = node.orphans
        node.orphans = []
        for life in orphans:
            life.abort(node)
        self.look()

    def forget(self):
        """The controller loses its state and forgets all jobs. Nodes kill processes of unknown jobs."""
        for job in self.jobs.values():
            for timer in job.timers:
                self.clock.cancel(timer)
            if job.life is not None:
                job.life.happened("forgotten")
                job.life.left = self.clock.now
                self.clock.at(self.rng.uniform(0.0, 600.0), job.life.kill)
            for node in job.nodes:
                node.job = None
        self.jobs = {}
        self.next_id = 1
