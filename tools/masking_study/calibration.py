"""Processor seconds per sample of each kind of work, measured once; step counts follow from them alone.

Not by the clock on the wall: what else runs on the machine would count as well.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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

    An interval is that between two metric lines. Raises ConfigError where a kind of work was not timed.
    """
    found: dict[str, list[float]] = {}
    for outcome in outcomes:
        one = design.arm(outcome.run.name.removesuffix("-s1"))
        seconds, samples = outcome.metrics["cpu_seconds"][SKIPPED:], outcome.metrics["samples"][SKIPPED:]
        pairs = zip(seconds[1:] - seconds[:-1], samples[1:] - samples[:-1], strict=True)
        found.setdefault(one.work, []).extend(float(s / n) for s, n in pairs)
    return {work: _spread(work, values) for work, values in found.items()}


def _spread(work: str, values: Sequence[float]) -> dict[str, Any]:
    from statistics import median, quantiles

    if len(values) < 2:
        raise ConfigError("was not timed: its calibration runs logged too little", work, len(values))
    low, _, high = quantiles(values, n=4)
    rounded = [float(f"{value:.4g}") for value in (median(values), low, high)]
    return {"seconds": rounded[0], "quartiles": rounded[1:], "intervals": len(values)}


def noisy(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The runs of the kinds of work whose intervals vary too much to be used."""
    found = measured(outcomes)
    uneven = {
        work
        for work, facts in found.items()
        if facts["quartiles"][1] - facts["quartiles"][0] > UNEVEN * facts["seconds"]
    }
    return [o for o in outcomes if design.arm(o.run.name.removesuffix("-s1")).work in uneven]


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
        found = read_json(path)
    except ValueError as error:
        raise ConfigError("the calibration cannot be read", str(path), str(error), remedy) from error
    if found is None:
        raise ConfigError("there is no calibration", str(path), remedy=remedy)
    for each in design.ROUNDS:
        for one in each.arms:
            if one.work not in found.get("work", {}):
                raise ConfigError("the calibration lacks a kind of work", str(path), one.work, remedy)
    return dict(found)


def times(found: Mapping[str, Any]) -> dict[str, float]:
    return {work: float(facts["seconds"]) for work, facts in found["work"].items()}
