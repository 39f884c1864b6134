"""Decides where the next attempt starts: ``where``, a pure function that follows ``restart_policy.decide``.

``decide`` says whether a run restarts. A restart in the allocation that the run still holds takes seconds; a requeue
takes minutes of queue and start-up, but gets other nodes, new processes and a new wall limit:

| action and cause | place |
|---|---|
| done, stop, nothing | leave: there is no restart, or another process starts it |
| any cause with the wall limit near | requeue: the attempt would be cut off at once |
| stopped, timeout | requeue: Slurm or a user wants the nodes back, or the allocation is used up |
| crash, hang, port | here for the first failure since a commit; the second is requeued, to get other nodes |
| storage | here if the wait is at most 120 s; else requeue, so that no nodes are held for nothing |
| node, or nodes to exclude | here, without those nodes, if enough others are left; else requeue |

Whatever the cause, a restart here needs a number of nodes with which the run can go on: that of its submission, of
which spare nodes make up for lost ones, or a smaller one of its range whose world size divides the lanes. On
fewer nodes than a requeue would bring it goes on only if that costs less than a requeue now (``too_slow``).

On one machine no queue exists: ``here`` then means the node agent that is running, and ``requeue`` a new one.
Standard library, Python >= 3.6.
"""

from typing import Any, Dict, NamedTuple, Optional, Sequence

from flip.runs.restart_policy import Decision, since_commit

HERE = "here"
REQUEUE = "requeue"
LEAVE = "leave"

#: Causes of which the first without a new commit restarts here.
ONCE = ("crash", "hang", "port")

#: Causes that count as a failure before: a timeout, too, made no progress.
FAILED = ONCE + ("timeout",)

#: Longest wait in seconds for which an allocation is held.
LONGEST_WAIT = 120.0

#: A wall limit that is nearer than this, in seconds, leaves no time to start, train and save.
NEAR_WALL_LIMIT = 600.0


#: Seconds that a requeue takes at least: queue, start-up, restore.
LEAST_REQUEUE = 600.0


class Allocation(NamedTuple):
    """What a run still holds when its attempt has ended."""

    nodes: int
    """Nodes that can start ranks, without those that were lost or are to be excluded."""
    usable: Sequence[int]
    """Numbers of nodes with which the run can go on."""
    seconds_left: Optional[float] = None
    """Until the wall limit; None: none, or unknown."""
    nodes_after_requeue: int = 0
    """With which the run would go on after a requeue; 0: unknown."""
    queued: float = 0.0
    """Seconds for which this start of the job waited in the queue: the best guess for the next one."""


class Place(NamedTuple):
    """``place``: HERE, REQUEUE or LEAVE. ``nodes``: on how many nodes, if here."""

    place: str
    reason: str
    nodes: int = 0


def where(decision: Decision, committed: bool, history: Sequence[Dict[str, Any]], allocation: Allocation) -> Place:
    """Where the next attempt starts.

    Args:
        decision: what ``decide`` returned for the attempt that has ended.
        committed: whether that attempt made a new commit.
        history: earlier ends that count, oldest first, as for ``decide``: rows with ``cause`` and ``committed``.
        allocation: what is left of the nodes and of the time.
    """
    if decision.action != "requeue":
        return Place(LEAVE, "no restart from here: %s" % decision.action)
    left = allocation.seconds_left
    if left is not None and left - decision.delay < NEAR_WALL_LIMIT:
        return Place(REQUEUE, "the wall limit comes in %d s" % max(0, left))
    reason = _reason_to_leave(decision, committed, history)
    if reason:
        return Place(REQUEUE, reason)
    fitting = [count for count in allocation.usable if count <= allocation.nodes]
    if not fitting:
        needed = min(allocation.usable, default=1)
        return Place(REQUEUE, "%d nodes are left, and %d are needed" % (allocation.nodes, needed))
    reason = too_slow(max(fitting), allocation)
    if reason:
        return Place(REQUEUE, reason)
    return Place(HERE, "%s: in this allocation" % decision.cause, max(fitting))


def too_slow(nodes: int, allocation: Allocation) -> str:
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


def _reason_to_leave(decision: Decision, committed: bool, history: Sequence[Dict[str, Any]]) -> str:
    """Why the cause alone forbids a restart here; empty if it does not."""
    cause = decision.cause
    if cause in ONCE:
        earlier = sum(row["cause"] in FAILED for row in since_commit(list(history), committed))
        if committed or not earlier:
            return ""
        return "failure %d without a new commit" % (earlier + 1)
    if cause == "storage":
        if decision.delay <= LONGEST_WAIT:
            return ""
        return "storage is tried again in %g s" % decision.delay
    if cause == "node":
        return ""
    return "%s: the allocation ends" % cause
