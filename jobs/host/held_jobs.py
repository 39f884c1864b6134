"""The jobs in Slurm's queue that are held until their canary has passed: release and cancel them.

When that happens is decided in ``flip.runs.canary``. All functions raise SlurmUnavailable if Slurm does not answer.
"""

from typing import Any, List, Mapping, Sequence

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
