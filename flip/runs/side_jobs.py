"""Side jobs of a sweep: jobs that work on its runs and are not runs themselves, such as evaluations.

The directory of one lies in the folder ``.evaluate`` of the sweep, whose code and whose lock it uses. It is submitted
once: after a failure or a cancel it never continues. Standard library, Python >= 3.6.
"""

from pathlib import Path

from flip.runs.rundir import RunDir

SIDE_JOBS = ".evaluate"
"""Folder of the side jobs of a sweep."""
REQUEST = "task.json"
"""The configuration of a side job, in place of the config.yaml of a run."""


def is_side_job(run: RunDir) -> bool:
    """Whether a directory, by its place, is of a side job."""
    return run.path.parent.name == SIDE_JOBS


def sweep_folder(run: RunDir) -> Path:
    """The folder of the sweep to which a run directory, or that of a side job, belongs."""
    folder = run.path.parent
    if is_side_job(run):
        return folder.parent
    return folder
