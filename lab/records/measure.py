"""Measures a recipe of the record page: trains it with new seeds, and its cost beside that of the reference."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import flip
from flip.config.merge import read_yaml
from flip.runs.errors import ConfigError
from flip.runs.rundir import read_json
from jobs.common.paths import REPOSITORY, SWEEPS, runs_root
from lab.records.rows import REFERENCE_SECONDS, SET, RecordRow
from lab.records.rule import SEEDS
from lab.studies.arms_design import EMOJI, ONE_CORE
from lab.studies.engine.training import SKIPPED, machine, submit

FIRST_SEED = 100
"""Of the seeds of a row. Choices use seeds below it."""
PROBES = 2
PROBE_STEPS = 48
"""Short runs of the reference that are trained between those of a recipe, and steps of each of their stages."""
REFERENCE = Path("cheapest") / "results" / "clipa.json"
"""Below docs: the settings of the reference."""

Stages = Mapping[str, Mapping[str, Any]]


def measure(run: str, docs: Path, profile: str) -> RecordRow:
    """Train a run of sweeps/records.yaml with SEEDS new seeds, two at a time, and return its row.

    Its cost is relative to probes of the reference, which run at the same time: another processor, or other load, acts
    on both. Complete runs in RUNS_ROOT are used again. Raises ConfigError, and Unfinished of the engine.
    """
    entry = _entry(run)
    stages = reference_stages(read_json(docs / REFERENCE) or {})
    name = f"records_{run}"
    entries = _entries(run, entry, stages)
    sweep = {
        "name": name, "title": f"Record: {run}", "cluster": "pair", "recipe": "emoji",
        "set": {**ONE_CORE, "evaluate": {"every": 0}, "monitor.log_every": 8}, "runs": entries,
    }  # fmt: skip
    submit(sweep, profile, float("inf"), lambda: False)
    folders = {key: runs_root() / name / key for key in entries}
    own = [folder for key, folder in folders.items() if not key.startswith("reference")]
    probes = [folder for key, folder in folders.items() if key.startswith("reference")]
    measured = {"recipe": stage_times(own), "reference": stage_times(probes)}
    lengths = stage_lengths(own[0])
    of_reference = {stage: int(each["samples"]) for stage, each in stages.items()}
    unit = cost(measured["reference"], of_reference) / REFERENCE_SECONDS
    return RecordRow(
        run=run,
        scores={str(FIRST_SEED + i): score(folder) for i, folder in enumerate(own)},
        seconds=round(cost(measured["recipe"], lengths) / unit, 1),
        measured={who: {stage: float(f"{t:.4g}") for stage, t in times.items()} for who, times in measured.items()},
        samples=sum(lengths.values()),
        commit=_commit(),
        date=time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        machine=machine(),
    )


def reference_stages(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages of the reference from its file of results."""
    stages: dict[str, dict[str, Any]] = {}
    for key, value in record.get("settings", {}).items():
        head, _, rest = key.partition(".")
        if head == "stages":
            stage, _, field = rest.partition(".")
            stages.setdefault(stage, {})[field] = value
    if not stages:
        raise ConfigError("the settings of the reference cannot be read", str(REFERENCE), remedy="Restore it.")
    return stages


def stage_times(runs: Sequence[Path]) -> dict[str, float]:
    """Stage -> median of the processor seconds per sample between metric lines, over all runs."""
    times: dict[str, list[float]] = {}
    for run in runs:
        columns = flip.read_metrics(run)
        lines = list(zip(columns["stage"], columns["cpu_seconds"], columns["samples"], strict=True))
        for stage in dict.fromkeys(columns["stage"]):
            own = [(seconds, samples) for name, seconds, samples in lines if name == stage][SKIPPED:]
            pairs = zip(own, own[1:], strict=False)
            times.setdefault(stage, []).extend((b[0] - a[0]) / (b[1] - a[1]) for a, b in pairs)
    for stage, values in times.items():
        if len(values) < SKIPPED:
            raise ConfigError("was not timed: its runs logged too little", stage, len(values), "Make it longer.")
    return {stage: median(values) for stage, values in times.items()}


def stage_lengths(run: Path) -> dict[str, int]:
    """Stage -> its samples."""
    columns = flip.read_metrics(run)
    ends = dict(zip(columns["stage"], map(int, columns["samples"]), strict=True))
    starts = [0, *ends.values()]
    return {stage: end - start for (stage, end), start in zip(ends.items(), starts, strict=False)}


def cost(times: Mapping[str, float], lengths: Mapping[str, int]) -> float:
    return sum(times[stage] * samples for stage, samples in lengths.items())


def score(run: Path) -> float:
    (item,) = [item for item in (read_json(run / "result.json") or {})["evaluations"] if item["name"] == SET]
    return float(item["top1"])


def _entry(run: str) -> dict[str, Any]:
    """The settings of a run of sweeps/records.yaml, all in the run, so that they do not act on the reference."""
    path = SWEEPS / "records.yaml"
    sweep = read_yaml(path)
    if run not in sweep["runs"]:
        raise ConfigError("no such recipe", str(path), run, f"There are: {', '.join(sweep['runs'])}.")
    return dict(sweep["runs"][run])


def _entries(run: str, entry: Mapping[str, Any], stages: Stages) -> dict[str, dict[str, Any]]:
    """Runs with new seeds; a probe of the reference before every few of them."""
    probe: dict[str, Any] = {"evaluate.sets": [dict(EMOJI)]}
    for stage, settings in stages.items():
        short = {"samples": PROBE_STEPS * int(settings["batch"]), "warmup": 0}
        probe[f"stages.{stage}"] = _nested(settings) | short
    entries: dict[str, dict[str, Any]] = {}
    for i in range(SEEDS):
        if i % (SEEDS // PROBES) == 0 and i // (SEEDS // PROBES) < PROBES:
            entries[f"reference-{i}"] = {**probe, "seed": i}
        entries[f"{run}-s{FIRST_SEED + i}"] = {**entry, "seed": FIRST_SEED + i}
    return entries


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``image.size: 24`` as {image: {size: 24}}."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, field = key.partition(".")
        if field:
            result.setdefault(section, {})[field] = value
        else:
            result[section] = value
    return result


def _commit() -> str:
    """The commit of this repository, with + if tracked files differ from it; empty without a work tree or git."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--abbrev=12", "--match=", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
