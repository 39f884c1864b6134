"""Jobs: resources, and the interface of backends, which submit jobs and look at them.

``jobs.slurm.backend`` and ``jobs.local.backend`` implement the interface; ``jobs.backends`` has the table of them.
"""

import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from flip.runs.lifecycle import SchedulerView
from flip.runs.origin import original_folder
from flip.runs.rundir import RunDir, read_lenient
from flip.runs.side_jobs import sweep_folder


@dataclass(frozen=True)
class JobResources:
    """Resources of one run; runs with equal resources share an array."""

    nodes: int = 1
    processes: int = 1
    """Ranks per node."""
    gpus: int = 0
    """Per node."""
    cpus: int = 1
    """CPU cores per process."""
    hours: float = 24.0
    """Wall limit of one attempt."""
    least_nodes: int = 0
    """Fewest nodes, if they are a range; 0: no range."""
    spares: int = 0
    """Further nodes of the allocation, which wait to replace lost ones."""
    usable: tuple[int, ...] = ()
    """Numbers of nodes on which it can train, ascending; empty: ``nodes`` alone."""

    @property
    def allocation(self) -> str:
        """Nodes that are requested, as ``sbatch --nodes`` takes them."""
        most = self.nodes + self.spares
        if self.least_nodes:
            return f"{self.least_nodes}-{most}"
        return str(most)

    def shape(self) -> dict[str, Any]:
        """The request, as job.json has it. Fields of ranges and spare nodes are left out without these."""
        fields = {name: value for name, value in asdict(self).items() if name != "usable"}
        return {name: value for name, value in fields.items() if value or name not in ("least_nodes", "spares")}

    @property
    def world_size(self) -> int:
        """W, ranks."""
        return self.nodes * self.processes


@dataclass(frozen=True)
class Job:
    """One run or evaluation to start: its run directory, code and resources."""

    run: RunDir
    snapshot: Path
    """The run's own code (flip/, jobs/): working directory and PYTHONPATH of its ranks in all attempts."""
    resources: JobResources = JobResources()
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of ranks. It is stored in files, so it must not contain secrets."""
    kind: str = "train"
    """Of its work (``jobs.workloads``)."""
    module: str = "jobs.worker"
    """Run by every rank as ``python -m MODULE RUN_DIR``."""
    canary: int = 0
    """Steps to pass before the runs that wait for it start (``flip.runs.canary``); 0: no canary."""
    cluster: str = ""
    """Name of its cluster profile; empty if the call has only one."""
    uncancels: bool = False
    """Whether to delete an existing cancel.json. One that is written later cancels this job."""
    command: Sequence[str] = ()
    """Arguments of the command that submits it again; paths are relative to the repository."""
    command_folder: str = ""
    """The folder from which relative paths of the command's sweep file start; empty: it has none."""
    waits_for: str = ""
    """Name of the canary, in the same call, that must pass before this run starts."""
    has_steps: bool = True
    """Whether it logs steps, without which it is no canary."""
    trackers: Sequence[str] = ()
    """Names of the trackers that follow it (``jobs.tracking``)."""
    host_snapshot: Path | None = None
    """The current code; None: ``snapshot``. See ``host_code``."""
    exposed: Sequence[str] = ()
    """Folders above the run in which other users can rename what lies there, accepted because the run existed before
    they were checked (``flip.files.ownership.exposures``): its starts warn about these and refuse others."""

    @property
    def sweep(self) -> Path:
        """The folder of the sweep: its code and its locks are there."""
        return sweep_folder(self.run)

    @property
    def host_code(self) -> Path:
        """The code of everything outside the ranks: owner of a job, rank entry, supervisor.

        It is the current code, not the run's own, because the batch script must agree with it on options.
        """
        return Path(self.host_snapshot or self.snapshot).absolute()

    def execution(self) -> dict[str, Any]:
        """The part of job.json that says what is executed, and with what."""
        return {
            "module": self.module,
            "snapshot": str(Path(self.snapshot).absolute()),
            "shape": self.resources.shape(),
            "env": dict(self.env),
        }

    def record(self, **fields: Any) -> dict[str, Any]:
        """The job.json of the run: what every backend writes, and ``fields`` of its own."""
        return {
            "folder": os.path.abspath(self.run.path),
            "uid": os.geteuid(),
            "copy_of": original_folder(self.run, record_of(self.run)),
            "job_kind": self.kind,
            **self.execution(),
            "hooks": str(self.host_code),
            "world": self.resources.world_size,
            "usable": list(self.resources.usable) or [self.resources.nodes],
            "waits_for": self.waits_for,
            "trackers": list(self.trackers),
            "command": list(self.command),
            "command_folder": self.command_folder,
            "exposed": list(self.exposed),
            "after": self.run.newest_attempt(),
            "time": time.time(),
            **fields,
        }


def record_of(run: RunDir) -> dict[str, Any]:
    """job.json; empty if the run was never submitted or the file is unreadable."""
    return read_lenient(run.path / "job.json")


class Backend(Protocol):
    """Submits jobs, looks at them and ends them. The jobs of one ``submit`` call belong to one sweep folder."""

    def submit(self, jobs: Sequence[Job]) -> None:
        """Start jobs in this order as resources allow. Restarts of failed and cancelled runs are counted anew."""

    def seen(self, runs: Sequence[RunDir]) -> dict[Path, SchedulerView]:
        """Path of a run -> what the scheduler shows of its job. Never raises: if it cannot be read, it is UNKNOWN."""

    def cancel(self, runs: Sequence[RunDir], again: Collection[Path] = ()) -> None:
        """End runs with a cancel.json for good. Returns at once.

        ``again``: paths of runs that were cancelled before; they are killed without a save."""
