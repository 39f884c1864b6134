"""Learning rates chosen by trials, and scores of arms by seed, for the differences of jobs/reporting/paired.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flip.monitoring.results import Outcome
from flip.runs.errors import ConfigError
from flip.runs.rundir import read_json
from tools.studies.design import SEEDS, Arm, StudyDesign


def score(outcome: Outcome, name: str) -> float | None:
    """Final top-1 on a set, 0..1."""
    return next((float(item["top1"]) for item in outcome.evaluations if item["name"] == name), None)


def choose(arm: Arm, trials: Mapping[str, Outcome]) -> tuple[float, dict[float, float]]:
    """The peak of the best trial on the validation vendor (the smallest of equals), and the score of each.

    Raises ConfigError if a trial has no score: arms are compared only after equally many trials.
    """
    scores: dict[float, float] = {}
    for peak in arm.peaks:
        outcome = trials.get(arm.trial(peak))
        value = None
        if outcome is not None:
            value = score(outcome, "validation")
        if value is None:
            raise ConfigError("a trial has no score yet", arm.trial(peak), remedy="Run the study again to continue.")
        scores[peak] = value
    return max(scores, key=lambda peak: (scores[peak], -peak)), scores


def recorded(design: StudyDesign, path: Path) -> dict[str, float]:
    """Arm -> peak of all arms, as recorded when the study was made; empty if the file does not exist.

    Raises ConfigError if it is damaged or does not match the arms.
    """
    try:
        peaks = read_json(path) or {}
        if peaks and not all(peaks[arm.name] in arm.peaks for arm in design.arms.values()):
            raise ValueError("a learning rate that was not tried")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "Restore it, or delete it to choose learning rates anew."
        raise ConfigError("the chosen learning rates cannot be read", str(path), str(error), remedy) from error
    return dict(peaks)


def scores(arm: Arm, runs: Mapping[str, Outcome], name: str) -> dict[int, float]:
    """Seed -> final score on the set, for the complete runs of the arm."""
    outcomes = {seed: runs[arm.run(seed)] for seed in SEEDS if arm.run(seed) in runs}
    values = {seed: score(outcome, name) for seed, outcome in outcomes.items() if outcome.result}
    return {seed: value for seed, value in values.items() if value is not None}
