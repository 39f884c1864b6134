"""Slurm's commands: the one place that calls them, each with a deadline, and that reads what they print.

Standard library, Python >= 3.6: the exit trap on the host uses it too. Only plain output is read, whose fields have
been there for many years: no plugin, no accounting.
"""

import re
import subprocess
import time
from typing import NamedTuple

if False:  # names for annotations only: Python 3.6 runs this file too
    from typing import Dict, Iterable, List, Mapping, Optional, Tuple  # noqa: F401

#: Seconds that one command gets. A controller that is away makes clients wait.
DEADLINE = 30.0
#: Seconds for which a requeue is tried again while the controller is away.
PATIENCE = 600.0


class Unanswered(Exception):
    """Slurm did not answer, or said no. The text is its own."""


class Row(NamedTuple):
    """One job or array element as squeue lists it."""

    id: str
    """``57`` or ``57_3``."""
    state: str
    """Slurm's word: PENDING, RUNNING, COMPLETING, COMPLETED, CANCELLED ..."""
    reason: str
    nodes: str


def call(*words, **options):
    # type: (*str, **float) -> str
    """Standard output of a command of Slurm's. Raises Unanswered with its words."""
    deadline = options.get("deadline", DEADLINE)
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=deadline
        )
    except subprocess.TimeoutExpired:
        raise Unanswered("%s did not answer for %g s" % (words[0], deadline)) from None
    except OSError as error:
        raise Unanswered("%s: %s" % (words[0], error.strerror or error)) from error
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip() or "exit code %d" % done.returncode
        raise Unanswered("%s: %s" % (words[0], said.splitlines()[-1]))
    return done.stdout.decode("utf-8", "replace")


def own_job(environ):
    # type: (Mapping[str, str]) -> str
    """The batch job that this process belongs to, "" outside of one.

    An element of an array by its index: the number of the whole array is also that of one of its elements, and a
    requeue by it would be one of all.
    """
    if environ.get("SLURM_ARRAY_JOB_ID"):
        return "%s_%s" % (environ["SLURM_ARRAY_JOB_ID"], environ["SLURM_ARRAY_TASK_ID"])
    return environ.get("SLURM_JOB_ID", "")


def state_words(job, restarts):
    # type: (str, int) -> Optional[str]
    """What becomes of a job whose script is at its end, in the words that ``jobs.policy`` reads; None: nobody says.

    ``restarts``: SLURM_RESTART_COUNT of this life. While a job ends, all that Slurm prints is COMPLETING: one that it
    has requeued by itself counts a restart more, one that used up its limit has run that long, and any other that ends
    while its script still runs was cancelled (each seen on Slurm 24.11; tests/slurm/scenarios.json).
    """
    try:
        fields = _fields(call("scontrol", "show", "job", job))
    except Unanswered:
        return None
    state = fields.get("JobState", "")
    if int(fields.get("Restarts") or 0) > restarts:
        return "PENDING"
    if state != "COMPLETING":
        return state or None
    ran, limit = seconds(fields.get("RunTime", "")), seconds(fields.get("TimeLimit", ""))
    return "TIMEOUT" if ran is not None and limit is not None and ran >= limit else "CANCELLED"


def seconds(text):
    # type: (str) -> Optional[int]
    """[days-]hours:minutes:seconds; None for UNLIMITED and the like."""
    found = re.match(r"(?:(\d+)-)?(\d+):(\d+):(\d+)$", text)
    if not found:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def queue(names):
    # type: (Iterable[str]) -> Dict[Tuple[str, int], Row]
    """(job name, array index; 0 for a job alone) -> row, in one call. What ended minutes ago is listed still.

    Raises Unanswered.
    """
    asked = sorted(set(names))
    if not asked:
        return {}
    text = call("squeue", "-h", "-r", "-t", "all", "--name=" + ",".join(asked), "-o", "%j|%K|%i|%T|%N|%r")
    found = {}
    for line in text.splitlines():
        cells = line.split("|", 5)
        if len(cells) == 6:
            name, index, id_, state, nodes, reason = cells
            found[name, int(index) if index.isdigit() else 0] = Row(id_, state, reason, nodes)
    return found


def cluster_name():
    # type: () -> str
    """ClusterName of the site that answers here. Raises Unanswered."""
    return config().get("ClusterName", "")


def config():
    # type: () -> Dict[str, str]
    """The site's configuration as ``scontrol show config`` prints it. Raises Unanswered."""
    lines = (line.partition("=") for line in call("scontrol", "show", "config").splitlines())
    return {key.strip(): value.strip() for key, mark, value in lines if mark}


def requeue(job, restarts, delay=0.0, exclude=(), patience=PATIENCE):
    # type: (str, int, float, Iterable[str], float) -> str
    """Start a job again, after ``delay`` seconds and without nodes ``exclude``; what happened, in words.

    While the controller is away it is tried again for ``patience`` seconds, then Unanswered is raised. The caller may
    be killed as soon as the requeue is through, so delay and nodes come after it: before it they are refused anyway.
    """
    end, wait = time.time() + patience, 1.0
    while True:
        try:
            call("scontrol", "requeue", job)
            break
        except Unanswered as error:
            words = state_words(job, restarts)
            if words in ("PENDING", "CANCELLED"):
                return "left alone: it is %s" % words
            if time.time() + wait > end:
                raise error
        time.sleep(wait)
        wait = min(60.0, 2 * wait)
    wishes = ["StartTime=now+%d" % round(delay)] if delay >= 1 else []
    if exclude:
        wishes.append("ExcNodeList=" + ",".join(_excluded(job) + sorted(exclude)))
    if wishes:
        try:
            call("scontrol", "update", "JobId=" + job, *wishes)
        except Unanswered as error:  # it starts all the same
            return "requeued, but %s was refused: %s" % (" ".join(wishes), error)
    return " ".join(["requeued"] + wishes)


def _excluded(job):
    # type: (str) -> List[str]
    try:
        present = _fields(call("scontrol", "show", "job", job)).get("ExcNodeList", "")
    except Unanswered:
        return []
    return [present] if present and present != "(null)" else []


def _fields(text):
    # type: (str) -> Dict[str, str]
    """Key=value pairs of ``scontrol show job``; of a key that stands twice the first."""
    found = {}  # type: Dict[str, str]
    for key, value in re.findall(r"(\w+)=(\S*)", text):
        found.setdefault(key, value)
    return found


def restarts_of(environ):
    # type: (Mapping[str, str]) -> int
    """How often Slurm has started this job again."""
    return int(environ.get("SLURM_RESTART_COUNT") or 0)
