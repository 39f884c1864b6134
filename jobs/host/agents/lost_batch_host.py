"""Restarts a job whose first node is lost, and with it the batch script, its watcher and srun: a requeue or, if Slurm
does not requeue it, a successor.

Slurm lets a job with ``--no-kill`` go on without a failed node, also if that is the first one: nothing would end or
requeue the job before its wall limit. So the task of a node agent that has lost its coordinator asks Slurm. Standard
library, Python >= 3.6.
"""

import os
import socket
import time
from typing import Callable, Dict, Mapping, Optional

from flip.runs import attempts
from flip.runs.rundir import RunDir, read_record
from jobs.host import own_job, requeue, slurm_cli
from jobs.host.node_list import first_host

PATIENCE_SECONDS = 900.0
"""Until ``status`` shows that Slurm has not noticed the loss (SlurmdTimeout, 300 s by default), or does not answer."""
POLL_SECONDS = 10.0
TURN_SECONDS = 60.0
"""Between the turns of two nodes."""
CONNECT_SECONDS = 10.0


def requeue_if_lost(environ: Mapping[str, str], sleep: Callable[[float], None] = time.sleep) -> str:
    """Wait until Slurm has taken the first node out of the job of this task, then restart the job; returns what
    happened.

    The nodes take turns, because Slurm does not say which of them have a task left: nodes that were excluded have none,
    but stay in the job. Each asks Slurm in its turn whether another one has restarted the job. Returns at once if srun
    answers: the exit trap decides when this task has ended.
    """
    job = own_job.own_job(environ)
    if _srun_answers(environ):
        return "job %s is left to its exit trap" % job
    run = RunDir(environ["FLIP_RUN"])
    known = _newest(run)
    restarts = own_job.restart_count(environ)

    def leave_to_user(reason: str, remedy: str = "") -> str:
        return _leave_to_user(job, run, known, environ, reason, remedy)

    left_alone = _wait_for_loss(job, restarts, sleep, leave_to_user)
    if left_alone:
        return left_alone
    sleep(TURN_SECONDS * max(0, int(environ.get("SLURM_NODEID") or 0) - 1))
    try:
        return "job %s has lost its first node: %s" % (job, _restart(job, restarts, known))
    except slurm_cli.SlurmUnavailable as error:
        return leave_to_user(str(error))
    except SuccessorWaits as error:
        return leave_to_user(str(error), "`scancel %s`" % job)


def _wait_for_loss(job: str, restarts: int, sleep: Callable[[float], None], leave_to_user: Callable[[str], str]) -> str:
    """Wait until Slurm has taken the first node out of the job; returns why the job is left alone, or "".

    There is no limit, because the job holds its nodes in any case. ``status`` shows the wait after a while: on a node
    from which Slurm can never be asked, only the user can act.
    """
    reason = ""
    waited = 0.0  # for the same reason
    is_recorded = False
    while True:
        fields: Dict[str, str] = {}
        asked_at = time.monotonic()
        state = own_job.job_state(job, restarts, seen=fields)
        if state not in (None, "RUNNING"):
            return "job %s is left alone: it is %s" % (job, state)
        first = first_host(fields.get("NodeList", ""))
        if first and first != fields.get("BatchHost", first):
            return ""
        before = reason
        if state is None:
            reason = "Slurm does not answer"
            pause = own_job.UNANSWERED_POLL_SECONDS
        else:
            reason = "Slurm has not noticed that"
            pause = POLL_SECONDS
        if reason != before:
            waited = 0.0
        waited += time.monotonic() - asked_at + pause
        if waited >= PATIENCE_SECONDS and not is_recorded:
            is_recorded = True
            leave_to_user(reason)
        sleep(pause)


class SuccessorWaits(Exception):
    """The successor is submitted, but our job was not ended, which otherwise ends at its wall limit."""


def _restart(job: str, restarts: int, attempt: Optional[int]) -> str:
    """Requeue the job or, if Slurm does not requeue it, submit its successor and end it; returns what happened. Both
    leave a job alone that another node has restarted."""
    try:
        return requeue.requeue(job, restarts)
    except slurm_cli.RequeueDisabled:
        pass
    what = requeue.submit_successor(job, restarts, attempt)
    try:
        slurm_cli.call("scancel", job)
    except slurm_cli.SlurmUnavailable as error:
        raise SuccessorWaits("%s, which waits for the end of this job: %s" % (what, error)) from error
    return what


def _leave_to_user(
    job: str, run: RunDir, known: Optional[int], environ: Mapping[str, str], reason: str, remedy: str = ""
) -> str:
    """Record for ``flip status`` what the user must do, unless the run goes on: this node may have lost its network
    alone; returns what happened. ``known``: the newest attempt when this node lost its coordinator."""
    if known is None or _goes_on(run, known):
        return "job %s is left alone: %s, and its run may go on without this node" % (job, reason)
    what = "its first node does not answer, and %s could not restart job %s: %s; %s"
    remedy = remedy or "`scancel %s`, then submit again" % job
    text = what % (environ["SLURMD_NODENAME"], job, reason, remedy)
    if not (read_record(run.attempt(known) / "end.json") or {}).get("remedy"):
        attempts.record_failed_restart(run, known, "the job has lost its first node", text)
    return text


def _newest(run: RunDir) -> Optional[int]:
    """The newest attempt of the run; None if its files cannot be read."""
    try:
        return run.newest_attempt()
    except OSError:
        return None


def _goes_on(run: RunDir, known: int) -> bool:
    """Whether another attempt has started, or a rank has written the status of the run a short time ago."""
    if _newest(run) != known:
        return True
    try:
        age = time.time() - os.stat(str(run.status)).st_mtime
    except OSError:
        return False
    return age < PATIENCE_SECONDS / 2


def _srun_answers(environ: Mapping[str, str]) -> bool:
    """Whether the srun of this task listens; on a lost node it does not."""
    try:
        place = environ["SLURM_SRUN_COMM_HOST"], int(environ["SLURM_SRUN_COMM_PORT"])
        socket.create_connection(place, CONNECT_SECONDS).close()
    except (KeyError, OSError):
        return False
    return True
