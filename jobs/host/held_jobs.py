"""The jobs in Slurm's queue that are held until their canary has passed: release and cancel them.

When that happens is decided in ``flip.runs.canary``. All functions raise SlurmUnavailable if Slurm does not answer.
"""

import time
from typing import Any, Callable, List, Mapping, Sequence

from flip.files.creation import RefusedPath
from flip.runs import canary
from flip.runs.rundir import RunDir
from jobs.host import slurm_cli


def is_held(row: slurm_cli.QueueRow) -> bool:
    """Whether a job is held as by ``sbatch --hold``, so that it can be released."""
    return row.state == "PENDING" and "held" in row.reason.lower()


def release(run: RunDir, record: Mapping[str, Any]) -> List[str]:
    """Release the jobs in Slurm's queue that wait for this canary. Returns the names of those that squeue does not
    list.

    ``record``: of the canary, from ``RunDir.read_job``, so that no other user can have named the jobs. Raises
    SlurmUnavailable, OSError.
    """
    waiting = [name for name in record.get("releases", ()) if not canary.released_file(run, name).exists()]
    rows = slurm_cli.queue(waiting)
    for name in waiting:
        held = {_array(row) for (job, _), row in rows.items() if job == name and is_held(row)}
        if held:
            slurm_cli.call("scontrol", "release", ",".join(sorted(held)))
        if any(job == name for job, _ in rows):
            canary.record_release(run, name)
    return [name for name in waiting if not canary.released_file(run, name).exists()]


def release_passed(run: RunDir, record: Mapping[str, Any], absent: List[float], log: Callable[[object], None]) -> bool:
    """``release``; returns whether nothing is left to do. ``absent``: times of earlier answers of squeue that lacked
    some of the jobs. After two such answers, slurm_cli.UNKNOWN_JOB_SECONDS apart, these jobs are gone."""
    missing = release(run, record)
    if not missing:
        return True
    absent.append(time.time())
    if absent[-1] - absent[0] < slurm_cli.UNKNOWN_JOB_SECONDS:
        return False
    log("%s: no longer in Slurm's queue: %s; submit again" % (run.path, ", ".join(missing)))
    return True


def settle(run: RunDir, action: str, log: Callable[[object], None], sleep: Callable[[float], None]) -> None:
    """Release or cancel the jobs that wait for a canary which ends. Slurm outages are waited out as for a requeue.

    ``action``: of end.json. Never raises because of Slurm.
    """
    try:
        record = canary.canary_of(run.read_job())
    except RefusedPath as error:  # the end of the attempt is recorded with it
        log(error)
        return
    start = time.time()
    wait = 1.0
    absent: List[float] = []
    while record.get("releases"):
        try:
            then = canary.at_end(action, action == "stop" and canary.has_passed(run, record))
            if then == canary.CANCEL:
                cancel(record["releases"])
                return
            if then == canary.LEAVE or release_passed(run, record, absent, log):
                return
            problem: object = "held jobs are missing from squeue"
        except slurm_cli.SlurmUnavailable as error:
            problem = error
        patience = slurm_cli.OUTAGE_SECONDS if action == "done" else slurm_cli.RETRY_SECONDS
        if time.time() + wait > start + patience:
            log("%s: the jobs that wait for it were not released: %s; submit again" % (run.path, problem))
            return
        sleep(wait)
        wait = min(60.0, 2 * wait)


def cancel(names: Sequence[str], *options: str) -> None:
    """Cancel held jobs, but not elements of their arrays that a user has released. ``options``: of scancel."""
    rows = [row for row in slurm_cli.queue(names).values() if row.state not in slurm_cli.ENDED]
    released = {_array(row) for row in rows if not is_held(row)}
    held = {row.id if _array(row) in released else _array(row) for row in rows if is_held(row)}
    if held:
        slurm_cli.call("scancel", *options, *sorted(held))


def _array(row: slurm_cli.QueueRow) -> str:
    """The number of the job's array, or its own."""
    return row.id.partition("_")[0]
