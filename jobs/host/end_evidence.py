"""Collects what is known of the end of an attempt of this job: from Slurm, from the log of srun, and from the disk."""

import os
import time
from typing import Callable, Dict, Mapping, Optional

from flip.files.creation import RefusedPath
from flip.runs import attempts, bad_nodes, wall_limit
from flip.runs.errors import FULL_DISK_ERRNOS
from flip.runs.next_step import Evidence
from flip.runs.restart_policy import EndFacts
from flip.runs.rundir import RunDir, read_record
from jobs.host.scheduler import JobSeen, Scheduler


def evidence_of_end(
    run: RunDir,
    n: int,
    code: int,
    state: Optional[str],
    seen: JobSeen,
    unhealthy: Mapping[str, str],
    last_error: Optional[OSError] = None,
) -> Evidence:
    """What is known of the end of attempt n.

    ``code``, ``state``, ``unhealthy``: see ``EndFacts``. ``last_error``: of an earlier try of this call. Records a wall
    limit that was lowered since the owner has read it. Raises OSError, ValueError.
    """
    if seen.limit is not None and seen.limit != wall_limit.recorded_limit(run, n):
        wall_limit.record_limit(run, n, seen.limit)
    limit_reason = ""
    if not _restarted_in_place(run, n):  # else it had only the rest of the job's time
        limit_reason = wall_limit.limit_reason(run, n, seen.used)
    end = EndFacts(
        code,
        state,
        limit_reason=limit_reason,
        unstarted=bad_nodes.unstartable_nodes(run, n, int(os.environ.get("SLURM_JOB_NUM_NODES") or 1)),
        out_of_memory=bad_nodes.out_of_memory_nodes(run, n),
        unhealthy=unhealthy,
    )
    suspect = bad_nodes.find_suspect(run, n, time.time())
    return attempts.evidence_of(run, n, end, suspect, _met(run, n, last_error))


def end_abandoned(run: RunDir, scheduler: Scheduler, log: Callable[[str], None], before: Optional[int] = None) -> bool:
    """Record ends of attempts that ended unobserved, of those before number ``before``; returns whether there were any.

    The comment of the job names the one whose end could not be written. If Slurm does not answer they stay open,
    since their cause is not known; the end of this attempt or the next start asks again.
    """
    if not [n for n in attempts.unended(run) if before is None or n < before]:
        return False
    failed = scheduler.see().failed
    if failed is None:
        log("%s: Slurm does not say how the last attempt ended; it is asked again later" % run.path)
        return False
    attempts.end_abandoned(run, failed.attempt, before)
    return True


def _met(run: RunDir, n: int, last_error: Optional[OSError]) -> Dict[str, str]:
    """Cause -> reason, of what this process itself met. A run whose job.json is refused must not start again."""
    met: Dict[str, str] = {}
    disk_full = bad_nodes.storage_failure(run, n)
    if last_error is not None and last_error.errno in FULL_DISK_ERRNOS:
        disk_full = str(last_error)
    if disk_full:
        met["storage"] = disk_full
    try:
        run.read_job()
    except RefusedPath as error:
        met["permission"] = str(error)
    except ValueError:  # damaged: the next start reports it
        pass
    return met


def _restarted_in_place(run: RunDir, n: int) -> bool:
    """Whether attempt n started in the allocation of the one before, without a requeue."""
    start, previous = (read_record(run.attempt(number) / "start.json") or {} for number in (n, n - 1))
    return attempts.restarted_in_place(start, previous)
