"""A model of the worker: one object for all ranks of an attempt. It trains at constant speed and saves at intervals.

It writes the same files as the worker, with the functions of ``flip.runs.rundir`` and ``flip.runs.checkpoint_folder``.
Of the checkpoints between two reads, only the newest is written, at the second read.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass

from flip.runs import attempts, checkpoint_folder
from flip.runs.errors import CAUSES
from flip.runs.rundir import create_json, read_json
from tests.slurm.scripted import STOP

PORT = "failed to bind to [::]:29500 (errno: 98 - Address already in use)"
PEERS = 30.0
"""Seconds until a rank notices that another is gone."""
BATCH = 4096
CANARY = 50
"""Steps that the first run of a shape must pass."""


@dataclass
class Run:
    """Properties of a run; times in seconds."""

    total: int
    """S at its end."""
    nodes: int = 1
    least_nodes: int = 0
    """Fewest nodes, if they are a range."""
    spares: int = 0
    startup: float = 180.0
    step: float = 5.0
    save: float = 20.0
    interval: float = 900.0
    """Between checkpoints."""
    bug: int = 0
    """S at which it crashes, each time; 0: none."""
    killer: bool = False
    """Takes its node down before it has trained, each time."""


class Trainer:
    """``world`` provides the properties of the run, its faults, and the state of the storage."""

    def __init__(self, world, life, run, n, over, nodes=None):
        self.world = world
        self.life = life
        self.run = run
        self.n = n
        self.clock = life.clock
        self._over = over
        self.like = world.likes[run.name]
        if nodes is None:
            nodes = life.used_nodes
        self.living = {node.name for node in nodes}
        self.attempt = life.attempt_of(n)
        self.attempt.ended = float("inf")
        self.lost = set()
        self.listening = False
        self.over = False
        self.held = ""
        self.stop_signal = ""
        self._timer = self.clock.at(self.like.startup * world.rng.uniform(0.5, 2.0), self._listen)
        world.bodies.setdefault(run.name, []).append(self)

    # -- training ----------------------------------------------------------------------------------------------------

    def _listen(self):
        world = self.world
        like = self.like
        with world.storage(self.life):
            try:
                self.soon = bool((read_json(self.run.attempt(self.n) / "start.json") or {}).get("first_commit"))
                self.first = self.saved = attempts.newest_checkpoint_samples(self.run)
            except OSError:
                self.life.happened("storage")
                self._leave("storage", "the start cannot be read")
                return
        self.listening = True
        self.training_start = self.attempt.trained = self.clock.now
        self.attempt.first = self.first
        if self.held:
            self._hear(self.held)
            return
        if like.killer:
            self.world.lose(min(self.living))
            return
        wait, fate = self.world.fate(self)
        if like.bug > self.first:
            wait, fate = min((wait, fate), (self._when(like.bug), "crash"))
        wait, fate = min((wait, fate), (self._when(like.total), "complete"))
        if self.life.canary:
            for steps in (1, CANARY + 1):
                self.clock.at(steps * like.step, self._log, steps)
        self._timer = self.clock.at(wait, self._meet, fate)
        self.storage_changed()
        self.clock.at(like.step, self.look)  # detects changes during the start-up

    def _log(self, steps):
        """Write a metric line. The canary check needs only the two lines that are scheduled at the start."""
        if not self.over:
            with self.world.storage(self.life), contextlib.suppress(OSError):
                self.run.metrics.mkdir(exist_ok=True)
                step = self.first // BATCH + steps
                with open(self.run.metrics / f"{self.n}.jsonl", "a") as lines:
                    lines.write(json.dumps({"step": step, "samples": step * BATCH, "loss": 5.0}) + "\n")

    def _when(self, samples):
        """Seconds from the start of training until S is reached."""
        return -((self.first - samples) // BATCH) * self.like.step

    def _samples(self, moment):
        return min(self.like.total, self.first + int((moment - self.training_start) / self.like.step) * BATCH)

    def catch_up(self):
        """Write the newest checkpoint that is due by now."""
        if self.over or not self.listening:
            return
        trained = self.clock.now - self.training_start
        count = int(trained / self.like.interval)
        if count:
            offset = count * self.like.interval
        else:
            offset = 0
            if self.soon and trained >= self.like.step:
                offset = self.like.step
        if offset:
            self._checkpoint(self._samples(self.training_start + offset), self.training_start + offset)

    def _checkpoint(self, samples, moment):
        """Save a checkpoint as flip.checkpoint.saver does. Raises OSError."""
        if samples <= self.saved or not self.run.is_current_attempt(self.n):
            return
        path = checkpoint_folder.folder(self.run, "pretrain", samples, self.n)
        path.mkdir(parents=True)
        (path / (checkpoint_folder.SHARD_FILE % 1)).write_text(str(samples))
        checkpoint_folder.complete_checkpoint(path, {"stage": "pretrain", "samples": samples, "attempt": self.n})
        checkpoint_folder.apply_retention(self.run, self.n, 2, [path])
        self.saved = samples
        self.world.checkpoints.setdefault((self.run.name, self.n), []).append((moment, samples))

    # -- events ------------------------------------------------------------------------------------------------------

    def _meet(self, fate):
        if fate == "complete":
            self._complete()
            return
        self.life.happened(fate)
        self._catch_up_quietly()
        if fate == "oom":
            self._end(137)
        else:
            self._leave("crash" if fate == "port" else fate, PORT if fate == "port" else f"as fate has it: {fate}")

    def _complete(self):
        with self.world.storage(self.life):
            try:
                self._checkpoint(self.like.total, self.clock.now)
                if self.run.is_current_attempt(self.n):
                    create_json(self.run.result, {"run": self.run.name, "attempt": self.n})
            except OSError as error:
                self.life.happened("storage")
                self._leave("storage", str(error))
                return
        self._leave("complete", "")

    def signal(self, name, nodes):
        if self.living & nodes and not self.over:
            if self.listening:
                self._hear(name)
            else:
                self.held = self.held or name

    def _hear(self, name):
        if self.stop_signal:
            return
        self._catch_up_quietly()
        self.stop_signal = name or "cancel.json"
        with self.world.storage(self.life), contextlib.suppress(OSError):
            self.run.record_stop_request(self.n, _signal(name))
        self.clock.cancel(self._timer)
        self._timer = self.clock.at(self.like.step, self._save)

    def _save(self):
        samples = self._samples(self.clock.now)
        self._timer = self.clock.at(self.like.save if samples > self.saved else 0.0, self._stopped, samples)

    def _stopped(self, samples):
        with self.world.storage(self.life):
            try:
                self._checkpoint(samples, self.clock.now)
            except OSError as error:
                self.life.happened("storage")
                self._leave("storage", str(error))
                return
        self._leave("stopped", f"stopped by {self.stop_signal}", signal=_signal(self.stop_signal))

    def look(self):
        """The check of rank 0 in every step: whether a newer attempt exists, and whether the run is cancelled."""
        if self.over or not self.listening or self.stop_signal:
            return
        try:
            with self.world.storage(self.life):
                superseded = not self.run.is_current_attempt(self.n)
                cancelled = self.run.cancel.exists()
        except OSError:
            self.clock.at(self.like.step, self.look)
            return
        if superseded:
            self._leave("stopped", "superseded by a newer attempt")
        elif cancelled:
            self._hear("")

    def storage_changed(self):
        """File access fails from now on. The next step fails if the storage is away, the next save if it is full."""
        kind = self.world.storage_kind
        if self.over or not self.listening or not kind or self.stop_signal:
            return
        passed = self.clock.now - self.training_start
        if kind == "away":
            wait = self.like.step
        else:
            wait = self.like.interval - passed % self.like.interval
        self.clock.at(wait, self._fail)

    def _fail(self):
        if self.world.storage_kind and not self.over and not self.stop_signal:
            self.life.happened("storage")
            self._leave("storage", f"the file system is {self.world.storage_kind}")

    # -- the end -----------------------------------------------------------------------------------------------------

    def kill(self, nodes):
        self._fewer(nodes, 137)

    def lose(self, node):
        self.lost.add(node)
        self._fewer({node}, None)

    def _fewer(self, nodes, code):
        if self.over or not self.living & nodes:
            return
        self._catch_up_quietly()
        self.living -= nodes
        if self.living:
            self.clock.at(PEERS, self._leave, "peer_lost", "Connection closed by peer")
        else:
            self._end(code)

    def node_down(self, nodes):
        """srun learns from the controller that ranks of lost nodes never report."""
        self.lost -= nodes
        if self.over and not self.lost and self._code is not None:
            code = self._code
            self._code = None
            self._over(code)

    def _leave(self, cause, reason, **facts):
        if self.over:
            return
        with self.world.storage(self.life), contextlib.suppress(OSError):
            self.run.write_cause(self.n, 0, cause, CAUSES[cause], reason, host=self.life.host.name, **facts)
        self._end(CAUSES[cause])

    def _catch_up_quietly(self):
        with self.world.storage(self.life), contextlib.suppress(OSError):
            self.catch_up()

    def _end(self, code):
        if self.over:
            return
        self._stop_training()
        self._code = code
        self.attempt.ended = self.clock.now
        if code is not None and not self.lost:
            self._code = None
            self._over(code)

    def _stop_training(self):
        self.over = True
        self.clock.cancel(self._timer)
        self.world.bodies[self.run.name].remove(self)


def _signal(name):
    """The name of a signal as records have it; empty if it was none that stopped the run."""
    if name in STOP:
        return f"SIG{name}"
    return ""
