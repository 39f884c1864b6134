"""The one setting of a run whose change would save most time, where its own numbers say so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from flip.monitoring.results import Outcome
from jobs.common.text import duration, percent

if TYPE_CHECKING:
    from jobs.reporting.goodput import Times

INTERRUPTIONS = 3
"""From so many attempts that lost steps on, their rate is worth an advice."""
WORTH = 0.02
"""Share of the time that a change must promise."""


def advise(outcome: Outcome, times: Sequence[Times]) -> tuple[str, float]:
    """(the change of one setting that promises most, share of the time it promises); ("", 0) where none is worth it."""
    total = sum(t.total for t in times)
    if not total:
        return "", 0.0
    found = [_interval(outcome, times, total), _longer(outcome, times, total), _workers(outcome, times, total)]
    best = max(found, key=lambda advice: advice[1])
    return best if best[1] >= WORTH else ("", 0.0)


def _interval(outcome: Outcome, times: Sequence[Times], total: float) -> tuple[str, float]:
    """checkpoint.minutes by Young: sqrt(2 * cost of a save * time between interruptions)."""
    lines = outcome.metrics.ends()
    saves, saving = (sum(line[key] for line in lines if line[key] == line[key]) for key in ("saves", "saving"))
    cut = sum(t.cut for t in times)
    minutes = outcome.settings.get("checkpoint.minutes")
    if not saves or not saving or cut < INTERRUPTIONS or not minutes or outcome.settings.get("checkpoint.samples"):
        return "", 0.0
    cost, between, now = saving / saves, total / cut, 60 * float(minutes)
    best = math.sqrt(2 * cost * between)
    gain = young(now, cost, between) - young(best, cost, between)
    if 2 / 3 < best / now < 3 / 2:
        return "", 0.0
    words = f"checkpoint.minutes={best / 60:.2g} in place of {float(minutes):g}: a save costs {duration(cost)},"
    return f"{words} an interruption came every {duration(between)}", gain


def young(interval: float, cost: float, between: float) -> float:
    """Share of the time that saves and repeated steps take together, in first order."""
    return min(1.0, cost / interval + interval / (2 * between))


def _longer(outcome: Outcome, times: Sequence[Times], total: float) -> tuple[str, float]:
    """resources.hours where attempts end by it, and much of each is its start."""
    hours = float(outcome.settings.get("resources.hours") or 0)
    at_limit = [
        t for attempt, t in zip(outcome.attempts, times, strict=True)
        if attempt.end and attempt.end.get("cause") in ("stopped", "timeout") and 0.9 * 3600 * hours <= t.total
    ]  # fmt: skip
    if not hours or len(at_limit) < 2:
        return "", 0.0
    gain = sum(t.parts["starting"] for t in at_limit) / total / 2
    return f"resources.hours={2 * hours:g} in place of {hours:g}: {len(at_limit)} attempts ended by it", gain


def _workers(outcome: Outcome, times: Sequence[Times], total: float) -> tuple[str, float]:
    """data.workers where steps wait for data."""
    waits = outcome.metrics["data_wait"]
    waits = waits[np.isfinite(waits)]
    if len(waits) < 5:
        return "", 0.0
    share = float(waits.mean())
    workers = int(outcome.settings.get("data.workers") or 0)
    gain = share * sum(t.parts["useful"] for t in times) / total / 2 if share > 0.1 else 0.0
    return f"data.workers={max(1, 2 * workers)} in place of {workers}: steps wait {percent(share)} % for data", gain
