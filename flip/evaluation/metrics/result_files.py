"""The store of scores, eval/ of a run: its files, their one form, and which of several scores of a name is shown.

A file has the scores of one writer at one position: of the training, or of one evaluation job. No file has two writers,
and a job that is started again finds its own. No torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flip.files.creation import run_folder
from flip.runs import formats, records
from flip.runs.errors import DataError
from flip.runs.formats import FormatError
from flip.runs.rundir import RunDir, read_record, sorted_glob, write_json

COLUMNS = {"zeroshot": ("",), "retrieval": ("-text", "-image"), "probe": ("-probe",), "association": ("",)}
"""Task -> suffixes that its results append to the name of the data set, one result per column of a table."""

PUBLISHED = "foreign"
"""The stage in records of a published model, which has none."""


@dataclass(frozen=True)
class ScoreRecord:
    """The scores of one writer at one position."""

    stage: str
    samples_seen: int
    scores: list[dict[str, Any]]
    """One per column; on disk ``evaluations``."""
    job: str = ""
    """The evaluation job; empty: the training."""
    seconds: float | None = None
    """Of training up to the position; None: unknown to the writer."""
    attempt: int | None = None
    """Of the training."""


def training_file(run: RunDir, stage: str, samples_seen: int) -> Path:
    """The scores of the training at a position."""
    return run.eval / f"{stage}-{samples_seen}.json"


def folder_of(run: RunDir, stage: str, samples_seen: int) -> Path:
    """The folder with the scores of jobs at a position, and with predictions."""
    return run.eval / f"{stage}-{samples_seen}"


def write_scores(run: RunDir, point: ScoreRecord) -> Path:
    """Write a file of scores; replaces an older one of this writer and position."""
    run_folder(run.eval)
    record = {"stage": point.stage, "samples": point.samples_seen, "evaluations": point.scores}
    if point.job:
        path = _job_file(run, point.stage, point.samples_seen, point.job)
        run_folder(path.parent)
        record |= {"job": point.job}
    else:
        path = training_file(run, point.stage, point.samples_seen)
        record |= {"seconds": point.seconds, "attempt": point.attempt}
    write_json(path, record)
    return path


def write_result(subject: RunDir, result: Mapping[str, Any], checkpoint: Mapping[str, Any], job: str) -> Path:
    """Add a score to the file of a job, in place of its older one of that name."""
    stage = checkpoint["stage"]
    samples_seen = checkpoint["samples"]
    run_folder(subject.eval)  # closed to others before anything in it is read
    run_folder(folder_of(subject, stage, samples_seen))
    score = {
        **result,
        "stage": stage,
        "samples": samples_seen,
        "commit": dict(checkpoint),
        "job": job,
        "time": time.time(),
    }
    before = scores_of_job(subject, stage, samples_seen, job)
    others = [each for each in before if each["name"] != result["name"]]
    return write_scores(subject, ScoreRecord(stage, samples_seen, [*others, score], job))


def scores_of_job(subject: RunDir, stage: str, samples_seen: int, job: str) -> list[dict[str, Any]]:
    """What a job has stored at a position. A damaged file counts as none: the job computes the scores again."""
    path = _job_file(subject, stage, samples_seen, job)
    try:
        return read_score_file(path).scores
    except (FileNotFoundError, ValueError):
        return []


def _job_file(run: RunDir, stage: str, samples_seen: int, job: str) -> Path:
    return folder_of(run, stage, samples_seen) / f"{job}.json"


def read_scores(
    run: RunDir,
    read: Callable[[Path, Callable[[Path], ScoreRecord]], ScoreRecord | None] | None = None,
    at: tuple[str, int] | None = None,
) -> list[ScoreRecord]:
    """All scores of a run, those of its training first.

    Args:
        read: calls the function with the path, and returns None if the file is damaged; by default DataError is raised.
        at: (stage, S) of the only position that is wanted.
    """
    if at is None:
        paths = [*sorted_glob(run.eval, "*.json"), *sorted_glob(run.eval, "*-*/*.json")]
    else:
        own = training_file(run, *at)
        paths = [own] if own.exists() else []
        paths += sorted_glob(folder_of(run, *at), "*.json")
    points = [(read or _read_or_raise)(path, read_score_file) for path in paths]
    return [point for point in points if point is not None]


def read_score_file(path: Path) -> ScoreRecord:
    """One file of scores. Raises OSError, or ValueError with the path if it is damaged or another version wrote it."""
    point = read_record(path, records.SCORE_FILE, records.SCORE_FILE_LIMIT)
    if point is None:
        raise FileNotFoundError(path)
    if "evaluations" not in point:
        raise formats.missing("evaluations", path, "Score the run again: flip evaluate.")
    return ScoreRecord(
        point["stage"],
        point["samples"],
        point["evaluations"],
        point.get("job", ""),
        point.get("seconds"),
        point.get("attempt"),
    )


def of_result(result: Mapping[str, Any]) -> ScoreRecord:
    """The last scores of a complete run by its result.json, for a run directory without their file."""
    return ScoreRecord(result.get("stage", ""), result.get("samples", 0), list(result.get("evaluations", ())))


def _read_or_raise(path: Path, read: Callable[[Path], ScoreRecord]) -> ScoreRecord:
    try:
        return read(path)
    except FormatError:
        raise
    except ValueError as error:
        raise DataError("a record is damaged", path, str(error)) from error


# -- which score is shown ---------------------------------------------------------------------------------------------


def shown(points: Iterable[ScoreRecord]) -> list[dict[str, Any]]:
    """The scores to show of one position, one for each name: those of the training, then the others by name.

    The training's own score of a name is shown, unless a job scored the same data in fp32 and the training did not. Of
    several jobs the newest score is shown.
    """
    own = dict[str, dict[str, Any]]()
    later = dict[str, dict[str, Any]]()
    for point in points:
        for score in point.scores:
            name = score["name"]
            if not point.job:
                own[name] = score
            elif name not in later or score.get("time", 0) >= later[name].get("time", 0):
                later[name] = score
    scores = []
    for name, score in own.items():
        other = later.pop(name, None)
        if other is not None and _is_better(other, score):
            score = {**score, **other}
        scores.append(dict(score))
    return scores + [dict(later[name]) for name in sorted(later)]


def is_shown(subject: RunDir, result: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> bool:
    """Whether this new score of a job is shown, or one with equal predictions: the predictions that are stored are
    those of the score that is shown."""
    name = result["name"]
    try:
        own = read_score_file(training_file(subject, checkpoint["stage"], checkpoint["samples"]))
    except (FileNotFoundError, ValueError):  # absent, or damaged: it has no score to show
        return True
    scores = [score for score in own.scores if score["name"] == name]
    new = ScoreRecord(own.stage, own.samples_seen, [dict(result)], "new")
    (score,) = shown([ScoreRecord(own.stage, own.samples_seen, scores), new])
    return bool(score.get("predictions") == result["predictions"])


def _is_better(other: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether the score of a job replaces the training's own: only in fp32 it is that of the exported weights."""
    same_data = own.get("data") == other.get("data")
    return same_data and other.get("precision") == "fp32" and precision(own) != "fp32"


# -- names ------------------------------------------------------------------------------------------------------------


def precision(result: Mapping[str, Any]) -> str:
    """fp32 or bf16."""
    return str(result["precision"])


def is_of_published_model(result: Mapping[str, Any]) -> bool:
    """Whether it is the score of a published model, which has no stages."""
    return bool(result.get("stage") == PUBLISHED)


def curve(name: str) -> str:
    """The TensorBoard tag of the result ``name``."""
    return f"scores/{name}_top1"


def suffix(mask: str, ensemble: bool) -> str:
    """The suffix of a result with this mask."""
    if float(mask) == 0:
        return ""
    return f"-{'ensemble' if ensemble else 'mask'}{mask}"
