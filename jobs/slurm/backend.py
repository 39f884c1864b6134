"""The Slurm backend: runs as batch jobs over submitit, one array per shape of resources.

All that is known of a job is its name, ``<sweep>.<token>``, and its place in the array, both written into job.json
before sbatch is called: whatever happens to this process then, a job can be found, and one that was replaced does
nothing (``batch_hooks.py begin`` compares the token). What runs is named in the batch script; submitit's pickles carry
a function and the run's path, as it wants it, and nothing reads them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flip.runs.errors import ConfigError, FlipError
from flip.runs.ownership import closed_folder
from flip.runs.rundir import RunDir, read_record, write_json, write_text
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job, JobState
from jobs.host import canary, slurm_cli
from jobs.host.slurm_cli import ENDED, TRANSITIONAL, WAITING, SlurmUnavailable
from jobs.slurm import batch_script, job_states
from jobs.slurm.job_states import ahead_of, elsewhere, rows_of

NOT_REQUEUED = (
    "requeue is disabled here (Requeue=0). After a preemption or the time limit a job submits its successor; "
    "a run that is killed before it can do so, or whose first node is lost, is stopped: submit it again"
)


class SlurmBackend:
    """See ``jobs.common.job.Backend``. Knows nothing but the files and Slurm: any number of them may exist."""

    def __init__(self, profile: ClusterProfile) -> None:
        self.profile = profile

    # -- submit ------------------------------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[Job]) -> None:
        """One sbatch per shape (and code): see ``arrays``. Raises ConfigError with sbatch's words where it refuses."""
        if not jobs:
            return
        with _answered():
            site = slurm_cli.cluster_name()
        _retire([job.run for job in jobs])
        held: dict[str, list[str]] = {}  # before their canaries: these must find them
        try:
            for group in arrays((job for job in jobs if job.waits_for), self.profile.array_size):
                held.setdefault(group[0].waits_for, []).append(name := _new_name(group))
                self._submit_array(group, name, site)
            for group in arrays((job for job in jobs if not job.waits_for), self.profile.array_size):
                self._submit_array(group, _new_name(group), site, held)
                for job in group:
                    held.pop(job.run.name, None)  # theirs is there
        except BaseException:  # Ctrl-C included: nothing would ever release a held job whose canary was not submitted
            with contextlib.suppress(SlurmUnavailable):
                canary.cancel_held_jobs([name for names in held.values() for name in names])
            raise

    def _submit_array(
        self, jobs: Sequence[Job], name: str, site: str, held: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        """``name``: of the jobs in Slurm. ``held``: canary -> names of the jobs that wait for it."""
        folder = jobs[0].run.path.parent / ".slurm" / name.rpartition(".")[2]
        closed_folder(folder.parent)
        folder.mkdir(mode=0o700)
        write_text(folder / "runs", "".join(f"{job.run.path}\n" for job in jobs))
        for index, job in enumerate(jobs):
            record = self._record(job, name, index, site)
            if job.canary:
                record["canary"] = {"steps": job.canary, "releases": (held or {}).get(job.run.name, [])}
            write_json(job.run.path / "job.json", record)
            if job.uncancels:
                job.run.cancel.unlink(missing_ok=True)  # why it was cancelled stays in the attempt's end
        id_ = self._sbatch(jobs, folder, name)
        requeue = requeued(id_)
        write_json(folder / "submitted.json", {"job": id_, "name": name, "runs": len(jobs), "requeue": requeue})
        if requeue is False:
            print(f"warning: job {id_}: {NOT_REQUEUED}", file=sys.stderr)

    def _record(self, job: Job, name: str, index: int, site: str) -> dict[str, Any]:
        return {
            "kind": "slurm",
            "cluster": self.profile.name,
            "site": site,
            "uid": os.geteuid(),
            "name": name,
            "token": name.rpartition(".")[2],
            "index": index,
            "python": self.profile.jobs_python,
            "module": job.module,
            "snapshot": str(Path(job.snapshot).absolute()),
            "hooks": str(job.host_code),
            "world": job.shape.world,
            "shape": asdict(job.shape),
            "env": dict(job.env),
            "waits_for": job.waits_for,
            "notify": self.profile.notify,
            "signal_seconds": self.profile.signal_seconds,
            "command": list(job.command),
            "after": job.run.newest_attempt(),
            "time": time.time(),
        }

    def _sbatch(self, jobs: Sequence[Job], folder: Path, name: str) -> str:
        """The number of the job or array."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = executor_of(self.profile, jobs[0], folder)
        executor.update_parameters(**batch_script.parameters(self.profile, jobs[0], folder, name))
        try:
            with batch_script.clean_environment([*batch_script.FORWARDED_ENV, *self.profile.env]):
                submitted = executor.map_array(_named, [str(job.run.path) for job in jobs])
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            remedy = (
                "Correct partition, account, qos or options of the profile (`python jobs/doctor.py`), submit again."
            )
            refusal = slurm_cli.failure_text("sbatch", str(error)) or type(error).__name__
            raise ConfigError("sbatch refused the job", self.profile.name, refusal, remedy) from error
        return str(submitted[0].job_id).partition("_")[0]

    # -- states ------------------------------------------------------------------------------------------------------

    def states(self, runs: Sequence[RunDir]) -> dict[Path, JobState]:
        return job_states.states(runs)

    # -- hands -------------------------------------------------------------------------------------------------------

    def cancel(self, runs: Sequence[RunDir], again: Collection[Path] = ()) -> None:
        """Running ones save and stop, and their trap sees cancel.json; the others, and those of ``again``, are ended by
        a plain scancel. All are told before the first trouble is raised."""
        with _answered():
            rows = rows_of(runs)
            far = elsewhere([run for run in runs if run.path not in rows])
        troubles = [f"{path.name}: {why}" for path, why in far.items()]
        for run in runs:
            row = rows.get(run.path)
            if row is None or row.state in ENDED:
                continue
            if row.state in TRANSITIONAL and run.path not in again:
                continue  # it ends already, and its trap or its next start sees cancel.json
            save = row.state not in WAITING and run.path not in again
            try:
                slurm_cli.call("scancel", *(["--signal=USR2"] if save else []), *_owned(run), row.id)
            except SlurmUnavailable as error:
                troubles.append(f"{run.name}: {error}")
        if troubles:
            remedy = "Where cancel.json is written nothing starts again; cancel again where Slurm can be asked."
            raise FlipError("not told to stop", value="; ".join(troubles), remedy=remedy)

    def requeue(self, run: RunDir) -> None:
        with _answered():
            row = rows_of([run]).get(run.path)
            if row is not None and row.state == "RUNNING":
                slurm_cli.call("scancel", "--signal=USR2", *_owned(run), row.id)


def _owned(run: RunDir) -> list[str]:
    """Words by which scancel signals a job only if it belongs to the owner of its record, which another user may have
    written with the name of a job of ours."""
    uid = os.stat(run.path / "job.json").st_uid
    return [] if uid == os.geteuid() else [f"--user={uid}"]


def requeued(id_: str) -> bool | None:
    """Whether Slurm requeues a job when it is asked to; None: not known. A plugin of the site may have changed it."""
    try:
        return {"1": True, "0": False}.get(
            slurm_cli.fields_of(slurm_cli.call("scontrol", "show", "job", id_)).get("Requeue", "")
        )
    except SlurmUnavailable:
        return None


def arrays(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """Jobs of one shape, code and environment, in their order, at most ``size`` together."""
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        code = str(job.snapshot), str(job.host_code)
        key = (job.shape, code, job.module, job.canary, job.waits_for, *sorted(job.env.items()))
        groups.setdefault(key, []).append(job)
    for members in groups.values():
        yield from (members[i : i + size] for i in range(0, len(members), size))


def _new_name(jobs: Sequence[Job]) -> str:
    """A name in Slurm for one submission of jobs of a sweep: SWEEP.TOKEN."""
    return f"{jobs[0].run.path.parent.name.lstrip('.')}.{secrets.token_hex(4)}"


def executor_of(profile: ClusterProfile, job: Job, folder: Path) -> Any:
    """submitit's Slurm executor, whose command is ours."""
    from submitit import SlurmExecutor

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # whether Slurm is here is preflight's matter; a dry run shows the script anywhere

        @property
        def _submitit_command_str(self) -> str:
            return batch_script.command(profile, job)

    return Executor(folder)


def _named(path: str) -> str:
    """What submitit packs: a function and a path. Nothing unpacks it."""
    return path


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except SlurmUnavailable as error:
        remedy = "Run it where Slurm's commands work, and when its controller answers."
        raise FlipError("Slurm did not do what it was asked", value=str(error), remedy=remedy) from error


def _retire(runs: Sequence[RunDir]) -> None:
    """Take what is held for a canary of an earlier submission from the queue. Let go later, it would do nothing."""
    with contextlib.suppress(SlurmUnavailable):
        records = [read_record(path / "job.json") or {} for path in ahead_of(runs)]
        canary.cancel_held_jobs([record["name"] for record in records if "name" in record])
