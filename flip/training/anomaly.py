"""The guard of the weights: a step whose loss or gradient is not finite is not taken, and a loss that jumps is told.

Both need numbers that are on the device. The decision not to take a step is made there, without waiting for anybody:
the optimiser's kernel reads a flag. The host reads loss and norm one step late, when the device has the next step to
work on, and before every commit. So weights, moments and commits are those from before the bad step.
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

from flip.runs.errors import Diverged
from flip.runs.rundir import RunDir, write_json

log = logging.getLogger(__name__)

MOST = 100
"""Spikes of one attempt that are written down; of more there is a line in the log."""


class Step(NamedTuple):
    """What is to be known of a step when its numbers come. ``step`` and ``samples`` as in metric lines: after it."""

    step: int
    samples: int
    stage: str
    lr: float
    ids: Tensor
    """(b,) int64, this rank's samples."""


class Guard:
    """One rank's. All ranks see the same loss and norm, and so come to the same decisions at the same step."""

    def __init__(self, run: RunDir, attempt: int, rank: int, spike: float, window: int) -> None:
        self._run, self._attempt, self._rank = run, attempt, rank
        self._spikes, self._told = Spikes(spike, window), 0
        self._stage = ""
        self._pending: tuple[Step, Tensor, torch.cuda.Event | None] | None = None

    def watch(self, optimizer: torch.optim.Optimizer, step: Step, loss: Tensor, norm: Tensor) -> None:
        """Call it before ``optimizer.step``, which changes nothing where ``loss`` or ``norm`` (both ()) is not finite.

        Then reads the step before; raises Diverged where that was not taken. The optimiser must be a fused one: its
        kernels leave weights and moments alone where ``found_inf`` is 1, as torch's GradScaler has it.
        """
        assert all(group["fused"] for group in optimizer.param_groups)
        finite = loss.isfinite() & norm.isfinite()
        optimizer.found_inf = finite.logical_not().to(torch.float32)  # type: ignore[attr-defined]
        numbers = torch.stack([loss.detach().double(), norm.double()])
        event = None
        if numbers.is_cuda:
            host = torch.empty(2, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            numbers, event = host, torch.cuda.Event()
            event.record()
        before, self._pending = self._pending, (step, numbers, event)
        self._read(before)

    def settle(self) -> None:
        """Read what has not been read. Call it before anything of the present position is kept or told."""
        before, self._pending = self._pending, None
        self._read(before)

    def _read(self, pending: tuple[Step, Tensor, torch.cuda.Event | None] | None) -> None:
        if pending is None:
            return
        step, numbers, event = pending
        if event is not None:
            event.synchronize()
        loss, norm = numbers.tolist()
        where = f"stage {step.stage}, step {step.step}, S = {step.samples}"
        if not (math.isfinite(loss) and math.isfinite(norm)):
            kept = self._keep("not_finite", step, loss, norm)
            raise Diverged(
                "the loss or its gradient is not finite; the step was not taken", where,
                f"loss {loss}, gradient norm {norm}",
                f"{kept} names its samples. Lower `base_lr` or lengthen `warmup`; the newest commit is from before.",
            )  # fmt: skip
        if step.stage != self._stage:
            self._stage = step.stage
            self._spikes.clear()
        bound = self._spikes.judge(loss)
        if bound is not None:
            kept = self._keep("spike", step, loss, norm, bound) if self._told < MOST else ""
            self._told += 1
            if self._rank == 0:
                log.warning("%s: loss %.4f is above %.4f, a spike (%s)", where, loss, bound, kept or "not written down")

    def _keep(self, kind: str, step: Step, loss: float, norm: float, bound: float | None = None) -> str:
        """Write anomalies/<n>-<step>.<rank>.json and return its name. Not being able to must not hide what happened."""
        record: dict[str, Any] = {
            "kind": kind, "attempt": self._attempt, "rank": self._rank, "stage": step.stage, "step": step.step,
            "samples": step.samples, "lr": step.lr, "loss": _json(loss), "grad_norm": _json(norm), "bound": bound,
            "ids": step.ids.tolist(), "time": time.time(),
        }  # fmt: skip
        path = self._run.anomalies / f"{self._attempt}-{step.step}.{self._rank}.json"
        try:
            self._run.anomalies.mkdir(exist_ok=True)
            write_json(path, record)
        except OSError as error:
            log.warning("%s could not be written: %s", path, error)
        return f"{path.parent.name}/{path.name}"


def _json(value: float) -> float | str:
    """JSON has no words for what is not finite."""
    return value if math.isfinite(value) else str(value)


class Spikes:
    """Tells a loss above median + ``factor`` * sigma of the ``window`` losses before it; factor 0: none ever is.

    sigma = 1.4826 * the median absolute deviation, which is the standard deviation where losses are normal
    (Rousseeuw & Croux 1993) and does not follow the spikes themselves; at least a thousandth of the median, since
    losses that hardly differ are no reason to cry. Of an excursion only the first loss is told.
    """

    def __init__(self, factor: float, window: int) -> None:
        self._factor = factor
        self._losses: deque[float] = deque(maxlen=window)
        self._above = False

    def clear(self) -> None:
        """Another stage: its losses are others."""
        self._losses.clear()
        self._above = False

    def judge(self, loss: float) -> float | None:
        """The bound where this loss is the first above it, else None. It is counted among the next one's."""
        if not self._factor:
            return None
        bound = math.inf
        if len(self._losses) == self._losses.maxlen:
            middle = statistics.median(self._losses)
            deviation = statistics.median(abs(one - middle) for one in self._losses)
            bound = middle + self._factor * max(1.4826 * deviation, 1e-3 * abs(middle))
        first, self._above = loss > bound and not self._above, loss > bound
        self._losses.append(loss)
        return bound if first else None
