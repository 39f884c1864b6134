"""Requeues a job whose first node is lost, and with it the batch script, its watcher and srun.

Slurm lets a job with ``--no-kill`` go on without a failed node, also if that is the first one: nothing would end or
requeue the job before its wall limit. So the task of a node agent that has lost its coordinator asks Slurm. Standard
library, Python >= 3.6.
"""

import socket
import time
from typing import Callable, Dict, Mapping

from flip.runs import attempts
from flip.runs.rundir import RunDir, read_record
from jobs.host import own_job, requeue, slurm_cli
from jobs.host.node_list import first_host

PATIENCE_SECONDS = 900.0
"""For Slurm to notice that the node is lost (SlurmdTimeout, 300 s by default)."""
POLL_SECONDS = 10.0
CONNECT_SECONDS = 10.0


def requeue_if_lost(environ: Mapping[str, str], sleep: Callable[[float], None] = time.sleep) -> str:
    """Wait until Slurm has taken the first node out of the job of this task, then requeue the job; returns what
    happened. Of the nodes that are left, only the first one requeues.

    Returns at once if srun answers: the exit trap decides when this task has ended.
    """
    job = own_job.own_job(environ)
    if _srun_answers(environ):
        return "job %s is left to its exit trap" % job
    restarts = own_job.restart_count(environ)
    waited = 0.0
    while True:
        fields: Dict[str, str] = {}
        state = own_job.job_state(job, restarts, seen=fields)
        if state not in (None, "RUNNING"):
            return "job %s is left alone: it is %s" % (job, state)
        first = first_host(fields.get("NodeList", ""))
        if first and first != fields.get("BatchHost", first):
            break
        if waited >= PATIENCE_SECONDS and state is None:
            return _leave_to_user(job, environ, "Slurm does not answer")
        if waited >= PATIENCE_SECONDS:
            return "job %s is left alone: Slurm does not say that its first node is lost" % job
        sleep(POLL_SECONDS)
        waited += POLL_SECONDS
    if first != environ["SLURMD_NODENAME"]:
        return "job %s has lost its first node: %s requeues it" % (job, first)
    try:
        return "job %s has lost its first node: %s" % (job, _restart(job, restarts, environ))
    except slurm_cli.SlurmUnavailable as error:
        return _leave_to_user(job, environ, str(error))


def _restart(job: str, restarts: int, environ: Mapping[str, str]) -> str:
    """Requeue the job or, if Slurm does not requeue it, submit its successor and end it; returns what happened."""
    try:
        return requeue.requeue(job, restarts)
    except slurm_cli.RequeueDisabled:
        attempt = RunDir(environ["FLIP_RUN"]).newest_attempt()
    what = requeue.submit_successor(job, restarts, attempt)
    slurm_cli.call("scancel", job)  # the successor waits for its end, which otherwise comes at the wall limit
    return what


def _leave_to_user(job: str, environ: Mapping[str, str], reason: str) -> str:
    """Record for ``flip status`` what the user must do, as the first of the nodes that are left; returns it."""
    remedy = "its first node does not answer, and %s could not restart job %s: %s; `scancel %s`, then submit again"
    text = remedy % (environ["SLURMD_NODENAME"], job, reason, job)
    run = RunDir(environ["FLIP_RUN"])
    n = run.newest_attempt()
    if not (read_record(run.attempt(n) / "end.json") or {}).get("remedy"):
        attempts.record_failed_restart(run, n, "the job has lost its first node", text)
    return text


def _srun_answers(environ: Mapping[str, str]) -> bool:
    """Whether the srun of this task listens; on a lost node it does not."""
    try:
        place = environ["SLURM_SRUN_COMM_HOST"], int(environ["SLURM_SRUN_COMM_PORT"])
        socket.create_connection(place, CONNECT_SECONDS).close()
    except (KeyError, OSError):
        return False
    return True
