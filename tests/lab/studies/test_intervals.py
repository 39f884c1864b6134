"""Tests of intervals over seeds and test images: against simulated truth, resampled images, and binomial variances."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lab.studies.engine import intervals
from lab.studies.engine.answers import pack, right
from lab.studies.engine.intervals import Error


def test_interval_of_seeds_alone_is_students() -> None:
    error = Error(2 / 3, 6)
    assert error.interval(1.0).high == pytest.approx(1 + 2.4469 * (2 / 3) ** 0.5, rel=1e-4)
    assert error.p(2.4469 * (2 / 3) ** 0.5) == pytest.approx(0.05, rel=1e-3)


def test_images_widen_the_interval() -> None:
    """Seeds: t(6) * sqrt(2 / 3). Images: 2 * 0.2 * 0.8 / 1000, in points squared 3.2."""
    error = Error(2 / 3, 6, 3.2)
    freedom = 6 * ((2 / 3 + 3.2) / (2 / 3)) ** 2
    assert freedom > 100
    assert error.interval(0.0).high == pytest.approx(1.97 * (2 / 3 + 3.2) ** 0.5, rel=0.01)
    assert error.p(0.0) == 1


def test_images_never_make_a_difference_more_certain() -> None:
    """With 4 degrees of freedom, Satterthwaite alone shortens the interval by 2 %, and p of 4 deviations by 29 %."""
    alone = Error(1.0, 4)
    both = Error(1.0, 4, 0.2)
    assert both.interval(0.0) == alone.interval(0.0)
    assert both.p(4.0) == alone.p(4.0)
    assert Error(1.0, 4, 1.0).interval(0.0).high > 1.05 * alone.interval(0.0).high


@pytest.mark.parametrize("images", [0.0, 0.1, 0.3, 1.0, 5.0])
@pytest.mark.parametrize(("freedom", "most"), [(4, 0.059), (16, 0.053)])
def test_interval_misses_the_truth_in_one_of_twenty_studies(images: float, freedom: int, most: float) -> None:
    """Studies whose variance between seeds is 1, estimated with few degrees of freedom; that of images is known.

    p below 0.05 means that the interval misses. 4,000 draws: the standard error of the share is 0.0034.
    """
    random = np.random.default_rng(0)
    seeds = random.chisquare(freedom, 4000) / freedom
    values = random.normal(0, (1 + images) ** 0.5, 4000)
    missed = []
    for variance, value in zip(seeds, values, strict=True):
        missed.append(Error(variance, freedom, images).p(value) < 0.05)
    assert 0.05 - 3 * 0.0034 < np.mean(missed) < most + 2 * 0.0034
    for variance, value, miss in zip(seeds[:50], values, missed, strict=False):
        assert Error(variance, freedom, images).interval(value).contains(0.0) != miss


def test_equal_runs_have_the_error_of_images_alone() -> None:
    assert (Error(0.0, 4).p(0.0), Error(0.0, 4).p(0.1)) == (1, 0)
    for seeds in (0.0, 1e-32):
        assert Error(seeds, 4, 1.0).interval(0.0).high == pytest.approx(1.96, abs=1e-3), "images alone: normal"


def test_covariance_without_answers_is_binomial() -> None:
    """Two points of 10 % on three sets of 1,000 images; an unknown number of images has no part."""
    items = [{"top1": 0.1, "n": 1000}] * 3
    assert intervals.covariance([[items, items], [items]]) == pytest.approx(np.eye(2) * 0.1 * 0.9 / 3000)
    assert not intervals.covariance([[[{"top1": 0.1}]], [[{"top1": 0.1}]]]).any(), "unknown number of images"
    assert not intervals.covariance([[items], []]).any()


def test_binomial_variance_is_an_upper_bound_of_several_runs() -> None:
    """Runs that saw the same images: a share of 0.2 and one of 0.4 vary at most as one of 0.3."""
    half = [[{"top1": 0.2, "n": 100}], [{"top1": 0.4, "n": 100}]]
    assert intervals.covariance([half]) == pytest.approx(np.array([[0.3 * 0.7 / 100]]))


def test_images_are_paired_if_runs_recorded_their_answers() -> None:
    """The variance of a difference is that of resampled images, the same ones for both points: a bootstrap."""
    random = np.random.default_rng(0)
    easy = [random.random(size) for size in (400, 300)]
    points = [[_answered(random, easy, shift) for _ in range(2)] for shift in (0.0, 0.2)]
    images = intervals.covariance(points)
    differences = []
    for _ in range(4000):
        means = np.zeros(2)
        for number, known in enumerate(easy):
            drawn = random.integers(len(known), size=len(known))
            means += [np.mean([right(items[number])[drawn] for items in runs]) for runs in points]
        differences.append((means[0] - means[1]) / len(easy))
    paired = np.array([1, -1]) @ images @ [1, -1]
    assert paired == pytest.approx(np.var(differences), rel=0.1)
    alone = intervals.covariance(
        [[[{k: v for k, v in i.items() if k != "right"} for i in r] for r in p] for p in points]
    )
    assert paired < 0.6 * np.trace(alone), "most images are easy or hard for both"
    other = [[dict(item, images="others") for item in items] for items in points[1]]
    assert intervals.covariance([points[0], other]) == pytest.approx(alone)


def _answered(random: np.random.Generator, easy: list[np.ndarray], shift: float) -> list[dict[str, Any]]:
    """Return the results of a run that is right about a picture if it is easier than ``shift`` and some noise."""
    items = []
    for known in easy:
        bits = known + 0.1 * random.standard_normal(len(known)) > 0.5 + shift
        items.append({"top1": float(bits.mean()), "n": len(bits), **pack(range(len(bits)), bits)})
    return items
