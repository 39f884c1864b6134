"""File locks, trust in files, and errors of the file system as FlipErrors."""

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flip.files import deletion, ownership
from flip.files.creation import RefusedPath, create_file, final_path
from flip.runs.errors import FULL_DISK_ERRNOS, ConfigError, FlipError, PermissionDenied, StorageError
from jobs.common.text import plain

#: Remedy if runs cannot be stored in a folder.
OTHER_ROOT = "Choose another folder: FLIP_RUNS=FOLDER, --root FOLDER, or runs_root in the cluster profile."
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of flock on file systems without locks: Lustre without -o flock, some NFS."""
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of link on file systems without links: vfat, mounted buckets (gcsfuse)."""


def locked(handle: int, how: int, where: str | os.PathLike[str]) -> bool:
    """Try to lock an open file without waiting; False if another process holds a lock that excludes this one.

    Args:
        handle: descriptor of the file.
        how: ``fcntl.LOCK_EX`` or ``fcntl.LOCK_SH``.
        where: its path, for the error.

    Raises ConfigError if the file system has no locks.
    """
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        remedy = "Mount it with -o flock, or choose another runs root with FLIP_RUNS."
        raise ConfigError("this file system has no locks", where, error.strerror, remedy) from error
    return True


def lock_holder(handle: int) -> str:
    """Which process of this machine holds a lock on an open file, in words."""
    info = os.fstat(handle)
    device = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}:{info.st_ino}"
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    locks = [line.split() for line in lines if " FLOCK " in line and line.split()[5] == device]
    pids = [words[4] for words in locks if words[4].isdigit() and words[1] != "->"]
    if not pids:
        return "it runs on another machine, or has just ended"
    try:
        arguments = Path(f"/proc/{pids[0]}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    except OSError:  # it has just ended
        arguments = []
    return plain(f"process {pids[0]}: {' '.join(map(os.fsdecode, arguments))}".rstrip(": "))


def probe(place: str | os.PathLike[str]) -> None:
    """Create, lock, rename, link and delete in a folder, as runs will do.

    Raises ConfigError if the file system does not support it, OSError if it is not permitted.
    """
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".probe.", dir=place)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(place)) from error
    with temporary as folder:
        first = Path(folder, "a")
        second = Path(folder, "b")
        with create_file(first) as file:
            locked(file.fileno(), fcntl.LOCK_EX, place)
        first.rename(second)
        for link, kind in ((os.link, "hard"), (os.symlink, "symbolic")):
            try:
                link(second, first)
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                remedy = f"Runs could not record their state there. {OTHER_ROOT}"
                raise ConfigError(f"this file system has no {kind} links", place, error.strerror, remedy) from error
            deletion.delete_file(first)


def require_trusted(path: str | os.PathLike[str], inside: bool = False) -> None:
    """Raise PermissionDenied if another user owns, or may write to, a file or folder with code to be executed.

    ``inside``: also check everything below it.
    """
    if inside:
        reason = ownership.why_untrusted_inside(path)
    else:
        reason = ownership.why_untrusted(path)
    if reason:
        remedy = (
            f"Its content would be executed with your rights. If it is yours, run chmod -R go-w {path}. Or "
            f"choose another folder, or trust a group by name or number: export {ownership.TRUSTED_GROUP}=GROUP."
        )
        raise PermissionDenied(f"is not trusted: {reason}", str(path), remedy=remedy)


def unwritable(error: OSError, where: str | os.PathLike[str], remedy: str = OTHER_ROOT) -> FlipError:
    """The error for a file that cannot be written: PermissionDenied for missing permissions, else StorageError."""
    place = str(final_path(error.filename or where))
    if isinstance(error, RefusedPath):
        return PermissionDenied(error.strerror or str(error), place)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionDenied("may not be written", place, remedy=remedy)
    if error.errno in FULL_DISK_ERRNOS:
        remedy = f"Free space there. {remedy}"
    return StorageError(f"cannot be written: {error.strerror or error}", place, remedy=remedy)


@contextmanager
def writing(where: str | os.PathLike[str], remedy: str = OTHER_ROOT) -> Iterator[None]:
    """Turn an OSError of the block into the error of ``unwritable``."""
    try:
        yield
    except OSError as error:
        raise unwritable(error, where, remedy) from error
