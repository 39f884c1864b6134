"""Protects the weights: skips steps with a loss or gradient that is not finite, and records loss spikes.

The device decides to skip a step without waiting for the host: the optimiser's kernel reads a flag. The host reads loss
and norm one step late, and before every checkpoint. So weights, moments and checkpoints are those from before the bad
step.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flip.files.creation import run_folder
from flip.runs.errors import Diverged
from flip.runs.rundir import RunDir, write_json

log = logging.getLogger(__name__)

MAX_RECORDS = 100
"""Spikes of one attempt that are recorded in files; more are only logged."""


class TrainedStep(NamedTuple):
    """Description of a step for its record. ``step`` and ``samples`` as in metric lines: after it."""

    step: int
    samples_seen: int
    stage: str
    lr: float
    ids: Tensor
    """(b,) int64, this rank's samples."""


class NonFiniteGuard:
    """Checks the steps of one rank. All ranks see the same loss and norm, so they decide alike at the same step."""

    def __init__(self, run: RunDir, attempt: int, rank: int, spike: float, window: int) -> None:
        self._run = run
        self._attempt = attempt
        self._rank = rank
        self._spikes = LossSpikeDetector(spike, window)
        self._spike_count = 0
        self._stage = ""
        self._pending: tuple[TrainedStep, Tensor, torch.cuda.Event | None] | None = None

    def check_step(self, optimizer: torch.optim.Optimizer, step: TrainedStep, loss: Tensor, norm: Tensor) -> None:
        """Make ``optimizer.step``, which comes next, change nothing if ``loss`` or ``norm`` (both ()) is not finite.

        Then reads the previous step; raises Diverged if that was skipped. The optimiser leaves weights and
        moments unchanged if its ``found_inf`` is 1, the protocol of torch's GradScaler (``optimizer.build``).
        """
        finite = loss.isfinite() & norm.isfinite()
        optimizer.found_inf = finite.logical_not().to(torch.float32)  # type: ignore[attr-defined]
        numbers = torch.stack([loss.detach().double(), norm.double()])
        event = None
        if numbers.is_cuda:
            host = torch.empty(2, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            # a wait frees its core
            numbers = host
            event = torch.cuda.Event(blocking=True)
            event.record()
        self.flush()
        self._pending = step, numbers, event

    @property
    def is_device_busy(self) -> bool:
        """Whether the device has not finished the newest step."""
        event = self._pending[2] if self._pending else None
        return event is not None and not event.query()

    def flush(self) -> None:
        """Wait until the device has finished the newest step, and read it. Call it before the present position is saved
        or reported. Raises Diverged."""
        if self._pending is None:
            return
        step, numbers, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        loss, norm = numbers.tolist()
        where = f"stage {step.stage}, step {step.step}, S = {step.samples_seen}"
        if not (math.isfinite(loss) and math.isfinite(norm)):
            path = self._write_record("not_finite", step, loss, norm)
            raise Diverged(
                "the loss or its gradient is not finite; the step was skipped", where,
                f"loss {loss}, gradient norm {norm}",
                f"{path} lists its samples. Lower `base_lr` or lengthen `warmup`.",
            )  # fmt: skip
        if step.stage != self._stage:
            self._stage = step.stage
            self._spikes.clear()
        bound = self._spikes.update(loss)
        if bound is not None:
            path = "not recorded"
            if self._spike_count < MAX_RECORDS:
                path = self._write_record("spike", step, loss, norm, bound)
            self._spike_count += 1
            if self._rank == 0:
                log.warning("%s: loss %.4f is above %.4f, a spike (%s)", where, loss, bound, path)

    def _write_record(self, kind: str, step: TrainedStep, loss: float, norm: float, bound: float | None = None) -> str:
        """Write anomalies/<n>-<step>.<rank>.json and return its name. An error of the disk is only logged."""
        record: dict[str, Any] = {
            "kind": kind, "attempt": self._attempt, "rank": self._rank, "stage": step.stage, "step": step.step,
            "samples": step.samples_seen, "lr": step.lr, "loss": _json(loss), "grad_norm": _json(norm), "bound": bound,
            "ids": step.ids.tolist(), "time": time.time(),
        }  # fmt: skip
        path = self._run.anomalies / f"{self._attempt}-{step.step}.{self._rank}.json"
        try:
            run_folder(self._run.anomalies)
            write_json(path, record)
        except OSError as error:
            log.warning("%s could not be written: %s", path, error)
        return f"{path.parent.name}/{path.name}"


def _json(value: float) -> float | str:
    """JSON has no values that are not finite."""
    if math.isfinite(value):
        return value
    return str(value)


class LossSpikeDetector:
    """Detects a loss above median + ``factor`` * sigma of the ``window`` losses before it; factor 0: never.

    sigma = 1.4826 * the median absolute deviation, which is the standard deviation of normal losses (Rousseeuw & Croux
    1993) and does not follow the spikes themselves. It is at least a thousandth of the median, for losses that hardly
    differ. Only the first loss of an excursion counts.
    """

    def __init__(self, factor: float, window: int) -> None:
        self._factor = factor
        self._losses: deque[float] = deque(maxlen=window)
        self._above = False

    def clear(self) -> None:
        """Start again, for another stage."""
        self._losses.clear()
        self._above = False

    def update(self, loss: float) -> float | None:
        """Add a loss. Returns the bound if this loss is the first above it, else None."""
        if not self._factor:
            return None
        bound = math.inf
        if len(self._losses) == self._losses.maxlen:
            median = statistics.median(self._losses)
            deviation = statistics.median(abs(value - median) for value in self._losses)
            bound = median + self._factor * max(1.4826 * deviation, 1e-3 * abs(median))
        was_above = self._above
        self._above = loss > bound
        self._losses.append(loss)
        if self._above and not was_above:
            return bound
        return None
