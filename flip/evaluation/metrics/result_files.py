"""The files of results below eval/ of a run, their names, and which of two results of a name is shown. No torch."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flip.runs.files import run_folder
from flip.runs.rundir import RunDir, write_json

COLUMNS = {"zeroshot": ("",), "retrieval": ("-text", "-image"), "probe": ("-probe",), "association": ("",)}
"""Task -> suffixes that its results append to the name of the data set, one result per column of a table."""

UNKNOWN_PRECISION = "as trained"
"""Precision of results without the field, whose scores were computed in ``compute.precision``."""


def precision(result: Mapping[str, Any]) -> str:
    """fp32 or bf16; for results of older versions UNKNOWN_PRECISION or ``unknown``."""
    return str(result.get("precision") or ("unknown" if result.get("stage") == "foreign" else UNKNOWN_PRECISION))


def merge_results(own: Iterable[Mapping[str, Any]], later: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Scores of a run at one commit, then the scores of evaluation jobs (``later``) under other names.

    A job's fp32 score replaces the run's own score of the same name and data in another precision.
    """
    jobs = {score["name"]: dict(score) for score in later}
    merged = []
    for score in own:
        other = jobs.pop(score["name"], {})
        better = precision(score) != "fp32" == other.get("precision") and score.get("data") == other.get("data")
        merged.append({**score, **other} if better else dict(score))
    return merged + list(jobs.values())


def curve(name: str, task: str) -> str:
    """The TensorBoard tag of the result ``name``."""
    return f"{task}/{name}_top1"


def suffix(mask: str, ensemble: bool) -> str:
    """The suffix of a result with this mask."""
    if float(mask) == 0:
        return ""
    return f"-{'ensemble' if ensemble else 'mask'}{mask}"


def write_result(subject: RunDir, result: Mapping[str, Any], commit: Mapping[str, Any], job: str) -> Path:
    """Write eval/<stage>-<S>/<name>.json; replaces an older result of this name."""
    folder = subject.eval / f"{commit['stage']}-{commit['samples']}"
    run_folder(subject.eval)
    run_folder(folder)
    path = folder / f"{result['name']}.json"
    about = {"stage": commit["stage"], "samples": commit["samples"], "commit": dict(commit)}
    write_json(path, {**result, **about, "job": job, "time": time.time()})
    return path
