"""How often to commit: by the clock as the configuration says, or as costs and interruptions say (Young 1974).

A save costs the steps that wait for it; an interruption costs, on average, half an interval of steps done again. Their
sum is least, in first order, at sqrt(2 * cost of a save * time between interruptions); Daly 2006 has the higher orders.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flip.runs import rundir
from flip.runs.rundir import RunDir, read_record

log = logging.getLogger(__name__)

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

    A clean stop loses none. Both times of an attempt come from the clock of its own first rank. A record or metric line
    that is damaged counts as absent: they only tune an interval and must not stop a run.
    """
    lived, cut = 0.0, 0
    for n in run.attempt_numbers():
        ready = _time(_record(run.attempt(n) / "ready.json"))
        if n >= attempt or ready is None:
            continue
        logged = map(_time, rundir.newest_first(run.metrics / f"{n}.jsonl"))
        lived += max(0.0, next((time for time in logged if time is not None), ready) - ready)
        cut += _record(run.attempt(n) / "end.json").get("code") != 75
    return lived, cut


def _record(path: Path) -> dict[str, Any]:
    try:
        return read_record(path) or {}
    except (OSError, ValueError) as error:
        log.warning("ignored for the checkpoint interval: %s", error)
        return {}


def _time(record: Mapping[str, Any]) -> float | None:
    value = record.get("time")
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e12 else None
