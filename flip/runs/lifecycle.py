"""What state is a run in? ``state_of`` is the only function that names one (docs/cluster.md, State of a run).

It is a pure function of what the files of the run prove (``RunFacts``, read by ``read_run_facts``) and of what the
scheduler shows of its job (``SchedulerView``). Back ends only look and return a ``SchedulerView``; ``states`` does the
rest for them. Where the answer depends on a scheduler that was not asked or does not answer, the state is ``unknown``.
Standard library, Python >= 3.6.
"""

from pathlib import Path
from typing import Any, Dict, Iterable, Mapping, NamedTuple, Optional

from flip.runs import attempts, canary, wall_limit
from flip.runs.canary import Wait
from flip.runs.origin import is_copy
from flip.runs.rundir import RunDir, exists, read_record

STATES = ("queued", "running", "waiting", "complete", "failed", "cancelled", "stopped", "unknown")
"""``waiting``: between attempts, restarts automatically. ``stopped``: not supervised any more, submit again.
``failed``: for good. ``unknown``: the scheduler did not answer or was not asked, or files of the run cannot be read."""

ENDED = ("complete", "failed", "cancelled", "stopped")
"""States in which no job of a run exists or starts."""

FINAL = ("complete", "failed", "cancelled")
"""Ended for good: a submit leaves such runs alone unless it is asked for them."""

ACTIVE_STATES = ("queued", "running", "waiting")
"""States in which a job of a run exists."""

# What a scheduler shows of the job of a run (``SchedulerView.kind``).
ABSENT = "absent"  # it has no such job, or no supervisor is running
QUEUED = "queued"  # it starts the job when resources are free
HELD = "held"  # the job does not start until it is released
ACTIVE = "active"  # the job is on nodes, or its ranks are running
ENDING = "ending"  # the same, and it saves and stops, or its owner is at work
LISTED_AS_ENDED = "ended"  # the job has ended, and the scheduler still lists it
UNKNOWN = "unknown"  # the scheduler does not answer, cannot answer for this run, or was not asked

UNREADABLE = (OSError, ValueError, KeyError)
"""Errors of the files of a run that are unreadable, not JSON, or incomplete. They must not affect other runs."""

LIMIT_REASON = "its wall limit came before it had saved"
UNSEEN_REASON = "ended unseen: preempted, or its node failed"
COPIED = "copied or moved to this folder, and not submitted since"


class SchedulerView(NamedTuple):
    """What a scheduler shows of the job of a run."""

    kind: str = UNKNOWN
    reason: str = ""
    """A sentence without a full stop. ABSENT, LISTED_AS_ENDED: what has become of the job. QUEUED, HELD: why it waits.
    ACTIVE, ENDING: what it does, if it does not simply train. UNKNOWN: why that is so."""
    start: str = ""
    """Expected start, as the scheduler prints it; empty: unknown."""
    needs: str = ""
    """What a person must do before the job can start; empty: nothing."""
    evidence: str = ""
    """Further evidence, as a sentence. QUEUED, HELD: how its last starts failed. LISTED_AS_ENDED: how its batch
    script failed, which counts if the newest attempt has no recorded end."""


NOT_ASKED = SchedulerView(UNKNOWN, "it is not known whether it runs: its scheduler was not asked")


class RunFacts(NamedTuple):
    """What the files of a run prove."""

    present: bool = True
    """Whether the run directory exists."""
    submitted: bool = True
    """Whether job.json exists."""
    copied: bool = False
    """Whether the directory is a copy: its job.json, and the ends of its attempts, are those of the original."""
    complete: bool = False
    """Whether result.json exists."""
    cancelled: str = ""
    """By whom and why, from cancel.json; empty: not cancelled."""
    attempt: int = 0
    """The newest attempt; 0: none."""
    started: bool = False
    """Whether that attempt belongs to the newest submission."""
    open: bool = False
    """Whether it does, and has no end.json."""
    end: Optional[Mapping[str, Any]] = None
    """The newest end.json, if its decision still counts: action, cause, reason, delay."""
    stop_requested: bool = False
    """Whether the open attempt has received a stop request."""
    time_limit: bool = False
    """Whether the open attempt has exceeded its wall limit."""
    warnings: str = ""
    """About the wall limit of the open attempt."""
    waits_for: str = ""
    """Name of the canary for which it waits; empty: none, or an attempt has started."""
    released: Optional[bool] = None
    """``canary.Wait.released``."""
    current: bool = False
    """``canary.Wait.current``."""


class RunState(NamedTuple):
    """State of a run: ``state`` is one of STATES; ``reason`` is a sentence for users."""

    state: str
    attempt: int = 0
    """The newest attempt; 0: none."""
    reason: str = ""
    starts: str = ""
    """Expected start, as the scheduler prints it; empty: unknown."""
    resubmit: bool = False
    """Whether ``reason`` ends in "submit again", to which ``jobs.submitted_runs.clusters.states`` adds the command."""
    needs: str = ""
    """What a person must do before a queued or waiting run can start, as ``reason`` says too; empty: nothing."""
    waits_for: str = ""
    """Name of the canary for which a queued run waits; empty: none."""


# -- the rule ----------------------------------------------------------------------------------------------------------


def state_of(
    facts: RunFacts, seen: SchedulerView = NOT_ASKED, first: Optional[RunState] = None, ending: bool = False
) -> RunState:
    """The state of a run.

    Args:
        facts: what its files prove.
        seen: what its scheduler shows. It is ignored for a copy, whose job is that of the original.
        first: the state of the canary for which the run waits; None: unknown.
        ending: whether the job of that canary is still in the queue or on nodes.
    """
    n = facts.attempt
    if facts.complete:
        return RunState("complete", n)
    if seen.kind in (ACTIVE, ENDING) and not facts.copied:
        return RunState("running", n, _activity(facts, seen))
    if facts.cancelled:
        if facts.open and seen.kind == UNKNOWN:
            return RunState("unknown", n, "%s; %s" % (facts.cancelled, seen.reason))
        return RunState("cancelled", n, facts.cancelled)
    if facts.end is not None and facts.end["action"] == "stop":
        return RunState("cancelled" if facts.end["cause"] == "cancelled" else "failed", n, facts.end["reason"])
    if facts.copied:
        return RunState("stopped", n, COPIED)
    if not facts.submitted:
        return RunState("stopped", n, "never submitted" if facts.present else "its folder does not exist")
    if seen.kind == UNKNOWN:
        return RunState("unknown", n, seen.reason)
    if facts.waits_for:
        first = first or RunState("unknown")
        held = canary.hold_state(Wait(facts.released, _job(seen), facts.current, first.state, ending))
        if held == canary.WAITING:
            return RunState("queued", n, "waits for its canary %s" % facts.waits_for, waits_for=facts.waits_for)
        if held == canary.LOST:
            reason = canary.lost_reason(facts.waits_for, first.state, first.reason)
            return RunState("stopped", n, reason, resubmit=True)
    if seen.kind in (QUEUED, HELD):
        return _idle(facts, seen)
    return _stopped(facts, seen)


def damaged_state(n: int, error: Exception, path: Path, seen: SchedulerView = NOT_ASKED) -> RunState:
    """The state of a run whose files raised one of UNREADABLE; ``n``: its newest attempt, as far as known.

    A file that cannot be read may be readable later. Damaged content stays: nothing of such a run starts again.
    """
    if isinstance(error, OSError):
        reason = "it cannot be read: %s: %s" % (error.filename or path, error.strerror or error)
        return RunState("unknown", n, reason)
    reason = "a file of it is damaged: %s" % error
    if seen.kind == UNKNOWN:
        return RunState("unknown", n, reason)
    return RunState("running" if seen.kind in (ACTIVE, ENDING) else "failed", n, reason)


def _activity(facts: RunFacts, seen: SchedulerView) -> str:
    """What an active job does, for ``RunState.reason``; empty if it simply trains."""
    if facts.cancelled:
        return "%s: it saves and stops" % facts.cancelled
    if seen.kind == ENDING:
        return seen.reason or ("stop requested" if facts.open else "ending")
    if facts.open and facts.stop_requested:
        return "stop requested"
    if seen.reason:
        return seen.reason
    if facts.open:
        return facts.warnings
    if facts.end is not None and facts.end.get("remedy"):
        return str(facts.end["remedy"])
    return "starting"


def _idle(facts: RunFacts, seen: SchedulerView) -> RunState:
    """Queued, or waiting if an attempt of this submission has ended."""
    reason = _last_reason(facts)
    if facts.open and not seen.evidence:
        if facts.time_limit:
            reason = LIMIT_REASON
        else:
            reason = UNSEEN_REASON
    elif facts.end is not None and facts.end["delay"] > 0 and not seen.reason:
        reason += "; starts again %g s after that" % facts.end["delay"]
    why = "; ".join(filter(None, [reason, seen.evidence, seen.reason]))
    return RunState("waiting" if facts.started else "queued", facts.attempt, why, seen.start, needs=seen.needs)


def _stopped(facts: RunFacts, seen: SchedulerView) -> RunState:
    """Stopped: no scheduler has a job of this run, and nothing starts it again."""
    evidence = ""
    if facts.open or not facts.started:
        evidence = seen.evidence
    gone = "; ".join(filter(None, [_last_reason(facts), seen.reason, evidence]))
    return RunState("stopped", facts.attempt, "%s: submit again" % gone, resubmit=True)


def _last_reason(facts: RunFacts) -> str:
    """Why the newest attempt has ended, as recorded; empty if it is not recorded."""
    if facts.end is None or facts.open:
        return ""
    return str(facts.end["reason"])


def _job(seen: SchedulerView) -> str:
    """What ``canary.Wait.job`` calls the state of the job: queued, held or gone."""
    return {QUEUED: "queued", HELD: canary.JOB_HELD}.get(seen.kind, "gone")


# -- the files ---------------------------------------------------------------------------------------------------------


def read_run_facts(run: RunDir) -> RunFacts:
    """What the files of a run prove. Raises one of UNREADABLE."""
    n = run.newest_attempt()
    if is_complete(run):
        return RunFacts(complete=True, attempt=n)  # whatever other files say, and if they are damaged
    job = read_record(run.path / "job.json")
    record: Dict[str, Any] = job or {}
    cancelled = ""
    if exists(run.cancel):
        cancelled = attempts.cancel_reason(run)
    if is_copy(run, record):
        return RunFacts(copied=True, cancelled=cancelled, attempt=n)
    after = record.get("after", 0)
    started = n > after
    is_open = started and not exists(run.attempt(n) / "end.json")
    facts = RunFacts(
        present=job is not None or exists(run.path),
        submitted=job is not None,
        cancelled=cancelled,
        attempt=n,
        started=started,
        open=is_open,
        end=attempts.current_end(run, after),
    )
    if is_open:
        facts = facts._replace(
            stop_requested=run.stop_requested(n),
            time_limit=run.hit_time_limit(n),
            warnings=_limit_warnings(run, n),
        )
    first = canary.awaited(run, record)
    if first is None:
        return facts
    return facts._replace(
        waits_for=first.name,
        released=canary.is_released(run, record, first),
        current=canary.is_current(first, record),
    )


def _limit_warnings(run: RunDir, n: int) -> str:
    limit = wall_limit.recorded_limit(run, n)
    if not limit:
        return ""
    return "; ".join(filter(None, [wall_limit.why_lowered(run, limit), wall_limit.why_too_short(run, limit)]))


def is_complete(run: RunDir) -> bool:
    """Whether result.json exists. A damaged one raises ValueError, which names it and the remedy."""
    try:
        return read_record(run.result) is not None
    except ValueError as error:
        remedy = "Delete it and submit again: the run resumes at its end and writes it again"
        raise ValueError("%s. %s" % (error, remedy)) from error


def awaited_canaries(runs: Iterable[RunDir]) -> Dict[Path, RunDir]:
    """Path of a run -> the canary for which it waits. Damaged records count as none: the state reports them."""
    canaries: Dict[Path, RunDir] = {}
    for run in runs:
        try:
            first = canary.awaited(run, read_record(run.path / "job.json") or {})
        except UNREADABLE:
            continue
        if first is not None:
            canaries[run.path] = first
    return canaries


def states(runs: Iterable[RunDir], seen: Mapping[Path, SchedulerView]) -> Dict[Path, RunState]:
    """Path of a run -> its state.

    ``seen``: what schedulers show, also of the canaries of runs that wait (``awaited_canaries``). Ask them before this
    call, which reads the files: if a job ends in between, its files already have the end.
    """
    canaries: Dict[Path, RunState] = {}
    return {run.path: _read_state(run, seen, canaries) for run in runs}


def _read_state(run: RunDir, seen: Mapping[Path, SchedulerView], canaries: Optional[Dict[Path, RunState]]) -> RunState:
    """``canaries``: the states of canaries so far; None for a canary itself, which waits for none."""
    shown = seen.get(run.path, NOT_ASKED)
    try:
        facts = read_run_facts(run)
        if not facts.waits_for or canaries is None:
            return state_of(facts, shown)
        first = RunDir(run.path.parent / facts.waits_for)
        if first.path not in canaries:
            canaries[first.path] = _read_state(first, seen, None)
        shown_of_first = seen.get(first.path, NOT_ASKED)
        has_job = shown_of_first.kind in (QUEUED, HELD, ACTIVE, ENDING)
        return state_of(facts, shown, canaries[first.path], has_job)
    except UNREADABLE as error:
        return damaged_state(_newest(run), error, run.path, shown)


def _newest(run: RunDir) -> int:
    try:
        return run.newest_attempt()
    except OSError:
        return 0
