"""What the job of a run directory does: it trains the run, or it evaluates another run or model.

``job_kind`` in job.json records it. (``kind`` there names the back end.) An evaluation job lies in the folder
``.evaluate`` of its subject's sweep, whose code and whose lock it uses.
"""

from pathlib import Path
from typing import Any, Mapping, Optional

from flip.runs.rundir import RunDir, read_lenient

TRAIN = "train"
EVALUATE = "evaluate"
KINDS = (TRAIN, EVALUATE)
EVALUATIONS = ".evaluate"
"""Folder of the evaluation jobs of a sweep."""
REQUEST = "task.json"
"""The configuration of an evaluation job, in place of the config.yaml of a run."""


def job_kind(run: RunDir, record: Optional[Mapping[str, Any]] = None) -> str:
    """TRAIN or EVALUATE. ``record``: the job.json of the run, if it has been read.

    A run directory without a readable record has the kind that its folder shows.
    """
    if record is None:
        record = read_lenient(run.path / "job.json")
    kind = record.get("job_kind")
    if kind in KINDS:
        return str(kind)
    if run.path.parent.name == EVALUATIONS:
        return EVALUATE
    return TRAIN


def is_evaluation(run: RunDir, record: Optional[Mapping[str, Any]] = None) -> bool:
    """Whether the job of a run directory is an evaluation. ``record``: as in ``job_kind``."""
    return job_kind(run, record) == EVALUATE


def sweep_folder(run: RunDir, kind: str) -> Path:
    """The folder of the sweep to which a run directory of this kind belongs."""
    folder = run.path.parent
    if kind == EVALUATE:
        return folder.parent
    return folder
