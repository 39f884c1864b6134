"""The attempts of a run: begun and ended here, and what follows from an end (docs/contracts.md).

Standard library, Python >= 3.6. The files are the truth: attempts/<n>/start.json and end.json. ``job.json`` beside them
is what the launcher was asked for; its ``after`` is the newest attempt at that time, whose verdicts no longer count.
"""

import socket
import time
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

from flip.runs import commit
from flip.runs.errors import STORAGE
from flip.runs.rundir import RunDir, create_json, read_record, write_json
from jobs.host import wall_limit
from jobs.host.bad_nodes import NODE_SUSPECT_CAUSES
from jobs.host.restart_policy import STOP_REQUESTED, UNKNOWN, Decision, Limits, decide

#: What follows from an end depends on these fields of end.json.
REQUIRED_FIELDS = ("attempt", "action", "cause", "reason", "committed", "delay")
#: Ends that were no fault of the run: an attempt after one without a commit commits after its first step.
INTERRUPTED = ("stopped", "timeout", "node")


def start_attempt(run: RunDir, facts: Dict[str, Any]) -> int:
    """Win the next attempt and return its n. Its start.json: ``facts`` and host, resumes_from, first_commit, after.

    ``resumes_from``: newest committed S (0: none). ``first_commit``: this attempt must commit after its first step,
    because the one before was cut off without a commit. Attempts before it should have been settled.
    """
    previous = last_end(run)
    cut_off = previous is not None and not previous["committed"] and previous["cause"] in INTERRUPTED
    cut_off = cut_off or bool(unended(run))
    start = {
        "host": socket.gethostname(),
        "resumes_from": committed_samples(run),
        "first_commit": cut_off,
        "after": submitted_after(run),
    }
    return run.begin_attempt(dict(start, **facts))


def end_attempt(
    run: RunDir,
    n: int,
    code: Optional[int],
    state: Optional[str],
    limits: Optional[Limits] = None,
    suspect: Tuple[str, str] = ("", ""),
    late: Union[bool, str] = False,
    unstarted: Sequence[str] = (),
    full: str = "",
) -> Decision:
    """Decide what follows from the end of attempt n and record it, synced, in end.json. A second call changes nothing.

    ``code``: exit code of the attempt, None where nobody saw it. ``state``: the scheduler's words, None if unreadable.
    ``suspect``: a node to be left out where the attempt failed, and the run that failed there too
    (jobs/host/bad_nodes.py). ``late``, ``unstarted``: as ``policy.decide`` has them. ``full``: the caller met a full
    disk, in the system's words: it counts as a cause beside those of the ranks, which may have been unable to write
    theirs.
    """
    start = read_record(run.attempt(n) / "start.json") or {}
    following = read_record(run.attempt(n + 1) / "start.json") or {}  # of an end that is written late
    commits = following.get("resumes_from", committed_samples(run))
    committed = commits > start.get("resumes_from", commits)  # killed before start.json was there, it did nothing
    committed = committed or run.got_on(n)
    first = start["after"] if "after" in start else submitted_after(run)
    met = [{"cause": "storage", "by": "the exit trap", "reason": full}] if full else []
    decision = decide(
        run.causes(n) + met,
        code,
        state,
        earlier_ends(run, first, n),
        limits or Limits(),
        complete=run.result.exists(),
        cancelled=run.cancel.exists(),
        committed=committed,
        told=run.was_told(n),
        late=late,
        unstarted=unstarted,
    )
    if decision.cause == "cancelled":
        decision = decision._replace(reason=cancel_reason(run))
    node, other = suspect
    if node and decision.action == "requeue" and decision.cause in NODE_SUSPECT_CAUSES and node not in decision.exclude:
        reason = "%s; without %s from now on, where %s failed as well" % (decision.reason, node, other)
        decision = decision._replace(reason=reason, exclude=decision.exclude + (node,))
    record = dict(decision._asdict(), attempt=n, code=code, state=state, commits=commits, committed=committed)
    record["exclude"] = list(decision.exclude)
    record["time"] = time.time()
    create_json(run.attempt(n) / "end.json", record)
    return decision_of(read_record(run.attempt(n) / "end.json") or record)


def record_failed_restart(run: RunDir, n: int, reason: str) -> None:
    """Put ``reason`` before that of the end of attempt n: the start that was decided there does not come."""
    end_abandoned(run)
    path = run.attempt(n) / "end.json"
    row = read_record(path) or {}
    write_json(path, dict(row, reason="%s; %s" % (reason, row.get("reason", ""))))


def unended(run: RunDir) -> List[int]:
    """The newest attempts, back to one that has an end."""
    found = []
    for n in reversed(run.attempt_numbers()):
        if (run.attempt(n) / "end.json").exists():
            break
        found.append(n)
    return found[::-1]


def end_abandoned(run: RunDir, unwritten: int = 0, before: Optional[int] = None) -> None:
    """Give attempts that ended unseen (their host died) an end. Only for a launcher that knows that none still runs.

    ``unwritten``: an attempt whose end was seen, and could not be written: it is put down to storage. ``before``: only
    those with a smaller number.
    """
    for n in unended(run):
        if before is not None and n >= before:
            break
        if n == unwritten:
            end_attempt(run, n, STORAGE, None)
            continue
        state = STOP_REQUESTED if run.was_told(n) else UNKNOWN  # TOLD: killed while it saved
        if run.met_limit(n):
            limit = wall_limit.recorded_limit(run, n)
            end_attempt(run, n, None, "TIMEOUT", late=wall_limit.no_progress(run, limit) if limit else False)
            continue
        end_attempt(run, n, None, state)


def ends(run: RunDir) -> Iterator[Dict[str, Any]]:
    """The recorded ends, newest first."""
    for n in reversed(run.attempt_numbers()):
        path = run.attempt(n) / "end.json"
        row = read_record(path)
        if row is not None:
            lacking = [name for name in REQUIRED_FIELDS if name not in row]
            if lacking:
                raise ValueError("%s: lacks `%s`" % (path, lacking[0]))
            yield row


def earlier_ends(run: RunDir, first: int, n: int) -> List[Dict[str, Any]]:
    """Ends of the attempts between ``first`` and n, oldest first, from the newest that made a commit on."""
    found: List[Dict[str, Any]] = []
    for row in ends(run):
        if row["attempt"] <= first or (found and found[-1]["committed"]):
            break
        if row["attempt"] < n:
            found.append(row)
    return found[::-1]


def last_end(run: RunDir) -> Optional[Dict[str, Any]]:
    """The newest recorded end, None where there is none."""
    return next(ends(run), None)


def current_end(run: RunDir) -> Optional[Dict[str, Any]]:
    """The newest recorded end if its verdict still counts: None where the run was submitted again since."""
    row = last_end(run)
    return row if row is not None and row["attempt"] > submitted_after(run) else None


def submitted_after(run: RunDir) -> int:
    """The newest attempt at the time of the last submission."""
    return (read_record(run.path / "job.json") or {}).get("after", 0)


def committed_samples(run: RunDir) -> int:
    """The newest committed S, 0 where nothing is committed."""
    present = commit.commits(run)
    return present[-1].samples if present else 0


def decision_of(row: Dict[str, Any]) -> Decision:
    return Decision(row["action"], row["cause"], row["reason"], row["delay"], tuple(row["exclude"]))


def cancel_reason(run: RunDir) -> str:
    """Who cancelled the run and why, as a sentence."""
    record = read_record(run.cancel) or {}
    return "cancelled by %s: %s" % (record.get("who", "the scheduler's user"), record.get("why") or "no reason given")
