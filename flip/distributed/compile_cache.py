"""The folder for code that torch compiles: ``code_folder``.

Code for GPUs lies on the disk of the node, in a folder that all processes of this user share, those of other runs too.
It outlives them: the next run of the same model compiles nothing. It is bounded: a process that finds it larger than
``LARGEST_CACHE`` empties it, unless another process uses it. Each process holds a shared lock on it to its end.
"""

import contextlib
import fcntl
import os
import tempfile
from multiprocessing import util
from pathlib import Path

from flip.files import deletion
from flip.files.creation import open_lock, private_folder

LARGEST_CACHE = 2 << 30
"""Bytes. The code of one model needs tens of megabytes."""
LOCK = "lock"


def code_folder(run_folder: Path | None = None) -> Path:
    """Return a folder that only this user can write: ``run_folder``, or by default the one that all runs on this node
    share.

    If another user has taken its name, the folder is of this process alone, in multiprocessing's, which is deleted at
    the end of the process. Raises OSError.
    """
    try:
        if run_folder is not None:
            return private_folder(run_folder)
        folder = private_folder(Path(tempfile.gettempdir()) / f"flip-compile-{os.geteuid()}")
    except PermissionError:
        return private_folder(Path(util.get_temp_dir()) / "flip-compile")
    with contextlib.suppress(OSError):  # a file system without locks: nothing is deleted
        _hold(folder)
    return folder


def _hold(folder: Path) -> None:
    """Mark the folder as used by this process. Empty it before, if it is too large and no process uses it."""
    lock = open_lock(folder / LOCK)  # stays open until this process ends
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _size(folder) > LARGEST_CACHE:
            _empty(folder)
    fcntl.flock(lock, fcntl.LOCK_SH)  # waits for a process that empties it


def _size(folder: Path) -> int:
    total = 0
    for top, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a file that a compiler deletes meanwhile
                total += os.lstat(os.path.join(top, name)).st_size
    return total


def _empty(folder: Path) -> None:
    """Only this user can have written to the folder. What cannot be deleted stays."""
    for entry in folder.iterdir():
        if entry.name != LOCK:
            deletion.discard_own_folder(entry)
