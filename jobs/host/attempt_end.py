"""Records the end of an attempt of this job, with what Slurm and the logs show of it.

The exit trap calls it, and the coordinator of the job's node agents, which may start the next attempt in the same job.
"""

import os
import time
from typing import Dict, Mapping, Optional, Tuple

from flip.files.creation import RefusedPath
from flip.runs import attempts, bad_nodes, wall_limit
from flip.runs.errors import FULL_DISK_ERRNOS
from flip.runs.next_step import NOTHING_HELD, Allocation, Evidence, Step
from flip.runs.restart_policy import EndFacts
from flip.runs.rundir import RunDir, read_record
from jobs.host import own_job, slurm_cli
from jobs.host.scheduler import Seen

Start = Tuple[str, int]
"""A batch job and its restart count: one start of a job."""


def record_end(
    run: RunDir,
    n: int,
    code: Optional[int],
    state: Optional[str],
    fields: Mapping[str, str],
    last_error: Optional[OSError] = None,
    noticed: Optional[float] = None,
    unhealthy: Optional[Mapping[str, str]] = None,
    allocation: Allocation = NOTHING_HELD,
) -> Step:
    """Decide what follows from the end of attempt n, and record it (``attempts.end_attempt``).

    ``code``, ``state``, ``unhealthy``: see ``EndFacts``. ``fields``: of the job, empty if Slurm does not answer.
    ``last_error``: of an earlier try of this call. ``noticed``, ``allocation``: see ``end_attempt``. A second call
    changes nothing. Raises OSError.
    """
    suspect = bad_nodes.find_suspect(run, n, time.time())
    limit = slurm_cli.parse_duration(fields.get("TimeLimit", ""))
    end = facts_of_end(run, n, code, state, limit, own_job.time_used(fields), unhealthy or {})
    met = met_by_owner(run, n, last_error)
    return attempts.end_attempt(run, n, end, suspect, met, noticed, allocation=allocation)


def evidence(
    run: RunDir,
    n: int,
    code: int,
    state: Optional[str],
    seen: Seen,
    unhealthy: Mapping[str, str],
    last_error: Optional[OSError],
) -> Evidence:
    """What is known of the end of attempt n.

    ``code``, ``state``, ``unhealthy``: see ``EndFacts``. ``last_error``: of an earlier try of this call. Records a wall
    limit that was lowered since the owner has read it. Raises OSError.
    """
    end = facts_of_end(run, n, code, state, seen.limit, seen.used, unhealthy)
    suspect = bad_nodes.find_suspect(run, n, time.time())
    return attempts.evidence_of(run, n, end, suspect, met_by_owner(run, n, last_error))


def facts_of_end(
    run: RunDir,
    n: int,
    code: Optional[int],
    state: Optional[str],
    limit: Optional[int],
    used: Optional[wall_limit.TimeUsed],
    unhealthy: Mapping[str, str],
) -> EndFacts:
    """``limit``: the wall limit now, in seconds. ``used``: None if Slurm does not answer."""
    if limit is not None and limit != wall_limit.recorded_limit(run, n):  # lowered since the watcher has read it
        wall_limit.record_limit(run, n, limit)
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES") or 1)
    late = ""
    if not restarted_in_place(run, n):  # else it had only the rest of the job's time
        late = wall_limit.limit_reached(run, n, used)
    return EndFacts(
        code,
        state,
        late=late,
        unstarted=bad_nodes.unstartable_nodes(run, n, nodes),
        out_of_memory=bad_nodes.out_of_memory_nodes(run, n),
        unhealthy=unhealthy,
    )


def met_by_owner(run: RunDir, n: int, last_error: Optional[OSError]) -> Dict[str, str]:
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


def restarted_in_place(run: RunDir, n: int) -> bool:
    """Whether attempt n started in the allocation of the one before, without a requeue."""
    start, previous = (read_record(run.attempt(number) / "start.json") or {} for number in (n, n - 1))
    return attempts.restarted_in_place(start, previous)


def newest_of_start(run: RunDir, start: Start) -> int:
    """The newest attempt of the run if it belongs to this start of this job, else 0. Raises OSError, ValueError."""
    for n in reversed(run.attempt_numbers()):
        record = read_record(run.attempt(n) / "start.json")
        if record is not None:
            if (record.get("job"), int(record.get("restarts") or 0)) == start:
                return n
            break
    return 0
