"""When an attempt saves, what it went on from, and what its saves have cost the steps."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch

from flip.checkpoint.interval import Interval
from flip.checkpoint.saver import Checkpointer, model_state
from flip.config import merge
from flip.config.schema import Config
from flip.data import order
from flip.data.storage.retry import Patience
from flip.distributed.collectives import run_on_first
from flip.distributed.parallel import World
from flip.distributed.watchdog import LONG, Watchdog
from flip.models.clip import Pair
from flip.runs.commit import Commit
from flip.runs.errors import DataError
from flip.runs.rundir import RunDir, read_record
from flip.training.agree import as_they_are
from flip.training.warm_start import open_export

log = logging.getLogger(__name__)


class Saving:
    """One attempt's checkpoints. Methods are collective but for ``due`` and ``failed``."""

    def __init__(self, run: RunDir, attempt: int, world: World, config: Config, watchdog: Watchdog) -> None:
        self._run, self._world, self._watchdog, section = run, world, watchdog, config.checkpoint
        patience = Patience(deadline=config.data.deadline, timeout=config.data.timeout)
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

    def restore(self, pair: Pair, config: Config) -> Commit | None:
        """Fill the weights from the newest commit and return it, None where there is none.

        The first attempt of a run with ``init`` goes on from that commit instead, or takes its weights alone.
        """
        # A rank that reads by itself may not see the file yet, decide otherwise and never meet the others again.
        record = run_on_first(lambda: (read_record(self._start) or {}).get("first_commit"), self._world.control)
        self.soon = bool(record)
        self.source, init = self.checkpointer.newest(), config.init
        if self.source is None and init.export:
            self._begin(pair, config, open_export(init))
        elif self.source is None and init.run:
            origin = self.checkpointer.origin(init)
            if init.extend:
                self.source = origin
            elif as_they_are(config, merge.read(RunDir(init.run).config)):
                self.checkpointer.load(origin, model_state(pair))
            else:
                self._begin(pair, config, Path(init.run), f"{origin.stage}/{origin.path.name}")
        if self.source is not None:
            found = self.source.record["order"]
            if found != order.VERSION:
                remedy = "Finish the run with the code that it was begun with."
                raise DataError(
                    f"this code has version {order.VERSION} of the order of samples", self._run.path, found, remedy
                )
            self._samples = self.source.samples
            self.checkpointer.load(self.source, model_state(pair))
        self._at = time.monotonic()
        return self.source

    def _begin(self, pair: Pair, config: Config, source: Path, at: str = "") -> None:
        """With weights that are made of another model's, by each rank for itself."""
        from flip.training.begin import begin_from  # timm, a second that other runs need not pay

        self._watchdog.beat(f"beginning from {source}", times=LONG)
        made = begin_from(pair, config, source, at)
        self.checkpointer.parent = f"{source}/checkpoints/{at}" if at else str(source)
        if self._world.first:
            differs = "; ".join(f"{key}: {there} there, {here} here" for key, (there, here) in made["differs"].items())
            log.info("begins with the weights of %s; %s", source, differs or "it is the same model")

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
