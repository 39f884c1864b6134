"""Results of a study: a file per complete run, the learning rates that were chosen, and the runs that are missing.

The files are committed in docs/NAME/results, so that another machine continues with what is missing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from flip.runs.errors import ConfigError
from flip.runs.rundir import read_json
from lab.studies.engine.design import VALIDATION, Entry, Peaks, StudyDesign, StudyRun

Record = Mapping[str, Any]
"""The file of a complete run (``training.record``)."""
FIXED = ("seed", "stages.", "init.samples", "data.manifest", "model.", "optim.")
"""Settings, or beginnings of settings, that must agree between a run and its design."""


@dataclass
class Results:
    """The results so far. ``records``: name of a run -> its file. ``choices``: learning rates chosen before, which take
    precedence over trials: if two trials are almost equal, another machine would choose differently."""

    study: StudyDesign
    folder: Path
    calibration: Mapping[str, Any]
    records: dict[str, Record]
    choices: Peaks
    prediction: Record | None
    baseline: Record | None = None
    """baseline.json: the nearest training picture in place of a model."""

    @cached_property
    def times(self) -> dict[str, float]:
        """Kind of work -> core-seconds per sample."""
        return {work: float(facts["seconds"]) for work, facts in self.calibration["work"].items()}

    @cached_property
    def runs(self) -> list[StudyRun]:
        """All runs of the study, in order of importance."""
        return list(self.study.runs())

    @cached_property
    def trials(self) -> dict[str, dict[float, float]]:
        """``rates`` -> peak -> accuracy of its trial on the validation set."""
        scores: dict[str, dict[float, float]] = {rates: {} for rates in self.study.peaks()}
        for run in self.runs:
            if run.kind == "trial" and run.name in self.records:
                scores[run.rates][run.peak] = score(self.records[run.name], VALIDATION)
        return scores

    @cached_property
    def losses(self) -> dict[str, dict[float, float]]:
        """``rates`` -> peak -> contrastive loss of its trial on the validation set, of trials that have it."""
        losses: dict[str, dict[float, float]] = {rates: {} for rates in self.study.peaks()}
        for run in self.runs:
            if run.kind == "trial" and run.name in self.records:
                for item in self.records[run.name]["evaluations"]:
                    if item["name"] == VALIDATION and item.get("loss") is not None:
                        losses[run.rates][run.peak] = float(item["loss"])
        return losses

    def best(self, rates: str) -> float | None:
        """The peak of the best trial, the smallest of equals; None until all trials are complete.

        Best is the smallest loss over all validation pictures. Trials of earlier versions have no loss: the highest
        accuracy, which few right pictures decide.
        """
        return self._best_of(rates, self.tried(rates))

    def tried(self, rates: str) -> list[float]:
        """The peaks of the range, ascending. While the best is at an edge, the next further peak belongs to it, too.

        Not if trials of earlier versions were compared by accuracy, whose noise moves the best to an edge.
        """
        every = sorted(self.study.peaks()[rates])
        tried = [peak for peak in every if peak not in self.study.further]
        while not self.trials[rates] or self.losses[rates]:
            best = self._best_of(rates, tried)
            if best is None:
                return tried
            place = every.index(best)
            added = set(every[max(0, place - 1) : place + 2]) - set(tried)
            if not added:
                return tried
            tried = sorted({*tried, *added})
        return tried

    def _best_of(self, rates: str, tried: Sequence[float]) -> float | None:
        if len(tried) == 1:
            return tried[0]
        scores = self.trials[rates]
        losses = self.losses[rates]
        if not all(peak in scores for peak in tried):
            return None
        if all(peak in losses for peak in tried):
            return min(tried, key=lambda peak: (losses[peak], peak))
        return max(tried, key=lambda peak: (scores[peak], -peak))

    def pixels(self, name: str, train: str = "train", method: str = "nearest") -> float | None:
        """Top-1 of a baseline (``baseline.py``) on a set, by the comparison that is better on the validation set; None
        if it was not computed."""
        every = (self.baseline or {}).get("sets", ())
        rows = [row for row in every if row["train"] == train and row.get("method", "nearest") == method]
        tried = {row["by"]: row["top1"] for row in rows if row["set"] == VALIDATION}
        if not tried:
            return None
        best = max(tried, key=lambda by: tried[by])
        return next((float(row["top1"]) for row in rows if (row["set"], row["by"]) == (name, best)), None)

    @cached_property
    def peaks(self) -> dict[str, float]:
        """``rates`` -> its peak learning rate, as far as it is known."""
        known = {}
        for rates in self.study.peaks():
            peak = self.choices.get(rates) or self.best(rates)
            if peak is not None:
                known[rates] = peak
        return known

    def asked(self, run: StudyRun) -> bool | None:
        """Whether a run belongs to the study; None: not known yet."""
        if run.kind != "trial" or run.peak in self.tried(run.rates):
            return True
        if self.best(run.rates) is None:
            return None
        return False

    def missing(self) -> list[StudyRun]:
        """Runs without a result, in order, and those from whose checkpoints they start."""
        asked = [run for run in self.runs if self.asked(run) is not False]
        left = [run for run in asked if run.name not in self.records and run.kind != "trunk"]
        needed = set[str]()
        while left:
            run = left.pop()
            needed.add(run.name)
            source = self._source(run)
            if source and source.name not in needed:
                left.append(source)
        return [run for run in asked if run.name in needed]

    def ready(self, local: Collection[str]) -> list[StudyRun]:
        """The missing runs that can start. ``local``: names of complete runs whose directories are here.

        A run whose result was committed is trained again if its checkpoint is needed and its directory is elsewhere.
        """
        return [run for run in self.missing() if run.name not in local and self._can_start(run, local)]

    def check(self) -> None:
        """Raise ConfigError if a result is of another design."""
        for run in self.runs:
            if run.name in self.records and self._is_known(run):
                entry = self.study.entry(run, self.times, self.peaks)
                if not agree(self.records[run.name]["settings"], entry):
                    remedy = "Restore calibration.json and the trials, or move the results away to start another study."
                    path = str(results_folder(self.folder) / f"{run.name}.json")
                    raise ConfigError("the result is of a run with other settings", path, remedy=remedy)

    def _can_start(self, run: StudyRun, local: Collection[str]) -> bool:
        if not (self.asked(run) and self._is_known(run)):
            return False
        source = self._source(run)
        return source is None or source.name in local

    def _is_known(self, run: StudyRun) -> bool:
        """Whether the learning rates on which the settings of a run depend are chosen."""
        return all(rates in self.peaks for rates in self.study.needs(run))

    def _source(self, run: StudyRun) -> StudyRun | None:
        if not self._is_known(run):
            return None
        return self.study.source(run, self.peaks)


def results_folder(folder: Path) -> Path:
    return folder / "results"


def read_calibration(study: StudyDesign, path: Path) -> dict[str, Any]:
    """Read the measured step times. Raises ConfigError if they are missing, damaged or lack a kind of work."""
    remedy = "Measure on a quiet machine, with --calibrate."
    try:
        calibration = read_json(path)
    except ValueError as error:
        raise ConfigError("the calibration cannot be read", str(path), str(error), remedy) from error
    if calibration is None:
        raise ConfigError("there is no calibration", str(path), remedy=remedy)
    for work in study.calibration():
        if work not in calibration.get("work", {}):
            raise ConfigError("the calibration lacks a kind of work", str(path), work, remedy)
    return dict(calibration)


def read_choices(study: StudyDesign, path: Path) -> dict[str, float]:
    """The learning rates that were chosen when the study was made; empty if the file does not exist.

    Raises ConfigError if it is damaged or does not match the study.
    """
    try:
        chosen = read_json(path) or {}
        if chosen and not all(chosen[rates] in tried for rates, tried in study.peaks().items()):
            raise ValueError("a learning rate that was not tried")
    except (ValueError, KeyError, TypeError) as error:
        remedy = "Restore it, or delete it to choose learning rates anew."
        raise ConfigError("the chosen learning rates cannot be read", str(path), str(error), remedy) from error
    return dict(chosen)


def score(record: Record, name: str = "") -> float:
    """Top-1 of a run on a set, 0..1; without a name the mean over the test sets that are scored zero-shot."""
    items = [item for item in record["evaluations"] if (item["name"] == name if name else is_zero_shot_test(item))]
    return fmean(float(item["top1"]) for item in items)


def scores(records: Mapping[int, Record], name: str) -> dict[int, float]:
    """Seed -> score on a set, of the records that have it."""
    return {seed: score(each, name) for seed, each in records.items() if has(each, name)}


def has(record: Record, name: str) -> bool:
    return any(item["name"] == name for item in record["evaluations"])


def is_zero_shot_test(item: Mapping[str, Any]) -> bool:
    return item["role"] == "test" and item["task"] == "zeroshot"


# -- settings ----------------------------------------------------------------------------------------------------------


def checked(entry: Entry) -> dict[str, Any]:
    """The settings of an entry that must agree, by their dotted keys. Of a manifest it is the last part of the path."""
    settings = {}
    for key, value in _flat(entry):
        if key.startswith(FIXED) and value is not None:
            settings[key] = value
    if "data.manifest" in settings:
        settings["data.manifest"] = manifest_name(settings["data.manifest"])
    return settings


def manifest_name(path: str) -> str:
    """The last part of the path: a run has the absolute one of its machine."""
    return str(path).rpartition("/")[2]


def agree(settings: Mapping[str, Any], entry: Entry) -> bool:
    """Whether a record's settings are those of the entry. A record has what the study of its time compared."""
    wanted = checked(entry)
    return all(settings[key] == value for key, value in wanted.items() if key in settings)


def _flat(value: Any, key: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [(key, value)]
    items = []
    for name, inner in value.items():
        items += _flat(inner, f"{key}.{name}" if key else name)
    return items
