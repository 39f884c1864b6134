"""Processor seconds per sample of each kind of work, measured once; they determine the step counts.

Processor time, not wall-clock time, so that other load on the machine does not count.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np

from flip.monitoring.results import Outcome
from flip.runs.errors import ConfigError
from flip.runs.rundir import read_json
from tools.masking_study import design

SKIPPED = 2
"""Logged intervals at the start of a run that are not timed, because caches and threads are cold."""
UNEVEN = 0.2
"""Maximum distance of the quartiles as a share of the median; above it, the machine was too busy."""


def machine() -> dict[str, Any]:
    """The machine of the measurement: processor, cores, load of the last minute."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return {
        "processor": models[0] if models else os.uname().machine,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
    }


def measured(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """``Arm.work`` -> {seconds per sample (the median), quartiles, intervals timed}, of complete calibration runs.

    An interval lies between two metric lines. Raises ConfigError if a kind of work was not timed.
    """
    values: dict[str, list[float]] = {}
    for outcome in outcomes:
        seconds, samples = (np.diff(outcome.metrics[name][SKIPPED:]) for name in ("cpu_seconds", "samples"))
        values.setdefault(_work(outcome), []).extend((seconds / samples).tolist())
    spreads = {}
    for work, times in values.items():
        if len(times) < 2:
            raise ConfigError("was not timed: its calibration runs logged too little", work, len(times))
        low, median, high = (float(f"{value:.4g}") for value in quantiles(times, n=4))
        spreads[work] = {"seconds": median, "quartiles": [low, high], "intervals": len(times)}
    return spreads


def noisy(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The runs of the kinds of work whose intervals vary too much to be used."""
    spreads = measured(outcomes)
    widths = {
        work: (facts["quartiles"][1] - facts["quartiles"][0]) / facts["seconds"] for work, facts in spreads.items()
    }
    return [outcome for outcome in outcomes if widths[_work(outcome)] > UNEVEN]


def _work(outcome: Outcome) -> str:
    return design.ARMS[outcome.run.name.removesuffix("-s1")].work


def record(outcomes: Sequence[Outcome], before: Mapping[str, Any]) -> dict[str, Any]:
    """The calibration record. ``before``: the machine when the measurement started."""
    return {
        "what": "processor seconds per sample of the one process that a run is: reading, decoding, cropping, forward,"
        " backward, optimiser; two runs side by side; median over intervals between metric lines, and quartiles",
        "machine": dict(before),
        "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "work": measured(outcomes),
    }


def read(path: Path) -> dict[str, Any]:
    """Read the record. Raises ConfigError if it is missing, damaged or lacks a kind of work."""
    remedy = "Measure on a quiet machine: python tools/study.py --calibrate"
    try:
        calibration = read_json(path)
    except ValueError as error:
        raise ConfigError("the calibration cannot be read", str(path), str(error), remedy) from error
    if calibration is None:
        raise ConfigError("there is no calibration", str(path), remedy=remedy)
    for arm in design.ARMS.values():
        if arm.work not in calibration.get("work", {}):
            raise ConfigError("the calibration lacks a kind of work", str(path), arm.work, remedy)
    return dict(calibration)


def times(calibration: Mapping[str, Any]) -> dict[str, float]:
    return {work: float(facts["seconds"]) for work, facts in calibration["work"].items()}
