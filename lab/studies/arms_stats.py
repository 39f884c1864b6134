"""Statistics of studies of arms: differences of arms that were trained with the same seeds, in points.

Two sources of error (``engine/intervals.py``). Seeds: the deviation of a run from the effects of its arm and of its
seed, pooled over all arms of a study, because three pairs alone determine it badly. Images: another sample of test
images, the same ones for both arms if the runs recorded their answers. p-values are corrected for all comparisons
(Holm).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import fmean
from typing import Any

import numpy as np

from jobs.reporting.distributions import LEVEL, Interval
from lab.studies.engine.intervals import Error, covariance, is_answered

Scores = Mapping[int, float]
"""Seed -> score, 0..1."""

LEAST = 3
"""Minimum number of common seeds of a comparison."""
Results = Mapping[int, Mapping[str, Any]]
"""Seed -> result of a run on a test set."""


@dataclass(frozen=True)
class Residual:
    """Deviation of runs from arm and seed, points, and its degrees of freedom."""

    deviation: float
    freedom: int


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
    return Residual(sqrt(float((rest**2).sum()) / freedom), freedom)


def compare(first: Results, second: Results, between: Residual) -> Compared | None:
    """Two arms by their common seeds; None if these are fewer than LEAST."""
    seeds = sorted(first.keys() & second.keys())
    if len(seeds) < LEAST:
        return None
    by_seed = {seed: 100 * (first[seed]["top1"] - second[seed]["top1"]) for seed in seeds}
    value = fmean(by_seed.values())
    runs = [[[each[seed]] for seed in seeds] for each in (first, second)]
    factors = np.array([100, -100])
    images = float(factors @ covariance(runs) @ factors)
    alone = Error(2 * between.deviation**2 / len(seeds), between.freedom)
    both = replace(alone, images=images)
    paired = is_answered([*runs[0], *runs[1]])
    return Compared(alone.interval(value), both.interval(value), both.p(value), paired, by_seed)


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
