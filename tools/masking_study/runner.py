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
class Study:
    """Results so far. ``chosen``: arm -> peak; ``scores``: arm -> peak -> validation score of its trial.

    Peaks recorded by an earlier study take precedence over the trials: if two trials are almost equal, another machine
    would choose differently and train another arm.
    """

    chosen: dict[str, float] = field(default_factory=dict)
    runs: dict[str, Outcome] = field(default_factory=dict)
    scores: dict[str, dict[float, float]] = field(default_factory=dict)
    trials: dict[str, Outcome] = field(default_factory=dict)

    def choose(self, round_: Round) -> None:
        for arm in round_.arms:
            best, self.scores[arm.name] = paired_stats.choose(arm, self.trials)
            self.chosen.setdefault(arm.name, best)


def study(times: Times, profile: str, recorded: Mapping[str, float]) -> None:
    """Run all rounds; complete runs are left alone. Raises Unfinished.

    With recorded learning rates, compared runs come first because they need no trial: if the study is stopped early,
    only trials are missing.
    """
    state = Study(dict(recorded))
    for round_ in ROUNDS if recorded else ():
        submit(design.runs(round_, times, recorded), profile)
    for round_ in ROUNDS:
        submit(design.trials(round_, times, state.chosen), profile)
        state.trials |= outcomes(round_.trials)
        state.choose(round_)
        submit(design.runs(round_, times, state.chosen), profile)


def calibrate(profile: str, tries: int = 4) -> list[Outcome]:
    """Run the calibration. Runs with uneven step times go to the trash and are repeated, up to ``tries`` times in all.

    Raises Unfinished, also if step times stay uneven.
    """
    sweep = design.calibration()
    for _ in range(tries):
        submit(sweep, profile)
        timed = list(outcomes(sweep["name"]).values())
        uneven = calibration.noisy(timed)
        if not uneven:
            return timed
        names = ", ".join(outcome.run.name for outcome in uneven)
        print(f"uneven step times, let nothing else run: {names}", flush=True)
        for outcome in uneven:
            trash(outcome.run.path)
    raise Unfinished(STOPPED)


def collect(recorded: Mapping[str, float]) -> Study:
    """Read the complete runs of rounds with known learning rates, and the trials of complete rounds."""
    state = Study(dict(recorded))
    for round_ in ROUNDS:
        trials = outcomes(round_.trials)
        if all(arm.trial(peak) in trials for arm in round_.arms for peak in arm.peaks):
            state.trials |= trials
            state.choose(round_)
        elif not recorded:
            break
        state.runs |= outcomes(round_.sweep)
    return state


def submit(sweep: Mapping[str, Any], profile: str) -> None:
    """Write the sweep file below RUNS_ROOT/study, submit it and wait for its end. Raises Unfinished, OSError."""
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
    return {outcome.run.name: outcome for outcome in read_outcomes(runs_root() / sweep) if outcome.result}
