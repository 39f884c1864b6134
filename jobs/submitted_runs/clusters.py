"""Queries and cancels runs of any backend.

job.json of a run names the kind of its backend; one call may concern runs of several backends.
"""

import os
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from flip.files.ownership import user_name
from flip.runs import attempts, lifecycle
from flip.runs.errors import CAUSES, COMPLETE, CRASH, STOPPED, FlipError
from flip.runs.lifecycle import FINAL, HELD, QUEUED, UNKNOWN, UNREADABLE, RunState, SchedulerView
from flip.runs.rundir import RunDir, create_json
from jobs.backends.table import BACKENDS, open_backend, why_unknown
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.filesystem import unwritable
from jobs.common.job import record_of
from jobs.submitted_runs import resubmit

POLL_SECONDS = 0.5
"""Between two queries of runs without a known backend."""


def kind_of(run: RunDir) -> str:
    """Kind of the backend of the last submission; ``local`` if the run was never submitted."""
    return record_of(run).get("kind", "local")


def seen(runs: Iterable[RunDir]) -> dict[Path, SchedulerView]:
    """Path of a run, or of the canary for which one waits -> what its backend shows of its job; one call of squeue for
    all runs on Slurm."""
    runs = list(runs)
    queried = {run.path: run for run in [*lifecycle.awaited_canaries(runs).values(), *runs]}
    shown: dict[Path, SchedulerView] = {}
    for kind, group in _by_kind(queried.values()).items():
        why = why_unknown(kind)
        if why:
            shown |= {run.path: SchedulerView(UNKNOWN, f"it is unknown whether it runs: {why}") for run in group}
        else:
            shown |= open_backend(ClusterProfile(kind=kind)).seen(group)
    return shown


def states(runs: Iterable[RunDir]) -> dict[Path, RunState]:
    """Path of a run -> its state (``flip.runs.lifecycle``), by its files and its backend."""
    runs = list(runs)
    state_by_run = lifecycle.states(runs, seen(runs))
    return {run.path: _with_command(run, state_by_run[run.path]) for run in runs}


def cancellable(runs: Iterable[RunDir]) -> list[RunDir]:
    """The runs that have not ended for good, and those that have, but without success, while a job of them still waits:
    Slurm may have held it after it was cancelled, and may start it if it is released."""
    runs = list(runs)
    shown = seen(runs)
    state_by_run = lifecycle.states(runs, shown)
    chosen = []
    for run in runs:
        state = state_by_run[run.path].state
        waits = shown[run.path].kind in (QUEUED, HELD)
        if state not in FINAL or (waits and state != "complete"):
            chosen.append(run)
    return chosen


def _with_command(run: RunDir, state: RunState) -> RunState:
    """The state with the command that submits the run again, if there is one."""
    if not state.resubmit:
        return state
    try:
        command = resubmit.command(run)[1]
    except UNREADABLE as error:
        return lifecycle.damaged_state(state.attempt, error, run.path)
    if command:
        return state._replace(reason=f"{state.reason}: {command}")
    return state


def cancel(runs: Iterable[RunDir], again: Collection[Path] = ()) -> None:
    """``Backend.cancel`` for runs of any backend. An error is raised after all backends were called."""
    errors: list[FlipError] = []
    for kind, group in _by_kind(runs).items():
        try:
            open_backend(ClusterProfile(kind=kind)).cancel(group, again)
        except FlipError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def request_cancel(runs: Iterable[RunDir], why: str, repeat_kills: bool = True) -> None:
    """Write cancel.json of the runs and end them.

    ``repeat_kills``: runs that were cancelled before are killed without a save; else they are signalled again. Failures
    for some runs are raised as a FlipError after all others were cancelled.
    """
    runs = list(runs)
    before = []
    unwritten: dict[Path, OSError] = {}
    record = {"who": user_name(os.geteuid()), "why": why, "time": time.time()}
    for run in runs:
        try:
            if not create_json(run.cancel, record):
                before.append(run.path)
        except OSError as error:
            unwritten[run.path] = error
    undelivered = ""
    try:
        # without the file, a run that saves and exits would restart
        cancel(runs, [*(before if repeat_kills else ()), *unwritten])
    except FlipError as error:
        if not unwritten:
            raise
        undelivered = str(error)
    if unwritten:
        raise _cancel_error(unwritten, undelivered)


def _cancel_error(unwritten: Mapping[Path, OSError], undelivered: str) -> FlipError:
    """``undelivered``: further errors of the backends."""
    first = next(iter(unwritten.values()))
    owners = {
        user_name(path.stat().st_uid) for path in unwritten if path.exists() and path.stat().st_uid != os.geteuid()
    }
    value = "; ".join(f"{path.name}: {error.strerror or error}" for path, error in unwritten.items())
    remedy = "The others are cancelled. "
    if undelivered:
        remedy += f"These were not ended: {undelivered} "
    else:
        remedy += "Of these, jobs in Slurm's queue were killed without a save, and local runs continue. "
    if owners:
        remedy += f"Ask {', '.join(sorted(owners))}, who started them."
    else:
        remedy += "Fix the cause and cancel again."
    return type(unwritable(first, ""))("cancel.json could not be written", value=value, remedy=remedy)


def exit_code_of(run: RunDir) -> int:
    """The exit code of a failed run: of its recorded cause, else that of a crash."""
    try:
        return CAUSES.get((attempts.last_end(run) or {}).get("cause", "")) or CRASH  # "complete", with a damaged result
    except UNREADABLE:  # the status table shows it
        return CRASH


def worst_exit_code(states: Iterable[tuple[RunDir, str]]) -> int:
    """The worst exit code of runs, each with its state: a failure counts more than a stop."""
    codes = [exit_code_of(run) if state == "failed" else STOPPED for run, state in states if state != "complete"]
    return max(codes, key=lambda code: (code != STOPPED, code), default=COMPLETE)


def poll_interval(runs: Iterable[RunDir]) -> float:
    """Seconds between two queries of the states of runs; longer on Slurm, whose controller is shared."""
    kinds = {kind_of(run) for run in runs} & BACKENDS.keys()
    return max((BACKENDS[kind].poll_seconds for kind in kinds), default=POLL_SECONDS)


def _by_kind(runs: Iterable[RunDir]) -> dict[str, list[RunDir]]:
    groups: dict[str, list[RunDir]] = {}
    for run in runs:
        groups.setdefault(kind_of(run), []).append(run)
    return groups
