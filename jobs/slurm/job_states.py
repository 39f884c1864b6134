"""What Slurm shows of the jobs of runs (``flip.runs.lifecycle.SchedulerView``), from one call of squeue."""

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from flip.files.ownership import user_name
from flip.runs import canary
from flip.runs.lifecycle import (
    ABSENT,
    ACTIVE,
    ENDING,
    HELD,
    LISTED_AS_ENDED,
    QUEUED,
    UNKNOWN,
    UNREADABLE,
    SchedulerView,
)
from flip.runs.origin import is_copy
from flip.runs.rundir import RunDir, read_record
from jobs.host import held_jobs, slurm_cli
from jobs.host.slurm_cli import ENDED, WAITING, QueueRow, SlurmUnavailable
from jobs.slurm import start_problems

KILLED_STATES = ("FAILED", "NODE_FAIL", "OUT_OF_MEMORY")  # of a job whose batch script could not record its end


def seen(runs: Sequence[RunDir]) -> dict[Path, SchedulerView]:
    """Path of a run -> what Slurm shows of its job. It is UNKNOWN if Slurm does not answer for the run."""
    rows: dict[Path, QueueRow] = {}
    try:
        rows = queue_rows(runs)
        unanswered = invisible_jobs([run for run in runs if run.path not in rows])
    except SlurmUnavailable as error:
        unanswered = {run.path: f"Slurm does not answer: {error}" for run in runs}
    return {run.path: _seen(run, rows.get(run.path), unanswered.get(run.path, "")) for run in runs}


def _seen(run: RunDir, row: QueueRow | None, unanswered: str) -> SchedulerView:
    try:
        if row is None:
            if unanswered:
                return SchedulerView(UNKNOWN, unanswered)
            return _absent(run)
        if row.state in WAITING:
            return _waiting(run, row)
        if row.state in ENDED:
            return _ended(run, row)
    except UNREADABLE as error:
        return SchedulerView(UNKNOWN, f"a file of it cannot be read: {error}")
    if row.state == "COMPLETING":
        return SchedulerView(ENDING)
    return SchedulerView(ACTIVE, "" if row.state == "RUNNING" else f"in Slurm: {row.state}")


def _absent(run: RunDir) -> SchedulerView:
    job = read_record(run.path / "job.json") or {}
    if run.newest_attempt() <= job.get("after", 0) and not _was_accepted(run, job.get("token", "")):
        return SchedulerView(ABSENT, "Slurm did not confirm that it accepted its job")
    return SchedulerView(ABSENT, "its job is not in Slurm's queue any more")


def _was_accepted(run: RunDir, token: str) -> bool:
    """Whether sbatch returned a job number for the newest submission; True if unknown."""
    return canary.file_exists(run.path.parent / ".slurm" / token / "submitted.json") is not False


def _waiting(run: RunDir, row: QueueRow) -> SchedulerView:
    why = ""
    if row.reason and row.reason != "None":
        why = f"in Slurm: {row.reason}"
    needs = start_problems.remedy(row)
    if needs:
        why += f" ({needs})"
    kind = HELD if held_jobs.is_held(row) else QUEUED
    return SchedulerView(kind, why, row.start, needs, start_problems.failed_starts(run, row))


def _ended(run: RunDir, row: QueueRow) -> SchedulerView:
    if row.state == "CANCELLED":
        return SchedulerView(LISTED_AS_ENDED, "its job was cancelled in Slurm")
    failure = ""
    if row.state in KILLED_STATES:
        failure = _script_failure(run)
    return SchedulerView(LISTED_AS_ENDED, f"its job ended ({row.state})", evidence=failure)


def _script_failure(run: RunDir) -> str:
    """How a batch script ended that recorded no end of an attempt, as a sentence; "" if unknown."""
    logs = start_problems.start_logs(run, "err")
    if logs:
        return f"its batch script failed (log: {logs[-1]})"
    token = (read_record(run.path / "job.json") or {}).get("token", "")
    readable = canary.file_exists(run.path.parent / ".slurm" / token / "runs")
    if readable:
        return "its batch script was killed before it could act"
    return ""


def queue_rows(runs: Iterable[RunDir]) -> dict[Path, QueueRow]:
    """Path of a run -> its row in the queue, if it has one. Raises SlurmUnavailable."""
    places = {}
    for run in runs:
        with contextlib.suppress(*UNREADABLE):
            job = read_record(run.path / "job.json") or {}
            if "name" in job and not is_copy(run, job):
                places[run.path] = (job["name"], job["index"])
    rows = slurm_cli.queue(name for name, _ in places.values())
    return {path: rows[place] for path, place in places.items() if place in rows}


def invisible_jobs(runs: Sequence[RunDir]) -> dict[Path, str]:
    """Path of an unlisted run -> why this Slurm cannot answer for it: another cluster, or another user's hidden jobs.

    Raises SlurmUnavailable.
    """
    reasons: dict[Path, str] = {}
    config = {}
    if runs:
        config = slurm_cli.config()
    site = config.get("ClusterName", "")
    me = os.geteuid()
    hides = me != 0 and "jobs" in re.split(r"\W+", config.get("PrivateData", ""))
    for run in runs:
        with contextlib.suppress(*UNREADABLE):
            job = read_record(run.path / "job.json") or {}
            other = job.get("site", site)
            if other != site:
                reasons[run.path] = f"it was submitted to the Slurm cluster {other}; this is {site}"
            elif hides and job["uid"] != me:
                owner = user_name(job["uid"])
                reasons[run.path] = f"this Slurm hides the jobs of {owner} from other users (PrivateData)"
    return reasons
