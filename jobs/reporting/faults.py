"""What each fault of a run cost: the seconds from the last work of an attempt until the next one has caught up.

| part | from | to |
|---|---|---|
| detect | the last sign of work: the first recorded cause, else the last metric line | the launcher sees a rank end |
| decide | | the end is recorded: the other ranks have ended, too |
| start | | the next attempt restores: queue, processes, imports, peers |
| restore | | it can train |
| replay | | steps after the last checkpoint, in the time that they took at first |

``detect`` is an upper limit if no cause was recorded. An end that nobody observed has no ``detect`` and no ``decide``;
its ``start`` begins with the last sign of work. A restart ``in the job`` keeps the nodes; what a requeue would have
cost is estimated from the requeues of the same run, else from its first start. Clocks of two hosts are compared.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from flip.monitoring.results import Attempt, Outcome
from flip.runs.attempts import restarted_in_place
from flip.runs.records import is_observed
from jobs.common.terminal import TextTable
from jobs.common.text import duration

PARTS = ("detect", "decide", "start", "restore", "replay")
IN_JOB = "in the job"
REQUEUED = "requeue"
MOST_ROWS = 12
"""Newest faults in the table; ``--json`` has all."""
LATE_CAUSES = ("hang",)
"""Causes that are recorded long after the last work."""


@dataclass(frozen=True)
class Fault:
    """An attempt that has ended, and was followed by another one."""

    attempt: int
    cause: str
    place: str
    """How the run restarted: IN_JOB or REQUEUED."""
    seconds: Mapping[str, float | None]
    """Part -> its length; None: unknown."""
    requeue_seconds: float | None
    """Of a restart in the job: all parts if it had been a requeue. None: unknown, or it was one."""

    @property
    def total(self) -> float:
        return sum(seconds for seconds in self.seconds.values() if seconds is not None)


def of_run(
    outcome: Outcome, ready: Sequence[Mapping[str, Any]], replays: Sequence[float], waited: float | None
) -> list[Fault]:
    """The faults of a run.

    ``ready``, ``replays``: of each attempt its ready.json, and the seconds of its repeated steps. ``waited``: seconds
    from the submission to the first attempt, if they are known.
    """
    attempts = outcome.attempts
    faults = []
    for i, (attempt, following) in enumerate(zip(attempts, attempts[1:], strict=False)):
        if attempt.end.get("action") != "requeue" or following.start.get("after", 0) >= attempt.number:
            continue  # it ended for good, and was submitted again
        place = restart_place(following.start, attempt.start)
        seconds = _parts(outcome, attempt, following, ready[i], ready[i + 1], replays[i])
        faults.append(Fault(attempt.number, str(attempt.end.get("cause", "")), place, seconds, None))
    usual = _usual_requeue(faults, attempts, ready, waited)
    return [_with_requeue(fault, usual) for fault in faults]


def restart_place(start: Mapping[str, Any], previous: Mapping[str, Any]) -> str:
    """IN_JOB or REQUEUED, of an attempt and the one before, by their start.json."""
    if restarted_in_place(start, previous):
        return IN_JOB
    return REQUEUED


def _parts(
    outcome: Outcome,
    attempt: Attempt,
    following: Attempt,
    ready: Mapping[str, Any],
    next_ready: Mapping[str, Any],
    replay: float,
) -> dict[str, float | None]:
    last_work = _last_work(outcome, attempt, ready)
    ended = attempt.end.get("time")
    noticed = attempt.end.get("noticed", ended)
    if not is_observed(attempt.end):
        ended = last_work
        noticed = None
    trains = next_ready.get("time")
    restore = next_ready.get("restoring")
    restores = following.start.get("time")
    if trains is not None:
        restores = trains - (restore or 0.0)
    decide = None
    if noticed is not None:
        decide = _between(noticed, ended)
    return {
        "detect": _between(last_work, noticed),
        "decide": decide,
        "start": _between(ended, restores),
        "restore": restore,
        "replay": replay,
    }


def _between(start: float | None, end: float | None) -> float | None:
    if start is None or end is None:
        return None
    return max(0.0, end - start)


def _last_work(outcome: Outcome, attempt: Attempt, ready: Mapping[str, Any]) -> float | None:
    """The time of the last sign of work of an attempt."""
    causes = [cause["time"] for cause in attempt.causes if "time" in cause and cause.get("cause") not in LATE_CAUSES]
    if causes:
        return min(causes)
    lines = outcome.metrics.attempt(attempt.number)["time"]
    for time in lines[-1:].tolist():
        if not math.isnan(time):
            return float(time)
    return ready.get("time", attempt.start.get("time"))


def _usual_requeue(
    faults: Iterable[Fault], attempts: Sequence[Attempt], ready: Sequence[Mapping[str, Any]], waited: float | None
) -> float | None:
    """Seconds of start and restore of a requeue of this run."""
    requeued = [fault.seconds for fault in faults if fault.place == REQUEUED]
    seconds = [(parts["start"] or 0.0) + (parts["restore"] or 0.0) for parts in requeued if parts["start"] is not None]
    if seconds:
        return median(seconds)
    if waited is None or "time" not in ready[0]:
        return None
    return waited + max(0.0, ready[0]["time"] - attempts[0].start["time"])


def _with_requeue(fault: Fault, usual: float | None) -> Fault:
    if fault.place == REQUEUED or usual is None:
        return fault
    unavoidable = sum(fault.seconds[part] or 0.0 for part in ("detect", "decide", "replay"))
    return Fault(fault.attempt, fault.cause, fault.place, fault.seconds, unavoidable + usual)


def as_dict(fault: Fault) -> dict[str, Any]:
    return {
        "attempt": fault.attempt, "cause": fault.cause, "restart": fault.place, "seconds": dict(fault.seconds),
        "total_seconds": fault.total, "requeue_seconds": fault.requeue_seconds,
    }  # fmt: skip


def cells(named: Sequence[tuple[str, Fault]]) -> list[dict[str, Any]]:
    """Rows of a table, of (name of a run, fault)."""
    return [
        {
            "run": name,
            "attempt": str(fault.attempt),
            "ended by": fault.cause,
            "restart": fault.place,
            **{part: _text(fault.seconds[part]) for part in PARTS},
            "in all": _text(fault.total),
            "as requeue": _text(fault.requeue_seconds),
        }
        for name, fault in named
    ]


def _text(seconds: float | None) -> str:
    """With tenths of a second below a minute."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return duration(seconds)


def table(named: Sequence[tuple[str, Fault]]) -> list[str | TextTable]:
    """The newest faults as parts of a page; empty without faults."""
    if not named:
        return []
    parts: list[str | TextTable] = ["", "restarts", TextTable(cells(named[-MOST_ROWS:]), drop=("replay", "decide"))]
    if len(named) > MOST_ROWS:
        parts.append(f"and {len(named) - MOST_ROWS} earlier ones: --json")
    return parts
