"""Records of the attempts of a run: start.json and end.json in attempts/<n>, with the decision of the restart policy.

``job.json`` holds what was submitted; its ``after`` is the newest attempt at that time, and decisions up to that one no
longer count (docs/contracts.md).
"""

import socket
import time
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

from flip.runs import checkpoint_folder, wall_limit
from flip.runs.errors import STORAGE
from flip.runs.next_step import NOTHING_HELD, Allocation, Evidence, Step, next_step, recorded_step
from flip.runs.restart_policy import DAY, STOP_REQUESTED, UNKNOWN, EndFacts
from flip.runs.rundir import RunDir, create_json, exists, read_record, write_json

REQUIRED_FIELDS = ("attempt", "action", "cause", "reason", "committed", "delay")  # of end.json
INTERRUPTED = ("stopped", "timeout", "node")  # causes that are no fault of the run


def start_attempt(run: RunDir, fields: Dict[str, Any], after: Optional[int] = None) -> int:
    """Win the next attempt and return its number. Earlier attempts should have an end.

    ``after``: win only the attempt that follows this one; returns 0 if another process has won it.

    Its start.json has ``fields`` and: host; ``resumes_from``, S of the newest checkpoint (0: none); ``first_commit``,
    whether this attempt must save after its first step, because the previous one was interrupted without a checkpoint;
    ``after``.
    """
    previous = last_end(run)
    cut_off = previous is not None and not previous["committed"] and previous["cause"] in INTERRUPTED
    start = {
        "host": socket.gethostname(),
        "resumes_from": newest_checkpoint_samples(run),
        "first_commit": cut_off or bool(unended(run)),
        "after": submitted_after(run),
    }
    return run.start_attempt(dict(start, **fields), after)


def end_attempt(
    run: RunDir,
    n: int,
    end: EndFacts,
    suspect: Tuple[str, str] = ("", ""),
    met: Optional[Mapping[str, str]] = None,
    noticed: Optional[float] = None,
    observed: bool = True,
    allocation: Allocation = NOTHING_HELD,
) -> Step:
    """Decide what follows from the end of attempt n and record it, synced, in end.json. A second call changes nothing.

    Args:
        end, suspect, met: see ``evidence_of``.
        noticed: when the launcher saw the first rank fail; by default, now.
        observed: whether its launcher saw it end; else this is a later record of that.
        allocation: what the run still holds; by default nothing, so that the next attempt starts after a requeue.
    """
    return record_step(run, n, evidence_of(run, n, end, suspect, met), noticed, observed, allocation)


def evidence_of(
    run: RunDir,
    n: int,
    end: EndFacts,
    suspect: Tuple[str, str] = ("", ""),
    met: Optional[Mapping[str, str]] = None,
) -> Evidence:
    """What the caller and the files of the run say about the end of attempt n.

    Args:
        end: what the caller knows of it; this function adds what the files show.
        suspect: see ``Evidence``.
        met: cause -> reason, of what the caller itself met: a full disk, which may have kept the ranks from recording
            causes, or a job.json that another user may have written.
    """
    start = read_record(run.attempt(n) / "start.json") or {}
    first = start["after"] if "after" in start else submitted_after(run)
    causes = run.causes(n)
    for cause, reason in (met or {}).items():
        causes = causes + [{"cause": cause, "by": "the owner of the job", "reason": reason}]
    lowered_reason = wall_limit.why_lowered(run, wall_limit.recorded_limit(run, n))
    was_last = run.newest_attempt() == n  # if this end is written late, a later attempt may have completed the run
    return Evidence(
        end._replace(stop_requested=run.stop_requested(n), lowered_reason=lowered_reason),
        causes,
        earlier_ends(run, first, n),
        run.is_complete() and was_last,
        exists(run.cancel),
        _progress(run, n, start)[1],
        suspect=suspect,
    )


def record_step(
    run: RunDir,
    n: int,
    evidence: Evidence,
    noticed: Optional[float] = None,
    observed: bool = True,
    allocation: Allocation = NOTHING_HELD,
) -> Step:
    """``end_attempt`` with evidence that the caller has collected. Returns the step that an earlier call recorded, if
    that differs."""
    step = next_step(evidence, allocation)
    reason = step.reason
    if step.cause == "cancelled":
        reason = cancel_reason(run)
    newest, _ = _progress(run, n, read_record(run.attempt(n) / "start.json") or {})
    now = time.time()
    record = {
        "attempt": n,
        "action": step.action,
        "cause": step.cause,
        "reason": reason,
        "delay": step.delay,
        "exclude": list(step.exclude),
        "code": evidence.end.code,
        "state": evidence.end.state,
        "commits": newest,
        "committed": evidence.progressed,
        "noticed": now if noticed is None else noticed,
        "observed": observed,
        "time": now,
    }
    path = run.attempt(n) / "end.json"
    create_json(path, record)
    recorded = recorded_step(read_record(path) or record)
    if recorded.action != step.action:
        return recorded
    return recorded._replace(do=step.do, nodes=step.nodes, place=step.place)


def _progress(run: RunDir, n: int, start: Mapping[str, Any]) -> Tuple[int, bool]:
    """(S of the newest checkpoint at the end of attempt n, whether it made progress). ``start``: its start.json."""
    following = read_record(run.attempt(n + 1) / "start.json") or {}  # if this end is written late
    newest = following.get("resumes_from", newest_checkpoint_samples(run))
    has_saved = newest > start.get("resumes_from", newest)  # without a start.json it did nothing
    return newest, has_saved or run.has_progress(n)


def restarted_in_place(start: Mapping[str, Any], previous: Mapping[str, Any]) -> bool:
    """Whether an attempt started in the allocation of the one before, without a requeue. Both: their start.json.

    ``warm`` says so on one machine; on Slurm both have the same start of the same job.
    """
    job = start.get("job")
    same_start = (job, start.get("restarts")) == (previous.get("job"), previous.get("restarts"))
    return bool(start.get("warm") or (job and same_start))


def record_failed_restart(run: RunDir, n: int, reason: str, remedy: str = "") -> None:
    """Prefix the reason of the end of attempt n with ``reason``: the restart that was decided there has failed.

    ``remedy``: what the user must do if the job does not end (``flip.runs.lifecycle`` shows it).
    """
    end_abandoned(run)
    path = run.attempt(n) / "end.json"
    row = read_record(path) or {}
    row = dict(row, reason="%s; %s" % (reason, row.get("reason", "")))
    if remedy:
        row["remedy"] = remedy
    write_json(path, row)


def record_cancel(run: RunDir, n: int) -> Step:
    """Replace the restart that was decided at the end of attempt n: the run was cancelled before it."""
    path = run.attempt(n) / "end.json"
    row = read_record(path) or {}
    reason = "%s; before: %s" % (cancel_reason(run), row.get("reason", ""))
    row = dict(row, action="stop", cause="cancelled", reason=reason, delay=0.0, exclude=list(row.get("exclude", ())))
    write_json(path, row)
    return recorded_step(row)


def unended(run: RunDir) -> List[int]:
    """The newest attempts, back to the first that has an end."""
    numbers: List[int] = []
    for n in reversed(run.attempt_numbers()):
        if exists(run.attempt(n) / "end.json"):
            break
        numbers.insert(0, n)
    return numbers


def end_abandoned(run: RunDir, unwritten: int = 0, before: Optional[int] = None) -> None:
    """Record the ends of attempts that ended unobserved (their host died). Call it only if none of them still runs.

    ``unwritten``: an attempt whose end was observed but could not be written, or the first one of its start of the job
    if files could not be read either; its cause is storage. ``before``: only attempts with a smaller number.
    """
    for n in unended(run):
        if before is not None and n >= before:
            break
        end = unseen_end(run, n)
        if unwritten and in_same_allocation(run, n, unwritten):
            end = EndFacts(STORAGE, None)
        end_attempt(run, n, end, observed=False)


def unseen_end(run: RunDir, n: int) -> EndFacts:
    """What the files of the run show of the end of attempt n, which nothing has recorded."""
    if run.hit_time_limit(n):
        limit = wall_limit.recorded_limit(run, n)
        limit_reason = wall_limit.why_no_progress(run, limit) if limit else ""
        return EndFacts(None, "TIMEOUT", limit_reason=limit_reason)
    if run.stop_requested(n):  # it was killed while it saved
        return EndFacts(None, STOP_REQUESTED)
    return EndFacts(None, UNKNOWN)


def in_same_allocation(run: RunDir, n: int, first: int) -> bool:
    """Whether attempt n is ``first``, or started in its allocation."""
    start, of_first = (read_record(run.attempt(number) / "start.json") or {} for number in (n, first))
    return n == first or (n > first and restarted_in_place(start, of_first))


def ends(run: RunDir) -> Iterator[Dict[str, Any]]:
    """The recorded ends, newest first."""
    for n in reversed(run.attempt_numbers()):
        path = run.attempt(n) / "end.json"
        row = read_record(path)
        if row is not None:
            missing = [name for name in REQUIRED_FIELDS if name not in row]
            if missing:
                raise ValueError("%s: lacks `%s`" % (path, missing[0]))
            yield row


def excluded_nodes(run: RunDir, now: float) -> Optional[Tuple[str, ...]]:
    """Nodes that the next start avoids: those of the profile, and those that the ends of the last day name. None if no
    end ever named one, so that what the job excludes now stays.

    A node may be repaired, or its fault may have been a passing one.
    """
    named = [end for end in ends(run) if end.get("exclude")]
    if not named:
        return None
    job = read_record(run.path / "job.json") or {}
    nodes = {node for end in named if now - end.get("time", 0.0) < DAY for node in end["exclude"]}
    return tuple(filter(None, [job.get("exclude", ""), *sorted(nodes)]))


def earlier_ends(run: RunDir, first: int, n: int) -> List[Dict[str, Any]]:
    """Ends of the attempts between ``first`` and n, oldest first, starting with the newest that saved a checkpoint."""
    rows: List[Dict[str, Any]] = []
    for row in ends(run):
        if row["attempt"] <= first or (rows and rows[0]["committed"]):
            break
        if row["attempt"] < n:
            rows.insert(0, row)
    return rows


def last_end(run: RunDir) -> Optional[Dict[str, Any]]:
    """The newest recorded end, None if there is none."""
    return next(ends(run), None)


def current_end(run: RunDir, after: Optional[int] = None) -> Optional[Dict[str, Any]]:
    """The newest recorded end if its decision still counts; None if the run was submitted again since.

    ``after``: the newest attempt at the time of the last submission, if the caller has read it.
    """
    row = last_end(run)
    after = submitted_after(run) if after is None else after
    if row is not None and row["attempt"] > after:
        return row
    return None


def submitted_after(run: RunDir) -> int:
    """The newest attempt at the time of the last submission."""
    return (read_record(run.path / "job.json") or {}).get("after", 0)


def newest_checkpoint_samples(run: RunDir) -> int:
    """S of the newest checkpoint, 0 if there is none."""
    checkpoints = checkpoint_folder.checkpoints(run)
    if checkpoints:
        return checkpoints[-1].samples_seen
    return 0


def cancel_reason(run: RunDir) -> str:
    """Who cancelled the run and why, as a sentence."""
    record = read_record(run.cancel) or {}
    return "cancelled by %s: %s" % (record.get("who", "the scheduler's user"), record.get("why") or "no reason given")
