"""Canaries: the first run with new resources or code starts alone; the others are held until it has passed.

It passes when it has logged a number of steps, each with a finite loss. Then the others are released: on Slurm by a
process beside its ranks and, after that, its exit trap (batch_hooks.py); locally by the supervisor. If it stops for
good they never start, and ``status`` says why; the next submission includes them, with a canary of its own.

job.json of a canary has ``canary``: steps, and on Slurm ``releases``, the names of the held jobs. job.json of a run
that waits has ``waits_for``, the name of its canary.
"""

import json
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from flip.runs import attempts
from flip.runs.rundir import RunDir, create_json, exists, read_record
from jobs.host import slurm_cli


def canary_record(run: RunDir) -> Dict[str, Any]:
    """The ``canary`` field of job.json; empty for any other run."""
    return (read_record(run.path / "job.json") or {}).get("canary") or {}


def passed(run: RunDir, steps: int) -> bool:
    """Whether a run has logged that many steps since it was submitted, over all its attempts, or is complete."""
    if run.result.exists():
        return True
    after = attempts.submitted_after(run)
    lowest: Optional[int] = None
    highest = 0
    for n in run.attempt_numbers():
        for step in _steps(run, n) if n > after else ():  # a loss that is not finite is never logged
            lowest, highest = (step, step) if lowest is None else (min(lowest, step), max(highest, step))
            if highest - lowest >= steps:
                return True  # nearly always in the first lines of a long file
    return False


def _steps(run: RunDir, n: int) -> Iterator[int]:
    """The steps that attempt n logged. Damaged lines are skipped: they must not keep others held."""
    try:
        file = open(str(run.metrics / ("%d.jsonl" % n)), "rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            try:
                step = json.loads(line.decode("utf-8"))["step"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            if isinstance(step, int) and line.endswith(b"\n"):
                yield step


def canary_of(run: RunDir, job: Dict[str, Any]) -> Optional[RunDir]:
    """The canary for which a run waits; None if it has none, or if its job on Slurm was released.

    If only the submitter can know that, the canary is returned: see ``was_released``.
    """
    name = job.get("waits_for")
    return RunDir(run.path.parent / name) if name and not was_released(run, job) else None


def holding(run: RunDir, job: Dict[str, Any]) -> Optional[RunDir]:
    """The canary for which a run still waits, because it has not passed (it may never); else None."""
    first = canary_of(run, job)
    return first if first and not passed(first, canary_record(first).get("steps", 0)) else None


def was_released(run: RunDir, job: Dict[str, Any]) -> Optional[bool]:
    """Whether a held job on Slurm was released; None if another user submitted it, whose folder cannot be read."""
    return file_exists(_released_file(run, job["name"])) if "token" in job else False


def file_exists(path: Path) -> Optional[bool]:
    """Whether a file of a submission exists; None if unknown, because its folder (0700) belongs to another user."""
    try:
        return exists(path)
    except PermissionError:
        return None


def is_current(canary: RunDir, job: Dict[str, Any]) -> bool:
    """Whether a job waits for the newest submission of its canary."""
    record = canary_record(canary)
    return bool(record) and ("token" not in job or job["name"] in record["releases"])


def stuck_reason(canary: RunDir, state: str, reason: str) -> str:
    """Why a run will not be released any more: the state of its canary, as a sentence."""
    return "its canary %s is %s%s: submit again" % (canary.name, state, " (%s)" % reason if reason else "")


def is_held(row: slurm_cli.QueueRow) -> bool:
    """Whether a job is held as by ``sbatch --hold``, so that it can be released."""
    return row.state == "PENDING" and "held" in row.reason.lower()


def release(run: RunDir) -> List[str]:
    """Release the jobs in Slurm's queue that wait for this canary. Returns the names of those that squeue does not
    list.

    Raises SlurmUnavailable, OSError.
    """
    waiting = [name for name in canary_record(run).get("releases", []) if not _released_file(run, name).exists()]
    rows = slurm_cli.queue(waiting)
    for name in waiting:
        held = {_array(row) for (job, _), row in rows.items() if job == name and is_held(row)}
        if held:
            slurm_cli.call("scontrol", "release", ",".join(sorted(held)))
        if any(job == name for job, _ in rows):
            create_json(_released_file(run, name), {"canary": run.name})
    return [name for name in waiting if not _released_file(run, name).exists()]


def still_held(run: RunDir) -> List[str]:
    """Names of the jobs that were not released yet, or whose release this user cannot see."""
    names = canary_record(run).get("releases", [])
    return [name for name in names if file_exists(_released_file(run, name)) is not True]


def cancel_held_jobs(names: List[str], *options: str) -> None:
    """Cancel held jobs, but not elements of their arrays that a user has released. Raises SlurmUnavailable.

    ``options``: of scancel.
    """
    rows = [row for row in slurm_cli.queue(names).values() if row.state not in slurm_cli.ENDED]
    released = {_array(row) for row in rows if not is_held(row)}
    held = {row.id if _array(row) in released else _array(row) for row in rows if is_held(row)}
    if held:
        slurm_cli.call("scancel", *options, *sorted(held))


def _array(row: slurm_cli.QueueRow) -> str:
    """The number of the job's array, or its own."""
    return row.id.partition("_")[0]


def _released_file(run: RunDir, name: str) -> Path:
    """Exists once the jobs of that name were released. The end of the name is the token of their submission."""
    return run.path.parent / ".slurm" / name.rpartition(".")[2] / "released.json"
