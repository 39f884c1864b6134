"""The first run of a new shape goes ahead, as canaries do; the others are queued, but held until it has passed.

It has passed when it has logged so many steps, each with a finite loss. Whoever looks after it then lets the others
go: on Slurm a process beside its ranks and, after that, its exit trap (jobs/host/batch_hooks.py), here the supervisor.
Where it stops for good they never start, and ``status`` tells why; the next submission takes them up, with a canary of
its own.

In job.json stands of a canary ``canary``: steps, and on Slurm ``releases``, the names of the jobs that are held; of a
run that waits for one ``waits_for``, its name. Standard library, Python >= 3.6.
"""

import json
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from flip.runs.rundir import RunDir, create_json, read_record
from jobs.host import attempts, slurm_cli


def canary_record(run: RunDir) -> Dict[str, Any]:
    """What job.json says of a canary; empty for any other run."""
    return (read_record(run.path / "job.json") or {}).get("canary") or {}


def passed(run: RunDir, steps: int) -> bool:
    """Whether a run has logged so many steps since it was submitted, whatever cut it short in between, or is done."""
    if run.result.exists():
        return True
    after = attempts.submitted_after(run)
    logged = [step for n in run.attempt_numbers() if n > after for step in _steps(run, n)]
    return bool(logged) and max(logged) - min(logged) >= steps  # a loss that is not finite is never logged


def _steps(run: RunDir, n: int) -> Iterator[int]:
    """The steps that attempt n logged. A damaged line counts as absent: it must not keep others held."""
    try:
        lines = (run.metrics / ("%d.jsonl" % n)).read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return
    for line in lines:
        try:
            step = json.loads(line.decode("utf-8"))["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(step, int):
            yield step


def canary_of(run: RunDir, job: Dict[str, Any]) -> Optional[RunDir]:
    """The canary for which a run waits; None where there is none, or its job on Slurm was let go.

    Where nobody but the submitter can tell, it may be waited for: see ``let_go``.
    """
    name = job.get("waits_for")
    return RunDir(run.path.parent / name) if name and not was_released(run, job) else None


def was_released(run: RunDir, job: Dict[str, Any]) -> Optional[bool]:
    """Whether a job that waits on Slurm was let go; None where its submission is somebody else's to read."""
    return file_exists(_mark(run, job["name"])) if "token" in job else False


def file_exists(mark: Path) -> Optional[bool]:
    """Whether a file of a submission exists; None: not known, as its folder (0700) belongs to another user."""
    try:
        os.stat(str(mark))
    except PermissionError:
        return None
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_current(ahead: RunDir, job: Dict[str, Any]) -> bool:
    """Whether it is for this submission of the canary that a job waits: one that was submitted again has another."""
    record = canary_record(ahead)
    return bool(record) and ("token" not in job or job["name"] in record["releases"])


def stuck_reason(ahead: RunDir, state: str, reason: str) -> str:
    """Why nobody will let a run go any more: where its canary stands, as a sentence."""
    return "its canary %s is %s%s: submit again" % (ahead.name, state, " (%s)" % reason if reason else "")


def is_held(row: slurm_cli.QueueRow) -> bool:
    """Whether a job is held as ``sbatch --hold`` does it, so that it can be let go."""
    return row.state == "PENDING" and "held" in row.reason.lower()


def release(run: RunDir) -> List[str]:
    """Release the jobs in Slurm's queue that wait for this canary. Returns the names of those that were not listed.

    Raises SlurmUnavailable, OSError.
    """
    waiting = [name for name in canary_record(run).get("releases", []) if not _mark(run, name).exists()]
    rows = slurm_cli.queue(waiting)
    for name in waiting:
        held = {row.id.partition("_")[0] for (job, _), row in rows.items() if job == name and is_held(row)}
        if held:
            slurm_cli.call("scontrol", "release", ",".join(sorted(held)))
        if any(job == name for job, _ in rows):
            create_json(_mark(run, name), {"canary": run.name})
    return [name for name in waiting if not _mark(run, name).exists()]


def cancel_held_jobs(names: List[str]) -> None:
    """Take held jobs from Slurm's queue. Raises SlurmUnavailable."""
    held = {row.id.partition("_")[0] for row in slurm_cli.queue(names).values() if is_held(row)}
    if held:
        slurm_cli.call("scancel", *sorted(held))


def _mark(run: RunDir, name: str) -> Path:
    """Exists when the jobs of that name were let go. They are told by their token, the end of the name."""
    return run.path.parent / ".slurm" / name.rpartition(".")[2] / "released.json"
