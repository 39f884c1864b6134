"""The checkpoint policy of one attempt: when to save, what to resume from, and what saving costs.

With ``minutes: 0`` the time between saves is Young's interval (Young 1974, Daly 2006). A save costs the steps that wait
for it; an interruption costs, on average, half an interval of repeated steps. To first order their sum is least at
sqrt(2 * cost of a save * time between interruptions).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flip.checkpoint.restorer import CheckpointRestorer
from flip.checkpoint.saver import Checkpointer, model_state, optimizer_state
from flip.common.shutdown import LONG_OPERATION_FACTOR, Watchdog
from flip.config.schema import Config
from flip.data.storage.retry import RetryPolicy
from flip.distributed.collectives import run_on_first
from flip.distributed.parallel import World
from flip.models.clip import CLIPModel
from flip.runs import formats
from flip.runs.checkpoint_folder import SavedCheckpoint
from flip.runs.errors import STOPPED
from flip.runs.metric_lines import metric_file
from flip.runs.rundir import RunDir, read_record

log = logging.getLogger(__name__)

DAY = 86_400.0
FIRST = 300.0
"""Seconds to the first save, which measures the cost of one."""
MIN_SECONDS = 60.0
MAX_SECONDS = 3600.0
MIN_SAVE_MULTIPLE = 4.0
"""The interval is at least this many times the length of a save: how much a save slows training is not measured."""


class CheckpointManager:
    """Saves and restores the state of one attempt. Methods are collective except ``is_due``."""

    def __init__(self, run: RunDir, attempt: int, world: World, config: Config, watchdog: Watchdog) -> None:
        self._run = run
        self._world = world
        self._watchdog = watchdog
        section = config.checkpoint
        retry_policy = RetryPolicy.of(config.data)
        self.checkpointer = Checkpointer(
            run, attempt, world, section.keep, section.background == "yes", section.url, retry_policy, section.keep_at
        )
        self._restorer = self.checkpointer.restorer
        self._interval: SaveInterval | None = None
        if world.is_rank0 and not section.samples:  # rank 0's clock decides for all
            self._interval = SaveInterval(section.minutes, run, attempt)
        self._last_time = time.monotonic()
        self._last_samples = 0
        self.restore_seconds = 0.0
        """From the search for a checkpoint until the weights are there."""
        self.resumed_from: SavedCheckpoint | None = None
        self._start = run.attempt(attempt) / "start.json"
        self.save_after_first_step = False
        self.saves = 0
        self.blocked_seconds = 0.0
        """Saves of this attempt, and the seconds that steps waited for them."""

    def find(
        self, extended_checkpoint: Callable[[CheckpointRestorer], SavedCheckpoint | None]
    ) -> SavedCheckpoint | None:
        """The checkpoint to resume from: the newest one, or what ``extended_checkpoint`` opens for a run without
        checkpoints.

        Collective. Raises FormatError if the checkpoint has another order of samples, and what
        ``CheckpointRestorer.newest`` raises.
        """
        self._last_time = time.monotonic()
        # Rank 0 reads for all: on a shared file system another rank may not see the file yet and would decide
        # otherwise.
        record = run_on_first(lambda: (read_record(self._start) or {}).get("first_commit"), self._world.control_group)
        self.save_after_first_step = bool(record)
        self.resumed_from = self._restorer.newest() or extended_checkpoint(self._restorer)
        if self.resumed_from is not None:
            formats.check(formats.ORDER, self.resumed_from.record, self.resumed_from.path)
            self._last_samples = self.resumed_from.samples_seen
        return self.resumed_from

    def load_weights(self, model: CLIPModel, initialise: Callable[[CheckpointRestorer], None]) -> None:
        """Fill the weights from the checkpoint that ``find`` returned; without a checkpoint, call ``initialise`` to
        fill them.

        Starts the time to the next save.
        """
        if self.resumed_from is None:
            initialise(self._restorer)
        else:
            self._restorer.load(self.resumed_from, model_state(model))
        self.restore_seconds = time.monotonic() - self._last_time
        self._last_time = time.monotonic()

    def load_optimizer(self, model: CLIPModel, optimizer: torch.optim.Optimizer, stage: str) -> None:
        """Fill the moments from the checkpoint that ``find`` returned, if it is one of ``stage``; other stages start
        with fresh moments."""
        if self.resumed_from is not None and self.resumed_from.stage == stage:
            self._restorer.load(self.resumed_from, optimizer_state(model, optimizer))

    def is_due(self) -> bool:
        """Whether a save is due by the clock of rank 0; False on every other rank."""
        if self._interval is None:
            return False
        seconds = self._interval.seconds(self.saves, self.blocked_seconds, self.checkpointer.last_save_seconds)
        return time.monotonic() - self._last_time > seconds

    def is_unsaved(self, samples_seen: int) -> bool:
        """Whether S = ``samples_seen`` is neither saved nor being saved."""
        return samples_seen not in (self._last_samples, 0)

    def save(self, state: dict[str, torch.Tensor], stage: str, samples_seen: int, **record: Any) -> None:
        """Start a save of S = ``samples_seen``; ``wait`` waits until the checkpoint is complete.

        Args:
            state: this rank's part of each tensor by its name in the checkpoint (``model_state``, ``optimizer_state``).
            stage: the stage of S.
            record: further fields of commit.json.

        Collective. Blocks while the state is copied, and while an earlier save is still being written, whose error it
        raises.
        """
        start = time.perf_counter()
        self.checkpointer.save(state, stage, samples_seen, **record)
        self._last_samples = samples_seen
        self._last_time = time.monotonic()
        self.save_after_first_step = False
        self.saves += 1
        self.blocked_seconds += time.perf_counter() - start

    def has_failed(self) -> bool:
        """Whether the save in the background has failed; ``wait`` and the next save raise its error."""
        return self.checkpointer.failed

    @property
    def waited_seconds(self) -> float:
        """Seconds of ``blocked_seconds`` in which a save waited for the one before it."""
        return self.checkpointer.blocked_seconds

    def wait(self) -> None:
        """Wait for the save in the background. Raises its error, on all ranks."""
        self._watchdog.heartbeat("waiting for a save", times=LONG_OPERATION_FACTOR)
        self.checkpointer.wait()


class SaveInterval:
    """Seconds between the saves of one attempt. ``minutes`` 0: Young's interval from observed costs."""

    def __init__(self, minutes: float, run: RunDir, attempt: int) -> None:
        self._fixed = 60 * minutes
        self._start = time.monotonic()
        if minutes:
            self._uptime = 0.0
            self._interruptions = 0
        else:
            self._uptime, self._interruptions = uptime_and_interruptions(run, attempt)

    def seconds(self, saves: int, blocked: float, last: float) -> float:
        """After ``saves`` saves that blocked steps for ``blocked`` seconds, the last of which took ``last`` seconds."""
        if self._fixed:
            return self._fixed
        if not saves:
            return FIRST
        uptime = self._uptime + time.monotonic() - self._start
        return young_daly_interval(blocked / saves, (DAY + uptime) / (1 + self._interruptions), last)


def young_daly_interval(cost: float, between: float, duration: float) -> float:
    """Seconds between saves that least delay a run: sqrt(2 * cost * between) (Young 1974; Daly 2006), within limits.

    ``cost``: seconds that a save blocks steps. ``between``: seconds from one interruption to the next. ``duration``:
    seconds until a save is complete; the interval is at least MIN_SAVE_MULTIPLE times that.
    """
    least = MIN_SAVE_MULTIPLE * duration
    return min(max(math.sqrt(2 * cost * between), MIN_SECONDS, least), max(MAX_SECONDS, least))


def uptime_and_interruptions(run: RunDir, attempt: int) -> tuple[float, int]:
    """Seconds that earlier attempts trained, and how many of them lost steps at their end. A clean stop loses none.

    Both times of an attempt come from the clock of its own rank 0. Damaged records and metric lines are skipped: they
    only tune an interval and must not stop a run.
    """
    uptime = 0.0
    interruptions = 0
    for n in run.attempt_numbers():
        ready = _record(run.attempt(n) / "ready.json").get("time")
        if n >= attempt or ready is None:
            continue
        lines = metric_file(run, n).newest_first()
        uptime += max(0.0, next((line["time"] for line in lines if "time" in line), ready) - ready)
        interruptions += _record(run.attempt(n) / "end.json").get("code") != STOPPED
    return uptime, interruptions


def _record(path: Path) -> dict[str, Any]:
    try:
        return read_record(path) or {}
    except (OSError, ValueError) as error:
        log.warning("ignored for the checkpoint interval: %s", error)
        return {}
