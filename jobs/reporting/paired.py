"""Paired differences between two designs over their common seeds, with 95 % intervals by Student's t.

Runs of one seed have the same order of samples, crops and initial weights, so that a pair varies less than two seeds.
Reports and the studies (tools/studies) compare designs by ``difference``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

LEAST = 3
"""Minimum number of pairs for an interval."""
QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, its 95 % interval, and each difference by seed; points (100 * share)."""

    mean: float
    low: float
    high: float
    each: Mapping[int, float]

    @property
    def verdict(self) -> str:
        if self.low > 0:
            return "more"
        if self.high < 0:
            return "less"
        return "undecided"


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Difference over the seeds that both have, or None if these are fewer than LEAST. Scores are shares, 0..1.

    The interval is Student's t over the differences of pairs: mean +- t * s / sqrt(n).
    """
    each = {seed: 100 * (first[seed] - second[seed]) for seed in sorted(first.keys() & second.keys())}
    if len(each) < LEAST:
        return None
    mean = fmean(each.values())
    half = t_quantile(len(each) - 1) * stdev(each.values()) / sqrt(len(each))
    return Difference(mean, mean - half, mean + half, each)


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; from 30 degrees of freedom on, that of 30, which is the larger."""
    return QUANTILES[min(freedom, len(QUANTILES)) - 1]
