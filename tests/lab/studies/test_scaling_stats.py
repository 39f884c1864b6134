"""Tests of the scaling study's statistics on synthetic results with known values and intervals."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.reporting.distributions import Interval
from lab.studies import scaling_stats
from lab.studies.scaling_stats import Spread


def test_spread_is_pooled_over_points() -> None:
    """Deviations are -1, 0, 1 and -2, 2, so the variance is (2 + 8) / (2 + 1)."""
    spread = scaling_stats.spread({"a": [1.0, 2.0, 3.0], "b": [5.0, 9.0], "c": [7.0], "d": []})
    assert spread is not None and spread.freedom == 3 and spread.deviation == pytest.approx((10 / 3) ** 0.5)
    assert scaling_stats.spread({"a": [1.0], "b": [2.0]}) is None


def test_contrast_interval_includes_all_points() -> None:
    """With s = 2 and with one and four scores, the half-width is t(8) * 2 * sqrt(1 + 1 / 4) = 2.306 * 2.236."""
    interval = scaling_stats.contrast([(1.0, [10.0]), (-1.0, [3.0, 5.0, 3.0, 5.0])], Spread(2.0, 8))
    assert interval is not None and interval.value == 6.0
    assert (interval.low, interval.high) == pytest.approx((6 - 5.157, 6 + 5.157), abs=1e-2)
    assert interval.verdict() == "shown"
    assert interval.verdict(6.5) == "not shown"
    assert interval.verdict(12.0) == "opposite"
    assert not scaling_stats.is_clear(interval) and scaling_stats.is_clear(Interval(6.0, 4.0, 8.0))
    assert scaling_stats.contrast([(1.0, [10.0]), (-1.0, [])], Spread(2.0, 8)) is None


def lengths(factor: float, noise: float, seed: int) -> list[tuple[float, list[float]]]:
    """Return (cost, scores) of three lengths: accuracy is 0.1 + 0.05 log(cost * ``factor``), plus noise."""
    random = np.random.default_rng(seed)
    means = [(length * 100 / factor, 0.1 + 0.05 * np.log(length * 100)) for length in (1, 2, 4)]
    return [(cost, (mean + noise * random.standard_normal(3)).tolist()) for cost, mean in means]


def test_speed_up_interval_contains_known_value() -> None:
    """About 95 % of the intervals contain the known value, and their median width stays below a factor of 1.6."""
    inside = []
    widths = []
    for seed in range(30):
        speed_up = scaling_stats.speed_up(lengths(1, 0.004, seed), lengths(2, 0.004, 100 + seed), draws=300)
        assert speed_up is not None and speed_up.bound == ""
        inside.append(speed_up.estimate.low <= 2 <= speed_up.estimate.high)
        widths.append(speed_up.estimate.high / speed_up.estimate.low)
    assert np.mean(inside) >= 0.85 and 1.05 < np.median(widths) < 1.6
    exact = scaling_stats.speed_up(lengths(1, 0, 0), lengths(3, 0, 0))
    assert exact is not None and exact.estimate.value == pytest.approx(3)


def test_speed_up_may_resample_the_lengths_of_a_trunk_together() -> None:
    """A deviation that a trunk gives to all of its lengths counts once, not once per length."""
    apart = []
    together = []
    for seed in range(10):
        shift = np.random.default_rng(seed).normal(0, 0.01, 3)
        first = [
            (cost, [score + d for score, d in zip(scores, shift, strict=True)]) for cost, scores in lengths(1, 0, 0)
        ]
        for shared, widths in ((False, apart), (True, together)):
            speed_up = scaling_stats.speed_up(first, lengths(2, 0.001, seed), draws=300, shared=shared)
            assert speed_up is not None
            widths.append(speed_up.estimate.high / speed_up.estimate.low)
    assert np.mean(together) > 1.05 * np.mean(apart)


def test_speed_up_is_bound_instead_of_extrapolation() -> None:
    """Accuracies do not overlap: one design is more accurate at its shortest length than the other at its longest."""
    low = [(100.0, [0.1, 0.1]), (200.0, [0.2, 0.2])]
    high = [(50.0, [0.3, 0.3]), (100.0, [0.4, 0.4])]
    faster = scaling_stats.speed_up(low, high)
    slower = scaling_stats.speed_up(high, low)
    assert faster is not None and (faster.bound, faster.estimate.value) == ("at least", pytest.approx(4))
    assert slower is not None and (slower.bound, slower.estimate.value) == ("at most", pytest.approx(1 / 4))
    assert scaling_stats.speed_up(low, [(50.0, [0.3]), (100.0, [])]) is None


def test_speed_up_ignores_longer_run_that_is_not_more_accurate() -> None:
    first = [(1.0, [0.1]), (2.0, [0.2]), (4.0, [0.3])]
    second = [(1.0, [0.1]), (2.0, [0.3]), (4.0, [0.28])]
    speed_up = scaling_stats.speed_up(first, second)
    assert speed_up is not None and speed_up.estimate.value == pytest.approx(2), "30 % at cost 4, and at cost 2"


def test_contrast_adds_variance_of_test_pictures() -> None:
    """Two points of 10 % on three sets of 1,000 pictures add 2 * 0.09 / 3000 to 2 * s^2 / 2 of the seeds."""
    pictures = np.eye(2) * 0.1 * 0.9 / 3000
    terms = [(100.0, [0.1, 0.1]), (-100.0, [0.1, 0.1])]
    seeds = scaling_stats.contrast(terms, Spread(0.005, 1000))
    both = scaling_stats.contrast(terms, Spread(0.005, 1000), pictures)
    assert seeds is not None and seeds.high == pytest.approx(1.96 * 0.5, abs=0.01)
    assert both is not None and both.high == pytest.approx(1.96 * (0.25 + 0.6) ** 0.5, abs=0.01)


def test_speed_up_includes_test_pictures() -> None:
    """The same errors of both designs at equal cost move no ratio; those of different pictures do."""
    first, second = ([(cost * factor, [0.1 * n]) for n, cost in enumerate((100, 200, 400), 1)] for factor in (1, 0.5))
    first, second = ([(cost, [*scores, *scores]) for cost, scores in each] for each in (first, second))
    alone = scaling_stats.speed_up(first, second, level=0.2)
    apart = scaling_stats.speed_up(first, second, level=0.2, pictures=1e-6 * np.eye(6))
    together = scaling_stats.speed_up(first, second, level=0.2, pictures=1e-6 * np.ones((6, 6)))
    assert alone is not None and apart is not None and together is not None
    for unmoved in (alone.estimate, together.estimate):
        assert (unmoved.low, unmoved.high) == pytest.approx((2, 2))
    slope = np.log(2) / 0.1  # of the logarithm of the cost, per accuracy
    error = 1.96 * slope * 1e-3 * 2**0.5
    assert np.log(apart.estimate.high / apart.estimate.low) == pytest.approx(2 * error, rel=0.1)


def test_speed_up_at_a_level_includes_error_of_calibration() -> None:
    first = [(100.0, [0.10, 0.10]), (200.0, [0.20, 0.20])]
    second = [(50.0, [0.10, 0.11]), (100.0, [0.20, 0.21])]
    exact = scaling_stats.speed_up(first, second, level=0.15)
    wide = scaling_stats.speed_up(first, second, level=0.15, calibration=0.1)
    assert exact is not None and wide is not None and exact.level == 0.15
    assert exact.estimate.value == wide.estimate.value == pytest.approx(2, rel=0.1)
    assert wide.estimate.high / wide.estimate.low > 1.2 * exact.estimate.high / exact.estimate.low
    assert scaling_stats.speed_up(first, second, level=0.25) is None, "neither design reaches it"
    facts = {"quartiles": [0.9, 1.1], "seconds": 1.0, "intervals": 16}
    assert scaling_stats.relative_error(facts) == pytest.approx(1.2533 * 0.2 / 1.349 / 4)
