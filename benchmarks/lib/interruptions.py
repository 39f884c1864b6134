"""Goodput of a run that is interrupted: the share of its time that becomes steps which stand; by formula and by events.

Interruptions come at random, on average m seconds apart, and save nothing first. An attempt starts for R seconds, then
trains; every t seconds it saves, which holds up steps for c seconds, and w seconds later the commit stands. An
interruption takes it back to the newest commit. With exponential times between interruptions commit n of an attempt
stands if it lasts longer than R + w + n (t + c), so that

    goodput = t / m * exp(-(R + w) / m) / (exp((t + c) / m) - 1)

which with w = 0 is the complete model of Daly (2006, Future Generation Computer Systems 22) turned over.
Its first order, m large: 1 - c / t - t / (2 m) - (R + w) / m; least lost at t = sqrt(2 c m), Young (1974).
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
    """What runs are like, in seconds."""

    between: float
    """m, on average between two interruptions."""
    start: float
    """R, from the begin of an attempt to its first step."""
    cost: float
    """c, for which steps wait for a save."""
    written: float
    """w, until its commit stands."""


@dataclass
class History:
    """What a run knows of itself when it asks when to save next (``flip.checkpoint.manager.SaveInterval``)."""

    trained: float = 0.0
    """Seconds since their first steps of all attempts, this one included."""
    cut: int = 0
    """Attempts that lost steps."""
    saves: int = 0
    """Of this attempt."""


def goodput(life: Life, every: float) -> float:
    """The formula above for t = ``every``."""
    alone = math.exp(-(life.start + life.written) / life.between)
    return every / life.between * alone / math.expm1((every + life.cost) / life.between)


def young(life: Life) -> float:
    """sqrt(2 c m)."""
    return math.sqrt(2 * life.cost * life.between)


def optimum(life: Life) -> float:
    """The t of most goodput, by golden section around Young's."""
    low, high, ratio = young(life) / 20, young(life) * 20, (math.sqrt(5) - 1) / 2
    while high - low > 1e-6 * high:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (left, high) if goodput(life, left) < goodput(life, right) else (low, right)
    return (low + high) / 2


def known(life: Life) -> float:
    """The interval of ``checkpoint.minutes: 0`` when costs and interruptions are known: bounds and all."""
    return young_daly_interval(life.cost, life.between, life.cost + life.written)


def learning(life: Life) -> Rule:
    """The same from what a run has seen so far, as ``flip.checkpoint.manager.SaveInterval`` does; it begins with a
    day."""

    def every(history: History) -> float:
        if not history.saves:
            return FIRST
        between = (DAY + history.trained) / (1 + history.cut)
        return young_daly_interval(life.cost, between, life.cost + life.written)

    return every


def simulate(life: Life, rule: Rule, lives: int, seed: int) -> tuple[float, float]:
    """Goodput over ``lives`` attempts of one endless run, event by event, and its standard error."""
    rng, history = np.random.default_rng(seed), History()
    lasted = rng.exponential(life.between, lives)
    useful = np.zeros(lives)
    for n, end in enumerate(lasted.tolist()):
        history.saves, before = 0, history.trained
        now, trained, stood = life.start, 0.0, 0.0
        while now < end:
            every = rule(history)
            now, trained = now + every + life.cost, trained + every
            if now + life.written > end:
                break
            stood, history.saves = trained, history.saves + 1
            history.trained = before + now - life.start
        useful[n], history.cut = stood, history.cut + 1
        history.trained = before + max(0.0, end - life.start)
    share = float(useful.sum() / lasted.sum())
    apart = useful - share * lasted
    return share, float(apart.std(ddof=1) / math.sqrt(lives) / lasted.mean())
