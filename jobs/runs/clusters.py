"""The small protocol that both kinds of cluster keep (submit, states, cancel, requeue), and which one a run is on."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from flip.runs.errors import FlipError
from flip.runs.ownership import user_name
from flip.runs.rundir import RunDir, create_json, read_record
from jobs.common.cluster_profile import Profile
from jobs.common.filesystem import unwritable

STATES = ("queued", "running", "waiting", "complete", "failed", "cancelled", "stopped", "unknown")
"""``waiting``: between two attempts, starts again by itself. ``stopped``: nobody looks after it, submit again.
``failed``: for good. ``unknown``: the scheduler did not answer, or a file of the run is damaged."""


@dataclass(frozen=True)
class Shape:
    """The resources of one run; runs of one shape can share an array."""

    nodes: int = 1
    processes: int = 1
    """Ranks per node."""
    gpus: int = 0
    """Per node."""
    cpus: int = 1
    """CPU cores per process."""
    hours: float = 24.0
    """Wall limit of one attempt."""

    @property
    def world(self) -> int:
        """W, ranks."""
        return self.nodes * self.processes


@dataclass(frozen=True)
class Job:
    """One run to be started: its directory (complete, with config.yaml), its code, its resources."""

    run: RunDir
    snapshot: Path
    """The run's own code (flip/, jobs/): working directory and PYTHONPATH of its ranks; a run that goes on keeps it."""
    shape: Shape = Shape()
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of ranks; stands in files, so never a secret."""
    module: str = "jobs.worker"
    """Run by every rank as ``python -m MODULE RUN_DIR``."""
    canary: int = 0
    """Steps that it must pass before those start that wait for it (``jobs.host.canary``); 0: none waits for it."""
    cluster: str = ""
    """Name of the profile that it goes to; empty where there is one alone."""
    uncancels: bool = False
    """Whether its cancel.json goes: whoever submits knew of it. One that was written since is a cancel of this."""
    command: Sequence[str] = ()
    """What submits it again: a command of ours, from the repository, and its words."""
    waits_for: str = ""
    """Name of the run, of the same call, that must pass before this one starts."""
    hooks: Path | None = None
    """The code that is submitted now; None: ``snapshot``. See ``host_code``."""

    @property
    def host_code(self) -> Path:
        """The code of everything outside the ranks: batch script hooks, rank entry, supervisor.

        Not the run's own: the batch script and these files must agree on options, and the script is written today.
        """
        return Path(self.hooks or self.snapshot).absolute()


@dataclass(frozen=True)
class JobState:
    """Where a run stands. ``state`` is one of STATES; ``detail`` is a sentence for people."""

    state: str
    attempt: int = 0
    detail: str = ""
    starts: str = ""
    """When the scheduler expects to start it, in its own words; empty where it does not say."""


UNREADABLE = (OSError, ValueError, KeyError)
"""What a run's files raise that may not be read, are no JSON, or lack something: no matter of other runs."""


def unread(run: RunDir, error: Exception, damaged: str = "unknown") -> JobState:
    """The state of a run whose files raised one of UNREADABLE. ``damaged``: where it is what they hold."""
    try:
        n = run.newest_attempt()
    except OSError:
        n = 0
    if isinstance(error, OSError):
        return JobState("unknown", n, f"it cannot be read: {error.filename or run.path}: {error.strerror or error}")
    return JobState(damaged, n, f"a file of it is damaged: {error}")


def is_complete(run: RunDir) -> bool:
    """Whether result.json exists. A damaged one raises ValueError, which names it and the remedy."""
    try:
        return read_record(run.result) is not None
    except ValueError as error:
        remedy = "Delete it and submit again: the run resumes at its end and writes it anew"
        raise ValueError(f"{error}. {remedy}") from error


class Cluster(Protocol):
    """The hands. Jobs given to one call of ``submit`` belong to one sweep folder."""

    def submit(self, jobs: Sequence[Job]) -> None:
        """Start them, in this order as room allows. A failed or cancelled one begins a new allowance."""

    def states(self, runs: Sequence[RunDir]) -> dict[Path, JobState]:
        """Path of a run -> its state."""

    def cancel(self, runs: Sequence[RunDir], again: Collection[Path] = ()) -> None:
        """See to it that runs whose cancel.json is written end and stay ended. Returns at once.

        ``again``: paths of those that were told before; they are ended without waiting for a save."""

    def requeue(self, run: RunDir) -> None:
        """Let the running attempt save, stop and start again."""


def open_cluster(profile: Profile) -> Cluster:
    """The cluster of a profile."""
    if profile.kind == "slurm":
        from jobs.slurm.backend import SlurmCluster

        return SlurmCluster(profile)
    from jobs.local.backend import LocalCluster

    return LocalCluster(profile)


def kind_of(run: RunDir) -> str:
    """The kind of the cluster that the run was submitted to last; ``local`` where it never was."""
    return record_of(run).get("kind", "local")


def cluster_of(run: RunDir) -> str | None:
    """Name of the profile that the run was submitted with last; None where it never was, or nobody can read it."""
    return record_of(run).get("cluster")


def record_of(run: RunDir) -> dict[str, Any]:
    """job.json; empty where it was never submitted, or nobody can read it: what reads more of it says so."""
    try:
        return read_record(run.path / "job.json") or {}
    except UNREADABLE:
        return {}


def states(runs: Iterable[RunDir]) -> dict[Path, JobState]:
    """Path of a run -> its state, as the cluster says that it is on; one call of squeue for all on Slurm."""
    found: dict[Path, JobState] = {}
    for kind, group in _by_kind(runs).items():
        found |= open_cluster(Profile(kind=kind)).states(group)
    return found


def cancel(runs: Iterable[RunDir], again: Collection[Path] = ()) -> None:
    """``Cluster.cancel`` of the clusters that look after the runs. All are told before a trouble is raised."""
    troubles = []
    for kind, group in _by_kind(runs).items():
        try:
            open_cluster(Profile(kind=kind)).cancel(group, again)
        except FlipError as error:
            troubles.append(error)
    if troubles:
        raise troubles[0]


class Several:
    """Clusters by the names of their profiles: each job goes to its own. Only ``submit`` needs to know."""

    def __init__(self, profiles: Iterable[Profile]) -> None:
        self.profiles = {profile.name: profile for profile in profiles}

    def submit(self, jobs: Sequence[Job]) -> None:
        for name, profile in self.profiles.items():
            open_cluster(profile).submit([job for job in jobs if job.cluster == name])


def call_off(runs: Iterable[RunDir], why: str) -> None:
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


def interval(runs: Iterable[RunDir]) -> float:
    """Seconds between two looks at runs by somebody who waits: Slurm's controller is everybody's."""
    return 10.0 if any(kind_of(run) == "slurm" for run in runs) else 0.5


def _by_kind(runs: Iterable[RunDir]) -> dict[str, list[RunDir]]:
    groups: dict[str, list[RunDir]] = {}
    for run in runs:
        groups.setdefault(kind_of(run), []).append(run)
    return groups
