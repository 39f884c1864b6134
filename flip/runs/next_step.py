"""Decides what follows for a job or a run: ``next_step``, a pure function, and the only place in Python that does.

Without Python, the fallback of the batch script counts starts by itself. Callers may replace the delay of a step.

| known | step |
|---|---|
| the run is complete or cancelled, or has failed in a way that only a person can fix | done, stop |
| an attempt has ended by something that may pass | here, or requeue (see below) |
| the scheduler has requeued the job, or a cancel cannot be excluded | leave |
| the scheduler ends the job while ranks run, or the process that owns the job was killed | requeue, or leave |
| a start of the job could not read or write its run | requeue, at most MAX_FAILED_STARTS in a row |

A restart in the allocation that the run still holds (here) takes seconds. A requeue takes minutes of queue and
start-up, but gets other nodes, new processes and a new wall limit:

| cause | place |
|---|---|
| any, with the wall limit near | requeue: less time is left than a start and a save take, or 600 s |
| stopped, timeout | requeue: Slurm or a user wants the nodes back, or the allocation is used up |
| crash, hang, port | here for the first failure since a checkpoint; the second is requeued, to get other nodes |
| storage | here if the wait is at most 120 s; else requeue, so that no nodes are held for nothing |
| node, or nodes to exclude | here, without those nodes, if enough others are left; else requeue |

A restart here needs a number of nodes with which the run can go on: that of its submission, of which spare nodes
make up for lost ones, or a smaller one of its range whose world size divides the lanes. On fewer nodes than a requeue
would bring it goes on only if that costs less than a requeue now (``why_too_slow``). On one machine no queue exists:
here then means the node agent that is running, and requeue a new one.

``restart_policy.decide`` classifies the cause and counts. Standard library, Python >= 3.6.
"""

from typing import Any, Collection, Dict, Mapping, NamedTuple, Optional, Sequence, Tuple

from flip.runs.bad_nodes import NODE_SUSPECT_CAUSES
from flip.runs.restart_policy import UNKNOWN, Decision, EndFacts, Limits, decide, since_checkpoint

DONE = "done"
HERE = "here"  # the next attempt starts in the allocation that the run still holds
REQUEUE = "requeue"
STOP = "stop"  # for good
LEAVE = "leave"  # another process starts the next attempt, or none may

#: Causes of which the first without a new checkpoint restarts here.
ONCE = ("crash", "hang", "port")

#: Causes that count as a failure before: a timeout, too, made no progress.
FAILED = ONCE + ("timeout",)

#: Longest wait in seconds for which an allocation is held.
LONGEST_WAIT = 120.0

#: A wall limit that is nearer than this, in seconds, leaves no time to start, train and save.
NEAR_WALL_LIMIT = 600.0

#: Seconds that a requeue takes at least: queue, start-up, restore.
LEAST_REQUEUE = 600.0

#: Failed starts of a job in a row after which it is given up: two days, if each waits REQUEUE_DELAY (half an hour).
MAX_FAILED_STARTS = 100

LIMITS = Limits()

#: The next start waits for this many seconds times the number of failed starts before this one.
FAILED_START_DELAY = 60.0


class Allocation(NamedTuple):
    """What a run still holds when its attempt has ended; by default nothing."""

    nodes: int = 0
    """Nodes of the job that could start ranks."""
    usable: Sequence[int] = ()
    """Numbers of nodes with which the run can go on."""
    seconds_left: Optional[float] = None
    """Until the wall limit; None: none, or unknown."""
    nodes_after_requeue: int = 0
    """With which the run would go on after a requeue; 0: unknown."""
    queued: float = 0.0
    """Seconds for which this start of the job waited in the queue: the best guess for the next one."""
    seconds_needed: float = 0.0
    """Measured seconds from a start to its first step, and of a save; 0: unknown."""
    held: Optional[Collection[str]] = None
    """Names of ``nodes``; None: unknown."""
    excluded: Collection[str] = ()
    """Names of nodes that are not used any more; some may have left the job."""
    refusal: str = ""
    """Why no attempt may start here, as a sentence; empty: one may."""


NOTHING_HELD = Allocation()


class Evidence(NamedTuple):
    """What is known of a start of a job, or of the end of its attempt."""

    end: EndFacts
    causes: Sequence[Dict[str, Any]] = ()
    """The records that the processes of the attempt left (rundir.causes)."""
    history: Sequence[Dict[str, Any]] = ()
    """Earlier ends that count, oldest first: rows with ``cause`` and ``committed``."""
    complete: bool = False
    """Whether result.json exists."""
    cancelled: bool = False
    """Whether cancel.json exists."""
    progressed: bool = False
    """Whether the attempt saved a new checkpoint."""
    superseded: bool = False
    """Whether another process has started an attempt after it."""
    suspect: Tuple[str, str] = ("", "")
    """A node to exclude if the attempt failed, and the run that failed there too (``bad_nodes``)."""
    is_over: bool = True
    """False: ranks may still run, or the end was not seen; the next start records it."""
    failed_starts: Optional[int] = None
    """Starts in a row that failed before this one, which has failed; None: it has not."""


class Step(NamedTuple):
    """What follows."""

    do: str
    """DONE, HERE, REQUEUE, STOP or LEAVE."""
    cause: str
    reason: str
    delay: float = 0.0
    """Seconds until the next start."""
    exclude: Tuple[str, ...] = ()
    """Names of nodes that the next start avoids."""
    nodes: int = 0
    """On how many nodes the next attempt starts, if here."""
    place: str = ""
    """Why here or not, as a sentence; empty if nothing restarts."""

    @property
    def action(self) -> str:
        """The word of end.json: done, requeue, stop or nothing."""
        return {HERE: "requeue", LEAVE: "nothing"}.get(self.do, self.do)


def next_step(evidence: Evidence, allocation: Allocation = NOTHING_HELD, limits: Limits = LIMITS) -> Step:
    """What follows from what is known of a job, and of what it holds."""
    if evidence.failed_starts is not None:
        return _after_failed_start(evidence, evidence.failed_starts)
    if not evidence.is_over:
        return _before_the_end(evidence)
    if evidence.superseded:
        return Step(LEAVE, "node", "another process has continued the run")
    decision = decide(
        list(evidence.causes),
        evidence.end,
        list(evidence.history),
        limits,
        evidence.complete,
        evidence.cancelled,
        evidence.progressed,
    )
    decision = _without_suspect(decision, *evidence.suspect)
    if decision.action != "requeue":
        do = {"nothing": LEAVE}.get(decision.action, decision.action)
        return Step(do, decision.cause, decision.reason, decision.delay, decision.exclude)
    place, nodes = _place(decision, evidence, allocation)
    do = HERE if nodes else REQUEUE
    return Step(do, decision.cause, decision.reason, decision.delay, decision.exclude, nodes, place)


def recorded_step(row: Mapping[str, Any]) -> Step:
    """The step that an end.json records. Where the next attempt started stands in the next start.json."""
    do = {"nothing": LEAVE}.get(row["action"], row["action"])
    return Step(do, row["cause"], row["reason"], row["delay"], tuple(row.get("exclude", ())))


def _after_failed_start(evidence: Evidence, before: int) -> Step:
    reason = "start %d in a row without access to the run" % (before + 1)
    if "CANCELLED" in evidence.end.states:
        return Step(LEAVE, "cancelled", reason)
    if before >= MAX_FAILED_STARTS:
        return Step(LEAVE, "storage", reason)
    return Step(REQUEUE, "storage", reason, FAILED_START_DELAY * before)


def _before_the_end(evidence: Evidence) -> Step:
    """The job ends around its ranks, or its owner was killed: the next start records what became of the ranks."""
    states = evidence.end.states
    if evidence.complete:
        return Step(LEAVE, "complete", "the run is complete")
    if evidence.cancelled:
        return Step(LEAVE, "cancelled", "the run was cancelled")
    if not states or states & {UNKNOWN, "PENDING", "CANCELLED"}:
        return Step(LEAVE, "node", "the state of the job: %s" % (evidence.end.state or "no answer"))
    if "TIMEOUT" in states:
        return Step(REQUEUE, "timeout", "the wall limit came before the end of the attempt")
    if "PREEMPTED" in states:
        return Step(REQUEUE, "stopped", "a preemption came before the end of the attempt")
    return Step(REQUEUE, "node", "the attempt was cut off: %s" % evidence.end.state)


def _without_suspect(decision: Decision, node: str, other: str) -> Decision:
    """The decision, which also excludes ``node`` if an attempt that failed there is retried. ``other``: the run that
    failed there too."""
    suspicious = decision.action == "requeue" and decision.cause in NODE_SUSPECT_CAUSES
    if not node or not suspicious or node in decision.exclude:
        return decision
    reason = "%s; without %s from now on, where %s failed as well" % (decision.reason, node, other)
    return decision._replace(reason=reason, exclude=decision.exclude + (node,))


def _place(decision: Decision, evidence: Evidence, allocation: Allocation) -> Tuple[str, int]:
    """(why; on how many nodes of this allocation the next attempt starts, 0: after a requeue)."""
    if allocation.refusal:
        return allocation.refusal, 0
    left = allocation.seconds_left
    needed = max(NEAR_WALL_LIMIT, allocation.seconds_needed)
    if left is not None and left - decision.delay < needed:
        return "the wall limit comes in %d s, and an attempt needs %d s" % (max(0, left), needed), 0
    reason = _reason_to_leave(decision, evidence)
    if reason:
        return reason, 0
    nodes = _count_nodes(allocation, decision.exclude)
    fitting = [count for count in allocation.usable if count <= nodes]
    if not fitting:
        needed_nodes = min(allocation.usable, default=1)
        return "%d nodes are left, and %d are needed" % (nodes, needed_nodes), 0
    reason = why_too_slow(max(fitting), allocation)
    if reason:
        return reason, 0
    return "%s: in this allocation" % decision.cause, max(fitting)


def _count_nodes(allocation: Allocation, exclude: Sequence[str]) -> int:
    """Nodes of the allocation without those that are excluded, some of which the scheduler may have taken away, too."""
    excluded = set(allocation.excluded) | set(exclude)
    if not excluded:
        return allocation.nodes
    if allocation.held is None:
        return allocation.nodes - len(excluded)
    return len(set(allocation.held) - excluded)


def _reason_to_leave(decision: Decision, evidence: Evidence) -> str:
    """Why the cause alone forbids a restart here; empty if it does not."""
    cause = decision.cause
    if cause in ONCE:
        earlier = sum(row["cause"] in FAILED for row in since_checkpoint(list(evidence.history), evidence.progressed))
        if evidence.progressed or not earlier:
            return ""
        return "failure %d without a new checkpoint" % (earlier + 1)
    if cause == "storage":
        if decision.delay <= LONGEST_WAIT:
            return ""
        return "storage is tried again in %g s" % decision.delay
    if cause == "node":
        return ""
    return "%s: the allocation ends" % cause


def why_too_slow(nodes: int, allocation: Allocation) -> str:
    """Why a run does not go on with this number of nodes; empty if it does.

    The lost nodes are missing until the next requeue, which comes at the wall limit: that time is compared with a
    requeue now, after which the job may have all nodes. Speed is taken to be proportional to the number of nodes.
    """
    most = allocation.nodes_after_requeue
    left = allocation.seconds_left
    if nodes >= most or left is None:
        return ""
    lost = left * (most - nodes) / most
    requeue = max(LEAST_REQUEUE, allocation.queued)
    if lost < requeue:
        return ""
    text = "%d of %d nodes would lose %d s until the wall limit, and a requeue about %d s"
    return text % (nodes, most, lost, requeue)
