"""Simulated ranks that follow a play and log every signal, like tests/slurm/scripted.py."""

from __future__ import annotations

import json

from flip.runs.rundir import write_json
from tests.slurm.scripted import STEP, STOP, leave

LISTENS = 0.6
"""Seconds until a rank has started."""


class Scripted:
    """The ranks of a step, one per node, and srun."""

    def __init__(self, life, run, n, over, nodes=None):
        self.life = life
        self.run = run
        self.n = n
        self.clock = life.clock
        self._over = over
        play = json.loads((run.path / "play.json").read_text())
        self.play = play | play.get("attempts", {}).get(str(n), {})
        if nodes is None:
            nodes = life.used_nodes
        self.ranks = [Rank(self, rank, node, self._rank_ended) for rank, node in enumerate(nodes)]
        self._lost = set()
        self._returned = False

    def on(self, nodes):
        return [rank for rank in self.ranks if rank.node.name in nodes and rank.code is None]

    def signal(self, name, nodes):
        for rank in self.on(nodes):
            rank.hear(name)

    def kill(self, nodes):
        for rank in self.on(nodes):
            rank.end(137)

    kill_ranks = kill

    def lose(self, node):
        self._lost.add(node)
        for rank in self.on({node}):
            rank.drop()

    def node_down(self, nodes):
        """srun learns from the controller that nodes are down, and exits when all other ranks have."""
        if nodes & self._lost:
            self._lost -= nodes
            for rank in self.ranks:
                if rank.node.name in nodes and rank.code is None:
                    rank.code = 1
            self.ended()

    def _rank_ended(self, rank):
        self.ended()

    def ended(self):
        """Called after a rank has ended: srun waits for the other ranks, for a limited time."""
        codes = [rank.code for rank in self.ranks]
        if self._returned or self._lost:
            return
        if all(code is not None for code in codes):
            self._returned = True
            self._over(max(codes))
        elif any(code is not None for code in codes):
            self.clock.at(self.life.script.peer_seconds, self.kill, {node.name for node in self.life.nodes})


class Rank:
    """``on_end(rank)`` is called when it has ended with a code."""

    def __init__(self, step, rank, node, on_end):
        self.step = step
        self._on_end = on_end
        self.rank = rank
        self.node = node
        self.clock = step.clock
        self.code = None
        self.stop_signal = ""
        self.log = None
        self._held = []
        self.event = self.clock.at(LISTENS, self._listen)

    def _listen(self):
        folder = self.step.run.path / "signals"
        folder.mkdir(exist_ok=True)
        self.log = folder / f"{self.step.n}.{self.rank}.jsonl"
        gpus = ",".join(map(str, range(self.step.life.job.gpus)))
        self._write({"pid": 0, "node": self.node.name, "gpus": gpus, "address": ""})
        if self.step.run.result.exists():
            self.end(0)
        elif "exit" in self.step.play:
            self.end(self.step.play["exit"])
        else:
            self.event = self.clock.at(STEP * self.step.play["steps"], self._finish)
            for name in self._held:
                self.hear(name)

    def _write(self, line):
        with open(self.log, "a") as file:
            file.write(json.dumps(line) + "\n")

    def hear(self, name):
        if self.log is None:  # jobs/host/rank_entry.py blocks the signal until then
            self._held.append(name)
            return
        self._write({"signal": name})
        if name not in STOP:
            return
        if self.rank == 0:
            self.step.run.record_stop_request(self.step.n, f"SIG{name}")
        if not self.stop_signal and name not in self.step.play.get("ignore", []):
            self.stop_signal = f"SIG{name}"
            self.clock.cancel(self.event)
            self.event = self.clock.at(self.step.play.get("save", 0.0), self._finish)

    def _finish(self):
        run = self.step.run
        n = self.step.n
        if not self.stop_signal and self.rank == 0:
            write_json(run.result, {"run": run.name, "attempt": n})
        self.end(leave(run, n, self.rank, self.stop_signal))

    def end(self, code):
        self.code = code
        self.drop()
        self._on_end(self)

    def drop(self):
        self.clock.cancel(self.event)
