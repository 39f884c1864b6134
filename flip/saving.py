"""When an attempt saves, what it went on from, and what its saves have cost the steps."""

from __future__ import annotations

import time
from typing import Any

import torch

from flip.checkpoint import Checkpointer
from flip.commit import Commit
from flip.config.schema import Config, Init
from flip.data import order
from flip.data.retry import Patience
from flip.exitcodes import DataError
from flip.interval import Interval
from flip.parallel import World
from flip.rundir import RunDir, read_json
from flip.watchdog import LONG, Watchdog


class Saving:
    """One attempt's checkpoints. Methods are collective but for ``due`` and ``failed``."""

    def __init__(self, run: RunDir, attempt: int, world: World, config: Config, watchdog: Watchdog) -> None:
        self._run, self._world, self._watchdog, section = run, world, watchdog, config.checkpoint
        patience = Patience(deadline=config.data.deadline, timeout=config.data.timeout)
        self.checkpointer = Checkpointer(
            run, attempt, world, section.keep, section.background == "yes", section.url, patience
        )
        self._interval, self._by_clock = Interval(section.minutes, run, attempt), not section.samples
        self._at, self._samples = time.monotonic(), 0
        self.source: Commit | None = None
        """The commit that the attempt went on from."""
        self._start = run.attempt(attempt) / "start.json"
        self.soon = False
        """Whether the first step is to be saved, as ``restore`` has found it; the same on all ranks."""
        self.saves, self.seconds = 0, 0.0
        """Saves of this attempt, and the seconds that steps waited for them."""

    def restore(self, model: dict[str, torch.Tensor], init: Init) -> Commit | None:
        """Fill the weights from the newest commit and return it, None where there is none.

        The first attempt of a run with ``init`` goes on from that commit instead, or takes its weights alone.
        """
        soon = [self._world.first and bool((read_json(self._start) or {}).get("first_commit"))]
        # What ranks read by themselves may differ, as where one does not see the file yet: they would never meet again.
        torch.distributed.broadcast_object_list(soon, src=0, group=self._world.control)
        self.soon = soon[0]
        self.source = self.checkpointer.newest()
        if self.source is None and init.run:
            origin = self.checkpointer.origin(init)
            if init.extend:
                self.source = origin
            else:
                self.checkpointer.load(origin, model)
        if self.source is not None:
            found = self.source.record["order"]
            if found != order.VERSION:
                remedy = "Finish the run with the code that it was begun with."
                raise DataError(
                    f"this code has version {order.VERSION} of the order of samples", self._run.path, found, remedy
                )
            self._samples = self.source.samples
            self.checkpointer.load(self.source, model)
        self._at = time.monotonic()
        return self.source

    def due(self) -> bool:
        """Whether a save is due by the clock."""
        every = self._interval.seconds(self.saves, self.seconds, self.checkpointer.took)
        return self._by_clock and time.monotonic() - self._at > every

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
