"""What an evaluation is asked to do, as it stands in its job's ``task.json``, and where its results go. No torch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flip.runs.errors import ConfigError, DataError
from flip.runs.rundir import RunDir, load_record, write_json

FILE = "task.json"
CONFIGURED = "run"
"""In the place of a set's path: it is one of the run's own evaluate.sets."""

COLUMNS = {"zeroshot": ("",), "retrieval": ("-text", "-image"), "probe": ("-probe",)}
"""Kind of task -> what its results are called after the data set, one result per column of a table."""


UNKNOWN_PRECISION = "as trained"
"""Precision of results without the field: scores in training were then computed in ``compute.precision``."""


def precision(result: Mapping[str, Any]) -> str:
    """fp32 or bf16 as the result says, else what is known of an older one."""
    return str(result.get("precision") or ("unknown" if result.get("stage") == "foreign" else UNKNOWN_PRECISION))


def merge_results(own: Iterable[Mapping[str, Any]], later: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Scores of a run at one commit, then those of evaluation jobs under other names.

    A job's fp32 score replaces the run's own score of the same name and data in another precision.
    """
    jobs = {one["name"]: dict(one) for one in later}
    merged = []
    for one in own:
        other = jobs.pop(one["name"], {})
        better = precision(one) != "fp32" == other.get("precision") and one.get("data") == other.get("data")
        merged.append({**one, **other} if better else dict(one))
    return merged + list(jobs.values())


def curve(name: str, task: str) -> str:
    """The tag in TensorBoard of the result called ``name``."""
    return f"{task}/{name}_top1"


@dataclass(frozen=True)
class Task:
    subject: str
    """The run directory whose commits are scored and whose eval/ gets the results; for a foreign model, one made."""
    model: str = ""
    """``open_clip:FOLDER``; empty: the run's own commits."""
    commits: tuple[str, ...] = ()
    """STAGE/S-n each; empty: the newest when the job starts."""
    sets: tuple[Mapping[str, str], ...] = ()
    """``flip.evaluation.datasets.Wanted`` as plain values."""
    data: str = ""
    """The data root."""
    views: tuple[tuple[str, bool], ...] = (("0", False),)
    """(mask, ensemble) each: ways to look at an image."""
    batch: int = 256
    cost: float = 0.0
    """Of a probe; 0: chosen on held-out training images."""
    cache: str = ""
    """Folder of kept features; empty: none are kept."""
    url: str = ""
    """Addresses of checkpoint files below it are followed even if another user wrote the record that names them."""

    @classmethod
    def read(cls, job: RunDir) -> Task:
        found = load_record(job.path / FILE)
        if not found:
            raise ConfigError("there is no evaluation here: task.json is missing", job.path)
        try:
            lists = {"commits": tuple(found["commits"]), "sets": tuple(found["sets"])}
            return cls(**{**found, **lists, "views": tuple((mask, bool(every)) for mask, every in found["views"])})
        except (KeyError, TypeError, ValueError) as error:
            raise DataError("this is no evaluation's task", job.path / FILE, str(error)) from error

    def write(self, job: RunDir) -> None:
        write_json(job.path / FILE, dataclasses.asdict(self))


def suffix(mask: str, ensemble: bool) -> str:
    """What a view adds to a data set's name."""
    return "" if float(mask) == 0 else f"-{'ensemble' if ensemble else 'mask'}{mask}"


def keep_result(subject: RunDir, result: Mapping[str, Any], commit: Mapping[str, Any], job: str) -> Path:
    """eval/<stage>-<S>/<name>.json: one result, in the place of an older one of its name."""
    folder = subject.eval / f"{commit['stage']}-{commit['samples']}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['name']}.json"
    about = {"stage": commit["stage"], "samples": commit["samples"], "commit": dict(commit)}
    write_json(path, {**result, **about, "job": job, "time": time.time()})
    return path
