"""Tests of the statistics of arms: pooled deviation, paired images, correction for several comparisons."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lab.studies import arms_stats
from lab.studies.arms_stats import Compared, Residual
from lab.studies.engine.answers import pack


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


def results_of(answers: dict[int, np.ndarray], packed: bool = True) -> dict[int, dict[str, Any]]:
    """Return the result of each seed; ``packed``: with the answers to each image."""
    results = {}
    for seed, bits in answers.items():
        results[seed] = {"name": "t", "top1": float(bits.mean()), "n": len(bits)}
        if packed:
            results[seed] |= pack(range(len(bits)), bits)
    return results


def test_images_widen_the_interval_of_seeds() -> None:
    """Seeds: t(6) * 1 * sqrt(2 / 3). Images: 2 * 0.2 * 0.8 / 1000, in points squared 3.2."""
    between = Residual(1.0, 6)
    results = {seed: {"top1": 0.2, "n": 1000} for seed in range(3)}
    compared = arms_stats.compare(results, results, between)
    assert compared is not None and compared.verdict == "undecided" and compared.p == pytest.approx(1)
    assert not compared.paired
    assert compared.seeds.high == pytest.approx(2.4469 * (2 / 3) ** 0.5, rel=1e-4)
    assert compared.both.high == pytest.approx(1.97 * (2 / 3 + 3.2) ** 0.5, rel=0.01)
    few = {seed: results[seed] for seed in range(2)}
    assert arms_stats.compare(few, results, between) is None
    unknown = {seed: {"top1": 0.2} for seed in range(3)}
    alone = arms_stats.compare(unknown, unknown, between)
    assert alone is not None and alone.both == alone.seeds


def test_paired_images_cover_truth_and_are_narrower_than_unpaired() -> None:
    """The population's difference of two equal arms is 0. Paired images exclude most of their variance."""
    inside = []
    widths = []
    for seed in range(60):
        answers = simulated(seed, gain=0.0)
        between = arms_stats.residual(scores_of(answers))
        assert between is not None
        paired = arms_stats.compare(results_of(answers["0"]), results_of(answers["1"]), between)
        plain = arms_stats.compare(results_of(answers["0"], False), results_of(answers["1"], False), between)
        assert paired is not None and plain is not None and paired.paired and not plain.paired
        assert paired.both.value == pytest.approx(plain.both.value)
        inside.append(paired.both.contains(0.0))
        assert paired.both.contains(0.0) == (paired.p > 0.05)
        widths.append((paired.both.high - paired.both.low) / (plain.both.high - plain.both.low))
    assert np.mean(inside) >= 0.9 and np.mean(widths) < 0.8


def test_holm_corrects_for_number_of_comparisons() -> None:
    between = Residual(1.0, 30)
    zero = {seed: {"top1": 0.2} for seed in range(3)}

    def gain(points: float) -> Compared:
        compared = arms_stats.compare({seed: {"top1": 0.2 + points / 100} for seed in zero}, zero, between)
        assert compared is not None
        return compared

    alone = gain(1.9)
    assert alone.verdict == "more" and gain(-1.9).verdict == "less"
    many = arms_stats.holm([alone, None, *(gain(0.1 * i) for i in range(8)), gain(9)])
    assert many[0] is not None and many[0].verdict == "undecided" and many[0].p == pytest.approx(9 * alone.p)
    assert many[1] is None and many[-1] is not None and many[-1].verdict == "more"
