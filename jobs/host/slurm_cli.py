"""Slurm's commands: the one place that calls them, each with a deadline, and that reads what they print.

Standard library, Python >= 3.6: the exit trap on the host uses it too. Only plain output is read, whose fields have
been there for many years: no plugin, no accounting. The job's comment carries ``FailedStarts`` from one start of a job
that cannot write to its run to the next.
"""

import os
import re
import shutil
import subprocess
import time
from datetime import datetime
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Tuple

from jobs.host.restart_policy import UNKNOWN

#: Seconds that one command gets. A controller that is away makes clients wait.
DEADLINE = 30.0
#: The same where the job is about to be killed: KillWait is 30 seconds by default.
SHORT_DEADLINE = 5.0
#: Seconds after which a job's wall limit is asked for again: administrators change limits of running jobs.
LIMIT_POLL_SECONDS = 900.0
#: Seconds until it is asked for once more where nobody answers.
UNANSWERED_POLL_SECONDS = 60.0
#: Seconds for which a requeue is tried again that Slurm refuses, and for which a silent one is asked for a state.
RETRY_SECONDS = 600.0
#: Seconds for which a requeue is tried again while Slurm does not answer at all, as while it is being upgraded.
OUTAGE_SECONDS = 12 * 3600.0
#: Seconds after which a job that Slurm still does not know, or does not list, counts as gone: one answer may be wrong.
UNKNOWN_JOB_SECONDS = 60.0
#: Seconds between Slurm's two notes of one event.
SAME_EVENT_SECONDS = 3.0
#: Slurm's job states: the job waits in the queue; signals to it are refused or delayed; it is on nodes; it is over.
WAITING = (
    "PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD", "RECONFIG_FAIL",
)  # fmt: skip
TRANSITIONAL = ("COMPLETING", "CONFIGURING", "POWER_UP_NODE", "STAGE_OUT")
ON_NODES = ("RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "EXPEDITING", "UPDATE_DB")
ENDED = (
    "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY",
    "REVOKED", "LAUNCH_FAILED",
)  # fmt: skip
#: The state that a job will have, by the reason that Slurm shows while it is COMPLETING.
STATE_BY_REASON = {
    "None": "CANCELLED",
    "TimeLimit": "TIMEOUT",
    "NodeDown": "NODE_FAIL",
    "DeadLine": "DEADLINE",
    "OutOfMemory": "OUT_OF_MEMORY",
    "JobLaunchFailure": "LAUNCH_FAILED",
    "NonZeroExitCode": "FAILED",
    "RaisedSignal": "FAILED",
    "SystemFailure": "FAILED",
}
#: What users set for their own eyes: filters, questions, another cluster, another form of times.
USER_SETTINGS = re.compile("(SQUEUE|SCANCEL|SINFO|SCONTROL|SACCT|SBATCH)_|SLURM_(CLUSTERS|TIME_FORMAT|BITSTR_LEN)$")

#: A reason, which may hold anything, and a time or N/A.
START = re.compile(r"(.*?)(?:\|(?:(\d{4}-\d\d-\d\dT[\d:]+)|N/A))?$")


class SlurmUnavailable(Exception):
    """Slurm did not answer, or said no. The text is its own."""


class JobNotFound(SlurmUnavailable):
    """Slurm answered that it knows no such job: no more is to be waited for."""


class RequeueDisabled(SlurmUnavailable):
    """Slurm does not requeue this job: it has Requeue=0, by the site's settings or those of the job."""


class QueueRow(NamedTuple):
    """One job or array element as squeue lists it."""

    id: str
    """``57`` or ``57_3``."""
    state: str
    """Slurm's word: PENDING, RUNNING, COMPLETING, COMPLETED, CANCELLED ..."""
    reason: str
    nodes: str
    start: str = ""
    """When Slurm began it, or expects to; empty where it does not say."""


def call(*words: str, **options: Any) -> str:
    """Standard output of a command of Slurm's. Raises SlurmUnavailable with its words.

    Options: ``deadline`` in seconds, ``text`` for its standard input, ``env`` in place of this process's environment.
    """
    deadline, text = options.get("deadline", DEADLINE), options.get("text", "")
    ours = {name: value for name, value in options.get("env", os.environ).items() if not USER_SETTINGS.match(name)}
    line = [shutil.which(words[0]) or words[0]] + list(words[1:])  # on our PATH, whatever that of ``env`` is
    try:
        done = subprocess.run(
            line, input=text.encode(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=deadline, env=ours
        )
    except subprocess.TimeoutExpired:
        raise SlurmUnavailable("%s did not answer for %g s" % (words[0], deadline)) from None
    except OSError as error:
        raise SlurmUnavailable("%s: %s" % (words[0], error.strerror or error)) from error
    if done.returncode != 0:
        said = failure_text(words[0], done.stderr.decode("utf-8", "replace")) or "exit code %d" % done.returncode
        raise command_error(words[0], said)
    return done.stdout.decode("utf-8", "replace")


def failure_text(command: str, text: str) -> str:
    """Why a command failed, from its standard error: its own lines, of which the site's come before Slurm's, and the
    last of all."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Try ")]
    own = [line for line in lines if line.startswith(command + ": ")]
    return "; ".join(own + [line for line in lines[-1:] if line not in own])


def command_error(command: str, said: str) -> SlurmUnavailable:
    """What a command that failed said."""
    kind = (
        JobNotFound
        if "Invalid job id" in said
        else RequeueDisabled
        if "presently disabled" in said
        else SlurmUnavailable
    )
    return kind("%s: %s" % (command, said))


def own_job(environ: Mapping[str, str]) -> str:
    """The batch job that this process belongs to, "" outside of one.

    An element of an array by its index: the number of the whole array is also that of one of its elements, and a
    requeue by it would be one of all.
    """
    if environ.get("SLURM_ARRAY_JOB_ID"):
        return "%s_%s" % (environ["SLURM_ARRAY_JOB_ID"], environ["SLURM_ARRAY_TASK_ID"])
    return environ.get("SLURM_JOB_ID", "")


def job_state(
    job: str, restarts: int, deadline: float = DEADLINE, seen: Optional[Dict[str, str]] = None
) -> Optional[str]:
    """The state of a job whose script is at its end, in the words that ``jobs.host.restart_policy`` reads; None: no
    answer.

    ``restarts``: SLURM_RESTART_COUNT of this life. While a job ends, all that Slurm prints is COMPLETING: one that it
    has requeued by itself counts a restart more, one that used up its limit says so, one that is preempted was so in
    the moment of its end (after a grace it may have been cancelled since), and for the others the reason tells (each
    seen on Slurm 24.11; tests/slurm/scenarios.json). UNSEEN: a state or a reason that is not known here.
    ``seen`` gets the job's fields.
    """
    try:
        fields = fields_of(call("scontrol", "show", "job", job, deadline=deadline))
    except JobNotFound:
        return UNKNOWN
    except SlurmUnavailable:
        return None
    if seen is not None:
        seen.update(fields)
    state, reason = fields.get("JobState", ""), fields.get("Reason", "").partition(":")[0]
    if (parse_int(fields.get("Restarts", "")) or 0) > restarts or state in WAITING:
        return "PENDING"
    if state != "COMPLETING":
        return state if state in TRANSITIONAL + ON_NODES + ENDED else UNKNOWN if state else None
    ran, limit = parse_duration(fields.get("RunTime", "")), parse_duration(fields.get("TimeLimit", ""))
    if reason == "None" and ran is not None and limit is not None and ran >= limit:
        return "TIMEOUT"
    preempted, ended = timestamp(fields.get("PreemptTime", "")), timestamp(fields.get("EndTime", ""))
    if (
        reason == "None"
        and preempted is not None
        and ended is not None
        and abs(ended - preempted) <= SAME_EVENT_SECONDS
    ):
        return "PREEMPTED"
    return STATE_BY_REASON.get(reason, UNKNOWN)


def wait_for_state(
    job: str, restarts: int, patience: float = RETRY_SECONDS, seen: Optional[Dict[str, str]] = None
) -> Optional[str]:
    """``state_words``, asked again for ``patience`` seconds while nobody says."""
    end, wait = time.time() + patience, 1.0
    while True:
        words = job_state(job, restarts, seen=seen)
        if words is not None or time.time() + wait > end:
            return words
        time.sleep(wait)
        wait = min(30.0, 2 * wait)


def wait_for_time_limit(
    job: str,
    restarts: int,
    rest: Optional[Callable[[float], None]] = None,
    told: Optional[Callable[[int], None]] = None,
) -> str:
    """Wait until Slurm ends a job for its wall limit, or for lost nodes; return TIMEOUT or NODE_FAIL.

    Returns "" if the job has no limit, has been requeued, or ends for another reason. Asks seldom, as limits are seldom
    changed, and about the limit every second, with little patience: between TERM and KILL there is KillWait, which is
    too short for an answer that is waited for as long as others. ``rest``: waits for so many seconds in place of
    time.sleep; it may return early when there is a reason to ask. ``told`` is called with the limit in seconds whenever
    Slurm reports another one.
    """
    left = None  # seconds until the limit, or fewer, as far as anybody said
    before: Optional[int] = None
    while True:
        near = left is not None and left <= DEADLINE + UNANSWERED_POLL_SECONDS
        try:
            fields = fields_of(call("scontrol", "show", "job", job, deadline=SHORT_DEADLINE if near else DEADLINE))
        except JobNotFound:
            return ""
        except SlurmUnavailable:
            time.sleep(1.0 if near else UNANSWERED_POLL_SECONDS)
            if left is not None:
                left -= DEADLINE + UNANSWERED_POLL_SECONDS
            continue
        ran, limit = parse_duration(fields.get("RunTime", "")), parse_duration(fields.get("TimeLimit", ""))
        if ran is None or limit is None or (parse_int(fields.get("Restarts", "")) or 0) > restarts:
            return ""
        if told is not None and limit != before:
            told(limit)
            before = limit
        if fields.get("JobState") == "RUNNING":
            left = max(1.0, limit - ran)
            nap = min(left, LIMIT_POLL_SECONDS)
            (rest or time.sleep)(nap)
            left -= nap
        else:
            state, reason = fields.get("JobState", ""), fields.get("Reason", "").partition(":")[0]
            if state == "COMPLETING":
                state = "TIMEOUT" if ran >= limit else STATE_BY_REASON.get(reason, "")
            return state if state in ("TIMEOUT", "NODE_FAIL") else ""


def parse_int(text: str) -> Optional[int]:
    """The number that a value begins with: ``30 sec`` -> 30; None for UNLIMITED, NONE, (null) and the like."""
    found = re.match("[0-9]{1,18}(?![0-9])", text)
    return int(found.group(0)) if found else None


def timestamp(text: str) -> Optional[float]:
    """Seconds of a time as Slurm prints it; None for None, Unknown and the like. Only for differences."""
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S").timestamp()
    except (ValueError, OverflowError):  # the second one: a year that this machine's clock does not have
        return None


def parse_duration(text: str) -> Optional[int]:
    """[days-]hours:minutes:seconds; None for UNLIMITED and the like."""
    found = re.match(r"(?:([0-9]{1,9})-)?([0-9]{1,9}):([0-9]{1,9}):([0-9]{1,9})$", text)
    if not found:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def queue(names: Iterable[str]) -> Dict[Tuple[str, int], QueueRow]:
    """(job name, array index; 0 for a job alone) -> row, in one call. What ended minutes ago is listed still.

    Where a job has a successor (jobs/host/successor.py), the row is that of the newest. Raises SlurmUnavailable.
    """
    asked = sorted(set(names))
    if not asked:
        return {}
    text = call("squeue", "-a", "-h", "-r", "-t", "all", "--name=" + ",".join(asked), "-o", "%j|%K|%i|%T|%N|%r|%S")
    found: Dict[Tuple[str, int], QueueRow] = {}
    for line in text.splitlines():
        cells = line.split("|", 5)
        if len(cells) == 6:
            name, index, id_, state, nodes, rest = cells
            reason, start = START.findall(rest)[0]
            known = found.get((name, parse_int(index) or 0))
            if known is None or (parse_int(known.id) or 0) < (parse_int(id_) or 0):
                found[name, parse_int(index) or 0] = QueueRow(id_, state, reason, nodes, start)
    return found


def cluster_name() -> str:
    """ClusterName of the site that answers here. Raises SlurmUnavailable."""
    return config().get("ClusterName", "")


def config() -> Dict[str, str]:
    """The site's configuration as ``scontrol show config`` prints it. Raises SlurmUnavailable."""
    lines = (line.partition("=") for line in call("scontrol", "show", "config").splitlines())
    return {key.strip(): value.strip() for key, mark, value in lines if mark}


def call_with_retry(*words: str, **options: float) -> str:
    """``call``, again after 1, 5 and 25 seconds, then every minute for ``patience`` seconds, if the job is known."""
    end, wait = time.time() + options.get("patience", 0.0), 1.0
    while True:
        try:
            return call(*words)
        except SlurmUnavailable as error:
            if wait > 25.0 and (time.time() > end or isinstance(error, JobNotFound)):
                raise
        time.sleep(wait)
        wait = min(60.0, 5 * wait)


def requeue(
    job: str,
    restarts: int,
    delay: float = 0.0,
    exclude: Iterable[str] = (),
    patience: float = RETRY_SECONDS,
    ending: bool = False,
) -> str:
    """Start a job again, after ``delay`` seconds and without nodes ``exclude``; what happened, in words.

    Before each try the job's state is looked at: one that Slurm has started again, or somebody cancelled, is left so.
    A refusal is tried again for ``patience`` seconds, an unknown job for GONE, silence for AWAY; then
    SlurmUnavailable is raised. The caller may be killed as soon as the requeue is through, so delay and nodes come
    after it: before it they are refused anyway. Disabled is raised at once.
    ``ending``: Slurm ends the job for its limit at this moment, so that no time is lost with questions and waits.
    """
    deadline, wait, tried = SHORT_DEADLINE if ending else DEADLINE, 1.0, False
    words: Optional[str] = "TIMEOUT" if ending else job_state(job, restarts)
    silent_until = time.time() + OUTAGE_SECONDS
    refused_until: Optional[float] = None
    while True:
        if tried and words == "PENDING":
            break  # our own try was carried out, and its answer lost: delay and nodes are still to be told
        if words in ("PENDING", "CANCELLED"):
            return "left alone: it is %s" % words
        try:
            call("scontrol", "requeue", job, deadline=deadline)
            break
        except RequeueDisabled:
            raise
        except SlurmUnavailable as error:
            tried, now, gone = True, time.time(), isinstance(error, JobNotFound)
            # after hours of silence the first refusal is not the last word
            silent = words is None and not gone
            refused_until = (
                None if silent else refused_until or now + (min(UNKNOWN_JOB_SECONDS, patience) if gone else patience)
            )
            if now + wait > (refused_until or silent_until):
                raise error
        time.sleep(wait)
        wait = wait if ending else min(60.0, 2 * wait)
        words = job_state(job, restarts, deadline)
    wishes = ["StartTime=now+%d" % round(delay)] if delay >= 1 else []
    if exclude:
        wishes.append("ExcNodeList=" + ",".join(_excluded(job) + sorted(exclude)))
    if wishes:
        try:
            call("scontrol", "update", "JobId=" + job, *wishes)
        except SlurmUnavailable as error:  # it starts all the same
            return "requeued, but %s was refused: %s" % (" ".join(wishes), error)
    return " ".join(["requeued"] + wishes)


def _excluded(job: str) -> List[str]:
    try:
        present = fields_of(call("scontrol", "show", "job", job)).get("ExcNodeList", "")
    except SlurmUnavailable:
        return []
    return [present] if present and present != "(null)" else []


def fields_of(text: str) -> Dict[str, str]:
    """Key=value pairs of ``scontrol show job``; of a key that stands twice the first."""
    found: Dict[str, str] = {}
    for key, value in re.findall(r"\b(\w+)=(\S*)", text):
        found.setdefault(key, value)
    return found


def restart_count(environ: Mapping[str, str]) -> int:
    """How often Slurm has started this job again."""
    return int(environ.get("SLURM_RESTART_COUNT") or 0)


#: Starts of a job in a row at most that come to nothing, for want of the run's files: two days of them.
MAX_FAILED_STARTS = 100


class FailedStarts(NamedTuple):
    """What starts of a job that could not write to its run leave with the scheduler: ``Comment=away:1:17:5``.

    The second number is the restart that left it; -1: the job's predecessor (jobs/host/successor.py).
    """

    starts: int = 0
    """In a row, all of which came to nothing; a preemption or a start that went well ends the row."""
    attempt: int = 0
    """The one whose end could not be written; 0: none."""


def read_failed_starts(job: str, restarts: int, patience: float = 0.0) -> Optional[FailedStarts]:
    """What earlier lives of the job left, if they left something; None: nobody says, for so many seconds and more."""
    try:
        text = call_with_retry("scontrol", "show", "job", job, patience=patience)
    except SlurmUnavailable:
        return None
    comment = fields_of(text).get("Comment", "")
    found = re.match(r"away:([0-9]{1,9}):(-1|[0-9]{1,9}):([0-9]{1,9})$", comment)
    if not found:
        return FailedStarts()
    starts, life, attempt = (int(part) for part in found.groups())
    return FailedStarts(starts if life == restarts - 1 else 0, attempt)


def record_failed_starts(job: str, restarts: int, failed: FailedStarts, patience: float = 0.0) -> None:
    """For the next life of the job; before its requeue, after which this one may be killed at once. Silence is waited
    for as with ``read_failed_starts``.
    """
    words = "JobId=" + job, "Comment=away:%d:%d:%d" % (failed.starts, restarts, failed.attempt)
    try:
        call_with_retry("scontrol", "update", *words, patience=patience)
    except SlurmUnavailable:  # a start more than there might be
        pass
