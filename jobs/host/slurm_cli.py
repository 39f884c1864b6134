"""Slurm's commands: the only module that calls them, each with a deadline, and that parses their output.

Only plain output is read, whose fields have existed for many years: no plugin, no JSON, no accounting.
"""

import logging
import os
import re
import shutil
import subprocess
import time
from datetime import datetime
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple

log = logging.getLogger(__name__)
DEADLINE = 30.0  # seconds for one command; clients wait if the controller is down
SHORT_DEADLINE = 5.0  # the same if the job is about to be killed: KillWait is 30 seconds by default
END_SECONDS = 10.0  # for srun to end its job
RETRY_SECONDS = 600.0  # how long a refused requeue is retried, and a state is asked for
OUTAGE_SECONDS = 12 * 3600.0  # how long a requeue is retried while Slurm does not answer, as during an upgrade
UNKNOWN_JOB_SECONDS = 60.0  # after which an unknown or unlisted job counts as gone: one answer may be wrong

#: Slurm's states of jobs that wait in the queue. The next tuples: between queue and nodes, where signals are refused
#: or delayed; on nodes; ended.
WAITING = (
    "PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD", "RECONFIG_FAIL",
)  # fmt: skip
COMPLETING = "COMPLETING"  # it ends, or was requeued and ends here first: squeue shows no difference
TRANSITIONAL = (COMPLETING, "CONFIGURING", "POWER_UP_NODE", "STAGE_OUT")
ON_NODES = ("RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "EXPEDITING", "UPDATE_DB")
ENDED = (
    "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY",
    "REVOKED", "LAUNCH_FAILED",
)  # fmt: skip
#: States of nodes that start no job, in sinfo's words.
UNUSABLE = re.compile("down|drain|fail|inval|unk")
#: In the errors of commands while the controller does not answer.
NO_ANSWER = re.compile(
    "Unable to contact|timed out|Communication connection failure|not responding|did not answer"
    "|Zero Bytes were transmitted|Message (send|receive) failure"
)
#: Variables by which users change what Slurm's commands print: filters, prompts, another cluster, formats of times.
USER_SETTINGS = re.compile("(SQUEUE|SCANCEL|SINFO|SCONTROL|SACCT|SBATCH)_|SLURM_(CLUSTERS|TIME_FORMAT|BITSTR_LEN)$")
#: Name, array index, id, state, nodes, reason, start, comment.
QUEUE_FORMAT = "%j|%K|%i|%T|%N|%r|%S|%k"
#: The last fields of a line of squeue. Reason and comment may contain anything, and the last two may be absent.
REASON_START_COMMENT = re.compile(r"(.*?)(?:\|(?:(\d{4}-\d\d-\d\dT[\d:]+)|N/A)(?:\|(.*))?)?$")


class SlurmUnavailable(Exception):
    """Slurm did not answer, or refused. The text is its own."""


class NoSuchJob(SlurmUnavailable):
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


class StepResult(NamedTuple):
    """How srun ended."""

    code: int  # minus the number of the signal that killed it
    output: str
    errors: str


def call(*argv: str, **options: Any) -> str:
    """Standard output of one of Slurm's commands. Raises SlurmUnavailable with its error text.

    Options: ``deadline`` in seconds, ``text`` for standard input, ``env`` in place of this process's environment
    without USER_SETTINGS, ``messages``: a list that receives the lines on standard error of a command that succeeds.
    """
    deadline = options.get("deadline", DEADLINE)
    text = options.get("text", "")
    env = options.get("env")
    if env is None:
        env = {name: value for name, value in os.environ.items() if not USER_SETTINGS.match(name)}
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
    errors = done.stderr.decode("utf-8", "replace")
    if done.returncode != 0:
        raise command_error(argv[0], failure_text(argv[0], errors) or "exit code %d" % done.returncode)
    if "messages" in options:
        options["messages"].extend(errors.splitlines())
    return done.stdout.decode("utf-8", "replace")


def run_step(argv: List[str], env: Dict[str, str], deadline: float) -> StepResult:
    """Run srun, with this environment and without input, until it ends; its tasks may fail.

    After ``deadline`` seconds, and if this process is interrupted, srun is asked to end its job. Raises
    SlurmUnavailable if it cannot be started.
    """
    line = [shutil.which(argv[0]) or argv[0]] + argv[1:]
    log.debug("running %s", " ".join(argv))
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:  # of its own session: Ctrl-C reaches this process, which ends srun
        process = subprocess.Popen(line, env=env, start_new_session=True, **pipes)  # type: ignore[call-overload]
    except OSError as error:
        raise SlurmUnavailable("%s: %s" % (argv[0], error.strerror or error)) from error
    try:
        output, errors = process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        output, errors = _end_srun(process)
    except BaseException:
        _end_srun(process)
        raise
    return StepResult(process.returncode, output.decode("utf-8", "replace"), errors.decode("utf-8", "replace"))


def _end_srun(process: "subprocess.Popen[bytes]") -> Tuple[bytes, bytes]:
    """Ask srun to end its job, kill it if it does not, and return what it has printed."""
    process.terminate()
    try:
        return process.communicate(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()


def call_with_retry(*argv: str, **options: float) -> str:
    """``call``, retried after 1, 5 and 25 seconds, then every minute for ``patience`` seconds if the job is known."""
    end = time.time() + options.get("patience", 0.0)
    wait = 1.0
    while True:
        try:
            return call(*argv)
        except SlurmUnavailable as error:
            if wait > 25.0 and (time.time() > end or isinstance(error, NoSuchJob)):
                raise
        time.sleep(wait)
        wait = min(60.0, 5 * wait)


def failure_text(command: str, text: str) -> str:
    """Why a command failed, from its standard error: the command's own lines, and the last line of all.

    Messages of the site, which come first, are left out.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Try ")]
    own = [line for line in lines if line.startswith(command + ": ")]
    return "; ".join(own + [line for line in lines[-1:] if line not in own])


def command_error(command: str, text: str) -> SlurmUnavailable:
    """The error for a command that failed with this text."""
    message = "%s: %s" % (command, text)
    if "Invalid job id" in text:
        return NoSuchJob(message)
    if "presently disabled" in text:
        return RequeueDisabled(message)
    return SlurmUnavailable(message)


def job_fields(job: str, deadline: float = DEADLINE) -> Dict[str, str]:
    """The fields of ``scontrol show job``. Raises SlurmUnavailable."""
    return fields_of(call("scontrol", "show", "job", job, deadline=deadline))


def fields_of(text: str) -> Dict[str, str]:
    """Key=value pairs of ``scontrol show job``; the first value of each key."""
    return dict(reversed(re.findall(r"\b(\w+)=(\S*)", text)))


def queue(names: Iterable[str]) -> Dict[Tuple[str, int], QueueRow]:
    """(job name, array index; 0 for a single job) -> row, by one call of squeue, which also lists recently ended jobs.

    If a job has a successor (``requeue.submit_successor``), the row is that of the newest. Raises SlurmUnavailable.
    """
    asked = sorted(set(names))
    if not asked:
        return {}
    text = call("squeue", "-a", "-h", "-r", "-t", "all", "--name=" + ",".join(asked), "-o", QUEUE_FORMAT)
    rows: Dict[Tuple[str, int], QueueRow] = {}
    for cells in (line.split("|", 5) for line in text.splitlines()):
        if len(cells) != 6:
            continue
        name, index, id_, state, nodes, rest = cells
        reason, start, comment = REASON_START_COMMENT.findall(rest)[0]
        key = (name, parse_int(index) or 0)
        earlier_row = rows.get(key)
        if earlier_row is None or (parse_int(earlier_row.id) or 0) < (parse_int(id_) or 0):
            rows[key] = QueueRow(id_, state, reason, nodes, start, comment)
    return rows


def cluster_name() -> str:
    """ClusterName of the Slurm that answers here. Raises SlurmUnavailable."""
    return config().get("ClusterName", "")


def config() -> Dict[str, str]:
    """The site's configuration as ``scontrol show config`` prints it. Raises SlurmUnavailable."""
    lines = (line.partition("=") for line in call("scontrol", "show", "config").splitlines())
    return {key.strip(): value.strip() for key, mark, value in lines if mark}


def usable_nodes(partition: str) -> List[str]:
    """Names of the nodes of a partition that start jobs. Raises SlurmUnavailable."""
    lines = call_with_retry("sinfo", "-h", "-N", "-p", partition, "-o", "%N|%T").split()
    rows = [line.partition("|") for line in lines]
    return [name for name, _, state in rows if not UNUSABLE.match(state)]


def host_names(nodes: str) -> List[str]:
    """The names in a node list: ``n[1-2],n7`` -> n1, n2, n7. Raises SlurmUnavailable."""
    return call_with_retry("scontrol", "show", "hostnames", nodes).split()


def parse_int(text: str) -> Optional[int]:
    """The number at the start of a value: ``30 sec`` -> 30; None for UNLIMITED, NONE, (null) and the like."""
    match = re.match("[0-9]{1,18}(?![0-9])", text)
    if match is None:
        return None
    return int(match.group(0))


def parse_duration(text: str) -> Optional[int]:
    """Seconds of [days-]hours:minutes:seconds; None for UNLIMITED and the like."""
    match = re.match(r"(?:([0-9]{1,9})-)?([0-9]{1,9}):([0-9]{1,9}):([0-9]{1,9})$", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def timestamp(text: str) -> Optional[float]:
    """Seconds of a time as Slurm prints it; None for None, Unknown and the like. Only for differences.

    Without strptime, whose first call imports a module: the guard of a job's owner may open no file.
    """
    match = re.match(r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{2}):([0-9]{2}):([0-9]{2})$", text)
    if not match:
        return None
    year, month, day, hour, minute, second = (int(part) for part in match.groups())
    try:
        return datetime(year, month, day, hour, minute, second).timestamp()
    except (ValueError, OverflowError):  # the second: a year that this machine's clock does not have
        return None
