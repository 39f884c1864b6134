"""Errors of the file system by the names that our exit codes know."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from flip.exitcodes import FlipError, PermissionDenied, StorageError

ELSEWHERE = "Choose another place: FLIP_RUNS=FOLDER, or runs_root in the cluster profile."


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
