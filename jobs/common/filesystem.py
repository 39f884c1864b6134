"""Errors of the file system by the names that our exit codes know."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flip.runs import ownership
from flip.runs.errors import ConfigError, FlipError, PermissionDenied, StorageError

ELSEWHERE = "Choose another place: FLIP_RUNS=FOLDER, or runs_root in the cluster profile."
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""What flock says where there are none: Lustre without -o flock, some NFS."""
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
"""What link says where there are none: vfat, a bucket that is mounted (gcsfuse)."""


def locked(handle: int, how: int, where: str | os.PathLike[str]) -> bool:
    """Take flock's lock on an open file, or not, without waiting. ConfigError where the file system has no locks."""
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


def probe(place: str | os.PathLike[str]) -> None:
    """Do in a folder what runs will do there: create, lock, rename, link and delete. Raises ConfigError where its file
    system cannot, OSError where it may not."""
    with tempfile.TemporaryDirectory(prefix=".probe.", dir=place) as folder:
        first, second = Path(folder, "a"), Path(folder, "b")
        with open(first, "w") as file:
            locked(file.fileno(), fcntl.LOCK_EX, place)
        first.rename(second)
        for link, kind in ((os.link, "hard"), (os.symlink, "symbolic")):
            try:
                link(second, first)
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                remedy = f"What becomes of a run could not be recorded there. {ELSEWHERE}"
                raise ConfigError(f"this file system has no {kind} links", place, error.strerror, remedy) from error
            first.unlink()


def require_trusted(path: str | os.PathLike[str], inside: bool = False) -> None:
    """Raise PermissionDenied if another user owns a file or folder that is executed from, or may write to it.

    ``inside``: everything below it, too.
    """
    reason = ownership.untrusted_inside(path) if inside else ownership.untrusted(path)
    if reason:
        remedy = (
            f"What lies there would be executed with your rights. If it is yours, close it: chmod -R go-w {path}. Or "
            f"choose another place, or trust a group by name or number: export {ownership.TRUSTED_GROUP}=GROUP."
        )
        raise PermissionDenied(f"is not trusted: {reason}", str(path), remedy=remedy)


def unwritable(error: OSError, where: str | os.PathLike[str], remedy: str = ELSEWHERE) -> FlipError:
    """PermissionDenied (77) where nothing may be written, else StorageError (69): a full disk, a lost mount."""
    place = str(error.filename or where)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionDenied("may not be written", place, remedy=remedy)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = f"Free space there. {remedy}"
    return StorageError(f"cannot be written: {error.strerror or error}", place, remedy=remedy)


@contextmanager
def writing(where: str | os.PathLike[str]) -> Iterator[None]:
    """Within, what the file system refuses is an error of ours, with its name."""
    try:
        yield
    except OSError as error:
        raise unwritable(error, where) from error
