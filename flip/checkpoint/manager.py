"""When an attempt saves, what it went on from, and what its saves have cost the steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from flip.checkpoint.interval import Interval
from flip.checkpoint.saver import Checkpointer, model_state
from flip.config.schema import Config
from flip.data import order
from flip.data.storage.retry import RetryPolicy
from flip.distributed.collectives import run_on_first
from flip.distributed.parallel import World
from flip.distributed.watchdog import LONG, Watchdog
from flip.models.clip import Pair
from flip.runs.commit import Commit
from flip.runs.errors import DataError
from flip.runs.rundir import RunDir, read_record


class Saving:
    """One attempt's checkpoints. Methods are collective but for ``due`` and ``failed``."""

    def __init__(self, run: RunDir, attempt: int, world: World, config: Config, watchdog: Watchdog) -> None:
        self._run, self._world, self._watchdog, section = run, world, watchdog, config.checkpoint
        patience = RetryPolicy(deadline=config.data.deadline, timeout=config.data.timeout)
        self.checkpointer = Checkpointer(
            run, attempt, world, section.keep, section.background == "yes", section.url, patience
        )
        self._interval: Interval | None = None
        if world.first and not section.samples:  # the first rank's clock decides for all
            self._interval = Interval(section.minutes, run, attempt)
        self._at, self._samples = time.monotonic(), 0
        self.source: Commit | None = None
        """The commit that the attempt went on from."""
        self._start = run.attempt(attempt) / "start.json"
        self.soon = False
        """Whether the first step is to be saved, as ``restore`` has found it; the same on all ranks."""
        self.saves, self.seconds = 0, 0.0
        """Saves of this attempt, and the seconds that steps waited for them."""

    def restore(self, pair: Pair, warm_start: Callable[[], Commit | None]) -> Commit | None:
        """Fill the weights from the newest commit and return it, or None if there is none.

        ``warm_start`` is called if the run has no commit: it may fill the weights, or return a commit of another run to
        continue from.
        """
        # A rank that reads by itself may not see the file yet, decide otherwise and never meet the others again.
        record = run_on_first(lambda: (read_record(self._start) or {}).get("first_commit"), self._world.control)
        self.soon = bool(record)
        self.source = self.checkpointer.restorer.newest() or warm_start()
        if self.source is not None:
            found = self.source.record["order"]
            if found != order.VERSION:
                remedy = "Finish the run with the code that it was begun with."
                raise DataError(
                    f"this code has version {order.VERSION} of the order of samples", self._run.path, found, remedy
                )
            self._samples = self.source.samples
            self.checkpointer.restorer.load(self.source, model_state(pair))
        self._at = time.monotonic()
        return self.source

    def due(self) -> bool:
        """Whether a save is due by the clock of the first rank; False on every other rank."""
        if self._interval is None:
            return False
        every = self._interval.seconds(self.saves, self.seconds, self.checkpointer.took)
        return time.monotonic() - self._at > every

    def needed(self, samples: int) -> bool:
        """Whether S = ``samples`` is neither committed nor about to be."""
        return samples not in (self._samples, 0)

    def save(self, state: dict[str, torch.Tensor], stage: str, samples: int, **record: Any) -> None:
        """Commit S = ``samples``; ``settle`` waits for it."""
        begin = time.perf_counter()
        self.checkpointer.save(state, stage, samples, **record)
        self._samples, self._at, self.soon = samples, time.monotonic(), False
        self.saves, self.seconds = self.saves + 1, self.seconds + time.perf_counter() - begin

    def settle(self) -> None:
        """Wait for the commit that is under way. Raises what became of it, on all ranks alike."""
        self._watchdog.beat("waiting for a commit", times=LONG)
        self.checkpointer.wait()
