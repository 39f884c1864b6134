"""The interface between the launcher and the work of its jobs.

- ``Workload``: what a job does, whatever it is. The launcher writes its files, runs its checks and starts its ranks.
- ``SweepRun``: the workload of a run of a sweep. It is also planned, compared with its directory, and continued.
- ``RequestedRun``: a run as its sweep file asks for it. ``workload_at`` makes a ``SweepRun`` of it.

The launcher knows no other property of a workload, and never asks which kind it has.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from flip.common.host import Host
from flip.common.plain_data import ConfigChange
from flip.runs.checks import Check
from flip.runs.rundir import RunDir
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job, JobResources
from jobs.common.terminal import TextTable
from jobs.planning.run_cost import Estimate
from jobs.planning.storage_checks import CheckpointNeed
from jobs.submitted_runs.resubmit import NO_COMMAND, SubmitCommand


@dataclass(frozen=True)
class Place:
    """Where the runs of a submission are, and on what they run."""

    folder: Path
    """RUNS_ROOT/<sweep>."""
    names: Sequence[str]
    """Of all runs of the sweep file."""
    profile: ClusterProfile
    node: Host
    """A node of the cluster."""
    changed: str = ""
    """What to do with changed runs: keep, extend, fork, restart, data; empty: refuse them."""
    dry: bool = False
    """Write no files, and accept data sets that do not exist yet."""
    resubmit_command: SubmitCommand = NO_COMMAND
    """The command that submits the sweep again."""

    def directories(self, name: str) -> list[Path]:
        """The directory of a run, and those of its forks, oldest first. They may not exist."""
        return [self.folder / each for each in (name, *self._forks.get(name, ()))]

    @cached_property
    def _forks(self) -> dict[str, list[str]]:
        return forks([path.name for path in self.folder.glob("*-v*")], self.names)


class RequestedRun(Protocol):
    """A run as its sweep file asks for it, with the options of the command line."""

    @property
    def name(self) -> str: ...

    @property
    def arm(self) -> str:
        """The name without the seed."""

    @property
    def cluster(self) -> str:
        """The cluster profile that the run names; empty: none."""

    @property
    def settings(self) -> str:
        """Equal texts: two runs do the same."""

    @property
    def programs(self) -> Sequence[Path]:
        """Files of the user that the run executes; they may not exist."""

    @property
    def differs(self) -> Mapping[str, Any]:
        """Its values of the settings that vary in the sweep."""

    def is_default(self, key: str) -> bool:
        """Whether a value at this key is a default, which neither the sweep file nor the command line sets."""

    def workload_at(self, place: Place) -> SweepRun:
        """The run with all its values. Raises FlipError if they do not fit each other or the place."""


class _RunOfFile(Protocol):
    """A run as the reader of its sweep file returns it."""

    @property
    def name(self) -> str: ...

    @property
    def arm(self) -> str: ...

    @property
    def differs(self) -> Mapping[str, Any]: ...


_Run = TypeVar("_Run", bound=_RunOfFile)


@dataclass(frozen=True)
class RunOfSweepFile(Generic[_Run]):
    """The members of ``RequestedRun`` that are the same for all kinds of work."""

    run: _Run
    file: Path
    """The sweep file."""

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def arm(self) -> str:
        return self.run.arm

    @property
    def differs(self) -> Mapping[str, Any]:
        return self.run.differs


class Workload(Protocol):
    """What a job does."""

    @property
    def kind(self) -> str:
        """Recorded in job.json: ``jobs.workloads.submitted`` has a row for it."""

    @property
    def rank_module(self) -> str:
        """Run by every rank as ``python -m MODULE RUN_DIR``."""

    @property
    def resources(self) -> JobResources: ...

    @property
    def env(self) -> Mapping[str, str]:
        """Added to the environment of ranks. It is stored in files, so it must not contain secrets."""

    @property
    def has_steps(self) -> bool:
        """Whether it logs steps, without which it is no canary."""

    @property
    def trackers(self) -> Sequence[str]:
        """Names of the trackers that follow it (``jobs.tracking``)."""

    def checks(self) -> Iterator[Check]:
        """The rows of all checks before it starts. Raises FlipError if it would fail."""

    def files(self) -> Mapping[str, str]:
        """Name -> text of the files of a new directory that say what to do."""

    def pin(self, run: RunDir) -> None:
        """Keep the checkpoints of other runs that it needs until ``run``, its directory, is over."""


class SweepRun(Workload, Protocol):
    """The work of a run of a sweep, resolved."""

    @property
    def name(self) -> str:
        """Of the run in its sweep file."""

    @property
    def cluster(self) -> str:
        """Name of the profile of its cluster."""

    @property
    def code(self) -> Mapping[str, bytes]:
        """Files of the user that its snapshot holds besides the toolkit: path -> content."""

    # -- the plan

    @property
    def estimate(self) -> Estimate: ...

    @property
    def is_nominal(self) -> bool:
        """Whether it is planned with data that do not exist yet."""

    @property
    def checkpoints(self) -> CheckpointPlace: ...

    @property
    def description(self) -> RunDescription: ...

    # -- comparison with its directory

    @property
    def identity(self) -> Mapping[str, Any]:
        """identity.json without the code: at least ``hash``, and ``config``, over which it is."""

    def matches(self, stored: Mapping[str, Any]) -> bool:
        """Whether a stored identity.json belongs to this run."""

    def changes_since(self, stored: Mapping[str, Any] | None) -> list[ConfigChange]:
        """The differences from a stored identity.json; empty if there is none or it cannot be compared."""

    def in_words(self, changes: Sequence[ConfigChange]) -> str:
        """Changes as one sentence."""

    def outdated(self, stored: Mapping[str, Any]) -> str:
        """Which results of a complete run would be others now, in words; empty: none."""

    @property
    def ignored_changes(self) -> Sequence[ConfigChange]:
        """Changes in the sweep file that ``--changed keep`` ignores."""

    # -- continuing

    def adopts(self, changes: Sequence[ConfigChange]) -> bool:
        """Whether a run can continue in its directory with these changes (``--changed data``)."""

    def adopt(self, run: RunDir, changes: Sequence[ConfigChange]) -> None:
        """Record that ``run`` continues with these changes after its newest checkpoint."""

    @property
    def extends(self) -> bool:
        """Whether it continues its changed run in a directory of its own (``--changed extend``)."""

    def why_not_extended(self, run: RunDir, changes: Sequence[ConfigChange]) -> str:
        """Why a new run cannot continue from the newest checkpoint of ``run`` with these changes; empty: it can."""

    def update(self, run: RunDir, older: bool) -> None:
        """Write the settings with which ``run`` continues. ``older``: it keeps the code of an earlier submission."""

    def missing_code(self, run: RunDir) -> Sequence[str]:
        """What the sweep file names, and the code of an earlier submission of ``run`` does not contain."""

    @property
    def lacks_checkpoint(self) -> bool:
        """Whether the checkpoint that it starts from does not exist yet. Only dry runs plan such a run."""

    @property
    def starts_from_checkpoint(self) -> bool:
        """Whether it starts from the checkpoint of another run."""

    def check_source(self) -> None:
        """Raise DataError if the checkpoint that it starts from is gone."""


class CheckpointPlace(CheckpointNeed, Protocol):
    """Where the checkpoints of a run go."""

    def take_over(self, run: RunDir) -> None:
        """Give ``run`` the remote folders of the checkpoints that it has inherited."""


@dataclass(frozen=True)
class RunDescription:
    """A run in a plan."""

    design: str
    """Equal texts: two runs differ only in their seed."""
    seed: int = 0
    page: Sequence[str | TextTable] = ()
    """What it does and costs, as lines and tables of a dry run."""
    differs: Mapping[str, Any] = field(default_factory=dict)
    """Its values of the settings that vary in the sweep."""
    against_base: Sequence[ConfigChange] = ()
    """Differences from what all runs of the sweep share."""
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()


def forks(existing: Collection[str], others: Collection[str]) -> dict[str, list[str]]:
    """Name of a run -> its forks among existing directories, oldest first; ``others`` are names of other runs."""
    by_name: dict[str, list[tuple[int, str]]] = {}
    for fork in existing:
        if fork not in others and (match := re.fullmatch(r"(.+)-v(\d+)", fork)):
            by_name.setdefault(match[1], []).append((int(match[2]), fork))
    return {name: [fork for _, fork in sorted(numbered)] for name, numbered in by_name.items()}


def job_of(workload: Workload, run: RunDir, snapshot: Path, **fields: Any) -> Job:
    """The job that does the work in ``run``. ``fields``: further ones of ``Job``."""
    return Job(
        run,
        snapshot,
        workload.resources,
        env=workload.env,
        kind=workload.kind,
        module=workload.rank_module,
        trackers=workload.trackers,
        has_steps=workload.has_steps,
        **fields,
    )
