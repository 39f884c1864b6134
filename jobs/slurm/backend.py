"""The Slurm backend: runs as batch jobs, one array per group of equal resources.

A job is known by its name, ``<sweep>.<token>``, and its array index. Both are written to job.json before sbatch is
called, so a job can be found whatever happens to this process, and a job that was replaced does nothing
(``jobs/host/job.py`` compares the token).
"""

import contextlib
import os
import re
import secrets
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flip.files import deletion
from flip.files.creation import new_folder, run_folder
from flip.runs import canary, lifecycle, wall_limit
from flip.runs.errors import ConfigError, FlipError, StorageError
from flip.runs.rundir import RunDir, write_json, write_text
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.filesystem import unwritable
from jobs.common.job import Job
from jobs.common.text import plain
from jobs.host import held_jobs, slurm_cli
from jobs.host.slurm_cli import COMPLETING, ENDED, TRANSITIONAL, WAITING, SlurmUnavailable
from jobs.slurm import batch_script, job_states
from jobs.slurm.job_states import invisible_jobs, queue_rows

NOT_REQUEUED = (
    "requeue is disabled here (Requeue=0). After a preemption or the time limit a job submits its successor; "
    "a run that is killed before it can do so, or whose first node is lost, is stopped: submit it again"
)
CANCEL_NOTE = (
    "Runs with a cancel.json save and stop by themselves, or do not start; a second cancel kills them without a save."
)


SUBMIT_SECONDS = 300.0  # for sbatch: plugins of a site may work on an array for long
SUBMITTED = re.compile(r"job ([0-9]+)")  # in the answer of sbatch


class SlurmBackend:
    """See ``jobs.common.job.Backend``. Stateless: any number of instances may exist."""

    seen = staticmethod(job_states.seen)

    def __init__(self, profile: ClusterProfile) -> None:
        self.profile = profile

    def submit(self, jobs: Sequence[Job]) -> None:
        """Submit one array per group of ``group_into_arrays``. Raises ConfigError if sbatch refuses one; arrays that it
        accepted before stay, but for held jobs whose canary was not submitted."""
        if not jobs:
            return
        with _slurm_errors():
            site = slurm_cli.cluster_name()
        _cancel_superseded([job.run for job in jobs])
        held: dict[str, list[str]] = {}  # canary -> names of held jobs, which are submitted before it
        accepted = 0  # runs
        try:
            for group in group_into_arrays((job for job in jobs if job.waits_for), self.profile.array_size):
                held.setdefault(group[0].waits_for, []).append(name := _new_name(group))
                self._submit_array(group, name, site)
            for group in group_into_arrays((job for job in jobs if not job.waits_for), self.profile.array_size):
                self._submit_array(group, _new_name(group), site, held)
                names = {job.run.name for job in group}
                accepted += sum((job.waits_for or job.run.name) in names for job in jobs)
                for name in names:
                    held.pop(name, None)
        except BaseException as error:  # Ctrl-C included: nothing would release held jobs without their canary
            with contextlib.suppress(SlurmUnavailable):
                held_jobs.cancel([name for names in held.values() for name in names])
            problem: BaseException = error
            if isinstance(error, OSError):
                problem = unwritable(error, jobs[0].run.path.parent)
            if accepted and isinstance(problem, FlipError):
                what = f"{problem.what}; {accepted} of {len(jobs)} runs were submitted before and stay"
                raise type(problem)(what, problem.where, problem.value, problem.remedy) from error
            raise

    def _submit_array(
        self, jobs: Sequence[Job], name: str, site: str, held: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        folder = jobs[0].run.path.parent / ".slurm" / name.rpartition(".")[2]
        run_folder(folder.parent)
        new_folder(folder, 0o700)
        write_text(folder / "runs", "".join(f"{job.run.path}\n" for job in jobs))
        for index, job in enumerate(jobs):
            record = self._record(job, name, index, site)
            if job.canary:
                record["canary"] = {"steps": job.canary, "releases": (held or {}).get(job.run.name, [])}
            write_json(job.run.path / "job.json", record)
            if job.uncancels:
                deletion.delete_file(job.run.cancel, missing_ok=True)  # why it was cancelled stays in the attempt's end
        id_ = self._sbatch(jobs, folder, name)
        requeue, limit = granted(id_)
        record = {"job": id_, "name": name, "runs": len(jobs), "requeue": requeue, "limit": limit}
        write_json(folder / "submitted.json", record)
        if requeue is False:
            print(f"warning: job {id_}: {NOT_REQUEUED}", file=sys.stderr)
        asked = 60 * batch_script.minutes(jobs[0].resources.hours)
        if limit is not None and limit < asked:
            given = wall_limit.format_seconds(limit)
            what = f"the site has cut its wall limit to {given}; asked for {wall_limit.format_seconds(asked)}"
            print(f"warning: job {id_}: {what}", file=sys.stderr)

    def _record(self, job: Job, name: str, index: int, site: str) -> dict[str, Any]:
        return job.record(
            kind="slurm",
            cluster=self.profile.name,
            site=site,
            name=name,
            token=name.rpartition(".")[2],
            index=index,
            python=self.profile.jobs_python,
            notify=self.profile.notify,
            exclude=self.profile.options.get("exclude", ""),
            signal_seconds=self.profile.signal_seconds,
        )

    def _sbatch(self, jobs: Sequence[Job], folder: Path, name: str) -> str:
        """Write the batch script and submit it; returns the number of the job or array."""
        script = folder / "batch_script.sh"
        try:
            write_text(script, batch_script.script_text(self.profile, jobs, folder, name))
        except OSError as error:
            raise unwritable(error, folder) from error
        messages: list[str] = []
        try:
            with batch_script.clean_environment([*batch_script.FORWARDED_ENV, *self.profile.env]):
                environment = dict(os.environ)
            answer = slurm_cli.call("sbatch", str(script), deadline=SUBMIT_SECONDS, env=environment, messages=messages)
        except SlurmUnavailable as error:
            refusal = str(error).removeprefix("sbatch: ")
            if slurm_cli.NO_ANSWER.search(refusal):
                remedy = "Submit again when the controller answers: a job that was accepted is found by its name."
                raise StorageError("Slurm does not answer", self.profile.name, refusal, remedy) from error
            remedy = "Correct partition, account, qos or options of the profile (`flip doctor`)."
            raise ConfigError("sbatch refused the job", self.profile.name, refusal, remedy) from error
        for line in messages:  # of the site, for instance
            print(plain(line), file=sys.stderr)
        number = SUBMITTED.search(answer)
        if number is None:
            remedy = "Submit again: if the job was accepted, it is found by its name."
            raise StorageError("sbatch printed no job number", self.profile.name, answer.strip(), remedy)
        return number[1]

    def cancel(self, runs: Sequence[RunDir], again: Collection[Path] = ()) -> None:
        """Signal running jobs, which save and stop, and whose owner reads cancel.json. Other jobs, and those in
        ``again``, are ended by a plain scancel. Errors are raised after all jobs have been signalled.

        A job that is COMPLETING may have been requeued, and may be held then, so that no start of it reads cancel.json.
        A plain scancel prevents the requeue; the ranks still have the time to save that Slurm gave them.
        """
        with _slurm_errors(CANCEL_NOTE):
            rows = queue_rows(runs)
            invisible = invisible_jobs([run for run in runs if run.path not in rows])
        problems = [f"{path.name}: {why}" for path, why in invisible.items()]
        canaries: list[RunDir] = []
        for run in runs:
            row = rows.get(run.path)
            if row is None or row.state in ENDED:
                continue
            if row.state in TRANSITIONAL and row.state != COMPLETING and run.path not in again:
                continue  # its start reads cancel.json
            save = row.state not in (*WAITING, COMPLETING) and run.path not in again
            if not save:  # its owner, which cancels the jobs that wait for this canary, will not run
                canaries.append(run)
            try:
                slurm_cli.call("scancel", *(["--signal=USR2"] if save else []), *_owner_filter(run), row.id)
            except SlurmUnavailable as error:
                problems.append(f"{run.name}: {error}")
        for run in canaries:
            try:
                _settle(run)
            except (SlurmUnavailable, OSError, ValueError) as error:
                problems.append(f"{run.name}, jobs that wait for it: {error}")
        if problems:
            remedy = "Runs with a cancel.json do not restart; cancel again on a machine where Slurm answers."
            raise FlipError("not signalled", value="; ".join(problems), remedy=remedy)


def _settle(run: RunDir) -> None:
    """Release or cancel the jobs that wait for a canary whose owner does not run.

    Raises RefusedPath if another user may have named them; SlurmUnavailable, OSError, ValueError.
    """
    if not canary.releases(run):  # so a run of another user that is no canary is no error
        return
    record = canary.canary_of(run.read_job())
    names = canary.held_names(run, record)
    if not names:
        return
    if canary.at_end("stop", canary.has_passed(run, record)) == canary.RELEASE:
        held_jobs.release(run, record)
    else:
        held_jobs.cancel(names)


def _owner_filter(run: RunDir) -> list[str]:
    """Options that restrict scancel to jobs of the record's owner, who may have written the name of our job."""
    uid = os.stat(run.path / "job.json").st_uid
    if uid == os.geteuid():
        return []
    return [f"--user={uid}"]


def granted(id_: str) -> tuple[bool | None, int | None]:
    """(whether Slurm requeues a job on request, its wall limit in seconds), each None if unknown.

    A plugin of the site may have changed what was asked for.
    """
    try:
        fields = slurm_cli.job_fields(id_)
    except SlurmUnavailable:
        return None, None
    requeue = {"1": True, "0": False}.get(fields.get("Requeue", ""))
    return requeue, slurm_cli.parse_duration(fields.get("TimeLimit", ""))


def group_into_arrays(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """Groups of at most ``size`` jobs with equal resources, code and environment, in order."""
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        code = str(job.snapshot), str(job.host_code)
        key = (
            job.resources,
            code,
            job.module,
            job.canary,
            job.waits_for,
            tuple(job.trackers),
            *sorted(job.env.items()),
        )
        groups.setdefault(key, []).append(job)
    for members in groups.values():
        yield from (members[i : i + size] for i in range(0, len(members), size))


def _new_name(jobs: Sequence[Job]) -> str:
    """A new name in Slurm for jobs of one folder: SWEEP.TOKEN, or evaluate.TOKEN of side jobs."""
    group = jobs[0].run.path.parent.name.lstrip(".")
    return f"{group}.{secrets.token_hex(4)}"


@contextlib.contextmanager
def _slurm_errors(note: str = "") -> Iterator[None]:
    """Turn SlurmUnavailable into StorageError, whose remedy ends with ``note``."""
    try:
        yield
    except SlurmUnavailable as error:
        remedy = f"Repeat it on a machine with Slurm's commands, when the controller answers. {note}".rstrip()
        raise StorageError("Slurm does not answer", value=str(error), remedy=remedy) from error


def _cancel_superseded(runs: Sequence[RunDir]) -> None:
    """Cancel jobs of these runs that are held for a canary of an earlier submission: they would do nothing.

    Other runs may wait in the same array, so array elements are cancelled by their own ids.
    """
    with contextlib.suppress(SlurmUnavailable):
        rows = queue_rows([run for run in runs if run.path in lifecycle.awaited_canaries(runs)])
        if held := sorted(row.id for row in rows.values() if held_jobs.is_held(row)):
            slurm_cli.call("scancel", *held)
