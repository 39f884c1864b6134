"""Why a job in Slurm's queue does not start: its failed starts, the logs of these, and what a person must do."""

import os
import re
from pathlib import Path

from flip.runs.errors import KILLED, STORAGE
from flip.runs.rundir import RunDir, list_names, read_lenient, read_record
from jobs.common.job import record_of
from jobs.host.failed_starts import parse_failed_starts
from jobs.host.slurm_cli import WAITING, QueueRow

#: What the exit code of a failed start means (``elsewhere`` in fallback.sh, ``jobs/host/job.py``).
FAILURES = {
    1: "the folder of the sweep cannot be read or written there",
    2: "the code of the run, or its folder, is missing there",
    STORAGE: "files could not be read or written there for ten minutes",
    126: "the batch script's Python cannot be executed there",
    127: "the batch script's Python is missing there",
    KILLED: "the batch script was killed",
}

#: Slurm's reasons for which a job waits for ever, and what ends that; {id} is the job.
REMEDIES = {
    "JobHeldAdmin": "an administrator must release it: `scontrol release {id}`",
    "BadConstraints": "too few nodes fit, or are left without those that it excludes (`scontrol show job {id}`); "
    "`scontrol update JobId={id} ExcNodeList=` excludes none",
    "PartitionTimeLimit": "its limit is above the partition's: `scontrol update JobId={id} TimeLimit=MINUTES`, or set "
    "fewer hours, cancel it and submit again",
    "PartitionNodeLimit": "the partition allows fewer nodes: cancel it, and submit again with fewer nodes",
    "DependencyNeverSatisfied": "cancel it and submit again",
    "InvalidAccount": "correct the profile's account, cancel it and submit again",
    "InvalidQOS": "correct the profile's qos, cancel it and submit again",
    "AccountNotAllowed": "the partition does not allow the profile's account: correct it, cancel it and submit again",
    "QOSNotAllowed": "the partition does not allow the profile's qos: correct it, cancel it and submit again",
}  # fmt: skip


def remedy(row: QueueRow) -> str:
    """What a person must do before a waiting job can start; "" if it starts by itself."""
    if row.state not in WAITING:
        return ""
    if row.reason in REMEDIES:
        return REMEDIES[row.reason].format(id=row.id)
    if "held" in row.reason.lower():
        return f"release it with `scontrol release {row.id}`"
    return ""


def failed_starts(run: RunDir, row: QueueRow) -> str:
    """How often in a row, where and why a waiting job could not start an attempt, as a sentence; "" if it could."""
    writer, failed = parse_failed_starts(row.comment)
    if writer is None or not failed.starts or row.state not in WAITING:
        return ""
    newest = read_record(run.attempt(run.newest_attempt()) / "start.json") or {}
    if newest.get("job") == row.id and int(newest.get("restarts") or 0) > writer:
        return ""  # a later start has succeeded
    if failed.starts > 1:
        count = f"{failed.starts} starts in a row failed, the last one"
    else:
        count = "a start failed"
    where = ""
    if failed.node:
        where = f" on {failed.node}"
    why = ""
    if failed.code:
        why = f": {FAILURES.get(failed.code, f'exit code {failed.code}')}"
    logs = start_logs(run, "err")
    return f"{count}{where}{why}" + (f" (log: {logs[-1]})" if logs else "")


def start_logs(run: RunDir, kind: str) -> list[Path]:
    """The outputs (``kind``: out or err) of the batch scripts of a run's last submission before their attempts, oldest
    first, without empty ones and those that an attempt has followed."""
    job = record_of(run)
    if "token" not in job:
        return []
    folder = run.path.parent / ".slurm" / job["token"]
    number = job.get("index", 0)
    own = re.compile(rf"[0-9]+_{number}\.{kind}" + (rf"|[0-9]+\.{kind}" if number == 0 else ""))
    times: dict[Path, float] = {}
    try:
        since = read_lenient(run.attempt(run.newest_attempt()) / "start.json").get("time", 0.0)
        for name in list_names(folder):
            if own.fullmatch(name):
                status = os.stat(folder / name)
                if status.st_size and status.st_mtime > since:
                    times[folder / name] = status.st_mtime
    except OSError:  # the folder of another user, or gone
        pass
    return sorted(times, key=lambda path: times[path])
