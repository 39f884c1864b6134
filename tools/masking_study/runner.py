"""Runs of the study: writes and submits the sweeps of each round, and reads the complete runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flip.config.yaml_io import dump_yaml
from flip.monitoring.results import Outcome, read_outcomes
from flip.runs.errors import STOPPED
from flip.runs.rundir import write_text
from jobs.common.cluster_profile import runs_root
from jobs.submission.apply import trash
from tools.masking_study import calibration, design, paired_stats
from tools.masking_study.design import ROUNDS, Round, Times

ROOT = Path(__file__).resolve().parents[2]


class Unfinished(Exception):
    """A sweep did not complete. The argument is the exit code of the submission, which has printed the reason."""


@dataclass
class Found:
    """What there is of the study. ``chosen``: arm -> peak; ``scores``: arm -> peak -> validation score of its trial.

    A choice that is there before the trials counts, as it was recorded when the study was made: where two trials are as
    good as equal another machine would choose the other, and train another arm.
    """

    chosen: dict[str, float] = field(default_factory=dict)
    runs: dict[str, Outcome] = field(default_factory=dict)
    scores: dict[str, dict[float, float]] = field(default_factory=dict)
    trials: dict[str, Outcome] = field(default_factory=dict)

    def choose(self, each: Round) -> None:
        for one in each.arms:
            best, self.scores[one.name] = paired_stats.choose(one, self.trials)
            self.chosen.setdefault(one.name, best)


def study(times: Times, profile: str, recorded: Mapping[str, float]) -> None:
    """All rounds; what is complete is left alone. Where the learning rates are recorded, runs that are compared come
    first, as they wait for no trial: where time ends early, trials are missing. Raises Unfinished.
    """
    found = Found(dict(recorded))
    for each in ROUNDS if recorded else ():
        submit(design.runs(each, times, recorded), profile)
    for each in ROUNDS:
        submit(design.trials(each, times, found.chosen), profile)
        found.trials |= outcomes(each.trials)
        found.choose(each)
        submit(design.runs(each, times, found.chosen), profile)


def calibrate(profile: str, tries: int = 4) -> list[Outcome]:
    """The runs that are timed; those of uneven times go to the trash and are done again, ``tries`` times in all.

    Raises Unfinished, also where the machine does not get quiet.
    """
    sweep = design.calibration()
    for _ in range(tries):
        submit(sweep, profile)
        timed = list(outcomes(sweep["name"]).values())
        uneven = calibration.noisy(timed)
        if not uneven:
            return timed
        print(f"uneven step times, let nothing else run: {', '.join(one.run.name for one in uneven)}", flush=True)
        for one in uneven:
            trash(one.run.path)
    raise Unfinished(STOPPED)


def collect(recorded: Mapping[str, float]) -> Found:
    """Read the complete runs of rounds with known learning rates, and the trials of complete rounds."""
    found = Found(dict(recorded))
    for each in ROUNDS:
        trials = outcomes(each.trials)
        if all(one.trial(peak) in trials for one in each.arms for peak in one.peaks):
            found.trials |= trials
            found.choose(each)
        elif not recorded:
            break
        found.runs |= outcomes(each.sweep)
    return found


def submit(sweep: Mapping[str, Any], profile: str) -> None:
    """Write the sweep file below RUNS_ROOT/study and submit it, watching. Raises Unfinished, OSError."""
    path = runs_root() / "study" / f"{sweep['name']}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, dump_yaml(dict(sweep)))
    print(f"\n{sweep['title']}: {path}", flush=True)
    command = [sys.executable, str(ROOT / "jobs" / "submit.py"), "--sweep", str(path), "--cluster", profile]
    done = subprocess.run([*command, "--watch", "--no-canary"], env=os.environ | {"FLIP_RUNS": str(runs_root())})
    if done.returncode:
        raise Unfinished(done.returncode)


def outcomes(sweep: str) -> dict[str, Outcome]:
    """Run -> outcome, for the complete runs of a sweep."""
    found = read_outcomes(runs_root() / sweep)
    return {outcome.run.name: outcome for outcome in found if outcome.result}
