"""How does a batch job restart? By a requeue or, if Slurm does not requeue it, by a successor: a new job with the same
batch script.

``elsewhere`` of ``jobs/slurm/fallback.sh`` requeues a job on a node that cannot run this file.
"""

import logging
import os
import time
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from flip.runs import attempts
from flip.runs.rundir import RunDir
from jobs.host import failed_starts, slurm_cli
from jobs.host.failed_starts import FailedStarts
from jobs.host.own_job import job_state, restart_count
from jobs.host.slurm_cli import NoSuchJob, RequeueDisabled, SlurmUnavailable, parse_int

log = logging.getLogger(__name__)
FOLLOWS = "FLIP_FOLLOWS"  # in the environment of a successor: an attempt of its predecessor
OF_START = ("FLIP_RUN", "FLIP_ATTEMPT", "FLIP_AGENTS")
"""Variables that the batch script exports for one start of the job."""
HOLD = "\n#SBATCH --hold\n"  # in the batch script of a job that waits for its canary


class SuccessorRefused(SlurmUnavailable):
    """Slurm does not requeue this job, and refused its successor."""


def restart(
    job: str,
    restarts: int,
    delay: float = 0.0,
    exclude: Optional[Sequence[str]] = None,
    attempt: Optional[int] = None,
    ending: bool = False,
    failed: Optional[FailedStarts] = None,
    sleep: Optional[Callable[[float], Any]] = None,
) -> str:
    """``requeue`` our job or, if Slurm does not requeue it, ``submit_successor``; returns what happened.

    ``sleep``: how to wait between two tries; by default time.sleep. Raises SlurmUnavailable if the requeue was refused,
    SuccessorRefused if the new job was.
    """
    try:
        return requeue(job, restarts, delay, exclude, ending, sleep)
    except RequeueDisabled:
        log.debug("requeue is disabled for job %s", job)
    try:
        return submit_successor(job, restarts, attempt, delay, exclude, failed, sleep)
    except SlurmUnavailable as error:
        raise SuccessorRefused(str(error)) from error


def requeue(
    job: str,
    restarts: int,
    delay: float = 0.0,
    exclude: Optional[Sequence[str]] = None,
    ending: bool = False,
    sleep: Optional[Callable[[float], Any]] = None,
) -> str:
    """Requeue a job, to start after ``delay`` seconds; returns what happened. ``exclude``: all nodes that it avoids
    from now on, if enough others are left; None: as before.

    Before each try the state of the job is queried: a job that Slurm has requeued or a user has cancelled is left
    alone. A refusal is retried for RETRY_SECONDS, an unknown job for UNKNOWN_JOB_SECONDS, silence for
    OUTAGE_SECONDS; then SlurmUnavailable is raised. RequeueDisabled is raised at once. Delay and nodes are set
    afterwards, because Slurm refuses them before. ``ending``: Slurm is ending the job for its limit at this moment, so
    no time is spent on queries and waits.
    """
    fields: Dict[str, str] = {}
    state: Optional[str] = "TIMEOUT"
    if not ending:
        state = job_state(job, restarts, fields_out=fields)
    checked = bool(exclude and fields)
    if checked:  # before the requeue, after which this process may be killed at once
        exclude = affordable(fields, exclude)
        state = job_state(job, restarts, fields_out=fields)  # the queries may have taken a minute
    left_alone = _request_requeue(job, restarts, state, fields, ending, sleep or time.sleep)
    if left_alone:
        return left_alone
    if not checked:
        exclude = affordable(fields, exclude)
    updates: List[str] = []
    if delay >= 1:
        updates.append("StartTime=now+%d" % round(delay))
    if exclude is not None and ",".join(exclude) != excluded_nodes(fields):
        updates.append("ExcNodeList=" + ",".join(exclude))
    if updates:
        try:
            slurm_cli.call("scontrol", "update", "JobId=" + job, *updates)
        except SlurmUnavailable as error:  # it starts all the same
            return "requeued, but %s was refused: %s" % (" ".join(updates), error)
    return " ".join(["requeued"] + updates)


def delay_start(job: str, delay: float) -> str:
    """Let a job that Slurm has requeued start ``delay`` seconds from now at the earliest; returns an error or ""."""
    try:
        slurm_cli.call("scontrol", "update", "JobId=" + job, "StartTime=now+%d" % round(delay))
    except SlurmUnavailable as error:
        return str(error)
    return ""


def submit_successor(
    job: str,
    restarts: int,
    attempt: Optional[int],
    delay: float = 0.0,
    exclude: Optional[Sequence[str]] = None,
    failed: Optional[FailedStarts] = None,
    sleep: Optional[Callable[[float], Any]] = None,
) -> str:
    """Submit a successor of our job, which Slurm does not requeue: the same batch script, name, token and array index.

    It starts after the end of this job and ``delay`` seconds, without the nodes ``exclude`` (None: those of this job)
    if enough others are left, and only if no attempt has started in between. ``attempt``: the one that ends now; None
    if unknown. ``failed``: what its comment says; None: what this start has written into the comment of its own job.
    Returns what happened. A controller that does not answer is asked again for RETRY_SECONDS. Raises SlurmUnavailable
    if it refuses.
    """
    end = time.time() + slurm_cli.RETRY_SECONDS
    wait = 1.0
    while True:
        try:
            return _submit_successor(job, restarts, attempt, delay, exclude, failed)
        except SlurmUnavailable as error:
            state = job_state(job, restarts)
            if state == "CANCELLED":
                return "left alone: it is CANCELLED"
            refused = state is not None and not slurm_cli.NO_ANSWER.search(str(error))  # Slurm answers again
            if refused or time.time() + wait > end:
                raise
        (sleep or time.sleep)(wait)
        wait = min(60.0, 2 * wait)


def superseded(run: RunDir, environ: Mapping[str, str]) -> bool:
    """Whether an attempt has started since the end of the job of which this one is a successor.

    Its predecessor may have started attempts after the one that FOLLOWS names: the files could not be read at its end.
    """
    follows = parse_int(environ.get(FOLLOWS, ""))
    if follows is None or restart_count(environ):
        return False
    newest = run.newest_attempt()
    return newest > follows and not attempts.in_same_allocation(run, newest, follows)


def affordable(fields: Mapping[str, str], exclude: Optional[Sequence[str]]) -> Optional[Sequence[str]]:
    """``exclude``; None if the partition of a job would have too few other nodes that work, or if Slurm does not list
    them: it would not start the job, for the reason BadConstraints.

    ``fields``: of the job. Does not know what else restricts the job to some nodes, such as a constraint.
    """
    if not exclude:
        return exclude
    try:
        usable = set(slurm_cli.usable_nodes(fields["Partition"]))
        excluded = set(slurm_cli.host_names(",".join(exclude)))
    except (KeyError, SlurmUnavailable) as error:
        log.warning("no node is excluded: the nodes of the job's partition are unknown (%s)", error)
        return None
    needed = parse_int(fields.get("NumNodes", "")) or 1
    if len(usable - excluded) < needed:
        return None
    return exclude


def excluded_nodes(fields: Mapping[str, str]) -> str:
    """The nodes that a job excludes, as Slurm prints them; "": none."""
    nodes = fields.get("ExcNodeList", "(null)")
    if nodes == "(null)":
        return ""
    return nodes


def exclude_failed_node(fields: Mapping[str, str], node: str, previous: str) -> Optional[Sequence[str]]:
    """What a job excludes after a start that failed on ``node``: the node, in place of ``previous``, that of the failed
    start before, because an outage of all nodes must not exclude them all. None (as before) if Slurm does not answer.

    ``fields``: of the job. Other nodes that it excludes (of the profile, with broken hardware) stay.
    """
    listed = excluded_nodes(fields)
    others: List[str] = []
    if listed:
        try:
            others = slurm_cli.host_names(listed)
        except SlurmUnavailable as error:
            log.warning("no node is excluded: %s", error)
            return None
    return [name for name in others if name != previous] + [node]


def _request_requeue(
    job: str,
    restarts: int,
    state: Optional[str],
    fields: Dict[str, str],
    ending: bool,
    sleep: Callable[[float], Any],
) -> str:
    """Request a requeue until Slurm accepts it; returns "", or why the job is left alone.

    ``state``: of the job, queried again after each failed try, with its ``fields``. See ``requeue``.
    """
    if ending:
        deadline = slurm_cli.SHORT_DEADLINE
    else:
        deadline = slurm_cli.DEADLINE
    wait = 1.0
    silent_until = time.time() + slurm_cli.OUTAGE_SECONDS
    refused_until: Optional[float] = None
    tried = False
    while True:
        if tried and state == "PENDING":  # our own try succeeded and its answer was lost
            return ""
        if state in ("PENDING", "CANCELLED"):
            return "left alone: it is %s" % state
        try:
            slurm_cli.call("scontrol", "requeue", job, deadline=deadline)
            return ""
        except RequeueDisabled:
            raise
        except SlurmUnavailable as error:
            tried = True
            now = time.time()
            gone = isinstance(error, NoSuchJob)
            if state is None and not gone:  # after hours of silence the first refusal is not final
                refused_until = None
            elif refused_until is None:
                unknown_for = min(slurm_cli.UNKNOWN_JOB_SECONDS, slurm_cli.RETRY_SECONDS)
                refused_until = now + (unknown_for if gone else slurm_cli.RETRY_SECONDS)
            if now + wait > (refused_until or silent_until):
                raise
        sleep(wait)
        if not ending:
            wait = min(60.0, 2 * wait)
        state = job_state(job, restarts, deadline, fields)


def _submit_successor(
    job: str,
    restarts: int,
    attempt: Optional[int],
    delay: float,
    exclude: Optional[Sequence[str]],
    failed: Optional[FailedStarts],
) -> str:
    name = os.environ.get("SLURM_JOB_NAME", "")
    index = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    row = slurm_cli.queue([name]).get((name, parse_int(index) or 0))
    if row is not None and row.id != job:
        return "left alone: job %s continues its run" % row.id
    fields = slurm_cli.job_fields(job)
    script = slurm_cli.call("scontrol", "write", "batch_script", job, "-")
    script = script.replace(HOLD, "\n", 1)  # its canary has passed
    options = ["--dependency=afterany:" + job]  # the number of the last element is that of its array
    if index:
        options.append("--array=" + index)
    if delay >= 1:
        options.append("--begin=now+%d" % round(delay))
    exclude = affordable(fields, exclude)
    if exclude is None:
        excluded = excluded_nodes(fields)
    else:
        excluded = ",".join(exclude)
    if excluded:
        options.append("--exclude=" + excluded)
    failed = failed or failed_starts.of_start(fields, restarts)
    if failed is not None:
        options.append("--comment=" + failed.comment(failed_starts.PREDECESSOR))
    id_ = slurm_cli.call("sbatch", "--parsable", *options, text=script, env=_successor_environment(attempt)).strip()
    return "requeue is disabled for this job; submitted its successor %s" % id_.partition(";")[0]


def _successor_environment(attempt: Optional[int]) -> Dict[str, str]:
    """The environment with which our job was started, without what belongs to that job, and with FOLLOWS."""
    environment = {
        name: value
        for name, value in _original_environment().items()
        if name == "SLURM_CONF" or not name.startswith(("SLURM", FOLLOWS))
    }
    if attempt is not None:
        environment[FOLLOWS] = str(attempt)
    return environment


def _original_environment() -> Dict[str, str]:
    """The environment with which our job was started, as this process or its parent got it, with what the script has
    exported. What either has set since is not in /proc, such as the addresses that ``rank_entry.py`` sets.
    """
    original = dict(os.environ)
    for process in (str(os.getppid()), "self"):
        given = _environment_of(process)
        if given and given.get("SLURM_JOB_ID") == os.environ.get("SLURM_JOB_ID"):
            original = given
            break
    return {name: value for name, value in original.items() if name not in OF_START}


def _environment_of(process: str) -> Dict[str, str]:
    """The environment with which a process of this node was started; empty if it cannot be read."""
    try:
        with open("/proc/%s/environ" % process, "rb") as file:
            pairs = [os.fsdecode(line).partition("=") for line in file.read().split(b"\0")]
    except OSError:
        return {}
    return {name: value for name, _, value in pairs if name}
