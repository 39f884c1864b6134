"""Runs of a study: measures step times, submits sweeps, and reads the complete runs.

Step times are processor seconds per sample, not wall-clock time, so that other load on the machine does not count. They
are measured once and determine the step counts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any, Protocol

import numpy as np

from flip.config.yaml_io import dump_yaml
from flip.monitoring.results import Outcome, read_outcomes
from flip.runs.errors import STOPPED, ConfigError
from flip.runs.files import output_folder
from flip.runs.rundir import read_json, write_json, write_text
from jobs.common.paths import runs_root
from jobs.submission.apply import move_to_trash
from tools.studies import arm_scores
from tools.studies.design import Round, StudyDesign, Times

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = 2
"""Logged intervals at the start of a run that are not timed, because caches and threads are cold."""
POLL = 15.0
"""Seconds between looks at the runs of a submission."""
UNEVEN = 0.2
"""Maximum distance of the quartiles as a share of the median; above it, the machine was too busy."""


class Calibrated(Protocol):
    """A study whose lengths follow from measured step times."""

    def calibration(self) -> dict[str, Any]:
        """The calibration sweep."""

    def calibrated(self) -> dict[str, str]:
        """Run of the calibration sweep -> its kind of work."""


class Unfinished(Exception):
    """A sweep did not complete. The argument is the exit code of the submission, which has printed the reason."""


@dataclass
class Study:
    """Results so far. ``chosen``: arm -> peak; ``scores``: arm -> peak -> validation score of its trial.

    Peaks recorded by an earlier study take precedence over the trials: if two trials are almost equal, another machine
    would choose differently and train another arm.
    """

    design: StudyDesign
    chosen: dict[str, float] = field(default_factory=dict)
    runs: dict[str, Outcome] = field(default_factory=dict)
    scores: dict[str, dict[float, float]] = field(default_factory=dict)
    trials: dict[str, Outcome] = field(default_factory=dict)

    def choose(self, round_: Round) -> None:
        for arm in round_.arms:
            best, self.scores[arm.name] = arm_scores.choose(arm, self.trials)
            self.chosen.setdefault(arm.name, best)


def study(design: StudyDesign, times: Times, profile: str, recorded: Mapping[str, float]) -> None:
    """Run all rounds; complete runs are left alone. Raises Unfinished.

    With recorded learning rates, compared runs come first because they need no trial: if the study is stopped early,
    only trials are missing.
    """
    state = Study(design, dict(recorded))
    if recorded:
        for round_ in design.rounds:
            submit(design.runs(round_, times, recorded), profile)
    for round_ in design.rounds:
        submit(design.trials(round_, times, state.chosen), profile)
        state.trials |= outcomes(design.sweep(round_, trials=True))
        state.choose(round_)
        submit(design.runs(round_, times, state.chosen), profile)


def calibrate(design: Calibrated, profile: str, tries: int = 4) -> list[Outcome]:
    """Run the calibration. Runs with uneven step times go to the trash and are repeated, up to ``tries`` times in all.

    Raises Unfinished, also if step times stay uneven.
    """
    sweep = design.calibration()
    for _ in range(tries):
        submit(sweep, profile)
        timed = list(outcomes(sweep["name"]).values())
        uneven = noisy(design, timed)
        if not uneven:
            return timed
        names = ", ".join(outcome.run.name for outcome in uneven)
        print(f"uneven step times, let nothing else run: {names}", flush=True)
        for outcome in uneven:
            move_to_trash(outcome.run.path)
    raise Unfinished(STOPPED)


def collect(design: StudyDesign, recorded: Mapping[str, float]) -> Study:
    """Read the complete runs of rounds with known learning rates, and the trials of complete rounds."""
    state = Study(design, dict(recorded))
    for round_ in design.rounds:
        trials = outcomes(design.sweep(round_, trials=True))
        if all(arm.trial(peak) in trials for arm in round_.arms for peak in arm.peaks):
            state.trials |= trials
            state.choose(round_)
        elif not recorded:
            break
        state.runs |= outcomes(design.sweep(round_))
    return state


def submit(
    sweep: Mapping[str, Any], profile: str, seconds: float | None = None, is_over: Callable[[], bool] = lambda: False
) -> None:
    """Write the sweep file below RUNS_ROOT/study, submit it and wait for its end.

    With ``seconds``, the runs save a checkpoint and stop then, once ``is_over`` (asked every POLL seconds), and on
    Ctrl-C and SIGTERM; the next submission continues them. Raises Unfinished unless it is complete or was stopped by
    the first two; OSError.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # with nohup it is ignored, and then by the submission too
    path = runs_root() / "study" / f"{sweep['name']}.yaml"
    output_folder(path.parent)
    write_text(path, dump_yaml(dict(sweep)))
    print(f"\n{sweep['title']}: {path}", flush=True)
    command = [sys.executable, str(ROOT / "jobs" / "submit.py"), "--sweep", str(path), "--cluster", profile]
    if seconds is None:
        command += ["--watch"]
    else:
        command += ["--foreground", "--retry"]
    end = time.monotonic() + (float("inf") if seconds is None else seconds)
    stopped = False
    with subprocess.Popen([*command, "--no-canary"], env=os.environ | {"FLIP_RUNS": str(runs_root())}) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGINT))
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL if stopped else min(POLL, max(0.0, end - time.monotonic())))
            if not stopped and (is_over() or time.monotonic() >= end) and process.poll() is None:
                process.send_signal(signal.SIGINT)
                stopped = True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if process.returncode and not stopped:
        raise Unfinished(process.returncode)


def outcomes(sweep: str) -> dict[str, Outcome]:
    """Run -> outcome, for the complete runs of a sweep."""
    return {outcome.run.name: outcome for outcome in read_outcomes(runs_root() / sweep) if outcome.result}


def machine() -> dict[str, Any]:
    """The machine of the measurement: processor, cores, load of the last minute."""
    text = ""
    if Path("/proc/cpuinfo").exists():
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return {
        "processor": models[0] if models else os.uname().machine,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
    }


def measured(design: Calibrated, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Kind of work -> {seconds per sample (the median), quartiles, intervals timed}, of complete calibration runs.

    An interval lies between two metric lines. Raises ConfigError if a kind of work was not timed.
    """
    values: dict[str, list[float]] = {}
    for outcome in outcomes:
        seconds, samples = (np.diff(outcome.metrics[name][SKIPPED:]) for name in ("cpu_seconds", "samples"))
        values.setdefault(_work(design, outcome), []).extend((seconds / samples).tolist())
    spreads = {}
    for work, times in values.items():
        if len(times) < 2:
            raise ConfigError("was not timed: its calibration runs logged too little", work, len(times))
        low, median, high = (float(f"{value:.4g}") for value in quantiles(times, n=4))
        spreads[work] = {"seconds": median, "quartiles": [low, high], "intervals": len(times)}
    return spreads


def noisy(design: Calibrated, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The runs of the kinds of work whose intervals vary too much to be used."""
    spreads = measured(design, outcomes)
    widths = {
        work: (facts["quartiles"][1] - facts["quartiles"][0]) / facts["seconds"] for work, facts in spreads.items()
    }
    return [outcome for outcome in outcomes if widths[_work(design, outcome)] > UNEVEN]


def _work(design: Calibrated, outcome: Outcome) -> str:
    return design.calibrated()[outcome.run.name.removesuffix("-s1")]


def write_calibration(design: Calibrated, path: Path, profile: str) -> None:
    """Measure step times and write the record. Raises Unfinished, OSError."""
    before = machine()  # when the measurement starts
    for outcome in read_outcomes(runs_root() / design.calibration()["name"]):  # complete runs would not start again
        move_to_trash(outcome.run.path)
    record = {
        "what": "processor seconds per sample of the one process that a run is: reading, decoding, cropping, forward,"
        " backward, optimiser; two runs side by side; median over intervals between metric lines, and quartiles",
        "machine": before,
        "work": measured(design, calibrate(design, profile)),
        "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }
    output_folder(path.parent)
    write_json(path, record)


def read_calibration(design: Calibrated, path: Path, study: str = "") -> dict[str, Any]:
    """Read the record. Raises ConfigError if it is missing, damaged or lacks a kind of work.

    ``study``: the option of flip study that names the study, in the remedy.
    """
    remedy = f"Measure on a quiet machine: flip study {study}--calibrate"
    try:
        calibration = read_json(path)
    except ValueError as error:
        raise ConfigError("the calibration cannot be read", str(path), str(error), remedy) from error
    if calibration is None:
        raise ConfigError("there is no calibration", str(path), remedy=remedy)
    for work in design.calibrated().values():
        if work not in calibration.get("work", {}):
            raise ConfigError("the calibration lacks a kind of work", str(path), work, remedy)
    return dict(calibration)


def seconds_per_sample(calibration: Mapping[str, Any]) -> dict[str, float]:
    return {work: float(facts["seconds"]) for work, facts in calibration["work"].items()}
