"""A run as a job: its resources, its states, and the interface of a backend, which submits jobs and knows their states.

``jobs.slurm.backend`` and ``jobs.local.backend`` implement the interface; ``jobs.runs.clusters`` chooses between them.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from flip.runs.rundir import RunDir, read_record

STATES = ("queued", "running", "waiting", "complete", "failed", "cancelled", "stopped", "unknown")
"""``waiting``: between two attempts, starts again by itself. ``stopped``: nobody looks after it, submit again.
``failed``: for good. ``unknown``: the scheduler did not answer, or a file of the run is damaged."""


@dataclass(frozen=True)
class JobResources:
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
    shape: JobResources = JobResources()
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

    def record(self, **fields: Any) -> dict[str, Any]:
        """The job.json of the run: what every backend writes, and ``fields`` of its own."""
        return {
            "module": self.module,
            "snapshot": str(Path(self.snapshot).absolute()),
            "hooks": str(self.host_code),
            "world": self.shape.world,
            "shape": asdict(self.shape),
            "env": dict(self.env),
            "waits_for": self.waits_for,
            "command": list(self.command),
            "after": self.run.newest_attempt(),
            "time": time.time(),
            **fields,
        }


@dataclass(frozen=True)
class JobState:
    """Where a run stands. ``state`` is one of STATES; ``detail`` is a sentence for people."""

    state: str
    attempt: int = 0
    detail: str = ""
    starts: str = ""
    """When the scheduler expects to start it, in its own words; empty where it does not say."""
    resubmit: bool = False
    """Whether ``detail`` ends in "submit again", to which ``jobs.runs.clusters.states`` adds the command."""


UNREADABLE = (OSError, ValueError, KeyError)
"""What a run's files raise that may not be read, are no JSON, or lack something: no matter of other runs."""


def unreadable_state(run: RunDir, error: Exception, damaged: str = "unknown") -> JobState:
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


def record_of(run: RunDir) -> dict[str, Any]:
    """job.json; empty if the run was never submitted or the file is unreadable."""
    return read_lenient(run.path / "job.json")


def read_lenient(path: Path) -> dict[str, Any]:
    """The JSON of a file; empty if it is absent or unreadable: the state of the run reports that."""
    try:
        return read_record(path) or {}
    except UNREADABLE:
        return {}


class Backend(Protocol):
    """Submits jobs, knows their states and ends them. The jobs of one ``submit`` call belong to one sweep folder."""

    def submit(self, jobs: Sequence[Job]) -> None:
        """Start them, in this order as room allows. A failed or cancelled one begins a new allowance."""

    def states(self, runs: Sequence[RunDir]) -> dict[Path, JobState]:
        """Path of a run -> its state."""

    def cancel(self, runs: Sequence[RunDir], again: Collection[Path] = ()) -> None:
        """See to it that runs whose cancel.json is written end and stay ended. Returns at once.

        ``again``: paths of those that were told before; they are ended without waiting for a save."""

    def requeue(self, run: RunDir) -> None:
        """Let the running attempt save, stop and start again."""
