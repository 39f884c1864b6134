"""Which user submitted a run directory?

The files of a copied run belong to the user who made the copy; only its records show that another user has submitted
the original. The answer decides whether the code and compiled kernels that came with it may be executed. Records are
data: another user may have written anything into them. They can only make a submission more careful.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flip.files.ownership import user_name
from flip.runs.rundir import RunDir, read_lenient
from jobs.common.job import record_of

UNKNOWN = "an unknown user"


def other_submitter(run: RunDir) -> str:
    """The user who submitted the original of a copied run, in words; "" if no record names another user than this one.

    A run that was moved or copied by its own user is no such copy.
    """
    job = record_of(run)
    identity = read_lenient(run.identity)
    if not job and (run.newest_attempt() > 0 or os.path.lexists(run.compiled)):
        return UNKNOWN  # every submission writes a job.json before the first attempt, which compiles
    uids = [record.get("uid") for record in (job, identity)]
    for uid in [*uids, *_owners(job), *_writers(run)]:
        if uid is not None and not _is_trusted(uid):
            if uid < 0:
                return UNKNOWN
            return user_name(uid)
    return ""


def _owners(job: dict[str, Any]) -> Iterator[int]:
    """Owners of the folders that a job.json names and that exist; -1 for one that cannot be reached."""
    for name in ("folder", "snapshot"):
        place = job.get(name)
        if not place:
            continue
        try:
            yield Path(place).lstat().st_uid
        except (FileNotFoundError, NotADirectoryError):  # the run was moved
            continue
        except (OSError, ValueError):
            yield -1


def _writers(run: RunDir) -> Iterator[int]:
    """The owner of job.json, whatever it states."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        yield (run.path / "job.json").lstat().st_uid


def _is_trusted(uid: int) -> bool:
    """As in ``flip.files.ownership``: this user and root."""
    return uid in (os.geteuid(), 0)
