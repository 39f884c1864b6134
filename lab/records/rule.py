"""The rule of records: five new seeds, and a mean that is above the goal by more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np

SEEDS = 5
"""New seeds of a row. None of them was used to choose the recipe."""
QUANTILE = 2.776
"""97.5 % quantile of Student's t with SEEDS - 1 degrees of freedom. With that of 95 %, 2.132, resampled seeds of the
committed studies pass too often: 5.6 %."""
MARGIN = 0.05
"""Share by which a record must be cheaper than the one before: step times of equal work differ by some per cent."""


def half_width(scores: Sequence[float]) -> float:
    """Half the 95 % interval of the mean over seeds, by Student's t."""
    return QUANTILE * float(np.std(scores, ddof=1)) / sqrt(len(scores))


def has_reached(scores: Sequence[float], goal: float) -> bool:
    """Whether the interval of the mean lies above the goal."""
    return len(scores) == SEEDS and float(np.mean(scores)) - half_width(scores) >= goal


def false_rate(scores: Sequence[Sequence[float]], draws: int = 20_000) -> float:
    """How often the rule accepts a recipe whose mean is exactly the goal, by resampling seeds.

    ``scores``: groups of equal runs with other seeds. Deviations from the mean of their group, made larger by
    sqrt(n / (n - 1)) as that mean follows them, are drawn with replacement.
    """
    deviations = np.concatenate([
        (np.array(group) - np.mean(group)) * sqrt(len(group) / (len(group) - 1)) for group in scores
    ])  # fmt: skip
    samples = np.random.default_rng(0).choice(deviations, (draws, SEEDS))
    widths = QUANTILE * samples.std(axis=1, ddof=1) / sqrt(SEEDS)
    return float(np.mean(samples.mean(axis=1) - widths >= 0))
