"""Tests of the statistics of arms: pooled deviation, pictures, bootstrap, correction for several comparisons."""

from __future__ import annotations

import numpy as np
import pytest

from tools.studies import arms_stats
from tools.studies.arms_stats import Compared, Residual


def simulated(seed: int, pictures: int = 400, arms: int = 4, gain: float = 0.05) -> dict[str, dict[int, np.ndarray]]:
    """Return answers: pictures have a difficulty that arms and seeds share, seeds a deviation of 1 point."""
    random = np.random.default_rng(seed)
    difficulty = random.normal(0, 1.0, pictures)
    answers: dict[str, dict[int, np.ndarray]] = {}
    for arm in range(arms):
        shift = 4 * gain * (arm == 0)
        answers[str(arm)] = {
            s: difficulty + random.normal(0, 0.5, pictures) < -1 + shift + random.normal(0, 0.04) for s in range(3)
        }
    return answers


def scores_of(answers: dict[str, dict[int, np.ndarray]]) -> dict[str, dict[int, float]]:
    return {arm: {s: float(bits.mean()) for s, bits in each.items()} for arm, each in answers.items()}


def test_residual_is_of_arm_and_seed() -> None:
    """Arm and seed effects leave no residual; a single exchange of 1 point leaves 4 deviations of 0.25 points."""
    base = {"a": {0: 0.1, 1: 0.2, 2: 0.3}, "b": {0: 0.2, 1: 0.3, 2: 0.4}}
    exact = arms_stats.residual(base)
    assert exact is not None and exact.deviation == pytest.approx(0) and exact.freedom == 2
    base["b"][2] = 0.41
    moved = arms_stats.residual(base)
    assert moved is not None and moved.deviation == pytest.approx((2 * (1 / 36 + 1 / 36 + 1 / 9) / 2) ** 0.5)
    assert arms_stats.residual({"a": base["a"]}) is None and arms_stats.residual({"a": {0: 0.1}, "b": {0: 0.2}}) is None


def test_pictures_widen_the_interval() -> None:
    """Seeds: t(6) * 1 * sqrt(2 / 3). Pictures: 2 * 0.2 * 0.8 / 1000, in points squared 3.2."""
    between = Residual(1.0, 6, np.array([1.0, -1.0]))
    scores = {0: 0.2, 1: 0.2, 2: 0.2}
    compared = arms_stats.compare(scores, scores, between, 1000)
    assert compared is not None and compared.verdict == "undecided" and compared.p == pytest.approx(1)
    assert compared.seeds.high == pytest.approx(2.4469 * (2 / 3) ** 0.5, rel=1e-4)
    freedom = 6 * ((2 / 3 + 3.2) / (2 / 3)) ** 2
    assert freedom > 100 and compared.both.high == pytest.approx(1.97 * (2 / 3 + 3.2) ** 0.5, rel=0.01)
    assert arms_stats.compare({0: 0.1, 1: 0.2}, scores, between, 0) is None
    alone = arms_stats.compare(scores, scores, between, 0)
    assert alone is not None and alone.both == alone.seeds


def test_bootstrap_over_seeds_and_pictures_covers_truth_and_is_narrower_than_unpaired() -> None:
    """The population's difference of two equal arms is 0. Paired pictures exclude most of their variance."""
    inside = []
    widths = []
    for seed in range(60):
        answers = simulated(seed, gain=0.0)
        between = arms_stats.residual(scores_of(answers))
        assert between is not None
        interval, p = arms_stats.bootstrap(answers["0"], answers["1"], between, draws=400)
        plain = arms_stats.compare(*(scores_of(answers)[arm] for arm in "01"), between, 400)
        assert plain is not None
        assert interval.value == pytest.approx(plain.both.value)
        inside.append(interval.contains(0.0))
        assert abs(p - 0.05) < 0.005 or interval.contains(0.0) == (p > 0.05)
        widths.append((interval.high - interval.low) / (plain.both.high - plain.both.low))
    assert np.mean(inside) >= 0.9 and np.mean(widths) < 0.8


def test_bootstrap_has_students_interval_if_few_runs_determine_the_deviation() -> None:
    """Both arms answer alike: without pictures the interval is t(4) * sqrt(2 / 3) = 2.27, of a normal one 1.60."""
    normal = np.random.default_rng(0).standard_normal(2000)
    between = Residual(1.0, 4, normal / normal.std())
    bits = {seed: np.arange(100) < 30 for seed in range(3)}
    interval, p = arms_stats.bootstrap(bits, bits, between)
    assert (interval.value, p) == (0, pytest.approx(1, abs=0.03))
    assert [interval.low, interval.high] == pytest.approx([-2.267, 2.267], rel=0.04)


def test_holm_corrects_for_number_of_comparisons() -> None:
    between = Residual(1.0, 30, np.array([1.0, -1.0]))
    zero = {0: 0.2, 1: 0.2, 2: 0.2}

    def gain(points: float) -> Compared:
        compared = arms_stats.compare({s: 0.2 + points / 100 for s in zero}, zero, between, 0)
        assert compared is not None
        return compared

    alone = gain(1.9)
    assert alone.verdict == "more" and gain(-1.9).verdict == "less"
    many = arms_stats.holm([alone, None, *(gain(0.1 * i) for i in range(8)), gain(9)])
    assert many[0] is not None and many[0].verdict == "undecided" and many[0].p == pytest.approx(9 * alone.p)
    assert many[1] is None and many[-1] is not None and many[-1].verdict == "more"
