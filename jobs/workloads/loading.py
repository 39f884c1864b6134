"""Finds out what a sweep file asks for: the only place that knows all kinds of sweep files."""

from collections.abc import Sequence
from pathlib import Path

from jobs.sweeps import sweep_file
from jobs.sweeps.sweep_file import Sweep
from jobs.workloads.training_request import TrainingRequest
from jobs.workloads.workload import RequestedRun


def requested_runs(
    path: Path,
    overrides: Sequence[str] = (),
    only: str | None = None,
    seeds: Sequence[int] | None = None,
    none: bool = False,
) -> Sweep[RequestedRun]:
    """The runs of a sweep file, as ``jobs.sweeps.sweep_file.read_sweep``, each with the interface of its kind."""
    sweep = sweep_file.read_sweep(path, overrides, only, seeds, none)
    return Sweep(**{**vars(sweep), "runs": [TrainingRequest(run, path) for run in sweep.runs]})
