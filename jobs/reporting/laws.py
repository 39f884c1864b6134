"""Laws of accuracy over scaled quantities: their form, least squares, intervals, and a test that can refuse them.

`fit` is the only implementation: reports (``scaling_laws.py``) and the scaling study use it. A law is linear in the
logarithms of its axes, with one of two forms. The power law is that of the error. At low accuracy the logarithm of the
error is almost linear in accuracy, so that a power law adds points where runs multiply: `form_of` then chooses the
log-odds of accuracy. Intervals are those of least squares, by Student's t. They are valid only if the form fits:
`LackOfFit` tests it against the spread of runs at equal positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from jobs.reporting.distributions import LEVEL, Interval, f_tail, t_quantile

Array = NDArray[np.float64]

SPARE = 2
"""Runs beyond the number of coefficients that a law needs."""
EVEN = 0.5
"""A mean accuracy below this has a law of its log-odds."""


@dataclass(frozen=True)
class Form:
    """What is linear in the logarithms: ``of`` an accuracy, and its inverse. Both increase."""

    name: str
    formula: str
    of: Callable[[Array], Array]
    inverse: Callable[[Array], Array]


POWER = Form("power law", "error = a * x^-b", lambda a: -np.log1p(-a), lambda y: -np.expm1(-y))
LOG_ODDS = Form(
    "log-odds",
    "accuracy / error = a * x^b",
    lambda a: np.log(a) - np.log1p(-a),
    lambda y: 1 / (1 + np.exp(-y)),
)


@dataclass(frozen=True)
class LackOfFit:
    """F test of the variance around the law, not explained by that between runs at equal positions."""

    f: float
    numerator: int
    denominator: int

    @property
    def probability(self) -> float:
        return f_tail(self.f, self.numerator, self.denominator)

    @property
    def refuses(self) -> bool:
        """Whether the form does not fit, at the 5 % level."""
        return self.probability < 1 - LEVEL

    def __str__(self) -> str:
        return f"F({self.numerator}, {self.denominator}) = {self.f:.1f}, p = {self.probability:.2g}"


@dataclass(frozen=True)
class Law:
    """A fitted law. ``coefficients``: constant, then b of each axis; ``inverse``: (X'X)^-1; ``deviation``: around
    the law; ``lack``: None if no two runs have equal positions, or if as many positions as coefficients exist."""

    form: Form
    coefficients: Array
    inverse: Array
    deviation: float
    runs: int
    lack: LackOfFit | None

    @property
    def refused(self) -> bool:
        return self.lack is not None and self.lack.refuses

    @property
    def freedom(self) -> int:
        return self.runs - len(self.coefficients)

    def exponents(self) -> list[Interval]:
        """b of each axis."""
        errors = self.deviation * np.sqrt(np.diag(self.inverse))
        return [self._interval(b, e) for b, e in zip(self.coefficients[1:], errors[1:], strict=True)]

    def predict(self, x: Sequence[float], runs: int) -> Interval:
        """The mean accuracy of ``runs`` runs at a point.

        The interval includes the variation of these runs. Raises ValueError if the law does not fit.
        """
        if self.refused:
            raise ValueError(f"the {self.form.name} does not fit, so it predicts nothing: {self.lack}")
        return self.extrapolate(x, runs)

    def extrapolate(self, x: Sequence[float], runs: int) -> Interval:
        """As ``predict``, also of a law that does not fit, to show how far off it is."""
        row = np.concatenate([[1.0], np.log(np.asarray(x, float))])
        error = self.deviation * sqrt(1 / runs + float(row @ self.inverse @ row))
        return self._back(self._interval(float(row @ self.coefficients), error))

    def line(self, start: float, stop: float, points: int = 24) -> list[tuple[float, float, float, float]]:
        """(x, error, low, high) of the mean over its only axis, evenly in the logarithm."""
        shown = []
        for x in np.geomspace(start, stop, points):
            row = np.array([1.0, np.log(x)])
            error = self.deviation * sqrt(float(row @ self.inverse @ row))
            accuracy = self._back(self._interval(float(row @ self.coefficients), error))
            shown.append((float(x), 1 - accuracy.value, 1 - accuracy.high, 1 - accuracy.low))
        return shown

    def _interval(self, value: float, error: float) -> Interval:
        half = t_quantile(self.freedom) * error
        return Interval(float(value), float(value - half), float(value + half))

    def _back(self, each: Interval) -> Interval:
        value, low, high = self.form.inverse(np.array([each.value, each.low, each.high])).tolist()
        return Interval(value, low, high)


def form_of(scores: Sequence[float]) -> Form:
    """Log-odds if the mean accuracy is below one half, else the power law of the error."""
    if fmean(scores) < EVEN:
        return LOG_ODDS
    return POWER


def fit(xs: Sequence[Sequence[float]], scores: Sequence[float], form: Form | None = None) -> Law:
    """Fit a law over all axes by least squares. ``xs``: (runs, axes), above 0; ``scores``: accuracies, 0..1.

    Raises ValueError if the runs do not determine it, or if a score has no logarithm.
    """
    form = form or form_of(scores)
    design = np.column_stack([np.ones(len(xs)), np.log(np.asarray(xs, float))])
    needed = design.shape[1] + SPARE
    if len(scores) < needed:
        raise ValueError(f"a law over {design.shape[1] - 1} axes needs {needed} runs, not {len(scores)}")
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise ValueError("a law needs at least two values of each axis, which must not all change together")
    if min(scores) <= 0 or max(scores) >= 1:
        raise ValueError("a score of 0 or 1 has no logarithm: leave the run out, or evaluate more images")
    y = form.of(np.asarray(scores, float))
    inverse = np.linalg.inv(design.T @ design)
    coefficients = np.linalg.lstsq(design, y, rcond=None)[0]
    residuals = y - design @ coefficients
    deviation = sqrt(float(residuals @ residuals) / (len(y) - design.shape[1]))
    return Law(form, coefficients, inverse, deviation, len(y), _lack_of_fit(design, y, float(residuals @ residuals)))


def _lack_of_fit(design: Array, y: Array, residual: float) -> LackOfFit | None:
    _, place = np.unique(design, axis=0, return_inverse=True)
    place = place.reshape(-1)
    positions = int(place.max()) + 1
    numerator = positions - design.shape[1]
    denominator = len(y) - positions
    if numerator < 1 or denominator < 1:
        return None
    means = np.bincount(place, y) / np.bincount(place)
    pure = float(((y - means[place]) ** 2).sum())
    if pure <= 1e-12 * float(((y - y.mean()) ** 2).sum()):  # repeated runs are equal: they show no spread
        return None
    return LackOfFit((residual - pure) / numerator / (pure / denominator), numerator, denominator)
