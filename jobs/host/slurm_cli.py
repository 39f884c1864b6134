"""Slurm's commands: the only module that calls them, each with a deadline, and that parses their output.

Only plain output is read, whose fields have existed for many years: no plugin, no JSON, no accounting. The comment of a
job carries ``FailedStarts`` from one start that cannot write to its run to the next.
"""

import logging
import os
import re
import shutil
import subprocess
import time
from datetime import datetime
from typing import Any, Callable, Dict, Iterable, Mapping, NamedTuple, Optional, Sequence, Tuple

from flip.runs.restart_policy import UNKNOWN
from flip.runs.wall_limit import TimeUsed

log = logging.getLogger(__name__)
DEADLINE = 30.0  # seconds for one command; clients wait if the controller is down
SHORT_DEADLINE = 5.0  # the same if the job is about to be killed: KillWait is 30 seconds by default
LIMIT_POLL_SECONDS = 900.0  # between two queries of a wall limit: administrators change limits of running jobs
UNANSWERED_POLL_SECONDS = 60.0  # until the next query if Slurm does not answer
RETRY_SECONDS = 600.0  # for which a refused requeue is retried, and a state is asked for
OUTAGE_SECONDS = 12 * 3600.0  # for which a requeue is retried while Slurm does not answer, as during an upgrade
UNKNOWN_JOB_SECONDS = 60.0  # after which an unknown or unlisted job counts as gone: one answer may be wrong
SAME_EVENT_SECONDS = 3.0  # between the two times that Slurm records for one event

#: Slurm's job states: waiting in the queue; in between, when signals are refused or delayed; on nodes; over.
WAITING = (
    "PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD", "RECONFIG_FAIL",
)  # fmt: skip
TRANSITIONAL = ("COMPLETING", "CONFIGURING", "POWER_UP_NODE", "STAGE_OUT")
ON_NODES = ("RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "EXPEDITING", "UPDATE_DB")
ENDED = (
    "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY",
    "REVOKED", "LAUNCH_FAILED",
)  # fmt: skip
#: The final state of a job by the reason that Slurm shows while it is COMPLETING.
STATE_BY_REASON = {
    "None": "CANCELLED", "TimeLimit": "TIMEOUT", "NodeDown": "NODE_FAIL", "DeadLine": "DEADLINE",
    "OutOfMemory": "OUT_OF_MEMORY", "JobLaunchFailure": "LAUNCH_FAILED", "NonZeroExitCode": "FAILED",
    "RaisedSignal": "FAILED", "SystemFailure": "FAILED",
}  # fmt: skip
#: Variables by which users change what Slurm's commands print: filters, prompts, another cluster, formats of times.
USER_SETTINGS = re.compile("(SQUEUE|SCANCEL|SINFO|SCONTROL|SACCT|SBATCH)_|SLURM_(CLUSTERS|TIME_FORMAT|BITSTR_LEN)$")
#: Name, array index, id, state, nodes, reason, start, comment.
QUEUE_FORMAT = "%j|%K|%i|%T|%N|%r|%S|%k"
#: The last fields of a line of squeue. Reason and comment may contain anything, and the last two may be absent.
REASON_START_COMMENT = re.compile(r"(.*?)(?:\|(?:(\d{4}-\d\d-\d\dT[\d:]+)|N/A)(?:\|(.*))?)?$")


class SlurmUnavailable(Exception):
    """Slurm did not answer, or refused. The text is its own."""


class JobNotFound(SlurmUnavailable):
    """Slurm does not know the job. Waiting does not help."""


class RequeueDisabled(SlurmUnavailable):
    """Slurm does not requeue this job: it has Requeue=0, set by the site or by the job's options."""


class QueueRow(NamedTuple):
    """One job or array element as squeue lists it."""

    id: str  # 57 or 57_3
    state: str  # PENDING, RUNNING, COMPLETING, COMPLETED, CANCELLED ...
    reason: str
    nodes: str
    start: str = ""  # start time, actual or expected; empty if unknown
    comment: str = ""


def call(*argv: str, **options: Any) -> str:
    """Standard output of one of Slurm's commands. Raises SlurmUnavailable with its error text.

    Options: ``deadline`` in seconds, ``text`` for standard input, ``env`` in place of this process's environment.
    """
    deadline, text = options.get("deadline", DEADLINE), options.get("text", "")
    env = {name: value for name, value in options.get("env", os.environ).items() if not USER_SETTINGS.match(name)}
    line = [shutil.which(argv[0]) or argv[0]] + list(argv[1:])  # on our PATH, not on that of ``env``
    log.debug("running %s", " ".join(argv))
    try:
        done = subprocess.run(
            line, input=text.encode(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=deadline, env=env
        )
    except subprocess.TimeoutExpired:
        raise SlurmUnavailable("%s did not answer for %g s" % (argv[0], deadline)) from None
    except OSError as error:
        raise SlurmUnavailable("%s: %s" % (argv[0], error.strerror or error)) from error
    if done.returncode != 0:
        text = failure_text(argv[0], done.stderr.decode("utf-8", "replace")) or "exit code %d" % done.returncode
        raise command_error(argv[0], text)
    return done.stdout.decode("utf-8", "replace")


def failure_text(command: str, text: str) -> str:
    """Why a command failed: of its standard error its own lines (the site's come first), and the last of all."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Try ")]
    own = [line for line in lines if line.startswith(command + ": ")]
    return "; ".join(own + [line for line in lines[-1:] if line not in own])


def command_error(command: str, text: str) -> SlurmUnavailable:
    """The error for a command that failed with this text."""
    kinds = (("Invalid job id", JobNotFound), ("presently disabled", RequeueDisabled), ("", SlurmUnavailable))
    return next(kind for phrase, kind in kinds if phrase in text)("%s: %s" % (command, text))


def job_fields(job: str, deadline: float = DEADLINE) -> Dict[str, str]:
    """The fields of ``scontrol show job``. Raises SlurmUnavailable."""
    return fields_of(call("scontrol", "show", "job", job, deadline=deadline))


def fields_of(text: str) -> Dict[str, str]:
    """Key=value pairs of ``scontrol show job``; the first value of each key."""
    return dict(reversed(re.findall(r"\b(\w+)=(\S*)", text)))


def own_job(environ: Mapping[str, str]) -> str:
    """The batch job that this process belongs to, "" outside of one.

    An element of an array by its index: the number of the array is also that of one of its elements, and a requeue by
    it would requeue all.
    """
    if environ.get("SLURM_ARRAY_JOB_ID"):
        return "%s_%s" % (environ["SLURM_ARRAY_JOB_ID"], environ["SLURM_ARRAY_TASK_ID"])
    return environ.get("SLURM_JOB_ID", "")


def restart_count(environ: Mapping[str, str]) -> int:
    """How often Slurm has restarted this job."""
    return int(environ.get("SLURM_RESTART_COUNT") or 0)


def _restarted(fields: Mapping[str, str], restarts: int) -> bool:
    return (parse_int(fields.get("Restarts", "")) or 0) > restarts


def job_state(
    job: str, restarts: int, deadline: float = DEADLINE, seen: Optional[Dict[str, str]] = None
) -> Optional[str]:
    """The state of a job whose script is ending, as ``flip.runs.restart_policy`` reads it; None if Slurm does not
    answer, UNKNOWN for a state or reason that is not known here.

    ``restarts``: SLURM_RESTART_COUNT of this start. ``seen`` receives the job's fields. While a job ends, Slurm prints
    only COMPLETING. A job that Slurm has requeued has a higher restart count. A job at its limit has used up its time.
    A preempted job was preempted at the time of its end (after a grace period it may have been cancelled since). For
    the others the reason decides. Each was observed on Slurm 24.11 (tests/slurm/scenarios.json).
    """
    try:
        fields = job_fields(job, deadline)
    except JobNotFound:
        return UNKNOWN
    except SlurmUnavailable:
        return None
    if seen is not None:
        seen.update(fields)
    state, reason = fields.get("JobState", ""), fields.get("Reason", "").partition(":")[0]
    if _restarted(fields, restarts) or state in WAITING:
        return "PENDING"
    if state != "COMPLETING":
        return state if state in TRANSITIONAL + ON_NODES + ENDED else UNKNOWN if state else None
    elapsed, limit = parse_duration(fields.get("RunTime", "")), parse_duration(fields.get("TimeLimit", ""))
    if reason == "None" and elapsed is not None and limit is not None and elapsed >= limit:
        return "TIMEOUT"
    preempted, ended = timestamp(fields.get("PreemptTime", "")), timestamp(fields.get("EndTime", ""))
    if reason == "None" and preempted and ended and abs(ended - preempted) <= SAME_EVENT_SECONDS:
        return "PREEMPTED"
    return STATE_BY_REASON.get(reason, UNKNOWN)


def wait_for_state(job: str, restarts: int, seen: Optional[Dict[str, str]] = None) -> Optional[str]:
    """``job_state``, retried for RETRY_SECONDS if Slurm does not answer."""
    end, wait = time.time() + RETRY_SECONDS, 1.0
    while True:
        state = job_state(job, restarts, seen=seen)
        if state is not None or time.time() + wait > end:
            return state
        time.sleep(wait)
        wait = min(30.0, 2 * wait)


def wait_for_time_limit(
    job: str,
    restarts: int,
    sleep: Optional[Callable[[float], None]] = None,
    on_limit: Optional[Callable[[int], None]] = None,
) -> str:
    """Wait until Slurm ends a job for its wall limit or for lost nodes; return TIMEOUT or NODE_FAIL.

    Returns "" if the job has no limit, has been requeued, or ends for another reason. Queries seldom, but every second
    and with a short deadline at the limit: only KillWait remains between TERM and KILL. ``sleep`` replaces time.sleep
    and may return early if there is a reason to query. ``on_limit`` is called with each new limit, in seconds.
    """
    left: Optional[float] = None  # seconds until the limit or less, as far as known
    known_limit: Optional[int] = None
    while True:
        near = left is not None and left <= DEADLINE + UNANSWERED_POLL_SECONDS
        try:
            fields = job_fields(job, SHORT_DEADLINE if near else DEADLINE)
        except JobNotFound:
            return ""
        except SlurmUnavailable:
            time.sleep(1.0 if near else UNANSWERED_POLL_SECONDS)
            if left is not None:
                left -= DEADLINE + UNANSWERED_POLL_SECONDS
            continue
        elapsed, limit = parse_duration(fields.get("RunTime", "")), parse_duration(fields.get("TimeLimit", ""))
        if elapsed is None or limit is None or _restarted(fields, restarts):
            return ""
        if on_limit is not None and limit != known_limit:
            on_limit(limit)
            known_limit = limit
        state, reason = fields.get("JobState", ""), fields.get("Reason", "").partition(":")[0]
        if state not in (*ON_NODES, "CONFIGURING"):
            if state == "COMPLETING":
                state = "TIMEOUT" if elapsed >= limit else STATE_BY_REASON.get(reason, "")
            return state if state in ("TIMEOUT", "NODE_FAIL") else ""
        left = max(1.0, limit - elapsed)
        nap = min(left, LIMIT_POLL_SECONDS)
        (sleep or time.sleep)(nap)
        left -= nap


def parse_int(text: str) -> Optional[int]:
    """The number at the start of a value: ``30 sec`` -> 30; None for UNLIMITED, NONE, (null) and the like."""
    match = re.match("[0-9]{1,18}(?![0-9])", text)
    return int(match.group(0)) if match else None


def timestamp(text: str) -> Optional[float]:
    """Seconds of a time as Slurm prints it; None for None, Unknown and the like. Only for differences."""
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S").timestamp()
    except (ValueError, OverflowError):  # the second: a year that this machine's clock does not have
        return None


def parse_duration(text: str) -> Optional[int]:
    """Seconds of [days-]hours:minutes:seconds; None for UNLIMITED and the like."""
    match = re.match(r"(?:([0-9]{1,9})-)?([0-9]{1,9}):([0-9]{1,9}):([0-9]{1,9})$", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def time_used(fields: Dict[str, str]) -> Optional[TimeUsed]:
    """The time that a job has used. ``fields``: of ``scontrol show job``; None if they are empty."""
    if not fields:
        return None
    return TimeUsed(
        elapsed=parse_duration(fields.get("RunTime", "")),
        limit=parse_duration(fields.get("TimeLimit", "")),
        over=fields.get("Reason") == "TimeLimit",  # RunTime is 0 if the job is requeued already
        preempted=timestamp(fields.get("PreemptTime", "")) is not None,
    )


def queue(names: Iterable[str]) -> Dict[Tuple[str, int], QueueRow]:
    """(job name, array index; 0 for a single job) -> row, by one call of squeue, which also lists recently ended jobs.

    If a job has a successor (``submit_successor``), the row is that of the newest. Raises SlurmUnavailable.
    """
    asked = sorted(set(names))
    if not asked:
        return {}
    text = call("squeue", "-a", "-h", "-r", "-t", "all", "--name=" + ",".join(asked), "-o", QUEUE_FORMAT)
    rows: Dict[Tuple[str, int], QueueRow] = {}
    for cells in (line.split("|", 5) for line in text.splitlines()):
        if len(cells) == 6:
            name, index, id_, state, nodes, rest = cells
            reason, start, comment = REASON_START_COMMENT.findall(rest)[0]
            known = rows.get((name, parse_int(index) or 0))
            if known is None or (parse_int(known.id) or 0) < (parse_int(id_) or 0):
                rows[name, parse_int(index) or 0] = QueueRow(id_, state, reason, nodes, start, comment)
    return rows


def cluster_name() -> str:
    """ClusterName of the Slurm that answers here. Raises SlurmUnavailable."""
    return config().get("ClusterName", "")


def config() -> Dict[str, str]:
    """The site's configuration as ``scontrol show config`` prints it. Raises SlurmUnavailable."""
    lines = (line.partition("=") for line in call("scontrol", "show", "config").splitlines())
    return {key.strip(): value.strip() for key, mark, value in lines if mark}


def call_with_retry(*argv: str, **options: float) -> str:
    """``call``, retried after 1, 5 and 25 seconds, then every minute for ``patience`` seconds if the job is known."""
    end, wait = time.time() + options.get("patience", 0.0), 1.0
    while True:
        try:
            return call(*argv)
        except SlurmUnavailable as error:
            if wait > 25.0 and (time.time() > end or isinstance(error, JobNotFound)):
                raise
        time.sleep(wait)
        wait = min(60.0, 5 * wait)


def _excluded(fields: Mapping[str, str]) -> str:
    """The nodes that a job excludes, as Slurm prints them."""
    nodes = fields.get("ExcNodeList", "(null)")
    return "" if nodes == "(null)" else nodes


UNUSABLE = re.compile("down|drain|fail|inval|unk")  # states of nodes, in sinfo's words
NO_ANSWER = re.compile(
    "Unable to contact|timed out|Communication connection failure|not responding|did not answer"
    "|Zero Bytes were transmitted|Message (send|receive) failure"
)  # in the errors of commands while the controller does not answer


def affordable(fields: Mapping[str, str], exclude: Optional[Sequence[str]]) -> Optional[Sequence[str]]:
    """``exclude``; None if the partition of a job would have too few other nodes that work, or if Slurm does not list
    them: it would not start the job, for the reason BadConstraints.

    ``fields``: of the job. Does not know what else restricts the job to some nodes, such as a constraint.
    """
    if not exclude:
        return exclude
    try:
        lines = call_with_retry("sinfo", "-h", "-N", "-p", fields["Partition"], "-o", "%N|%T").split()
        nodes = {name for name, _, state in (line.partition("|") for line in lines) if not UNUSABLE.match(state)}
        excluded = set(call_with_retry("scontrol", "show", "hostnames", ",".join(exclude)).split())
    except (KeyError, SlurmUnavailable) as error:
        log.warning("no node is excluded: the nodes of the job's partition are unknown (%s)", error)
        return None
    return exclude if len(nodes - excluded) >= (parse_int(fields.get("NumNodes", "")) or 1) else None


def requeue(
    job: str, restarts: int, delay: float = 0.0, exclude: Optional[Sequence[str]] = None, ending: bool = False
) -> str:
    """Requeue a job, to start after ``delay`` seconds; returns what happened. ``exclude``: all nodes that it avoids
    from now on, if enough others are left; None: as before.

    Before each try the state of the job is queried: a job that Slurm has requeued or a user has cancelled is left
    alone. A refusal is retried for RETRY_SECONDS, an unknown job for UNKNOWN_JOB_SECONDS, silence for
    OUTAGE_SECONDS; then SlurmUnavailable is raised. RequeueDisabled is raised at once. Delay and nodes are set
    afterwards, because Slurm refuses them before. ``ending``: Slurm is ending the job for its limit at this moment, so
    no time is spent on queries and waits.
    """
    deadline, wait, tried = SHORT_DEADLINE if ending else DEADLINE, 1.0, False
    fields: Dict[str, str] = {}
    state: Optional[str] = "TIMEOUT" if ending else job_state(job, restarts, seen=fields)
    checked = bool(exclude and fields)
    if checked:  # before the requeue, after which this process may be killed at once
        exclude = affordable(fields, exclude)
        state = job_state(job, restarts, seen=fields)  # the queries may have taken a minute
    silent_until = time.time() + OUTAGE_SECONDS
    refused_until: Optional[float] = None
    while True:
        if tried and state == "PENDING":
            break  # our own try succeeded and its answer was lost: delay and nodes are still to be set
        if state in ("PENDING", "CANCELLED"):
            return "left alone: it is %s" % state
        try:
            call("scontrol", "requeue", job, deadline=deadline)
            break
        except RequeueDisabled:
            raise
        except SlurmUnavailable as error:
            tried, now, gone = True, time.time(), isinstance(error, JobNotFound)
            # after hours of silence the first refusal is not final
            silent = state is None and not gone
            limit = min(UNKNOWN_JOB_SECONDS, RETRY_SECONDS) if gone else RETRY_SECONDS
            refused_until = None if silent else refused_until or now + limit
            if now + wait > (refused_until or silent_until):
                raise error
        time.sleep(wait)
        wait = wait if ending else min(60.0, 2 * wait)
        state = job_state(job, restarts, deadline, fields)
    updates = ["StartTime=now+%d" % round(delay)] if delay >= 1 else []
    if not checked:
        exclude = affordable(fields, exclude)
    if exclude is not None and ",".join(exclude) != _excluded(fields):
        updates.append("ExcNodeList=" + ",".join(exclude))
    if updates:
        try:
            call("scontrol", "update", "JobId=" + job, *updates)
        except SlurmUnavailable as error:  # it starts all the same
            return "requeued, but %s was refused: %s" % (" ".join(updates), error)
    return " ".join(["requeued"] + updates)


def delay_start(job: str, delay: float) -> str:
    """Let a job that Slurm has requeued start ``delay`` seconds from now at the earliest; returns an error or ""."""
    try:
        call("scontrol", "update", "JobId=" + job, "StartTime=now+%d" % round(delay))
    except SlurmUnavailable as error:
        return str(error)
    return ""


FOLLOWS = "FLIP_FOLLOWS"  # in the environment of a successor: the attempt of its predecessor


def superseded(newest: int, environ: Mapping[str, str]) -> bool:
    """Whether an attempt has started since this job was submitted as a successor; ``newest``: the run's newest."""
    follows = parse_int(environ.get(FOLLOWS, ""))
    return follows is not None and not restart_count(environ) and newest > follows


def submit_successor(
    job: str, restarts: int, attempt: Optional[int], delay: float = 0.0, exclude: Optional[Sequence[str]] = None
) -> str:
    """Submit a successor of our job, which Slurm does not requeue: the same batch script, name, token and array index.

    It starts after the end of this job and ``delay`` seconds, without the nodes ``exclude`` (None: those of this job)
    if enough others are left, and only if no attempt has started in between. ``attempt``: the one that ends now; None
    if unknown. Returns what happened. A controller that does not answer is asked again for RETRY_SECONDS. Raises
    SlurmUnavailable if it refuses.
    """
    end, wait = time.time() + RETRY_SECONDS, 1.0
    while True:
        try:
            return _submit_successor(job, restarts, attempt, delay, exclude)
        except SlurmUnavailable as error:
            state = job_state(job, restarts)
            if state == "CANCELLED":
                return "left alone: it is CANCELLED"
            refused = state is not None and not NO_ANSWER.search(str(error))  # Slurm answers again
            if refused or time.time() + wait > end:
                raise
        time.sleep(wait)
        wait = min(60.0, 2 * wait)


def _submit_successor(
    job: str, restarts: int, attempt: Optional[int], delay: float, exclude: Optional[Sequence[str]]
) -> str:
    name, index = os.environ.get("SLURM_JOB_NAME", ""), os.environ.get("SLURM_ARRAY_TASK_ID", "")
    row = queue([name]).get((name, parse_int(index) or 0))
    if row is not None and row.id != job:
        return "left alone: job %s continues its run" % row.id
    fields = job_fields(job)
    script = call("scontrol", "write", "batch_script", job, "-")
    script = re.sub(r"(?m)^#SBATCH --hold\s*$", "#", script)  # its canary has passed
    options = ["--dependency=afterany:" + os.environ["SLURM_JOB_ID"]]
    options += ["--array=" + index] if index else []
    options += ["--begin=now+%d" % round(delay)] if delay >= 1 else []
    exclude = affordable(fields, exclude)
    excluded = _excluded(fields) if exclude is None else ",".join(exclude)
    options += ["--exclude=" + excluded] if excluded else []
    left = COMMENT.match(fields.get("Comment", ""))
    options += ["--comment=away:%s:-1:%s%s" % left.group(1, 3, 4)] if left and left.group(2) == str(restarts) else []
    id_ = call("sbatch", "--parsable", *options, text=script, env=_original_environment(attempt)).strip()
    return "requeue is disabled for this job; submitted its successor %s" % id_.partition(";")[0]


def _original_environment(attempt: Optional[int]) -> Dict[str, str]:
    """The environment with which our job was started, without what belongs to that job.

    The batch shell is our parent; what its script has loaded and exported since is not in /proc.
    """
    try:
        with open("/proc/%d/environ" % os.getppid(), "rb") as file:
            pairs = [os.fsdecode(line).partition("=") for line in file.read().split(b"\0") if line]
        given = {name: value for name, _, value in pairs}
    except OSError:
        given = {}
    if given.get("SLURM_JOB_ID") != os.environ.get("SLURM_JOB_ID"):  # it was killed: our parent is another process
        given = {name: value for name, value in os.environ.items() if name not in ("FLIP_RUN", "FLIP_ATTEMPT")}
    jobs_own = ("SLURM", FOLLOWS)
    own = {name: value for name, value in given.items() if name == "SLURM_CONF" or not name.startswith(jobs_own)}
    return dict(own, **({FOLLOWS: str(attempt)} if attempt is not None else {}))


MAX_FAILED_STARTS = 100  # in a row without access to the run's files: two days of them
COMMENT = re.compile(r"away:([0-9]{1,9}):(-1|[0-9]{1,9}):([0-9]{1,9})((?::([0-9]{1,3}):([^:\s|]*))?)$")


class FailedStarts(NamedTuple):
    """What starts of a job that cannot write to its run leave in its comment: ``Comment=away:1:17:5:127:n3``.

    The second number is the restart count of the start that wrote it; -1: the job's predecessor.
    """

    starts: int = 0  # failed starts in a row; a preemption or a good start resets the number
    attempt: int = 0  # the attempt whose end could not be written; 0: none
    code: int = 0  # exit code of the last failed start, and its node; 0 and "": unknown
    node: str = ""


def read_failed_starts(job: str, restarts: int, patience: float = 0.0) -> Optional[FailedStarts]:
    """What earlier starts of the job left; None if Slurm does not answer for ``patience`` seconds and more."""
    try:
        text = call_with_retry("scontrol", "show", "job", job, patience=patience)
    except SlurmUnavailable:
        return None
    writer, failed = parse_failed_starts(fields_of(text).get("Comment", ""))
    return failed if writer == restarts - 1 else failed._replace(starts=0)


def parse_failed_starts(comment: str) -> Tuple[Optional[int], FailedStarts]:
    """(restart count of the start that wrote a job's comment, what it says); (None, FailedStarts()) for any other."""
    match = COMMENT.match(comment)
    if not match:
        return None, FailedStarts()
    starts, writer, attempt, code = (int(part or 0) for part in match.group(1, 2, 3, 5))
    return writer, FailedStarts(starts, attempt, code, match.group(6) or "")


def record_failed_starts(job: str, restarts: int, failed: FailedStarts, patience: float = 0.0) -> None:
    """Write the comment for the next start, before the requeue, after which this process may be killed at once."""
    comment = "Comment=away:%d:%d:%d:%d:%s" % (failed.starts, restarts, failed.attempt, failed.code, failed.node)
    try:
        call_with_retry("scontrol", "update", "JobId=" + job, comment, patience=patience)
    except SlurmUnavailable:  # one start more than the limit
        pass
