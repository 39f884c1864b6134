"""The trainer of ``trainer.py`` in ranks that node agents have started: each ends on its own."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from flip.runs.errors import CAUSES
from tests.fakeslurm.trainer import PEERS, Trainer

STOPPED_NOTICED = 2.5
"""Seconds until an agent kills a rank that a signal has stopped."""
TOGETHER = ("complete", "stopped", "hang")
"""Causes with which all ranks end; with others the first one ends, and the others wait for it."""
LIFELINE = "the end of the lifeline"
OUT_OF_MEMORY = "out of memory: the kernel killed it at the memory limit of the job"


class AgentTrainer(Trainer):
    """The ranks of an attempt. The agent of each one reports its end."""

    def __init__(self, world, life, run, n):
        super().__init__(world, life, run, n, over=None, nodes=())
        self._agents = {}
        """Rank that runs -> its agent."""

    def add(self, number, agent, world_size):
        """An agent starts a rank."""
        self._agents[number] = agent
        self.living.add(agent.node.name)
        self.attempt.ranks.append(number)
        self.attempt.world = world_size

    def on(self, nodes):
        """The ranks that run on nodes."""
        return [number for number, agent in self._agents.items() if agent.node.name in nodes]

    def _listen(self):
        if len(self._agents) < self.attempt.world:  # the rendezvous waits for the others
            self._break()
            return
        ranks_per_node = self.life.script.ranks_per_node
        slower = self.like.nodes * ranks_per_node / self.attempt.world
        self.like = replace(self.like, step=self.like.step * slower)
        super()._listen()

    # -- events ------------------------------------------------------------------------------------------------------

    def _meet(self, fate):
        if fate not in ("oom", "killed", "frozen"):
            super()._meet(fate)
            return
        self.life.happened(fate)
        self._catch_up_quietly()
        victim = self.world.rng.choice(sorted(self._agents))
        if fate == "oom":
            self._write_cause(victim, "crash", OUT_OF_MEMORY, out_of_memory=True)
        if fate == "frozen":
            self._stop_training()
            self.clock.at(STOPPED_NOTICED, self._kill_frozen, victim)
        else:
            self._end_first(victim, 137)

    def _kill_frozen(self, victim):
        if victim in self._agents:
            self._write_cause(victim, "hang", "its process was stopped by a signal (SIGSTOP)")
            self._report([victim], CAUSES["hang"], killed=True)
            self.clock.at(PEERS, self._end_peers)

    def lifeline_ended(self, nodes):
        """The agents on nodes have lost their coordinator."""
        if self.over or not self.on(nodes):
            return
        if self.listening:
            self._hear(LIFELINE)
        else:
            self.held = self.held or LIFELINE

    def kill(self, nodes):
        """Kill the ranks on nodes; their agents report it."""
        ranks = self.on(nodes)
        if ranks:
            self._break()
            self._report(ranks, 137)

    def drop(self, nodes):
        """The ranks on nodes end with their agents: nobody reports it."""
        ranks = self.on(nodes)
        if ranks:
            self._break()
        for number in ranks:
            self._remove(number)

    # -- the end -----------------------------------------------------------------------------------------------------

    def _leave(self, cause, reason, **facts):
        if self.over:
            return
        first = min(self._agents)
        self._write_cause(first, cause, reason, **facts)
        if cause in TOGETHER:
            self._stop_training()
            self._report(list(self._agents), CAUSES[cause])
        else:
            self._end_first(first, CAUSES[cause])

    def _end_first(self, victim, code):
        """A rank ends. The others wait for it, and are killed, or end when they notice."""
        self._break()
        self._report([victim], code)

    def _break(self):
        """A rank ends or is missing: no step is made any more, and the other ranks notice it."""
        if self.over:
            return
        self._catch_up_quietly()
        self._stop_training()
        self.clock.at(PEERS, self._end_peers)

    def _end_peers(self):
        if self._agents:
            self._write_cause(min(self._agents), "peer_lost", "Connection closed by peer")
            self._report(list(self._agents), CAUSES["peer_lost"])

    def _report(self, ranks, code, killed=None):
        if killed is None:
            killed = code == 137
        for number in ranks:
            self._remove(number).report(self.n, number, code, killed)

    def _remove(self, number):
        """A rank has ended; returns its agent."""
        agent = self._agents.pop(number)
        if not self._agents:
            self.attempt.ended = self.clock.now
        return agent

    def _write_cause(self, rank, cause, reason, **facts):
        host = self._agents[rank].node.name
        with self.world.storage(self.life), contextlib.suppress(OSError):
            self.run.write_cause(self.n, rank, cause, CAUSES[cause], reason, host=host, **facts)
