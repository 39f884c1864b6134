"""95 % intervals of differences over two sources of error: another training, and another sample of test images.

Seeds: the deviation between runs, estimated with few degrees of freedom, hence Student's t. Images: their part is the
`covariance` of the accuracies of what is compared, from the answers to each image, or else from numbers of right
answers alone. Both variances add, and degrees of freedom follow by Satterthwaite. `Error` is the only rule for both.

Satterthwaite alone is too certain with few degrees of freedom: a variance that is added can shorten the interval, since
it adds degrees of freedom. An interval is therefore at least as wide as that of seeds alone, and p at least as large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.reporting.distributions import Interval, t_quantile, t_tail
from lab.studies.engine.answers import Bits, is_paired, right

NORMAL = 1e6
"""Degrees of freedom from which Student's t is normal, to six digits."""
Array = NDArray[np.float64]
Items = Sequence[Mapping[str, Any]]
"""Results of a run on each test set: accuracy, number of images, and answers (``answers.py``) if they are recorded."""


@dataclass(frozen=True)
class Error:
    """Variances of a value by seeds, with their degrees of freedom, and by test images, in its unit squared."""

    seeds: float
    freedom: float
    images: float = 0.0

    def interval(self, value: float) -> Interval:
        """The 95 % interval over both sources."""
        widths = [t_quantile(freedom) * sqrt(variance) for variance, freedom in self._bounds()]
        return Interval(value, value - max(widths), value + max(widths))

    def p(self, value: float) -> float:
        """The two-sided probability of a value at least as far from 0, if the true one is 0."""
        if self.seeds + self.images == 0:
            return float(value == 0)
        return max(t_tail(value / sqrt(variance), freedom) for variance, freedom in self._bounds())

    def _bounds(self) -> list[tuple[float, float]]:
        """(variance, degrees of freedom) of seeds alone and of both sources; the larger error counts."""
        if not self.seeds:
            return [(self.images, NORMAL)]
        total = self.seeds + self.images
        freedom = min(NORMAL, self.freedom * (total / self.seeds) ** 2)
        return [(self.seeds, self.freedom), (total, freedom)]


def covariance(points: Sequence[Sequence[Items]]) -> Array:
    """(points, points) of the accuracies of points, means over runs and sets, by the choice of the test images.

    ``points``: of each point, of each run, its results. By answers to the same images, if all runs recorded them.
    Without them by binomial variances, as if points had seen different images, an upper bound for most differences; 0
    if the number of images is unknown.
    """
    every = [items for runs in points for items in runs]
    total = np.zeros((len(points), len(points)))
    if not all(points):
        return total
    if not is_answered(every):
        return np.diag([_binomial_variance(runs) for runs in points])
    for number in range(len(every[0])):
        shares = [np.mean([_right(items[number]) for items in runs], axis=0) for runs in points]
        total += np.cov(shares, bias=True).reshape(total.shape) / len(shares[0])
    return total / len(every[0]) ** 2


def is_answered(runs: Sequence[Items]) -> bool:
    """Whether runs have answers to the same images in every set."""
    return all(is_paired(first, each) for items in runs for first, each in zip(runs[0], items, strict=True))


def _right(item: Mapping[str, Any]) -> Bits:
    bits = right(item)
    assert bits is not None
    return bits


def _binomial_variance(runs: Sequence[Items]) -> float:
    """Variance of the mean accuracy over runs and sets, 0..1 squared, by the choice of the images of each set.

    An upper bound for runs that saw the same images: shares of right runs lie in 0..1, so that their variance over
    images is at most mean * (1 - mean).
    """
    total = 0.0
    for items in zip(*runs, strict=True):
        if not all(item.get("n") for item in items):
            return 0.0
        mean = fmean(item["top1"] for item in items)
        total += mean * (1 - mean) / items[0]["n"]
    return total / len(runs[0]) ** 2
