"""Where runs on Slurm stand: by their files and one call of squeue."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flip.runs.rundir import RunDir, read_record
from jobs.common.job import UNREADABLE, JobState, is_complete, unreadable_state
from jobs.host import attempts, canary, slurm_cli, wall_limit
from jobs.host.slurm_cli import ENDED, WAITING, QueueRow, SlurmUnavailable

LIMIT = "its wall limit came before it had saved"


def states(runs: Sequence[RunDir]) -> dict[Path, JobState]:
    """Path of a run -> state, by its files and one call of squeue. What Slurm does not say is ``unknown``."""
    rows: dict[Path, QueueRow] = {}
    silence: dict[Path, str] = {}
    ahead = ahead_of(runs)
    asked = {run.path: run for run in [*runs, *ahead.values()]}
    try:
        rows = rows_of(asked.values())
        silence = elsewhere([run for run in asked.values() if run.path not in rows])
    except SlurmUnavailable as error:
        silence = {path: f"Slurm does not answer: {error}" for path in asked}
    found = {}
    for path, run in {**{run.path: run for run in ahead.values()}, **asked}.items():
        try:
            found[path] = _state(run, rows.get(path), silence.get(path, ""))
            if path in ahead and found[path].state in ("queued", "stopped", "cancelled") and not run.cancel.exists():
                found[path] = _behind(run, ahead[path], rows.get(path), found[path], found[ahead[path].path])
        except UNREADABLE as error:
            found[path] = unreadable_state(run, error)
    return {run.path: found[run.path] for run in runs}


def ahead_of(runs: Iterable[RunDir]) -> dict[Path, RunDir]:
    """Path of a run -> the canary for which it waits."""
    found = {}
    for run in runs:
        with contextlib.suppress(*UNREADABLE):  # its state says so
            job = read_record(run.path / "job.json") or {}
            ahead = canary.canary_of(run, job) if run.newest_attempt() <= job.get("after", 0) else None
            if ahead is not None:
                found[run.path] = ahead
    return found


def _behind(run: RunDir, ahead: RunDir, row: QueueRow | None, alone: JobState, canarys: JobState) -> JobState:
    """Where a run stands whose job is held for a canary; ``alone``: what is to be said without."""
    if row is not None and row.state in WAITING and not canary.is_held(row):
        return alone  # somebody let it go
    job = read_record(run.path / "job.json") or {}
    if canary.was_released(run, job) is None and (row is None or row.state in ENDED or canarys.state == "complete"):
        return alone  # to anybody but its submitter it waits as long as Slurm says that it is held
    if canarys.state in ("queued", "running", "waiting", "unknown") and canary.is_current(ahead, job):
        held = row is not None and row.state in WAITING
        return JobState("queued", alone.attempt, f"waits for its canary {ahead.name}") if held else alone
    return JobState("stopped", alone.attempt, canary.stuck_reason(ahead, canarys.state, canarys.detail))


def rows_of(runs: Iterable[RunDir]) -> dict[Path, QueueRow]:
    """Path of a run -> its row in the queue, where there is one. Raises SlurmUnavailable."""
    places = {}
    for run in runs:
        with contextlib.suppress(*UNREADABLE):
            job = read_record(run.path / "job.json") or {}
            if "name" in job:
                places[run.path] = (job["name"], job["index"])
    rows = slurm_cli.queue(name for name, _ in places.values())
    return {path: rows[place] for path, place in places.items() if place in rows}


def elsewhere(absent: Sequence[RunDir]) -> dict[Path, str]:
    """Why the Slurm that answers here cannot speak for a run that it does not list: it was submitted to another, or by
    another, whose jobs it does not show. Raises SlurmUnavailable."""
    found: dict[Path, str] = {}
    config = slurm_cli.config() if absent else {}
    site, me = config.get("ClusterName", ""), os.geteuid()
    hides = me != 0 and "jobs" in re.split(r"\W+", config.get("PrivateData", ""))
    for run in absent:
        with contextlib.suppress(*UNREADABLE):
            job = read_record(run.path / "job.json") or {}
            theirs = job.get("site", site)
            if theirs != site:
                found[run.path] = f"it was submitted to the Slurm cluster {theirs}; this is {site}"
            elif hides and (owner := _owner(run, job)) != me:
                found[run.path] = f"this Slurm shows the jobs of {_called(owner)} to nobody else (PrivateData)"
    return found


def _owner(run: RunDir, job: Mapping[str, Any]) -> int:
    """The user who submitted it; of older records, whose file that is."""
    uid = job.get("uid")
    return uid if isinstance(uid, int) else (run.path / "job.json").stat().st_uid


def _called(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return f"user {uid}"


def _state(run: RunDir, row: QueueRow | None, silence: str) -> JobState:
    n, after, verdict = run.newest_attempt(), attempts.submitted_after(run), attempts.current_end(run)
    reason = verdict["reason"] if verdict else ""
    if is_complete(run):
        return JobState("complete", n)
    if row is not None and row.state not in (*WAITING, *ENDED):
        return _occupying(run, row, n, n > after)
    stopped = verdict is not None and verdict["action"] == "stop"
    if row is None and silence and not stopped:
        return JobState("unknown", n, silence)
    if run.cancel.exists():
        return JobState("cancelled", n, attempts.cancel_reason(run))
    if row is not None and row.state in WAITING:
        return _waiting(run, row, n, reason, n > after)
    if verdict is not None and stopped:
        return JobState("cancelled" if verdict["cause"] == "cancelled" else "failed", n, reason)
    if row is not None and row.state == "CANCELLED":
        return JobState("cancelled", n, "cancelled in Slurm")
    gone = f"its job ended ({row.state})" if row else "its job is not in Slurm's queue any more"
    if row is None and n <= after and not _taken(run):
        gone = "Slurm did not say that it took its job"
    return JobState("stopped", n, "; ".join(filter(None, [reason, f"{gone}: submit again"])), resubmit=True)


def _taken(run: RunDir) -> bool:
    """Whether sbatch answered the newest submission with the number of a job; so, too, where nobody can tell."""
    token = (read_record(run.path / "job.json") or {}).get("token", "")
    return canary.file_exists(run.path.parent / ".slurm" / token / "submitted.json") is not False


def _occupying(run: RunDir, row: QueueRow, n: int, begun: bool) -> JobState:
    """On nodes: starting, running, or ending. ``begun``: attempt n belongs to the job in the queue."""
    begun = begun and not (run.attempt(n) / "end.json").exists()
    if run.cancel.exists():
        return JobState("running", n, f"{attempts.cancel_reason(run)}: it saves and stops")
    if row.state == "COMPLETING" or (begun and run.was_signalled(n)):
        return JobState("running", n, "told to stop" if begun else "ending")
    if row.state == "RUNNING":
        return JobState(
            "running", n, wall_limit.too_short(run, wall_limit.recorded_limit(run, n)) if begun else "starting"
        )
    return JobState("running", n, f"in Slurm: {row.state}")


def _waiting(run: RunDir, row: QueueRow, n: int, reason: str, begun: bool) -> JobState:
    why = f"in Slurm: {row.reason}" if row.reason and row.reason != "None" else ""
    if "held" in row.reason.lower():
        why += f" (release it with `scontrol release {row.id}`)"
    if begun and not reason and not (run.attempt(n) / "end.json").exists():
        reason = LIMIT if run.hit_time_limit(n) else "ended unseen: preempted, or its node failed"
    return JobState("waiting" if begun else "queued", n, "; ".join(filter(None, [reason, why])), row.start)
