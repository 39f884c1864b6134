"""Intervals, Student's t and the F distribution (by the incomplete beta function). Standard library only."""

from dataclasses import dataclass
from math import exp, lgamma, log

LEVEL = 0.95
"""Of all intervals, unless a caller asks for another."""
_EPS = 1e-15
_TINY = 1e-300


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def contains(self, value: float) -> bool:
        return self.low <= value <= self.high

    def verdict(self, level: float = 0.0) -> str:
        """Whether the value is above ``level``: shown, opposite, or not shown if the interval includes the level."""
        if self.low > level:
            return "shown"
        if self.high < level:
            return "opposite"
        return "not shown"


def t_quantile(freedom: float, level: float = LEVEL) -> float:
    """The value that |t| with ``freedom`` degrees of freedom stays below with probability ``level``."""
    low = 0.0
    high = 1.0
    while _t_within(high, freedom) < level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if _t_within(middle, freedom) < level:
            low = middle
        else:
            high = middle
    return high


def t_tail(t: float, freedom: float) -> float:
    """The two-sided probability of a value at least as large as ``t``."""
    return 1 - _t_within(abs(t), freedom)


def f_tail(f: float, numerator: float, denominator: float) -> float:
    """The probability of a larger F with these degrees of freedom."""
    if f <= 0:
        return 1.0
    return incomplete_beta(denominator / 2, numerator / 2, denominator / (denominator + numerator * f))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b)."""
    if x <= 0:
        return 0.0
    if x >= 1:
        return 1.0
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log(1 - x))
    if x < (a + 1) / (a + b + 2):
        return front * _fraction(a, b, x) / a
    return 1 - front * _fraction(b, a, 1 - x) / b


def _t_within(t: float, freedom: float) -> float:
    return 1 - incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def _fraction(a: float, b: float, x: float) -> float:
    """Continued fraction of the incomplete beta function, by the method of Lentz."""
    c = 1.0
    d = 1 / _far_from_0(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 300):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for factor in (even, odd):
            d = 1 / _far_from_0(1 + factor * d)
            c = _far_from_0(1 + factor / c)
            value *= d * c
        if abs(d * c - 1) < _EPS:
            break
    return value


def _far_from_0(x: float) -> float:
    """``x``, or a tiny number in place of 0, by which the method divides."""
    if abs(x) < _TINY:
        return _TINY
    return x
