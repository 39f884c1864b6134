"""Statistics of the scaling study: pure functions of scores, with 95 % intervals.

Scores vary between seeds by a standard deviation that is pooled over all points with several seeds, because three seeds
alone determine it badly. Bootstraps resample the deviations of runs from the mean of their point, for the same reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from jobs.reporting.distributions import Interval
from lab.studies.engine.intervals import Array, Error

DRAWS = 2000
CLEAR = 2.0
"""A difference of first seeds that exceeds its interval's half-width this many times needs no further seeds."""


@dataclass(frozen=True)
class Spread:
    """Standard deviation between seeds of one point, and its degrees of freedom."""

    deviation: float
    freedom: int


def spread(scores: Mapping[Any, Sequence[float]]) -> Spread | None:
    """Pooled over points, the variance being sum (x - mean of its point)^2 / sum (n - 1); None without repeats."""
    deviations = _deviations(scores.values())
    freedom = sum(len(values) - 1 for values in scores.values() if values)
    if freedom:
        return Spread(sqrt(float((deviations**2).sum()) / freedom), freedom)
    return None


def contrast(
    terms: Sequence[tuple[float, Sequence[float]]], between: Spread, pictures: Array | None = None
) -> Interval | None:
    """Sum of factor * mean of the scores, as a difference of points; None if a point has no score.

    The variance between seeds is s^2 * sum factor^2 / n with the pooled deviation s; the part of the test pictures is
    that of the `covariance` of the points, if it is given. Seeds are not paired: points differ in what a seed means for
    them.
    """
    if not all(scores for _, scores in terms):
        return None
    value = sum(factor * float(np.mean(scores)) for factor, scores in terms)
    seeds = between.deviation**2 * sum(factor**2 / len(scores) for factor, scores in terms)
    factors = np.array([factor for factor, _ in terms])
    sampled = 0.0
    if pictures is not None:
        sampled = float(factors @ pictures @ factors)
    return Error(seeds, between.freedom, sampled).interval(value)


def is_clear(difference: Interval) -> bool:
    """Whether a difference is so large that no further seeds are trained."""
    return abs(difference.value) > CLEAR * (difference.high - difference.value)


# -- speed-up ----------------------------------------------------------------------------------------------------------

Lengths = Sequence[tuple[float, Sequence[float]]]
"""Per length, ascending: cost of a run, and the score of each seed."""


@dataclass(frozen=True)
class SpeedUp:
    """How many times less the second design costs at equal accuracy.

    ``level``: the accuracy. ``bound``: ``at least`` (``at most``) if the second (the
    first) has that accuracy at its shortest length already; else empty.
    """

    estimate: Interval
    level: float
    bound: str = ""


def speed_up(
    first: Lengths,
    second: Lengths,
    draws: int = DRAWS,
    seed: int = 0,
    shared: bool = False,
    level: float | None = None,
    calibration: float = 0.0,
    pictures: Array | None = None,
) -> SpeedUp | None:
    """Cost of the first design at a level of accuracy, divided by that of the second; None if a length has no score, or
    if a design does not reach the level. Without ``level``: the highest that both reach.

    Accuracy between two lengths is linear in the logarithm of the cost, never extrapolated. The interval is a
    bootstrap: each draw adds resampled deviations of all runs of both designs to the means, errors of the means by the
    test pictures (``pictures``: the `covariance` of the lengths of the first design, then of the second), and the
    relative error of the ratio of costs (``calibration``, a standard deviation). ``shared``: the lengths of a seed
    deviate together, since they share a trunk, and are resampled together; all have as many seeds.
    """
    if not first or not second or not all(scores for _, scores in (*first, *second)):
        return None
    a, b = ([float(np.mean(scores)) for _, scores in each] for each in (first, second))
    if level is not None and level > min(max(a), max(b)):
        return None
    random = np.random.default_rng(seed)
    drawn = _drawn((first, second), (a, b), random, draws, shared)
    if pictures is not None:
        errors = random.standard_normal((len(drawn), len(pictures))) @ _root(pictures)
        drawn = [(x + e[: len(a)], y + e[len(a) :]) for (x, y), e in zip(drawn, errors, strict=True)]
    ratios = [_ratio(first, of_first, second, of_second, level)[0] for of_first, of_second in drawn]
    ratio, reached = _ratio(first, a, second, b, level)
    low = 0.0
    high = np.inf
    if ratios:
        low, high = np.quantile(ratios * np.exp(calibration * random.standard_normal(len(ratios))), (0.025, 0.975))
    bound = ""
    if b[0] >= reached:
        bound = "at least"
    elif a[0] >= reached:
        bound = "at most"
    return SpeedUp(Interval(ratio, float(low), float(high)), reached, bound)


def _drawn(
    designs: tuple[Lengths, Lengths],
    means: tuple[Sequence[float], Sequence[float]],
    random: np.random.Generator,
    draws: int,
    shared: bool,
) -> list[tuple[Array, Array]]:
    """Mean accuracies of both designs per length with resampled deviations, for each draw; empty without any."""
    if shared:
        pool = np.concatenate([np.array([_scaled([scores]) for _, scores in each]).T for each in designs])
    else:
        pool = _scaled([scores for each in designs for _, scores in each])
    if not len(pool):
        return []
    if shared:  # (draws, lengths) of each design
        noise = [random.choice(pool, (draws, len(each[0][1]))).mean(axis=1) for each in designs]
    else:
        noise = [
            np.transpose([random.choice(pool, (draws, len(scores))).mean(axis=1) for _, scores in each])
            for each in designs
        ]
    first, second = (np.asarray(values) + each for values, each in zip(means, noise, strict=True))
    return list(zip(first, second, strict=True))


def _root(matrix: Array) -> Array:
    """The symmetric root of a covariance, the same on every machine, also if it is singular."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)


def relative_error(facts: Mapping[str, Any]) -> float:
    """Relative standard error of a calibrated time: that of a median, from its quartiles and number of intervals."""
    low, high = facts["quartiles"]
    deviation = (high - low) / 1.349  # of a normal distribution with these quartiles
    return float(1.2533 * deviation / sqrt(facts["intervals"]) / facts["seconds"])


def _ratio(
    first: Lengths,
    a: Sequence[float] | Array,
    second: Lengths,
    b: Sequence[float] | Array,
    level: float | None,
) -> tuple[float, float]:
    """(ratio of costs, accuracy at which they are compared) for mean accuracies ``a`` and ``b`` per length."""
    if level is None:
        level = min(max(a), max(b))
    logs = list[float]()
    for lengths, means in ((first, a), (second, b)):
        # a longer run that is not more accurate does not count
        reached, shortest = np.unique(np.maximum.accumulate(means), return_index=True)
        logs.append(float(np.interp(level, reached, np.log([lengths[i][0] for i in shortest]))))
    return float(np.exp(logs[0] - logs[1])), level


def _deviations(points: Iterable[Sequence[float]]) -> Array:
    """Deviations of all scores from the mean of their point."""
    return np.concatenate([np.zeros(0), *(np.asarray(v, float) - np.mean(v) for v in points if len(v))])


def _scaled(points: Sequence[Sequence[float]]) -> Array:
    """Deviations of points with several scores, times sqrt(n / (n - 1)), so that they vary as scores do."""
    several = [values for values in points if len(values) > 1]
    return np.concatenate([np.zeros(0), *(_deviations([v]) * sqrt(len(v) / (len(v) - 1)) for v in several)])
