"""Decides what follows from the end of an attempt: ``decide`` (docs/contracts.md, Causes and exit codes).

Standard library, Python >= 3.6. ``decide`` is a pure function: files and clocks are read by ``jobs.host.attempts``.
The patterns at the top classify the message of a crash. Add a message that belongs to one of them there, and as an
example to the test.
"""

import re
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

from flip.runs.errors import CAUSES, PRECEDENCE

#: The port of the rendezvous was free when the launcher looked, and taken when rank 0 wanted it.
PORT_TAKEN = re.compile("EADDRINUSE|address already in use", re.IGNORECASE)

#: The cards of one node, or their driver (CUDA's and PyTorch's words): it may go well on another one. Errors that a
#: kernel's mistake causes as well, such as an illegal access or a launch failure, are not among them.
HARDWARE = re.compile(
    "uncorrectable (ECC|NVLink) error"
    "|or a hardware error"
    "|no CUDA-capable device is detected"
    "|No CUDA GPUs are available"
    "|CUDA-capable device\\(s\\) is/are busy or unavailable"
    "|system not yet initialized"
    "|CUDA driver initialization failed"
    "|Found no NVIDIA driver on your system"
    "|GPU is lost|fallen off the bus",
    re.IGNORECASE,
)

#: gloo's and NCCL's words for a peer that is gone.
PEER_GONE = re.compile(
    "Connection closed by peer|Connection reset by peer|Broken pipe|remote process exited", re.IGNORECASE
)

#: Causes that only a person can mend.
FINAL = ("config", "permission", "data", "diverged")
#: A few of these without progress stop the run. ``timeout``: no clean stop in time.
FAILURES = ("crash", "hang", "timeout")
#: Causes with an allowance of their own (see Limits).
OWN_LIMITS = {"port": "ports", "node": "nodes"}

#: State given by a launcher that was itself told to end: nothing starts again until somebody submits.
LAUNCHER_STOPPED = "LEAVING"
#: State given by a launcher that had told the ranks to save and stop before they ended.
STOP_REQUESTED = "TOLD"
#: State given where nobody saw how the job ended, or the scheduler's state is not a known one.
UNKNOWN = "UNSEEN"

DAY = 24 * 3600


class Limits(NamedTuple):
    """How often a cause may repeat without a new commit. Delays double from ``first`` to ``longest``, in seconds."""

    failures: int = 3
    ports: int = 10
    """Ports taken by somebody else: bad luck, but not for ever."""
    nodes: int = 10
    """Attempts that ended unseen: most are preempted before they listen, some kill their node each time."""
    unstarted: int = 3
    """From this many preemptions in a row without a commit on, the next start waits."""
    unstarted_first: float = 60.0
    unstarted_longest: float = 3600.0
    storage_first: float = 30.0
    storage_longest: float = 1800.0
    storage_total: float = DAY
    """Storage is waited for until the waits add up to this."""


class Decision(NamedTuple):
    """``action``: done, requeue (after ``delay`` seconds, without hosts ``exclude``), stop (for good) or nothing."""

    action: str
    cause: str
    reason: str
    delay: float = 0.0
    exclude: tuple = ()


def decide(
    causes: List[Dict[str, Any]],
    code: Optional[int],
    state: Optional[str],
    history: List[Dict[str, Any]],
    limits: Limits,
    complete: bool,
    cancelled: bool,
    committed: bool,
    told: bool = False,
    late: Union[bool, str] = False,
    unstarted: Sequence[str] = (),
) -> Decision:
    """What to do after an attempt.

    ``causes``: what its processes left (rundir.causes). ``code``: its exit code, None where nobody saw it end.
    ``state``: the scheduler's words for the job, None where they could not be read. ``history``: ends of the earlier
    attempts that count, oldest first: rows with ``cause`` and ``committed``. ``complete``: result.json exists.
    ``cancelled``: cancel.json exists. ``committed``: this attempt made a new commit. ``told``: told.json exists.
    ``late``: it had its whole wall limit, but for the time to save; True, or that in words. ``unstarted``: nodes that
    could start no rank of it.
    """
    words = set(re.findall("[A-Z_]+", (state or "").upper()))
    if complete:
        return Decision("done", "complete", "complete")
    if cancelled or "CANCELLED" in words:
        return Decision("stop", "cancelled", "cancelled")
    cause, reason = root_cause(causes, code, words, told, unstarted)
    if cause in ("stopped", "timeout") and late and not committed:  # a preemption is waited out, this repeats
        whole = late if isinstance(late, str) else "it had its whole wall limit, and nothing new was kept"
        cause, reason = "timeout", "%s; %s: give it more hours" % (reason, whole)
    decision = _by_cause(cause, reason, history, limits, committed)
    if decision.action != "requeue":
        return decision
    if "PENDING" in words:
        return decision._replace(action="nothing", reason=reason + "; the scheduler has requeued it already")
    if LAUNCHER_STOPPED in words:
        return decision._replace(action="nothing", delay=0.0, reason=reason + "; the launcher was told to end")
    unread = not words or (words == {UNKNOWN} and code is not None)  # without a code: the job was started again since
    if unread and _told_to_end(causes, code):
        # scancel and preemption both send TERM: a requeue could raise a cancelled job from the dead
        return decision._replace(action="nothing", reason=reason + "; the job's state could not be read")
    crashes = [c for c in causes if c["cause"] == "crash" and c.get("host")]
    hosts = {str(c["host"]) for c in crashes if HARDWARE.search(str(c.get("reason", "")))}
    if cause == "node":  # a rank that had begun, and says why it ends with such a code, says nothing of its node
        hosts.update(unstarted)
    return decision._replace(exclude=tuple(sorted(hosts)))


def root_cause(
    causes: List[Dict[str, Any]],
    code: Optional[int],
    words: Set[str],
    told: bool = False,
    unstarted: Sequence[str] = (),
) -> Tuple[str, str]:
    """(cause, reason): a root cause beats its echoes by class, never by clock; codes and states are hints."""
    root = _first_by_class(causes)
    # how ranks end that waited for those of a node that started none is no cause
    echoes = ("crash", "hang", "stopped") if unstarted else ("crash",)
    if root and root["cause"] not in echoes:
        return root["cause"], _told_by(root)
    if words & {"NODE_FAIL", "BOOT_FAIL"}:
        return "node", "the node failed"
    if UNKNOWN in words and code is None:  # what looks like a crash may be a rank that lost its peers with their node
        return "node", "ended unseen: its host or its launcher went away"
    if "PENDING" in words:  # what looks like a crash then is a rank that was cut off, or the peer of one
        return "stopped", "preempted, or its node failed, before a clean stop"
    if unstarted:
        return "node", "no rank could be started on %s: the mount or the interpreter is missing" % ", ".join(unstarted)
    if root:
        taken = any(c["cause"] == "crash" and PORT_TAKEN.search(str(c.get("reason", ""))) for c in causes)
        return "port" if taken else "crash", _told_by(root)
    if STOP_REQUESTED in words and code in (None, 137, 143):
        return "stopped", "killed: told to save and stop, it did not do so in time"
    if "TIMEOUT" in words:
        return "timeout", "the wall limit came before a clean stop"
    if "PREEMPTED" in words:
        return "stopped", "preempted before a clean stop"
    if "OUT_OF_MEMORY" in words:
        return "crash", "out of memory (killed by the scheduler)"
    if code is None:
        return "node", "ended unseen: its host or its launcher went away"
    if not words - {UNKNOWN} and any(c["cause"] == "peer_lost" for c in causes):
        if told:
            return "stopped", "told to save and stop, but a rank went away before it had"
        return "node", "a rank went away unseen, and nobody says what became of the job: a network, or a node"
    if code == 0:
        return "crash", "ended with 0, but there is no result.json"
    named = {number: name for name, number in CAUSES.items() if name not in ("complete", "peer_lost")}
    if code in named and named[code] != "crash":
        return named[code], "exit code %d, without a cause file" % code
    return "crash", _killed_by(code)


def _first_by_class(causes: List[Dict[str, Any]]) -> Optional[Dict[str, Any]]:
    """The root among the causes; a cause of no known class is a crash. Echoes and ``complete`` explain no bad end."""
    for name in PRECEDENCE:
        if name not in ("complete", "peer_lost"):
            for record in causes:
                known = record["cause"] if record["cause"] in PRECEDENCE else "crash"
                if known == name:
                    return dict(record, cause=name)
    return None


def _told_by(record: Dict[str, Any]) -> str:
    who = record.get("by") or "rank %s" % record.get("rank", "?")
    return "%s: %s" % (who, record.get("reason") or record["cause"])


def _killed_by(code: int) -> str:
    if 128 < code < 160:
        hint = ", as the kernel does when memory runs out" if code == 137 else ""
        return "killed by signal %d%s" % (code - 128, hint)
    return "exit code %d, without a cause file" % code


def _told_to_end(causes: List[Dict[str, Any]], code: Optional[int]) -> bool:
    """Whether it was TERM that ended the job. The warning signal (USR2) comes from limits and preemption alone."""
    stops = [c for c in causes if c["cause"] == "stopped"]
    warned = any("USR2" in str(c.get("signal", "")) for c in stops)
    return (code == 143 or code == 75 or bool(stops)) and not warned


def _by_cause(cause: str, reason: str, history: List[Dict[str, Any]], limits: Limits, committed: bool) -> Decision:
    if cause in FINAL:
        return Decision("stop", cause, reason)
    since = _since_commit(history, committed)
    if cause == "stopped":
        return Decision("requeue", cause, reason, _unstarted_delay(history, limits, committed))
    if cause == "storage":
        tries = 1 + sum(row["cause"] == "storage" for row in since)
        waits = [backoff(i, limits.storage_first, limits.storage_longest) for i in range(tries)]
        if sum(waits[:-1]) >= limits.storage_total:
            remedy = "gave up after %d tries without a new commit; see that storage answers, then submit with --retry"
            return Decision("stop", cause, "%s; %s" % (reason, remedy % tries))
        return Decision("requeue", cause, reason, waits[-1])
    alike, most = ((cause,), getattr(limits, OWN_LIMITS[cause])) if cause in OWN_LIMITS else (FAILURES, limits.failures)
    failures = sum(row["cause"] in alike for row in since) + (not committed)
    if failures >= most:
        remedy = "%d failed attempts without a new commit; read the logs, mend the cause, then submit with --retry"
        return Decision("stop", cause, "%s; %s" % (reason, remedy % failures))
    return Decision("requeue", cause, reason)


def _since_commit(history: List[Dict[str, Any]], committed: bool) -> List[Dict[str, Any]]:
    """The earlier attempts after the last one that made progress."""
    since: List[Dict[str, Any]] = []
    for row in history:
        since = [] if row["committed"] else since + [row]
    return [] if committed else since


def _unstarted_delay(history: List[Dict[str, Any]], limits: Limits, committed: bool) -> float:
    """Wait before the next start when preemption came before the first commit several times in a row."""
    in_a_row = 0 if committed else 1
    for row in reversed(history if in_a_row else []):
        if row["committed"] or row["cause"] != "stopped":
            break
        in_a_row += 1
    if in_a_row < limits.unstarted:
        return 0.0
    return backoff(in_a_row - limits.unstarted, limits.unstarted_first, limits.unstarted_longest)


def backoff(i: int, first: float, longest: float) -> float:
    """Delay number i = 0, 1, ...: doubles from ``first`` to ``longest``."""
    return float(min(longest, first * 2 ** min(i, 60)))
