"""Statistics of studies of arms: differences of arms that were trained with the same seeds, in points.

Two sources of error. Seeds: the deviation of a run from the effects of its arm and of its seed, pooled over all arms of
a study, because three pairs alone determine it badly. Pictures: another sample of test pictures. With answers per
picture (``answers.py``) both are resampled, and the arms share pictures; without them the binomial variances of both
arms add, which is an upper bound unless arms err on opposite pictures. p-values are corrected for all comparisons
(Holm).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from jobs.reporting.distributions import LEVEL, Interval, t_quantile, t_tail
from tools.studies.engine.answers import Bits

Scores = Mapping[int, float]
"""Seed -> score, 0..1."""

LEAST = 3
"""Minimum number of common seeds of a comparison."""
DRAWS = 4000
NOISES = 8
"""Draws of pictures in a bootstrap, and draws of seeds for each of them."""


@dataclass(frozen=True)
class Residual:
    """Deviation of runs from arm and seed, points; its degrees of freedom; each deviation, scaled to that size."""

    deviation: float
    freedom: int
    each: NDArray[np.float64]


@dataclass(frozen=True)
class Compared:
    """Two arms. ``seeds``: 95 % interval of training alone; ``both``: of seeds and test pictures; ``p``: of ``both``,
    corrected after `holm`; ``paired``: whether pictures were paired; ``by_seed``: difference of each common seed."""

    seeds: Interval
    both: Interval
    p: float
    paired: bool
    by_seed: Mapping[int, float]

    @property
    def verdict(self) -> str:
        """more or less if the corrected p is below 0.05, else undecided."""
        if self.p >= 1 - LEVEL:
            return "undecided"
        if self.both.value > 0:
            return "more"
        return "less"


def residual(arms: Mapping[str, Scores]) -> Residual | None:
    """Pooled over the arms that have all seeds; None if these are fewer than two, or have fewer than two seeds."""
    seeds = sorted({seed for scores in arms.values() for seed in scores})
    table = np.array([[100 * scores[seed] for seed in seeds] for scores in arms.values() if len(scores) == len(seeds)])
    if table.ndim < 2 or min(table.shape) < 2:
        return None
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    return Residual(sqrt(float((rest**2).sum()) / freedom), freedom, rest.reshape(-1) * sqrt(rest.size / freedom))


def compare(first: Scores, second: Scores, between: Residual, pictures: int) -> Compared | None:
    """Without answers per picture; None if the arms have fewer than LEAST common seeds. ``pictures``: of the set; 0 if
    unknown, which leaves their part out."""
    by_seed = {seed: 100 * (first[seed] - second[seed]) for seed in sorted(first.keys() & second.keys())}
    if len(by_seed) < LEAST:
        return None
    value = fmean(by_seed.values())
    variance = 2 * between.deviation**2 / len(by_seed)
    seeds = _interval(value, variance, between.freedom)
    sampled = 0.0
    if pictures:
        means = [fmean(each[seed] for seed in by_seed) for each in (first, second)]
        sampled = sum(1e4 * mean * (1 - mean) / pictures for mean in means)
    total = variance + sampled
    if total == 0:
        return Compared(seeds, seeds, float(value == 0), False, by_seed)
    freedom = float(between.freedom)
    if variance:
        freedom *= (total / variance) ** 2
    return Compared(seeds, _interval(value, total, freedom), t_tail(value / sqrt(total), freedom), False, by_seed)


def bootstrap(
    first: Mapping[int, Bits], second: Mapping[int, Bits], between: Residual, draws: int = DRAWS
) -> tuple[Interval, float]:
    """The difference with the interval over seeds and pictures, from answers of both arms on the same pictures; its p.

    A draw has other pictures, the same ones for both arms and all seeds, and other deviations of both arms' runs. The
    size of these deviations is drawn as well, because few runs determine it: without pictures the interval is that of
    Student's t.
    """
    random = np.random.default_rng(0)
    seeds = sorted(first.keys() & second.keys())
    difference = 100 * np.mean([first[seed].astype(float) - second[seed] for seed in seeds], axis=0)
    counts = random.multinomial(len(difference), np.full(len(difference), 1 / len(difference)), draws)
    sampled = np.repeat(counts @ difference / len(difference), NOISES)
    noise = random.choice(between.each, (2, len(sampled), len(seeds))).mean(axis=2)
    scale = np.sqrt(between.freedom / random.chisquare(between.freedom, len(sampled)))
    drawn = sampled + scale * (noise[0] - noise[1])
    low, high = np.quantile(drawn, (0.025, 0.975))
    beyond = max(1 / len(drawn), min(float(np.mean(drawn <= 0)), float(np.mean(drawn >= 0))))
    return Interval(float(difference.mean()), float(low), float(high)), min(1.0, 2 * beyond)


def with_pictures(compared: Compared, interval: Interval, p: float) -> Compared:
    """The comparison with the interval and p of `bootstrap`."""
    return replace(compared, both=interval, p=p, paired=True)


def holm(compared: Sequence[Compared | None]) -> list[Compared | None]:
    """The comparisons with p corrected for their number: the smallest times n, the next times n - 1, ..., ascending."""
    order = sorted((each.p, i) for i, each in enumerate(compared) if each is not None)
    result = list(compared)
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        each = compared[i]
        assert each is not None
        result[i] = replace(each, p=highest)
    return result


def _interval(value: float, variance: float, freedom: float) -> Interval:
    half = t_quantile(freedom) * sqrt(variance)
    return Interval(value, value - half, value + half)
