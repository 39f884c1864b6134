"""Learning rates chosen by trials, and paired differences between arms with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

from flip.monitoring.results import Outcome
from flip.runs.errors import ConfigError
from flip.runs.rundir import read_json
from tools.masking_study.design import ROUNDS, Arm

T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Number of pairs -> 97.5 % quantile of Student's t with one degree of freedom less."""

LEAST = 3
"""Minimum number of pairs for an interval."""


def score(outcome: Outcome, name: str) -> float | None:
    """Final top-1 on a set, 0..1."""
    return next((float(item["top1"]) for item in outcome.evaluations if item["name"] == name), None)


def choose(one: Arm, trials: Mapping[str, Outcome]) -> tuple[float, dict[float, float]]:
    """The peak of the best trial on the validation vendor, of equals the smallest, and the score of each.

    Raises ConfigError where a trial has no score: arms are compared only after equally many trials.
    """
    scores: dict[float, float] = {}
    for peak in one.peaks:
        outcome = trials.get(one.trial(peak))
        found = None if outcome is None else score(outcome, "validation")
        if found is None:
            raise ConfigError("a trial has no score yet", one.trial(peak), remedy="Run the study again: it goes on.")
        scores[peak] = found
    return max(scores, key=lambda peak: (scores[peak], -peak)), scores


def recorded(path: Path) -> dict[str, float]:
    """Arm -> peak of all arms, as they were chosen when the study was made; empty where there is no such file.

    Raises ConfigError where it is damaged, or of other arms.
    """
    try:
        found = read_json(path) or {}
        if found and not all(found[one.name] in one.peaks for each in ROUNDS for one in each.arms):
            raise ValueError("a learning rate that is none of the trials'")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "Restore it; without it the trials choose anew."
        raise ConfigError("the chosen learning rates cannot be read", str(path), str(error), remedy) from error
    return dict(found)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, their 95 % interval, each one by seed; points (100 * share)."""

    mean: float
    low: float
    high: float
    each: Mapping[int, float]

    @property
    def verdict(self) -> str:
        return "more" if self.low > 0 else "less" if self.high < 0 else "undecided"


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Of the seeds that both have; None where these are fewer than LEAST. Scores are shares, 0..1.

    The interval is Student's t over the pairs' differences: mean +- t * s / sqrt(n).
    """
    each = {seed: 100 * (ours[seed] - theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())}
    if len(each) < LEAST:
        return None
    values = list(each.values())
    mean, half = fmean(values), T[len(values)] * stdev(values) / sqrt(len(values))
    return Difference(mean, mean - half, mean + half, each)


def scores(one: Arm, seeds: Sequence[int], found: Mapping[str, Outcome], name: str) -> dict[int, float]:
    """Seed -> final score on the set, for the complete runs of the arm."""
    made = {}
    for seed in seeds:
        outcome = found.get(one.run(seed))
        value = score(outcome, name) if outcome is not None and outcome.result else None
        if value is not None:
            made[seed] = value
    return made
