"""Gives each run of a sweep file its kind of work: the only place that chooses it."""

from collections.abc import Sequence
from pathlib import Path

from jobs.sweeps import command_file, sweep_file
from jobs.sweeps.sweep_file import Sweep
from jobs.workloads.command_request import CommandRequest
from jobs.workloads.training_request import TrainingRequest
from jobs.workloads.workload import RequestedRun


def requested_runs(
    path: Path,
    overrides: Sequence[str] = (),
    only: str | None = None,
    seeds: Sequence[int] | None = None,
    may_be_empty: bool = False,
) -> Sweep[RequestedRun]:
    """The runs of a sweep file, as ``jobs.sweeps.sweep_file.read_sweep``, each with the interface of its kind."""
    if command_file.is_command_file(path):
        commands = command_file.load(path, overrides, only, seeds, may_be_empty)
        return Sweep(**{**vars(commands), "runs": [CommandRequest(run, path) for run in commands.runs]})
    sweep = sweep_file.read_sweep(path, overrides, None, seeds, may_be_empty)
    runs: list[RequestedRun] = [TrainingRequest(run, path) for run in sweep.runs]
    runs += [CommandRequest(run, path) for run in command_file.beside(path, seeds)]
    names = [run.name for run in runs]
    command_file.refuse_repeated(names, path)
    return Sweep(**{**vars(sweep), "names": names, "runs": sweep_file.chosen(runs, only, may_be_empty, path)})
