"""Goodput of an interrupted run, by formula and by simulation: the share of its time spent in steps that are not lost.

Interruptions are random, on average m seconds apart, without a save before. An attempt starts up for R seconds, then
trains; every t seconds it saves, which blocks steps for c seconds, and w seconds later the checkpoint is complete.
After an interruption the newest checkpoint is resumed. With exponential times between interruptions, checkpoint n of an
attempt exists if the attempt lasts longer than R + w + n (t + c), so that

    goodput = t / m * exp(-(R + w) / m) / (exp((t + c) / m) - 1)

which with w = 0 is the inverse of the complete model of Daly (2006, Future Generation Computer Systems 22). Its first
order for large m: 1 - c / t - t / (2 m) - (R + w) / m; the optimum is t = sqrt(2 c m), Young (1974).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flip.checkpoint.manager import DAY, FIRST, young_daly_interval

Rule = Callable[["History"], float]


@dataclass(frozen=True)
class Life:
    """Parameters of a run, in seconds."""

    between: float
    """m, mean time between interruptions."""
    start: float
    """R, from the start of an attempt to its first step."""
    cost: float
    """c, for which a save blocks steps."""
    written: float
    """w, until its checkpoint is complete."""


@dataclass
class History:
    """The state from which a run computes its save interval (``flip.checkpoint.manager.SaveInterval``)."""

    trained: float = 0.0
    """Seconds since their first steps of all attempts, this one included."""
    cut: int = 0
    """Attempts that lost steps."""
    saves: int = 0
    """Seconds of this attempt."""


def goodput(life: Life, every: float) -> float:
    """The formula above for t = ``every``."""
    alone = math.exp(-(life.start + life.written) / life.between)
    return every / life.between * alone / math.expm1((every + life.cost) / life.between)


def young(life: Life) -> float:
    """sqrt(2 c m)."""
    return math.sqrt(2 * life.cost * life.between)


def optimum(life: Life) -> float:
    """The t with the best goodput, by golden-section search around Young's."""
    low = young(life) / 20
    high = young(life) * 20
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-6 * high:
        left = high - ratio * (high - low)
        right = low + ratio * (high - low)
        if goodput(life, left) < goodput(life, right):
            low = left
            high = high
        else:
            low = low
            high = right
    return (low + high) / 2


def interval_of_known_costs(life: Life) -> float:
    """The interval of ``checkpoint.minutes: 0`` for known costs and interruptions, with its bounds."""
    return young_daly_interval(life.cost, life.between, life.cost + life.written)


def learning(life: Life) -> Rule:
    """The same from the history of a run, as ``flip.checkpoint.manager.SaveInterval``; it starts with a day."""

    def every(history: History) -> float:
        if not history.saves:
            return FIRST
        between = (DAY + history.trained) / (1 + history.cut)
        return young_daly_interval(life.cost, between, life.cost + life.written)

    return every


def simulate(life: Life, rule: Rule, lives: int, seed: int) -> tuple[float, float]:
    """Goodput over ``lives`` attempts of one endless run, event by event, and its standard error."""
    rng = np.random.default_rng(seed)
    history = History()
    lasted = rng.exponential(life.between, lives)
    useful = np.zeros(lives)
    for n, end in enumerate(lasted.tolist()):
        history.saves = 0
        before = history.trained
        now = life.start
        trained = 0.0
        stood = 0.0
        while now < end:
            every = rule(history)
            now += every + life.cost
            trained += every
            if now + life.written > end:
                break
            stood = trained
            history.saves += 1
            history.trained = before + now - life.start
        useful[n] = stood
        history.cut += 1
        history.trained = before + max(0.0, end - life.start)
    share = float(useful.sum() / lasted.sum())
    apart = useful - share * lasted
    return share, float(apart.std(ddof=1) / math.sqrt(lives) / lasted.mean())
