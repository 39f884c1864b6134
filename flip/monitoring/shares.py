"""What the seconds between two metric lines went to, and what that says to a reader. Pure: no torch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

PARTS = ("data_wait", "compute", "communication", "checkpoint", "evaluation", "other")
"""data_wait: the trainer had no batch. compute, communication: inside steps; the latter is what arithmetic waited for
other ranks, as a sampled step had it (``flip.monitoring.profiler``). checkpoint: steps waited for a commit. other:
between steps, as writing lines."""

REMEDIES = {
    "data_wait": ("input-bound", "more data.workers (now {workers}), smaller stored images, or data.cache"),
    "communication": ("communication-bound", "a larger batch per rank, or fewer ranks on faster links"),
    "checkpoint": ("checkpoint-bound", "commits further apart (checkpoint.minutes, checkpoint.samples)"),
    "evaluation": ("evaluation-bound", "scores further apart (evaluate.every) or smaller validation sets"),
    "other": ("bound by what is between steps", "metric lines further apart (monitor.log_every)"),
}  # fmt: skip
"""Part -> (verdict, what would help). Only the part that a run is bound by is named."""

BOUND = 0.1
"""Share of the time from which on a part, the largest beside compute, is what holds a run up."""
LINES = 10
"""Metric lines over which the verdict looks back."""


class Window:
    """Seconds since the last metric line, by what they went to; samples and seconds of its steps."""

    def __init__(self) -> None:
        self.samples, self.waited, self.seconds = 0, 0.0, 1e-9
        self._begin, self._beside = time.perf_counter(), dict.fromkeys(("checkpoint", "evaluation"), 0.0)

    def add(self, samples: int, waited: float, seconds: float) -> None:
        """A step; ``seconds`` of it in all, ``waited`` of these for its batch."""
        self.samples, self.waited, self.seconds = self.samples + samples, self.waited + waited, self.seconds + seconds

    def beside(self, part: str, seconds: float) -> None:
        """Steps stood still for ``part``: checkpoint or evaluation."""
        self._beside[part] += seconds

    def shares(self, communication: float | None) -> dict[str, float | None]:
        """PARTS -> share of the time until now, together 1. ``communication``: share of a step without its data-wait;
        None: not known, then compute is both and communication None."""
        step, remote = self.seconds - self.waited, communication or 0.0
        seconds = {"data_wait": self.waited, "compute": step * (1 - remote), "communication": step * remote}
        seconds |= self._beside
        whole = max(time.perf_counter() - self._begin, sum(seconds.values()))
        seconds["other"] = whole - sum(seconds.values())
        found: dict[str, float | None] = {part: seconds[part] / whole for part in PARTS}
        return found if communication is not None else found | {"communication": None}


class Verdict:
    """What holds a run up, over the last LINES metric lines: one sentence, and whether it is another than before."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._lines: deque[Mapping[str, float | None]] = deque(maxlen=LINES)
        self.bound = ""
        """The part that it is bound by."""

    def judge(self, shares: Mapping[str, float | None]) -> tuple[str, bool]:
        self._lines.append(shares)
        means = {part: sum(line[part] or 0.0 for line in self._lines) / len(self._lines) for part in PARTS}
        worst = max((part for part in PARTS if part != "compute"), key=means.__getitem__)
        bound = worst if means[worst] >= BOUND else "compute"
        changed, self.bound = bound != self.bound, bound
        if bound == "compute":
            return f"compute-bound: {100 * means['compute']:.0f} % of the time is arithmetic", changed
        name, help = REMEDIES[bound]
        words = f"{bound.replace('_', '-')} is {100 * means[bound]:.0f} % of the time"
        return f"{name}: {words}; {help.format(workers=self._workers)}", changed
