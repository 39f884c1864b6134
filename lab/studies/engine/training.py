"""Trains studies: measures core-seconds per sample, submits what is missing, and writes a file per complete run.

It uses what every user has: ``flip.submit``, ``flip.read_runs``, ``flip.read_metrics``, the command ``flip status``,
and the files of a run directory (docs/contracts.md). Cost is processor time, not wall-clock time, so that other load on
the machine does not count; it is measured once and determines the lengths of runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np

import flip
from flip.common.host import cores
from flip.environment import processor
from flip.files import deletion
from flip.files.creation import output_folder
from flip.runs.errors import CRASH, STOPPED, ConfigError
from flip.runs.rundir import read_json, sorted_glob, write_json, write_text
from jobs.common.paths import REPOSITORY, runs_root
from lab.studies.engine.answers import pack
from lab.studies.engine.design import VALIDATION, Entry, StudyRun, work_name
from lab.studies.engine.results import Results, agree, checked, manifest_name, results_folder
from lab.studies.engine.study import Study, read

SKIPPED = 2
"""Logged intervals at the start of a run that are not timed, because caches and threads are cold."""
POLL = 15.0
"""Seconds between looks at the runs of a submission."""
UNEVEN = 0.1
"""Maximum distance of the quartiles as a share of the median; above it, the machine was too busy. On idle machines it
is at most 0.09. At a load of 9 it was 0.11 to 0.16, and work that does more than other work took 9 % less time."""
TRIES = 4
"""Measurements of a kind of work whose step times are uneven."""
CALIBRATION = (
    "processor seconds per sample of the one process that a run is: reading, decoding, cropping, forward,"
    " backward, optimiser; two runs side by side; median over intervals between metric lines, and quartiles"
)
SETTINGS = ("compute.threads", "data.samples", "evaluate.preprocess")
"""Settings of a run that its file of results has, beside those of its entry."""
SCORE_FIELDS = ("name", "role", "top1", "top5", "n", "chance", "interval", "loss")


class Unfinished(Exception):
    """Runs did not complete; the reason is printed. The argument is the exit code."""


def train(study: Study, docs: Path, profile: str, seconds: float) -> Results:
    """Train what is missing for at most ``seconds``, and write the result of each complete run. A run that is stopped
    then continues in the next call on this machine.

    Once a run can start that is more important than those of the submission, all runs stop and continue in a new one.
    Raises Unfinished if a run failed or the user interrupts.
    """
    end = time.monotonic() + seconds
    while True:
        results = collect(study, docs)
        ready = results.ready(complete_runs(study))
        left = end - time.monotonic()
        if not ready or left <= 0:
            return results
        batch = [run for run in ready if run.sweep == ready[0].sweep]
        entries = {run.name: study.entry(run, results.times, results.peaks) for run in batch}

        def is_over(batch: Sequence[StudyRun] = tuple(batch)) -> bool:
            results = collect(study, docs)
            return is_overtaken(batch, results.ready(complete_runs(study)))

        submit(study.sweep(batch[0].sweep, entries), profile, left, is_over)


def is_overtaken(batch: Sequence[StudyRun], ready: Sequence[StudyRun]) -> bool:
    """Whether a run of the same sweep that is not in the batch can start, and precedes one of the batch."""
    submitted = {run.name for run in batch}
    late = False
    for run in reversed(ready):
        if run.name in submitted:
            late = True
        elif late and run.sweep == batch[0].sweep:
            return True
    return False


def submit(sweep: Mapping[str, Any], profile: str, seconds: float, is_over: Callable[[], bool]) -> None:
    """Write the sweep file below RUNS_ROOT/study, submit it and wait until its runs have ended.

    After ``seconds``, once ``is_over`` (asked every POLL seconds), on Ctrl-C and on SIGTERM, the runs save a checkpoint
    and stop; the next submission continues them. Raises Unfinished if they failed, or were interrupted by the user.
    """
    path = runs_root() / "study" / f"{sweep['name']}.yaml"
    output_folder(path.parent)
    write_text(path, json.dumps(sweep, indent=1))  # JSON is YAML
    print(f"\n{sweep['title']}: {path}", flush=True)
    end = time.monotonic() + seconds
    with interrupts():
        runs = flip.submit(path, cluster=profile, retry=True)
        try:
            while True:
                try:
                    states = runs.wait(timeout=max(0.0, min(POLL, end - time.monotonic())))
                    break
                except TimeoutError:
                    if time.monotonic() >= end or is_over():
                        runs.cancel("the study stops or continues with other runs")
                        runs.wait()
                        return
        except KeyboardInterrupt:
            runs.cancel("the study was interrupted")
            runs.wait()
            raise Unfinished(STOPPED) from None
    failed = {name: state for name, state in states.items() if state.state != "complete"}
    for name, state in failed.items():
        print(f"{sweep['name']}/{name}: {state.state}: {state.reason}", file=sys.stderr)
    if failed:
        raise Unfinished(CRASH)


@contextmanager
def interrupts() -> Iterator[None]:
    """SIGTERM and SIGINT raise KeyboardInterrupt, also in the background of a shell, which ignores SIGINT."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# -- results -----------------------------------------------------------------------------------------------------------


def collect(study: Study, docs: Path) -> Results:
    """Write the results of complete runs that have none, and learning rates once all are known; read the study.

    Raises ConfigError if a run has other settings than its entry.
    """
    results = read(study, docs)
    local = complete_runs(study)
    new = [run for run in results.runs if run.name in local and run.name not in results.records]
    hours: dict[str, Any] = {}
    for sweep in dict.fromkeys(run.sweep for run in new):
        hours |= spent(runs_root() / sweep)
    for run in new:
        place = runs_root() / run.sweep / run.name
        entry = study.entry(run, results.times, results.peaks)
        measured = record(run, entry, place, hours[run.name])
        if not agree(measured["settings"], entry):
            remedy = "Name another folder for the runs of this study: export FLIP_RUNS=FOLDER."
            raise ConfigError("the run has other settings than the study", str(place), remedy=remedy)
        output_folder(results_folder(results.folder))
        write_json(results_folder(results.folder) / f"{run.name}.json", measured)
        results = read(study, docs)  # the next run may need a learning rate that is known now
    if not results.choices and results.peaks.keys() == study.peaks().keys():
        write_json(results.folder / "choices.json", results.peaks)
    return results


def complete_runs(study: Study) -> set[str]:
    """Names of the complete runs whose directories are on this machine."""
    return {run.name for run in study.runs() if (runs_root() / run.sweep / run.name / "result.json").is_file()}


def record(run: StudyRun, entry: Entry, place: Path, spent: Mapping[str, Any]) -> dict[str, Any]:
    """The file of a complete run: what was trained, with digests, what came out, and where its time went.

    ``curve``: accuracy on the validation set during training; ``hours``: core-hours by use.
    """
    identity = read_json(place / "identity.json") or {}
    scores = (read_json(place / "result.json") or {})["evaluations"]
    settings = checked(entry)
    (row,) = flip.read_runs(place, settings=[*settings, *SETTINGS])
    settings = {key: row[key] for key in settings}
    if "data.manifest" in settings:
        settings["data.manifest"] = manifest_name(settings["data.manifest"])
    end = read_json(place / "attempts" / str(row["attempts"]) / "end.json") or {}
    return {
        "run": run.name,
        "kind": run.kind,
        "settings": settings,
        "configuration": identity.get("hash"),
        "data": identity.get("config", {}).get("data", {}).get("manifest"),
        "threads": row["compute.threads"],
        "preprocess": row["evaluate.preprocess"],
        "data_samples": row["data.samples"],
        "parameters": row["parameters"],
        "samples": row["samples"],
        "seconds": round(row["seconds"], 1),
        "evaluations": [evaluation(item) | answered(place, item) for item in scores],
        "curve": list(curve(place)),
        "hours": {part: round(value, 4) for part, value in spent["hours"].items()},
        "attempts": spent["attempts"],
        "machine": {key: value for key, value in machine().items() if key != "load"},
        "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime(end.get("time"))),
    }


def evaluation(item: Mapping[str, Any]) -> dict[str, Any]:
    fields = {key: item[key] for key in SCORE_FIELDS if key in item}
    return fields | {"task": item.get("task", "zeroshot")}


def answered(place: Path, item: Mapping[str, Any]) -> dict[str, str]:
    """Right or wrong for each picture of a zero-shot result (``answers.pack``), from the run's file of predictions.

    Empty without this file: retrieval and probes have none.
    """
    for path in sorted_glob(place / "eval", f"*/{item['name']}.predictions.jsonl"):
        about, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        if about["predictions"] == item.get("predictions"):
            right = np.array([row["classes"][0] == row["label"] for row in rows])
            return pack([row["image"] for row in rows], right)
    return {}


def curve(place: Path) -> Iterator[dict[str, Any]]:
    """Accuracy on the validation set by samples seen."""
    points = [read_json(path) or {} for path in sorted_glob(place / "eval", "*.json")]
    for point in sorted(points, key=lambda point: point["samples"]):
        for item in point["evaluations"]:
            if item["name"] == VALIDATION:
                yield {"samples": point["samples"], "seconds": point.get("seconds"), "top1": item["top1"]}


def spent(folder: Path) -> dict[str, Any]:
    """Run -> its account of hours, as ``flip status --goodput`` gives it. Raises ConfigError if it fails."""
    command = [sys.executable, "-m", "jobs", "status", str(folder), "--goodput", "--json"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError("flip status fails", str(folder), done.stderr.strip(), "Repair what it names.")
    accounts = json.loads(done.stdout)
    return {account["name"].rpartition("/")[2]: account for account in accounts}


def machine() -> dict[str, Any]:
    """This machine: processor, cores, load of the last minute."""
    return {"processor": processor(), "cores": cores(), "load": round(os.getloadavg()[0], 2)}


# -- calibration -------------------------------------------------------------------------------------------------------


def calibrate(study: Study, docs: Path, profile: str) -> None:
    """Measure the step times of each kind of work and write calibration.json: another study, so choices.json goes.

    `flip doctor --measure` times steps whose batch is in memory, by the clock. A study needs the processor time of its
    own runs, input included, which other work on the machine does not change: so it measures them by itself.

    Two runs of each kind, two at a time, as in the study. Kinds with uneven step times are measured again, up to TRIES
    times in all. Raises Unfinished, also if step times stay uneven.
    """
    before = machine()  # when the measurement starts
    measured: dict[str, Any] = {}
    left = dict(study.calibration())
    for _ in range(TRIES):
        name = f"{study.name}_calibration_{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
        entries = {work_name(work): {**entry, "evaluate.sets": []} for work, entry in left.items()}
        sweep = study.sweep(name, entries) | {"title": "Step times", "seeds": [0, 1]}
        submit(sweep, profile, float("inf"), lambda: False)
        for work in list(left):
            facts = step_times(work, runs_root() / name / work_name(work), runs_root() / name / f"{work_name(work)}-s1")
            if is_even(facts):
                measured[work] = facts
                del left[work]
        if not left:
            break
        print(f"uneven step times, let nothing else run: {', '.join(left)}", flush=True)
    if left:
        raise Unfinished(STOPPED)
    folder = docs / study.name
    output_folder(folder)
    moment = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    write_json(folder / "calibration.json", {"what": CALIBRATION, "machine": before, "work": measured, "time": moment})
    deletion.delete_file(folder / "choices.json", missing_ok=True)


def step_times(work: str, *runs: Path) -> dict[str, Any]:
    """Seconds per sample (the median), quartiles, and number of intervals timed, of complete calibration runs.

    An interval lies between two metric lines. Raises ConfigError if there are too few.
    """
    times = list[float]()
    for run in runs:
        columns = flip.read_metrics(run)
        seconds = np.diff(columns["cpu_seconds"][SKIPPED:])
        samples = np.diff(columns["samples"][SKIPPED:])
        times += (seconds / samples).tolist()
    if len(times) < 2:
        raise ConfigError("was not timed: its calibration runs logged too little", work, len(times))
    low, median, high = (float(f"{value:.4g}") for value in quantiles(times, n=4))
    return {"seconds": median, "quartiles": [low, high], "intervals": len(times)}


def is_even(facts: Mapping[str, Any]) -> bool:
    """Whether step times vary so little that they can be used."""
    low, high = facts["quartiles"]
    return bool(high - low <= UNEVEN * facts["seconds"])


def again(study: Study, docs: Path, folder: Path) -> None:
    """Prepare ``folder`` for the same study trained a second time: its lengths and learning rates, no results.

    Raises ConfigError if the learning rates are not all known.
    """
    results = read(study, docs)
    if results.peaks.keys() != study.peaks().keys():
        raise ConfigError(
            "the learning rates are not all chosen yet", str(results.folder), remedy="Complete the trials."
        )
    output_folder(folder / study.name)
    if not (folder / study.name / "calibration.json").exists():
        write_json(folder / study.name / "calibration.json", results.calibration)
        write_json(folder / study.name / "choices.json", results.peaks)
