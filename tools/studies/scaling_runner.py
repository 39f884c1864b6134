"""Runs of the scaling study: what is missing beside the committed results, in order of importance.

Each complete run leaves a file in docs/scaling_study/results, so that another machine goes on with what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from flip.config.resolve import cache_root
from flip.monitoring.results import Outcome
from flip.runs.errors import ConfigError
from flip.runs.files import output_folder
from flip.runs.rundir import read_json, sorted_glob, write_json
from jobs.reporting import goodput
from tools.studies import runner, scaling_design, scaling_stats
from tools.studies.scaling_design import JOINT, REFERENCE, SEEDS, StudyPoint, StudyRun, Times
from tools.studies.scaling_stats import JointLaw, Spread

Record = Mapping[str, Any]
"""A file of results (``record``)."""


@dataclass
class ScalingStudy:
    """The calibration and the results so far. ``results``: name of a run -> its record."""

    folder: Path
    times: Times
    results: dict[str, Record]
    prediction: Record | None

    @cached_property
    def unit(self) -> int:
        return scaling_design.unit(self.times)

    @cached_property
    def peaks(self) -> dict[tuple[str, str], float]:
        """(model, mask) -> the peak of the best trial on the validation family, the smallest of equals; of those
        whose trials are complete."""
        chosen = {}
        for arm, scores in self.trials().items():
            if len(scores) == len(scaling_design.PEAKS):
                chosen[arm] = max(scores, key=lambda peak: (scores[peak], -peak))
        return chosen

    def trials(self) -> dict[tuple[str, str], dict[float, float]]:
        """(model, mask) -> peak -> accuracy on the validation family."""
        scores: dict[tuple[str, str], dict[float, float]] = {arm: {} for arm in scaling_design.ARMS}
        for job in scaling_design.all_jobs():
            if job.kind == "trial" and job.name in self.results:
                top1 = score(self.results[job.name], "validation")
                scores[job.group.model, job.group.mask][job.group.peak] = top1
        return scores

    def records(self, point: StudyPoint) -> dict[int, Record]:
        """Seed -> record of the runs of a point."""
        jobs = [job for job in scaling_design.all_jobs() if job.kind == "run" and job.group.point(job.length) == point]
        return {job.group.seed: self.results[job.name] for job in jobs if job.name in self.results}

    def first(self, repeat: StudyRun) -> Record | None:
        """Record of the run that ``repeat`` trains again. Of the trials it is the one with the chosen peak."""
        group = repeat.group
        same = group.point(repeat.length), group.seed
        peaks = 0.0, self.peaks.get((group.model, group.mask))
        firsts = (job for job in scaling_design.all_jobs() if not job.group.repeat and job.group.peak in peaks)
        names = [job.name for job in firsts if (job.group.point(job.length), job.group.seed) == same]
        return next((self.results[name] for name in names if name in self.results), None)

    def scores(self, point: StudyPoint) -> list[float]:
        """Accuracy of each run of a point: the mean over the test families."""
        return [score(each) for each in self.records(point).values()]

    def complete(self, point: StudyPoint) -> bool:
        """Whether all runs of a point that the study asks for have a result."""
        return not any(job.group.point(job.length) == point for job in self.missing() if job.kind == "run")

    @cached_property
    def unsettled(self) -> bool:
        """Whether runs of the reference, which determine the spread between seeds, have no result."""
        jobs = (job for job in scaling_design.all_jobs() if job.trunk and not is_predicted(job))
        return not all(job.name in self.results for job in jobs)

    @cached_property
    def spread(self) -> Spread | None:
        """Between seeds, pooled over the points with several."""
        return scaling_stats.spread({point: self.scores(point) for point in scaling_design.points()})

    def asked(self, job: StudyRun) -> bool | None:
        """Whether a run belongs to the study: no further seed if the difference from the reference is clear. None: not
        known yet, because the first seed or runs that determine the spread have no result."""
        group = job.group
        if group.seed not in SEEDS[1:] or len(group.lengths) > 1:
            return True
        first = [self.records(point).get(0) for point in (group.point(job.length), REFERENCE)]
        if not all(first) or self.unsettled:
            return None
        terms = [(sign, [score(each)]) for sign, each in zip((1.0, -1.0), first, strict=True) if each]
        difference = self.spread and scaling_stats.contrast(terms, self.spread)
        return not difference or not scaling_stats.is_clear(difference)

    def missing(self) -> list[StudyRun]:
        """Runs without a result, in order, and trunks that they extend."""
        jobs = [job for job in scaling_design.all_jobs() if self.asked(job) is not False]
        needed = {job.trunk for job in jobs if job.length and job.name not in self.results}
        return [job for job in jobs if (job.name not in self.results if job.length else job in needed)]

    def ready(self, local: Mapping[str, Outcome]) -> list[StudyRun]:
        """The missing runs that can start. ``local``: run directories of complete runs.

        A trunk whose result was committed is trained again if its run directory is elsewhere, because cooldowns start
        from its checkpoints. Runs of the joint corner wait for their prediction.
        """
        jobs = [job for job in self.missing() if self.asked(job) and (self.prediction or not is_predicted(job))]
        return scaling_design.startable(jobs, local.keys())

    def check(self) -> None:
        """Raise ConfigError if a result is of another design."""
        for job in scaling_design.all_jobs():
            if job.name in self.results and (job.kind == "trial" or self.peaks):
                entry = scaling_design.entry(job, self.unit, self.peaks)
                if self.results[job.name]["settings"] != scaling_design.settings(entry):
                    remedy = "Restore calibration.json and the trials, or move the results away to start another study."
                    path = str(results_folder(self.folder) / f"{job.name}.json")
                    raise ConfigError("the result is of a run with other settings", path, remedy=remedy)


def results_folder(folder: Path) -> Path:
    return folder / "results"


def read(folder: Path) -> ScalingStudy:
    """The study in docs/scaling_study. Raises ConfigError if a file is damaged or of another design."""
    calibration = runner.read_calibration(scaling_design, folder / "calibration.json", "--study scaling ")
    paths = sorted_glob(results_folder(folder), "*.json")
    try:
        results = {path.stem: read_json(path) or {} for path in paths}
        study = ScalingStudy(
            folder, runner.seconds_per_sample(calibration), results, read_json(folder / "prediction.json")
        )
        study.check()
    except (ValueError, KeyError, TypeError) as error:
        remedy = "Restore the file from the repository."
        raise ConfigError("a result cannot be read", str(results_folder(folder)), str(error), remedy) from error
    return study


def score(record: Record, name: str = "") -> float:
    """Top-1 of a run on a set, 0..1; without a name the mean over the test families."""
    items = [item for item in record["evaluations"] if (item["name"] == name if name else is_family(item))]
    return fmean(float(item["top1"]) for item in items)


def is_family(item: Mapping[str, Any]) -> bool:
    """Whether an evaluation is zero-shot on a test family."""
    return item["role"] == "test" and item["task"] == "zeroshot"


def is_predicted(job: StudyRun) -> bool:
    """Whether a run belongs to the joint corner, whose accuracy is predicted before it is trained."""
    return job.group in JOINT


# -- prediction --------------------------------------------------------------------------------------------------------


def law(study: ScalingStudy) -> tuple[JointLaw, list[Record]]:
    """The law over parameters, data and samples of the runs at mask 0.5 outside the joint corner, and their records.

    Raises ValueError if they do not determine it.
    """
    jobs = [job for job in scaling_design.all_jobs() if job.kind == "run" and not is_predicted(job)]
    records = [study.results[j.name] for j in jobs if j.group.mask == REFERENCE.mask and j.name in study.results]
    axes = ("parameters", "data_samples", "samples")
    xs = [[each[axis] for axis in axes] for each in records]
    errors = [1 - score(each) for each in records]
    return scaling_stats.joint_law(xs, errors), records


def predict(study: ScalingStudy) -> dict[str, Any]:
    """Predict the error of each run of the joint corner, by the law of the others, and write prediction.json.

    Raises ConfigError if runs of the law are missing, or if one of the joint corner is complete.
    """
    path = study.folder / "prediction.json"
    late = [job.name for job in scaling_design.all_jobs() if is_predicted(job) and job.name in study.results]
    early = [job.name for job in study.missing() if not is_predicted(job) and job.kind in ("trial", "run")]
    if late or early or study.prediction:
        if late:
            reason = "is complete"
        else:
            reason = "is missing" if early else "exists"
        what = f"a prediction is made once, before the joint corner and after all other runs: {reason}"
        raise ConfigError(what, (late or early or [str(path)])[0], remedy="Keep the file, or complete the other runs.")
    fitted, records = law(study)
    parameters = max(each["parameters"] for each in records)
    data = max(each["data_samples"] for each in records)
    lengths = [length for group in JOINT for length in group.lengths]
    errors = {str(each): vars(fitted.predict((parameters, data, each * study.unit), runs=1)) for each in lengths}
    prediction = {
        "what": "zero-shot error of a run of the joint corner by its length in units, from the runs below",
        "errors": errors,
        "exponents": [vars(each) for each in fitted.exponents()],
        "runs": {each["run"]: each["configuration"] for each in records},
        "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }
    write_json(path, prediction)
    return prediction


# -- training ----------------------------------------------------------------------------------------------------------


def train(folder: Path, profile: str, seconds: float) -> ScalingStudy:
    """Train what is missing for at most ``seconds``, and write the result of each complete run. A run that is stopped
    then continues in the next call on this machine.

    Once a run is complete on which others depend, all runs stop and continue in a new submission, in which those
    others have their place in the order of importance. Raises Unfinished if a submission failed or was stopped.
    """
    end = time.monotonic() + seconds
    machine = runner.machine()
    while True:
        local = runner.outcomes(scaling_design.NAME)
        collect(folder, local, machine)
        study = read(folder)
        left = end - time.monotonic()
        jobs = study.ready(local)
        if not jobs or left <= 0:
            return study

        def is_over(submitted: frozenset[str] = frozenset(job.name for job in jobs)) -> bool:
            local = runner.outcomes(scaling_design.NAME)
            collect(folder, local, machine)
            return any(job.name not in submitted for job in read(folder).ready(local))

        runner.submit(scaling_design.sweep(jobs, study.unit, study.peaks), profile, left, is_over)


def collect(folder: Path, local: Mapping[str, Outcome], machine: Mapping[str, Any]) -> None:
    """Write the results of complete runs that have none, and the facts about the data of this machine."""
    output_folder(results_folder(folder))
    facts = read_json(cache_root() / "icons" / "done.json") or {}
    known = {key: facts[key] for key in ("counts", "sets", "leakage") if key in facts}
    if known and known != read_json(folder / "data.json"):
        write_json(folder / "data.json", known)
    for job in scaling_design.all_jobs():
        path = results_folder(folder) / f"{job.name}.json"
        if job.name in local and not path.exists():
            write_json(path, record(job, local[job.name], machine))


def record(job: StudyRun, outcome: Outcome, machine: Mapping[str, Any]) -> dict[str, Any]:
    """The file of a complete run: what was trained, with digests, what came out, and where its time went.

    ``curve``: accuracy on the validation family during training; ``hours``: core-hours by use (``goodput``).
    """
    identity = read_json(outcome.run.identity) or {}
    result = outcome.result
    account = goodput.of_run(outcome)
    curve = [
        {"samples": point["samples"], "seconds": point["seconds"], "top1": item["top1"]}
        for point in outcome.curve()
        for item in point["evaluations"]
        if item["name"] == "validation"
    ]
    fields = ("name", "role", "top1", "top5", "n", "chance", "interval")
    evaluations = [
        {key: item[key] for key in fields if key in item} | {"task": item.get("task", "zeroshot")}
        for item in outcome.evaluations
    ]
    return {
        "run": job.name,
        "kind": job.kind,
        "settings": scaling_design.settings(outcome.settings),
        "configuration": identity.get("hash"),
        "data": identity.get("config", {}).get("data", {}).get("manifest"),
        "threads": outcome.settings["compute.threads"],
        "data_samples": outcome.settings["data.samples"],
        "parameters": result["parameters"]["total"],
        "samples": result["samples"],
        "seconds": round(result["seconds"], 1),
        "evaluations": evaluations,
        "curve": curve,
        "hours": {part: round(value, 4) for part, value in account.hours.items()},
        "attempts": account.attempts,
        "machine": {key: machine[key] for key in ("processor", "cores")},
        "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime(outcome.attempts[-1].end.get("time"))),
    }
