"""How often to commit: by the clock as the configuration says, or as costs and interruptions say (Young 1974).

A save costs the steps that wait for it; an interruption costs, on average, half an interval of steps done again. Their
sum is least, in first order, at sqrt(2 * cost of a save * time between interruptions); Daly 2006 has the higher orders.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

from flip.rundir import RunDir, read_json

DAY = 86_400.0
FIRST = 300.0
"""Seconds to the first commit, which tells what one costs."""
LEAST, MOST = 60.0, 3600.0
APART = 4.0
"""Saves are begun at least so many times their own length apart: what they slow down is not measured."""


class Interval:
    """Seconds between commits of one attempt. ``minutes`` 0: by what is observed."""

    def __init__(self, minutes: float, run: RunDir, attempt: int) -> None:
        self._fixed, self._begin = 60 * minutes, time.monotonic()
        self._lived, self._cut = (0.0, 0) if minutes else observed(run, attempt)

    def seconds(self, saves: int, waited: float, took: float) -> float:
        """After ``saves`` saves for which steps waited ``waited`` seconds; the last took ``took`` until its commit."""
        if self._fixed:
            return self._fixed
        if not saves:
            return FIRST
        lived = self._lived + time.monotonic() - self._begin
        return best(waited / saves, (DAY + lived) / (1 + self._cut), took)


def best(cost: float, between: float, took: float) -> float:
    """The interval in seconds for a save that costs ``cost`` and takes ``took`` seconds."""
    return min(max(math.sqrt(2 * cost * between), LEAST, APART * took), max(MOST, APART * took))


def observed(run: RunDir, attempt: int) -> tuple[float, int]:
    """Seconds that the attempts before this one trained, and how many of them lost steps at their end.

    One that stopped cleanly lost none. Both times of an attempt are by the clock of its own first rank.
    """
    lived, cut = 0.0, 0
    for n in run.attempt_numbers():
        ready, end = read_json(run.attempt(n) / "ready.json"), read_json(run.attempt(n) / "end.json") or {}
        if n >= attempt or ready is None:
            continue
        lived += max(0.0, _last(run.metrics / f"{n}.jsonl", "time", ready["time"]) - ready["time"])
        cut += end.get("code") != 75
    return lived, cut


def _last(path: Path, key: str, default: float) -> float:
    """The number in the last whole line of a file of JSON lines."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 14)))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return default
    return float(json.loads(lines[-1])[key]) if lines else default
