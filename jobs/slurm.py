"""The Slurm cluster: runs as batch jobs over submitit, one array per shape of resources.

All that is known of a job is its name, ``<sweep>.<token>``, and its place in the array, both written into job.json
before sbatch is called: whatever happens to this process then, a job can be found, and one that was replaced does
nothing (``requeue.py begin`` compares the token). What runs is named in the batch script; submitit's pickles carry a
function and the run's path, as it wants it, and nothing reads them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flip.exitcodes import ConfigError, FlipError
from flip.rundir import RunDir, read_json, write_json, write_text
from jobs import batch, ledger, scheduler
from jobs.cluster import Job, JobState
from jobs.profile import Profile
from jobs.scheduler import Row, Unanswered

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
BETWEEN = ("COMPLETING", "CONFIGURING")
"""A signal is refused then, or waited with."""
ENDED = (
    "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY",
    "REVOKED", "LAUNCH_FAILED",
)  # fmt: skip
"""Slurm's words for a job that is over; any that is in neither list occupies nodes."""


LIMIT = "its wall limit came before it had saved"


class SlurmCluster:
    """See ``jobs.cluster.Cluster``. Knows nothing but the files and Slurm: any number of them may exist."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    # -- submit ------------------------------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[Job]) -> None:
        """One sbatch per shape (and code): see ``arrays``. Raises ConfigError with sbatch's words where it refuses."""
        if not jobs:
            return
        with _answered():
            site = scheduler.cluster_name()
        for group in arrays(jobs, self.profile.array_size):
            self._submit_array(group, site)

    def _submit_array(self, jobs: Sequence[Job], site: str) -> None:
        sweep = jobs[0].run.path.parent
        folder = sweep / ".slurm" / secrets.token_hex(4)
        folder.mkdir(parents=True, mode=0o700)
        name = f"{sweep.name.lstrip('.')}.{folder.name}"
        write_text(folder / "runs", "".join(f"{job.run.path}\n" for job in jobs))
        for index, job in enumerate(jobs):
            job.run.cancel.unlink(missing_ok=True)  # why it was cancelled stays in the attempt's end
            write_json(job.run.path / "job.json", self._record(job, name, index, site))
        id_ = self._sbatch(jobs, folder, name)
        write_json(folder / "submitted.json", {"job": id_, "name": name, "runs": len(jobs)})

    def _record(self, job: Job, name: str, index: int, site: str) -> dict[str, Any]:
        return {
            "kind": "slurm",
            "cluster": self.profile.name,
            "site": site,
            "name": name,
            "token": name.rpartition(".")[2],
            "index": index,
            "python": self.profile.jobs_python,
            "module": job.module,
            "snapshot": str(Path(job.snapshot).absolute()),
            "world": job.shape.world,
            "env": dict(job.env),
            "after": job.run.newest_attempt(),
            "time": time.time(),
        }

    def _sbatch(self, jobs: Sequence[Job], folder: Path, name: str) -> str:
        """The number of the job or array."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = executor_of(self.profile, jobs[0], folder)
        executor.update_parameters(**batch.parameters(self.profile, jobs[0], folder, name))
        try:
            with only([*batch.PASSED, *self.profile.env]):
                submitted = executor.map_array(_named, [str(job.run.path) for job in jobs])
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            remedy = "Compare the profile with `python jobs/doctor.py`, and submit again."
            raise ConfigError("sbatch refused the job", self.profile.name, _last_words(error), remedy) from error
        return str(submitted[0].job_id).partition("_")[0]

    # -- states ------------------------------------------------------------------------------------------------------

    def states(self, runs: Sequence[RunDir]) -> dict[Path, JobState]:
        return states(runs)

    # -- hands -------------------------------------------------------------------------------------------------------

    def cancel(self, runs: Sequence[RunDir], again: Collection[Path] = ()) -> None:
        """Running ones save and stop, and their trap sees cancel.json; the others, and those of ``again``, are ended by
        a plain scancel. All are told before the first trouble is raised."""
        with _answered():
            rows = _rows(runs)
            far = _elsewhere([run for run in runs if run.path not in rows])
        troubles = [f"{path.name}: {why}" for path, why in far.items()]
        for run in runs:
            row = rows.get(run.path)
            if row is None or row.state in ENDED:
                continue
            if row.state in BETWEEN and run.path not in again:
                continue  # it ends already, and its trap or its next start sees cancel.json
            save = row.state not in WAITING and run.path not in again
            try:
                scheduler.call("scancel", *(["--signal=USR2"] if save else []), row.id)
            except Unanswered as error:
                troubles.append(f"{run.name}: {error}")
        if troubles:
            remedy = "cancel.json is written and keeps it from starting again; cancel again where Slurm can be asked."
            raise FlipError("not told to stop", value="; ".join(troubles), remedy=remedy)

    def requeue(self, run: RunDir) -> None:
        with _answered():
            row = _rows([run]).get(run.path)
            if row is not None and row.state == "RUNNING":
                scheduler.call("scancel", "--signal=USR2", row.id)


def arrays(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """Jobs of one shape, code and environment, in their order, at most ``size`` together."""
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        key = (job.shape, str(job.snapshot), job.module, *sorted(job.env.items()))
        groups.setdefault(key, []).append(job)
    for members in groups.values():
        yield from (members[i : i + size] for i in range(0, len(members), size))


def executor_of(profile: Profile, job: Job, folder: Path) -> Any:
    """submitit's Slurm executor, whose command is ours."""
    from submitit import SlurmExecutor

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # whether Slurm is here is preflight's matter; a dry run shows the script anywhere

        @property
        def _submitit_command_str(self) -> str:
            return batch.command(profile, job)

    return Executor(folder)


def _named(path: str) -> str:
    """What submitit packs: a function and a path. Nothing unpacks it."""
    return path


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except Unanswered as error:
        remedy = "Run it where Slurm's commands work, and when its controller answers."
        raise FlipError("Slurm did not do what it was asked", value=str(error), remedy=remedy) from error


@contextlib.contextmanager
def only(names: Sequence[str]) -> Iterator[None]:
    """Within, the environment of this process, which submitit's sbatch inherits, holds these names alone.

    ``--export=NAMES`` would do it too, but makes Slurm load the user's login environment on the node.
    """
    before = dict(os.environ)
    try:
        for name in before.keys() - set(names):
            del os.environ[name]
        yield
    finally:
        os.environ.update(before)


def _last_words(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


# -- where runs stand --------------------------------------------------------------------------------------------------


def states(runs: Sequence[RunDir]) -> dict[Path, JobState]:
    """Path of a run -> state, by its files and one call of squeue. What Slurm does not say is ``unknown``."""
    rows: dict[Path, Row] = {}
    silence: dict[Path, str] = {}
    try:
        rows = _rows(runs)
        silence = _elsewhere([run for run in runs if run.path not in rows])
    except Unanswered as error:
        silence = {run.path: f"Slurm does not answer: {error}" for run in runs}
    found = {}
    for run in runs:
        try:
            found[run.path] = _state(run, rows.get(run.path), silence.get(run.path, ""))
        except (ValueError, KeyError) as error:
            found[run.path] = JobState("unknown", run.newest_attempt(), f"a file of it is damaged: {error}")
    return found


def _rows(runs: Iterable[RunDir]) -> dict[Path, Row]:
    """Path of a run -> its row in the queue, where there is one. Raises Unanswered."""
    places = {}
    for run in runs:
        try:
            job = read_json(run.path / "job.json") or {}
        except ValueError:
            continue
        if "name" in job:
            places[run.path] = (job["name"], job["index"])
    rows = scheduler.queue(name for name, _ in places.values())
    return {path: rows[place] for path, place in places.items() if place in rows}


def _elsewhere(absent: Sequence[RunDir]) -> dict[Path, str]:
    """Why the Slurm that answers here cannot speak for a run: it was submitted to another. Raises Unanswered."""
    found: dict[Path, str] = {}
    site = scheduler.cluster_name() if absent else ""
    for run in absent:
        with contextlib.suppress(ValueError):
            theirs = (read_json(run.path / "job.json") or {}).get("site", site)
            if theirs != site:
                found[run.path] = f"it was submitted to the Slurm cluster {theirs}; this is {site}"
    return found


def _state(run: RunDir, row: Row | None, silence: str) -> JobState:
    n, after, verdict = run.newest_attempt(), ledger.after(run), ledger.standing(run)
    reason = verdict["reason"] if verdict else ""
    if run.result.exists():
        return JobState("complete", n)
    if row is not None and row.state not in (*WAITING, *ENDED):
        return _occupying(run, row, n, n > after)
    stopped = verdict is not None and verdict["action"] == "stop"
    if row is None and silence and not stopped:
        return JobState("unknown", n, silence)
    if run.cancel.exists():
        return JobState("cancelled", n, ledger.cancelled_by(run))
    if row is not None and row.state in WAITING:
        return _waiting(run, row, n, reason, n > after)
    if verdict is not None and stopped:
        return JobState("cancelled" if verdict["cause"] == "cancelled" else "failed", n, reason)
    if row is not None and row.state == "CANCELLED":
        return JobState("cancelled", n, "cancelled in Slurm")
    gone = f"its job ended ({row.state})" if row else "its job is not in Slurm's queue any more"
    return JobState("stopped", n, "; ".join(filter(None, [reason, f"{gone}: submit again"])))


def _occupying(run: RunDir, row: Row, n: int, begun: bool) -> JobState:
    """On nodes: starting, running, or ending. ``begun``: attempt n belongs to the job in the queue."""
    begun = begun and not (run.attempt(n) / "end.json").exists()
    if run.cancel.exists():
        return JobState("running", n, f"{ledger.cancelled_by(run)}: it saves and stops")
    if row.state == "COMPLETING" or (begun and run.was_told(n)):
        return JobState("running", n, "told to stop" if begun else "ending")
    if row.state == "RUNNING":
        return JobState("running", n, "" if begun else "starting")
    return JobState("running", n, f"in Slurm: {row.state}")


def _waiting(run: RunDir, row: Row, n: int, reason: str, begun: bool) -> JobState:
    why = f"in Slurm: {row.reason}" if row.reason and row.reason != "None" else ""
    if "held" in row.reason.lower():
        why += f" (release it with `scontrol release {row.id}`)"
    if begun and not reason and not (run.attempt(n) / "end.json").exists():
        reason = LIMIT if run.met_limit(n) else "ended unseen: preempted, or its node failed"
    return JobState("waiting" if begun else "queued", n, "; ".join(filter(None, [reason, why])), row.start)
