"""Temporary folders of processes that may be killed: by a record of the owner in each, a later process deletes it.

A folder belongs to an attempt of a run, and is deleted when that has ended, or to a process, which holds a lock in it.
Standard library, Python >= 3.6.
"""

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path
from typing import List, Optional

from flip.files import deletion, ownership
from flip.files.creation import open_lock
from flip.runs.rundir import OWNER, RunDir, read_json, write_json

PATTERNS = ("pymp-*", "flip-store-*", "flip-import-*")
"""Of multiprocessing, of the stores of ranks (``jobs.local.stores``), of a node agent while it imports torch."""
LOCK = "lock"


def claim(folder: Path, run: Optional[RunDir] = None, attempt: int = 0) -> None:
    """Record the owner of a new folder: an attempt of a run, or this process, which locks it until its end.

    Raises OSError.
    """
    if run is None:
        fcntl.flock(open_lock(folder / LOCK), fcntl.LOCK_EX)
    write_json(folder / OWNER, {"run": str(run.path) if run else "", "attempt": attempt})


def delete_left(run: Optional[RunDir] = None, attempt: int = 0) -> None:
    """Delete the folders of attempts of ``run`` up to ``attempt``, which have ended, and those of processes that have.

    A folder that cannot be deleted stays, and so does one without a record.
    """
    places = {tempfile.gettempdir(), "/tmp"}  # multiprocessing's folders are in /tmp if TMPDIR is too long for sockets
    for record in [path for place in places for pattern in PATTERNS for path in _records(Path(place), pattern)]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            folder = record.parent
            if ownership.is_mine(record) and ownership.is_mine(folder) and _is_left(record, run, attempt):
                deletion.discard_own_folder(folder)


def _records(place: Path, pattern: str) -> List[Path]:
    try:
        return list(place.glob(pattern + "/" + OWNER))
    except OSError:  # a folder of another user
        return []


def _is_left(record: Path, run: Optional[RunDir], attempt: int) -> bool:
    owner = read_json(record) or {}
    if owner["run"]:
        return run is not None and owner["run"] == str(run.path) and owner["attempt"] <= attempt
    lock = os.open(str(record.with_name(LOCK)), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises BlockingIOError if its process lives
    finally:
        os.close(lock)
    return True
