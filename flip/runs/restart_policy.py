"""Decides what follows from the end of an attempt: ``decide`` (docs/restarts.md, Causes and exit codes).

``decide`` is a pure function; ``flip.runs.attempts`` reads files and clocks. The patterns below classify the message of
a crash. Add a new message to its pattern, and as an example to the test.
"""

import re
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

from flip.runs.errors import CAUSES, COMPLETE, KILLED, NODE_LOST, PRECEDENCE, STOPPED, STORAGE, TERMINATED, UNSTARTED

#: The port of the rendezvous was free when the launcher checked, but not when rank 0 opened it.
PORT_TAKEN = re.compile("EADDRINUSE|address already in use", re.IGNORECASE)

#: Faults of one node's GPUs, driver or software, in the words of CUDA, PyTorch and flip.common.gpu_software. Errors
#: that a faulty kernel causes as well, such as an illegal access or a launch failure, are not among them.
HARDWARE = re.compile(
    "uncorrectable (ECC|NVLink) error|or a hardware error|no CUDA-capable device is detected|No CUDA GPUs are available"
    r"|CUDA-capable device\(s\) is/are busy or unavailable|system not yet initialized|CUDA driver initialization failed"
    "|Found no NVIDIA driver on your system|GPU is lost|fallen off the bus"
    "|NVIDIA driver on (your|this) system is too old|Triton cannot build its library",
    re.IGNORECASE,
)

#: gloo and NCCL report a peer that is gone.
PEER_GONE = re.compile(
    "Connection closed by peer|Connection reset by peer|Broken pipe|remote process exited", re.IGNORECASE
)

FINAL = ("config", "permission", "data", "diverged")  # causes that only a person can fix
FAILURES = ("crash", "hang", "timeout")  # a few of these without progress stop the run; timeout: no clean stop in time
OWN_LIMITS = {"port": "ports", "node": "nodes"}  # causes with a limit of their own (see Limits)

#: States that launchers pass and end.json stores. The launcher itself was asked to end, so nothing restarts before the
#: next submission:
LAUNCHER_STOPPED = "LEAVING"
#: A stop request reached the ranks before they ended. The word of end.json:
STOP_REQUESTED = "TOLD"
#: The end was not observed, or Slurm's state is not known here:
UNKNOWN = "UNSEEN"

#: Exit codes of srun if it cannot reach the slurmd of a node, which was killed or has lost its network: the lowest byte
#: of Slurm's error numbers 1001 to 1003 (SLURM_COMMUNICATIONS_CONNECTION_ERROR, SEND_ERROR, RECEIVE_ERROR).
NO_SLURMD = (1001 % 256, 1002 % 256, 1003 % 256)

AGENT_LOST = "the agent of a node was lost: it was killed, or its node failed"
ENDED_UNSEEN = "ended unseen: its host or its launcher went away"

DAY = 24 * 3600


class Limits(NamedTuple):
    """How often a cause may repeat without a new checkpoint. Delays double from ``first`` to ``longest``, in
    seconds."""

    failures: int = 3
    ports: int = 10  # ports taken by other processes: bad luck, but not for ever
    nodes: int = 10  # ends that were not observed: most are early preemptions, some attempts kill their node each time
    unstarted: int = 3  # from this many preemptions in a row without a checkpoint on, the next start waits
    unstarted_first: float = 60.0
    unstarted_longest: float = 3600.0
    storage_first: float = 30.0
    storage_longest: float = 1800.0
    storage_total: float = DAY  # storage is retried until the waits add up to this


class Decision(NamedTuple):
    """``action``: done, requeue (after ``delay`` seconds, without hosts ``exclude``), stop (for good) or nothing."""

    action: str
    cause: str
    reason: str
    delay: float = 0.0
    exclude: tuple = ()


class EndFacts(NamedTuple):
    """What is known of the end of an attempt, in addition to the causes that its processes recorded.

    Attributes:
        code: its exit code, None if unknown.
        state: the scheduler's state of the job, None if it could not be read.
        stop_requested: whether told.json exists.
        limit_reason: that it used its wall limit, except for the time to save, as a sentence; "" if it did not.
        lowered_reason: that its wall limit was lowered since it was submitted, as a sentence; "" if it was not.
        unstarted: nodes that could not start any of its ranks.
        out_of_memory: nodes on which the kernel killed a rank at the memory limit of the job.
        unhealthy: node -> evidence, of nodes that failed a check before any rank started.
    """

    code: Optional[int]
    state: Optional[str]
    stop_requested: bool = False
    limit_reason: str = ""
    lowered_reason: str = ""
    unstarted: Sequence[str] = ()
    out_of_memory: Sequence[str] = ()
    unhealthy: Mapping[str, str] = {}

    @property
    def states(self) -> Set[str]:
        """The words of ``state``: Slurm may show several."""
        return set(re.findall("[A-Z_]+", (self.state or "").upper()))


def decide(
    causes: List[Dict[str, Any]],
    end: EndFacts,
    history: List[Dict[str, Any]],
    limits: Limits,
    complete: bool,
    cancelled: bool,
    progressed: bool,
) -> Decision:
    """What to do after an attempt.

    Args:
        causes: the records that its processes left (rundir.causes).
        history: earlier ends that count, oldest first: rows with ``cause`` and ``committed``.
        complete, cancelled: whether result.json and cancel.json exist.
        progressed: whether this attempt saved a new checkpoint.
    """
    if complete:
        return Decision("done", "complete", "complete")
    if cancelled or "CANCELLED" in end.states:
        return Decision("stop", "cancelled", "cancelled")
    cause, reason = root_cause(causes, end)
    if cause in ("stopped", "timeout") and end.limit_reason and not progressed:
        cause, reason = _after_whole_limit(reason, end)
    decision = _by_cause(cause, reason, history, limits, progressed)
    if decision.action != "requeue":
        return decision
    left_alone = _left_alone(decision, causes, end)
    if left_alone:
        return left_alone
    hosts = _hosts_with_broken_hardware(causes)
    if cause == "node":  # codes of ranks that did start and left a cause say nothing about their node
        hosts.update(end.unstarted, end.unhealthy)
    return decision._replace(exclude=tuple(sorted(hosts)))


def _after_whole_limit(reason: str, end: EndFacts) -> Tuple[str, str]:
    """(cause, reason) of an attempt that used its wall limit without a checkpoint: unlike a preemption this repeats."""
    reason = "%s; %s: give it more hours" % (reason, end.limit_reason)
    if end.lowered_reason:  # as free as a preemption, but it waits longer each time
        return "stopped", "%s; %s" % (reason, end.lowered_reason)
    return "timeout", reason


def _left_alone(decision: Decision, causes: List[Dict[str, Any]], end: EndFacts) -> Optional[Decision]:
    """The decision in place of a requeue if this process must not requeue the job, else None."""
    states = end.states
    nothing = decision._replace(action="nothing")
    if "PENDING" in states:
        return nothing._replace(reason=decision.reason + "; the scheduler has requeued it already")
    if LAUNCHER_STOPPED in states:
        return nothing._replace(delay=0.0, reason=decision.reason + "; the launcher was asked to end")
    unread = not states or (states == {UNKNOWN} and end.code is not None)  # without a code the job was restarted since
    if unread and _ended_by_term(causes, end.code):
        # scancel and preemption both send TERM: a requeue could revive a cancelled job
        return nothing._replace(reason=decision.reason + "; the job's state could not be read")
    return None


def _hosts_with_broken_hardware(causes: List[Dict[str, Any]]) -> Set[str]:
    crashes = [c for c in causes if c["cause"] == "crash" and c.get("host")]
    return {str(c["host"]) for c in crashes if HARDWARE.search(str(c.get("reason", "")))}


def root_cause(causes: List[Dict[str, Any]], end: EndFacts) -> Tuple[str, str]:
    """(cause, reason): a root cause beats its echoes by class, never by clock; codes and states are hints."""
    code = end.code
    states = end.states
    root = _first_by_class(causes)
    # ranks that waited for those of a node that started none end with causes that are only echoes
    echoes = ["crash"]
    if end.unstarted:
        echoes += ["hang", "stopped"]
    if root and root["cause"] not in echoes:
        return root["cause"], _describe(root)
    lost = _unhealthy_nodes(end) or _lost_job(states, code) or _bad_nodes(end)
    if lost:
        return lost
    if root:
        taken = any(c["cause"] == "crash" and PORT_TAKEN.search(str(c.get("reason", ""))) for c in causes)
        return "port" if taken else "crash", _describe(root)
    is_unread = not states - {UNKNOWN} and code is not None
    if is_unread and end.stop_requested:  # its launcher would know, too
        states = states | {STOP_REQUESTED}
    by_state = _named_by_state(states, code)
    if by_state:
        return by_state
    if is_unread and any(c["cause"] == "peer_lost" for c in causes):
        if end.stop_requested:
            return "stopped", "asked to save and stop, but a rank was lost before it had"
        return "node", "a rank was lost, and the state of the job is unknown: a network, or a node"
    return _named_by_code(code)


def _lost_job(states: Set[str], code: Optional[int]) -> Optional[Tuple[str, str]]:
    """(cause, reason) if a node or the job itself went away under the ranks: their crashes are then echoes."""
    if states & {"NODE_FAIL", "BOOT_FAIL"}:
        return "node", "the node failed"
    if UNKNOWN in states and code is None:  # a crash may be a rank that lost its peers with their node
        return "node", ENDED_UNSEEN
    if "PENDING" in states:  # a crash then is a rank that was cut off, or a peer of one
        return "stopped", "preempted, or its node failed, before a clean stop"
    if code == NODE_LOST and not _named_by_state(states, code):  # else Slurm has ended the job on all nodes
        return "node", AGENT_LOST
    return None


def _unhealthy_nodes(end: EndFacts) -> Optional[Tuple[str, str]]:
    """(cause, reason) if nodes have failed a check, so that no rank was started."""
    if not end.unhealthy:
        return None
    evidence = ["%s (%s)" % pair for pair in sorted(end.unhealthy.items())]
    return "node", "failed the health check before the start: %s" % ", ".join(evidence)


def _bad_nodes(end: EndFacts) -> Optional[Tuple[str, str]]:
    """(cause, reason) if the launcher knows nodes on which ranks could not start or go on."""
    if end.unstarted:
        where = ", ".join(end.unstarted)
        return "node", "no rank could be started on %s: the mount, the interpreter or slurmd is missing" % where
    if end.out_of_memory:  # causes of other ranks are then echoes
        where = ", ".join(end.out_of_memory)
        return "crash", "out of memory: a rank on %s was killed at the memory limit of the job (--mem)" % where
    return None


def _named_by_state(states: Set[str], code: Optional[int]) -> Optional[Tuple[str, str]]:
    """(cause, reason) if the scheduler's state explains an end of which no rank has recorded the cause."""
    if STOP_REQUESTED in states and code in (None, KILLED, TERMINATED):
        return "stopped", "killed: asked to save and stop, it did not do so in time"
    if "TIMEOUT" in states:
        return "timeout", "the wall limit came before a clean stop"
    if "PREEMPTED" in states:
        return "stopped", "preempted before a clean stop"
    if "OUT_OF_MEMORY" in states:
        return "crash", "out of memory (killed by the scheduler)"
    return None


def _named_by_code(code: Optional[int]) -> Tuple[str, str]:
    """(cause, reason) of an end about which nothing else is known."""
    if code is None:
        return "node", ENDED_UNSEEN
    if code == UNSTARTED:
        return "storage", "a rank could not open its log or its code"
    if code in NO_SLURMD:
        return "node", "srun could not reach Slurm's daemon (slurmd) on a node"
    if code == COMPLETE:
        return "crash", "ended with 0, but there is no result.json"
    named = {number: name for name, number in CAUSES.items() if name not in ("complete", "peer_lost")}
    if code == STORAGE:
        return (
            "storage",
            "storage failed, such as a full disk, so the cause could not be recorded (exit code %d)" % code,
        )
    if code in named and named[code] != "crash":
        return named[code], "exit code %d, without a cause file" % code
    return "crash", _killed_by(code)


def _first_by_class(causes: List[Dict[str, Any]]) -> Optional[Dict[str, Any]]:
    """The root among the causes; a cause of no known class is a crash. Echoes and ``complete`` explain no bad end."""
    known = [record if record["cause"] in PRECEDENCE else dict(record, cause="crash") for record in causes]
    roots = [record for record in known if record["cause"] not in ("complete", "peer_lost")]
    return min(roots, key=lambda record: PRECEDENCE.index(record["cause"]), default=None)


def _describe(record: Dict[str, Any]) -> str:
    who = record.get("by") or "rank %s" % record.get("rank", "?")
    return "%s: %s" % (who, record.get("reason") or record["cause"])


def _killed_by(code: int) -> str:
    if 128 < code < 160:
        hint = ""
        if code == KILLED:
            hint = ", as the kernel does when memory runs out"
        return "killed by signal %d%s" % (code - 128, hint)
    return "exit code %d, without a cause file" % code


def _ended_by_term(causes: List[Dict[str, Any]], code: Optional[int]) -> bool:
    """Whether it was TERM that ended the job. The warning signal (USR2) comes from limits and preemption alone. Ranks
    that stop without a signal have lost their agent, if they do not end with STOPPED."""
    stops = [c for c in causes if c["cause"] == "stopped" and c.get("signal") != ""]
    warned = any("USR2" in str(c.get("signal", "")) for c in stops)
    return (code in (TERMINATED, STOPPED) or bool(stops)) and not warned


def _by_cause(cause: str, reason: str, history: List[Dict[str, Any]], limits: Limits, progressed: bool) -> Decision:
    if cause in FINAL:
        return Decision("stop", cause, reason)
    since = since_checkpoint(history, progressed)
    if cause == "stopped":
        return Decision("requeue", cause, reason, _unstarted_delay(history, limits, progressed))
    if cause == "storage":
        tries = 1 + sum(row["cause"] == "storage" for row in since)
        waits = [backoff(i, limits.storage_first, limits.storage_longest) for i in range(tries)]
        if sum(waits[:-1]) >= limits.storage_total:
            remedy = (
                "gave up after %d tries without a new checkpoint; see that storage answers, then submit with --retry"
            )
            return Decision("stop", cause, "%s; %s" % (reason, remedy % tries))
        return Decision("requeue", cause, reason, waits[-1])
    if cause in OWN_LIMITS:
        alike = {cause}
        most = getattr(limits, OWN_LIMITS[cause])
    else:
        alike = {cause, *FAILURES}
        most = limits.failures
    failures = sum(row["cause"] in alike for row in since) + (not progressed)
    if failures >= most:
        remedy = "%d failed attempts without a new checkpoint; read the logs, fix the cause, then submit with --retry"
        return Decision("stop", cause, "%s; %s" % (reason, remedy % failures))
    return Decision("requeue", cause, reason)


def since_checkpoint(history: List[Dict[str, Any]], progressed: bool) -> List[Dict[str, Any]]:
    """The earlier attempts after the last one that made progress."""
    since: List[Dict[str, Any]] = []
    for row in history:
        since = [] if row["committed"] else since + [row]
    return [] if progressed else since


def _unstarted_delay(history: List[Dict[str, Any]], limits: Limits, progressed: bool) -> float:
    """Wait before the next start when preemption came before the first checkpoint several times in a row."""
    if progressed:
        return 0.0
    in_a_row = 1
    for row in reversed(history):
        if row["committed"] or row["cause"] != "stopped":
            break
        in_a_row += 1
    if in_a_row < limits.unstarted:
        return 0.0
    return backoff(in_a_row - limits.unstarted, limits.unstarted_first, limits.unstarted_longest)


def backoff(i: int, first: float, longest: float) -> float:
    """Delay number i = 0, 1, ...: doubles from ``first`` to ``longest``."""
    return float(min(longest, first * 2 ** min(i, 60)))
