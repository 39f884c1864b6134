"""States of runs on Slurm, from their files and one call of squeue."""

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from flip.runs import attempts, wall_limit
from flip.runs.origin import is_copy
from flip.runs.ownership import user_name
from flip.runs.rundir import RunDir, read_record
from jobs.common.job import UNREADABLE, JobState, is_complete, unreadable_state
from jobs.host import canary, slurm_cli
from jobs.host.slurm_cli import ENDED, WAITING, QueueRow, SlurmUnavailable
from jobs.slurm import start_problems

KILLED_STATES = ("FAILED", "NODE_FAIL", "OUT_OF_MEMORY")  # of a job whose batch script could not record its end
LIMIT_REASON = "its wall limit came before it had saved"


def states(runs: Sequence[RunDir]) -> dict[Path, JobState]:
    """Path of a run -> state. It is ``unknown`` if Slurm does not answer for the run."""
    rows: dict[Path, QueueRow] = {}
    canaries = canaries_of(runs)
    queried = {run.path: run for run in [*canaries.values(), *runs]}  # canaries first: others depend on their states
    try:
        rows = queue_rows(queried.values())
        unanswered = invisible_jobs([run for run in queried.values() if run.path not in rows])
    except SlurmUnavailable as error:
        unanswered = {path: f"Slurm does not answer: {error}" for path in queried}
    result: dict[Path, JobState] = {}
    for path, run in queried.items():
        try:
            result[path] = state = _state(run, rows.get(path), unanswered.get(path, ""))
            if path in canaries and state.state in ("queued", "stopped", "cancelled") and not run.cancel.exists():
                canary_state = result[canaries[path].path]
                result[path] = _held_state(run, canaries[path], rows.get(path), state, canary_state)
        except UNREADABLE as error:
            result[path] = unreadable_state(run, error)
    return {run.path: result[run.path] for run in runs}


def canaries_of(runs: Iterable[RunDir]) -> dict[Path, RunDir]:
    """Path of a run -> the canary for which it waits."""
    canaries = {}
    for run in runs:
        with contextlib.suppress(*UNREADABLE):  # its state reports the error
            job = read_record(run.path / "job.json") or {}
            first = canary.canary_of(run, job) if run.newest_attempt() <= job.get("after", 0) else None
            if first is not None:
                canaries[run.path] = first
    return canaries


def _held_state(run: RunDir, first: RunDir, row: QueueRow | None, own: JobState, canary_state: JobState) -> JobState:
    """The state of a run whose job is held for the canary ``first``; ``own``: its state without a canary."""
    if row is not None and row.state in WAITING and not canary.is_held(row):
        return own  # it was released
    job = read_record(run.path / "job.json") or {}
    ended = row is None or row.state in ENDED or canary_state.state == "complete"
    if canary.was_released(run, job) is None and ended:
        return own  # for users other than the submitter it waits as long as Slurm shows it as held
    if canary_state.state in ("queued", "running", "waiting", "unknown") and canary.is_current(first, job):
        held = row is not None and row.state in WAITING
        return JobState("queued", own.attempt, f"waits for its canary {first.name}") if held else own
    return JobState("stopped", own.attempt, canary.stuck_reason(first, canary_state.state, canary_state.detail))


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
    config = slurm_cli.config() if runs else {}
    site, me = config.get("ClusterName", ""), os.geteuid()
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


def _state(run: RunDir, row: QueueRow | None, unanswered: str) -> JobState:
    n, after, end = run.newest_attempt(), attempts.submitted_after(run), attempts.current_end(run)
    reason = end["reason"] if end else ""
    if is_complete(run):
        return JobState("complete", n)
    if row is not None and row.state not in (*WAITING, *ENDED):
        return _active_state(run, row, n, n > after)
    stopped = end is not None and end["action"] == "stop"
    if row is None and unanswered and not stopped:
        return JobState("unknown", n, unanswered)
    if run.cancel.exists():
        return JobState("cancelled", n, attempts.cancel_reason(run))
    if row is not None and row.state in WAITING:
        return _queued_state(run, row, n, reason, n > after)
    if end is not None and stopped:
        return JobState("cancelled" if end["cause"] == "cancelled" else "failed", n, reason)
    if row is not None and row.state == "CANCELLED":
        return JobState("cancelled", n, "cancelled in Slurm")
    gone = f"its job ended ({row.state})" if row else "its job is not in Slurm's queue any more"
    if row is not None and row.state in KILLED_STATES and (n <= after or not (run.attempt(n) / "end.json").exists()):
        gone += _script_failure(run)
    if row is None and n <= after and not _was_accepted(run):
        gone = "Slurm did not confirm that it accepted its job"
    return JobState("stopped", n, "; ".join(filter(None, [reason, f"{gone}: submit again"])), resubmit=True)


def _script_failure(run: RunDir) -> str:
    """How a batch script ended that recorded no end of an attempt, as the end of a sentence; "" if unknown."""
    logs = start_problems.start_logs(run, "err")
    if logs:
        return f"; its batch script failed (log: {logs[-1]})"
    token = (read_record(run.path / "job.json") or {}).get("token", "")
    readable = canary.file_exists(run.path.parent / ".slurm" / token / "runs")
    return "; its batch script was killed before it could act" if readable else ""


def _was_accepted(run: RunDir) -> bool:
    """Whether sbatch returned a job number for the newest submission; True if unknown."""
    token = (read_record(run.path / "job.json") or {}).get("token", "")
    return canary.file_exists(run.path.parent / ".slurm" / token / "submitted.json") is not False


def _active_state(run: RunDir, row: QueueRow, n: int, started: bool) -> JobState:
    """The state of a job on nodes. ``started``: attempt n belongs to the job in the queue."""
    started = started and not (run.attempt(n) / "end.json").exists()
    if run.cancel.exists():
        return JobState("running", n, f"{attempts.cancel_reason(run)}: it saves and stops")
    if row.state == "COMPLETING" or (started and run.was_signalled(n)):
        return JobState("running", n, "stop requested" if started else "ending")
    if row.state == "RUNNING":
        if not started:
            return JobState("running", n, "starting")
        limit = wall_limit.recorded_limit(run, n)
        warnings = filter(None, [wall_limit.lowered(run, limit), wall_limit.too_short(run, limit)])
        return JobState("running", n, "; ".join(warnings))
    return JobState("running", n, f"in Slurm: {row.state}")


def _queued_state(run: RunDir, row: QueueRow, n: int, reason: str, started: bool) -> JobState:
    why = f"in Slurm: {row.reason}" if row.reason and row.reason != "None" else ""
    needs = start_problems.remedy(row)
    if needs:
        why += f" ({needs})"
    failed = start_problems.failed_starts(run, row)
    if started and not failed and not reason and not (run.attempt(n) / "end.json").exists():
        reason = LIMIT_REASON if run.hit_time_limit(n) else "ended unseen: preempted, or its node failed"
    detail = "; ".join(filter(None, [reason, failed, why]))
    return JobState("waiting" if started else "queued", n, detail, row.start, needs=needs)
