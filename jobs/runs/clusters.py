"""Submitted runs, whatever their backend: opens the backend of a run, asks for states, cancels.

A run's job.json names the kind of its backend; runs of several backends can be given to one call.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from flip.runs.errors import CAUSES, CRASH, FlipError
from flip.runs.ownership import user_name
from flip.runs.rundir import RunDir, create_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.filesystem import unwritable
from jobs.common.job import UNREADABLE, Backend, Job, JobState, record_of, unreadable_state
from jobs.host import attempts
from jobs.runs import resubmit

INTERRUPTED = 130
"""What a shell expects of a command that Ctrl-C ended: a script that waits for results must not go on."""

ENDED = ("complete", "failed", "cancelled", "stopped")


def open_backend(profile: ClusterProfile) -> Backend:
    """The backend of a profile."""
    if profile.kind == "slurm":
        from jobs.slurm.backend import SlurmBackend

        return SlurmBackend(profile)
    from jobs.local.backend import LocalBackend

    return LocalBackend(profile)


def kind_of(run: RunDir) -> str:
    """The kind of the backend that the run was submitted to last; ``local`` where it never was."""
    return record_of(run).get("kind", "local")


def cluster_of(run: RunDir) -> str | None:
    """Name of the profile that the run was submitted with last; None where it never was, or nobody can read it."""
    return record_of(run).get("cluster")


def states(runs: Iterable[RunDir]) -> dict[Path, JobState]:
    """Path of a run -> its state, from its backend; one call of squeue for all runs on Slurm."""
    runs, found = list(runs), dict[Path, JobState]()
    for kind, group in _by_kind(runs).items():
        found |= open_backend(ClusterProfile(kind=kind)).states(group)
    return {run.path: _with_command(run, found[run.path]) for run in runs}


def _with_command(run: RunDir, state: JobState) -> JobState:
    """The state with the command that submits the run again, if there is one."""
    if not state.resubmit:
        return state
    try:
        command = resubmit.command(run)[1]
    except UNREADABLE as error:
        return unreadable_state(run, error)
    return replace(state, detail=f"{state.detail}: {command}") if command else state


def cancel(runs: Iterable[RunDir], again: Collection[Path] = ()) -> None:
    """``Backend.cancel`` for runs of any backend. All backends are called before an error is raised."""
    troubles = []
    for kind, group in _by_kind(runs).items():
        try:
            open_backend(ClusterProfile(kind=kind)).cancel(group, again)
        except FlipError as error:
            troubles.append(error)
    if troubles:
        raise troubles[0]


class MultiBackend:
    """Backends by the names of their profiles: ``submit`` gives each job to its own."""

    def __init__(self, profiles: Iterable[ClusterProfile]) -> None:
        self.profiles = {profile.name: profile for profile in profiles}

    def submit(self, jobs: Sequence[Job]) -> None:
        for name, profile in self.profiles.items():
            open_backend(profile).submit([job for job in jobs if job.cluster == name])


def request_cancel(runs: Iterable[RunDir], why: str) -> None:
    """Write the runs' cancel.json and have them ended; those that were told before are not waited for.

    Each by itself: what could not be done for some is raised, as a FlipError, when all the others have been told.
    """
    runs, before = list(runs), []
    unwritten: dict[Path, OSError] = {}
    record = {"who": user_name(os.geteuid()), "why": why, "time": time.time()}
    for run in runs:
        try:
            if not create_json(run.cancel, record):
                before.append(run.path)
        except OSError as error:
            unwritten[run.path] = error
    untold = ""
    try:
        cancel(runs, [*before, *unwritten])  # without the file, one that saves and leaves would start again
    except FlipError as error:
        if not unwritten:
            raise
        untold = str(error)
    if unwritten:
        raise _uncancelled(unwritten, untold)


def _uncancelled(unwritten: Mapping[Path, OSError], untold: str) -> FlipError:
    """``untold``: what the clusters say besides."""
    first = next(iter(unwritten.values()))
    value = "; ".join(f"{path.name}: {error.strerror or error}" for path, error in unwritten.items())
    remedy = "The others are cancelled. Of these, jobs on Slurm were told to end at once, and those here go on: "
    remedy += f"mend it, and cancel again.{f' Besides: {untold}' if untold else ''}"
    return type(unwritable(first, ""))("cancel.json could not be written", value=value, remedy=remedy)


def exit_code_of(run: RunDir) -> int:
    """The exit code of a run that has failed: of its cause, or that of a crash where nobody can read one."""
    try:
        return CAUSES.get((attempts.last_end(run) or {}).get("cause", "")) or CRASH  # "complete", with a damaged result
    except UNREADABLE:  # its row says so
        return CRASH


def poll_interval(runs: Iterable[RunDir]) -> float:
    """Seconds between two looks at runs by somebody who waits: Slurm's controller is everybody's."""
    return 10.0 if any(kind_of(run) == "slurm" for run in runs) else 0.5


def _by_kind(runs: Iterable[RunDir]) -> dict[str, list[RunDir]]:
    groups: dict[str, list[RunDir]] = {}
    for run in runs:
        groups.setdefault(kind_of(run), []).append(run)
    return groups
