"""Tests of laws: known exponents, coverage of intervals, the form at low accuracy, lack of fit, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.reporting import laws
from jobs.reporting.laws import LOG_ODDS, POWER, Form

XS = [1e9, 2e9, 4e9, 8e9]


def accuracies(
    form: Form, xs: list[float], constant: float, b: float, noise: float = 0.0, seed: int = 0
) -> list[float]:
    """Return accuracies on a law along one axis, with normal noise in its form."""
    random = np.random.default_rng(seed)
    y = constant + b * np.log(xs) + noise * random.standard_normal(len(xs))
    return [float(a) for a in form.inverse(y)]


@pytest.mark.parametrize("form", [POWER, LOG_ODDS])
def test_fit_recovers_exact_law(form: Form) -> None:
    scores = accuracies(form, XS, -3.0, 0.16)
    law = laws.fit([[x] for x in XS], scores, form)
    (b,) = law.exponents()
    assert (b.value, b.low, b.high) == pytest.approx((0.16, 0.16, 0.16), abs=1e-9)
    x, error, low, high = law.line(1e9, 8e9)[-1]
    assert x == pytest.approx(8e9) and (error, low, high) == pytest.approx([1 - scores[-1]] * 3)
    assert law.lack is None, "no two runs at the same x"


def test_law_of_error_is_power_law_as_before() -> None:
    errors = [3.0 * x**-0.12 for x in XS]
    (b,) = laws.fit([[x] for x in XS], [1 - error for error in errors], POWER).exponents()
    assert b.value == pytest.approx(0.12)


@pytest.mark.parametrize("form", [POWER, LOG_ODDS])
def test_intervals_contain_known_values_at_nominal_rate(form: Form) -> None:
    xs = np.repeat(np.geomspace(1e8, 1e10, 4), 2).tolist()
    held = 0
    predicted = 0
    refused = 0
    for seed in range(200):
        law = laws.fit([[x] for x in xs], accuracies(form, xs, -1.0, 0.1, 0.05, seed), form)
        (b,) = law.exponents()
        held += b.contains(0.1)
        (result,) = accuracies(form, [1e11], -1.0, 0.1, 0.05, 1000 + seed)
        predicted += law.extrapolate([1e11], 1).contains(result)
        refused += law.refused
    assert 180 <= held <= 199 and 180 <= predicted <= 199, "95 % of 200"
    assert 2 <= refused <= 20, "the true form is refused in 5 % of the cases"


def test_joint_law_over_three_axes_predicts_its_corner() -> None:
    axes = np.array([(n, d, s) for n in (0.5e6, 2e6, 8e6) for d in (5e3, 4e4, 3e5) for s in (1e5, 4e5)])
    corner = np.array([8e6, 3e5, 8e5])
    slopes = np.array([0.36, 0.12, 1.4])
    inside = []
    for seed in range(40):
        noise = 0.05 * np.random.default_rng(seed).standard_normal(len(axes))
        scores = LOG_ODDS.inverse(-27 + np.log(axes) @ slopes + noise)
        law = laws.fit(axes.tolist(), scores.tolist())
        assert law.form is LOG_ODDS
        truth = float(LOG_ODDS.inverse(-27 + np.log(corner) @ slopes))
        assert law.predict(corner.tolist(), runs=1).value == pytest.approx(truth, rel=0.2)
        inside += [b.contains(x) for b, x in zip(law.exponents(), slopes, strict=True)]
    assert np.mean(inside) >= 0.85


def test_form_follows_mean_accuracy() -> None:
    assert laws.form_of([0.02, 0.1, 0.3]) is LOG_ODDS
    assert laws.form_of([0.6, 0.7, 0.75]) is POWER


def test_law_of_wrong_form_is_refused_and_predicts_nothing() -> None:
    """Accuracies of 2 to 16 % that double with x: their log-odds are linear, the logarithm of their error is not."""
    xs = [1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    scores = accuracies(LOG_ODDS, xs, -3.7, 1.44, 0.03)
    power = laws.fit([[x] for x in xs], scores, POWER)
    odds = laws.fit([[x] for x in xs], scores)
    assert power.refused and power.lack is not None and power.lack.probability < 0.01
    assert (power.lack.numerator, power.lack.denominator) == (1, 3)
    with pytest.raises(ValueError, match=r"the power law does not fit, so it predicts nothing: F\(1, 3\) = "):
        power.predict([8.0], 1)
    assert odds.form is LOG_ODDS and not odds.refused and not power.extrapolate([8.0], 1).contains(0.33)
    assert odds.predict([8.0], 1).contains(0.33), "the true accuracy"
    same = laws.fit([[x] for x in xs], accuracies(LOG_ODDS, xs, -3.7, 1.44))
    assert same.lack is None, "repeated runs with equal scores show no spread"


@pytest.mark.parametrize(
    "xs, scores, why",
    [
        ([1.0, 2.0, 4.0], [0.5, 0.6, 0.7], "a law over 1 axes needs 4 runs, not 3"),
        ([2.0] * 4, [0.5, 0.6, 0.7, 0.7], "at least two values of each axis"),
        ([1.0, 2.0, 4.0, 8.0], [0.0, 0.1, 0.2, 0.3], "a score of 0 or 1 has no logarithm"),
        ([1.0, 2.0, 4.0, 8.0], [0.7, 0.8, 0.9, 1.0], "a score of 0 or 1 has no logarithm"),
    ],
)
def test_fit_names_insufficient_data(xs: list[float], scores: list[float], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        laws.fit([[x] for x in xs], scores)
