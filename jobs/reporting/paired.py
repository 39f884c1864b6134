"""Paired differences between two designs over their common seeds, with 95 % intervals by Student's t.

Runs of one seed have the same order of samples, crops and initial weights, so that a pair varies less than two seeds.
Reports compare designs by ``difference``; the studies pool the deviation of all arms (lab/studies/arms_stats.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from jobs.reporting.distributions import t_quantile

LEAST = 3
"""Minimum number of pairs for an interval."""


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, its 95 % interval, and each difference by pair; points (100 * share)."""

    mean: float
    low: float
    high: float
    each: Mapping[Any, float]

    @property
    def verdict(self) -> str:
        if self.low > 0:
            return "more"
        if self.high < 0:
            return "less"
        return "undecided"


def difference(first: Mapping[Any, float], second: Mapping[Any, float]) -> Difference | None:
    """Difference over the pairs that both have, or None if these are fewer than LEAST. Scores are shares, 0..1.

    A pair is a seed, or a seed with the settings that two values of another setting have in common.

    The interval is Student's t over the differences of pairs: mean +- t * s / sqrt(n).
    """
    each = {pair: 100 * (first[pair] - second[pair]) for pair in sorted(first.keys() & second.keys())}
    if len(each) < LEAST:
        return None
    mean = fmean(each.values())
    half = t_quantile(len(each) - 1) * stdev(each.values()) / sqrt(len(each))
    return Difference(mean, mean - half, mean + half, each)
