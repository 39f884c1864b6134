"""Folders and files of runs and caches: access that never follows a prepared link, and modes that no umask opens.

Standard library, Python >= 3.6.
"""

import errno
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from flip.runs.ownership import PathLike, user_name

#: Largest record (JSON, YAML) that is read, bytes.
RECORD_LIMIT = 64 << 20


def open_regular(path: PathLike) -> Any:
    """Open a regular file for reading bytes, without waiting for a FIFO or a device.

    Raises OSError if it cannot be read, ValueError with the path if it is no regular file.
    """
    file = os.fdopen(os.open(str(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("%s: not a regular file" % (path,))
    return file


def read_regular(path: PathLike, limit: int = RECORD_LIMIT) -> bytes:
    """Return the contents of a regular file. Raises as ``open_regular``, and ValueError above ``limit`` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError("%s: %d bytes, more than the limit of %d" % (path, size, limit))
        return file.read(size)


def create_beside(path: PathLike, mode: int = 0o644) -> Any:
    """Create a new file in the folder of ``path``, under a name that cannot be guessed, and return (its path, its
    descriptor open for writing).

    An existing file or link is never opened. ``mode`` is reduced by the umask; by default only the user may write.
    """
    path = Path(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        temporary = path.with_name("%s.tmp.%s" % (path.name, secrets.token_hex(8)))
        try:
            return temporary, os.open(str(temporary), flags, mode)
        except FileExistsError:
            continue


def closed_folder(path: PathLike) -> Path:
    """Create a folder and its missing parents so that only the user may write to them, whatever the umask allows.

    An existing folder is left as it is.
    """
    path = Path(path)
    if not path.is_dir():
        closed_folder(path.parent)
        path.mkdir(mode=0o755, exist_ok=True)
    return path


def private_folder(path: PathLike) -> Path:
    """Create a folder with mode 0700, or check that the existing one belongs to the user and is closed to others.

    Its parents are created too. Raises PermissionError if another user prepared it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.mkdir(str(path), 0o700)
    except FileExistsError:
        pass
    info = os.lstat(str(path))
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        reason = "not a folder of %s; remove it or choose another place" % user_name(os.geteuid())
        raise PermissionError(errno.EPERM, reason, str(path))
    if info.st_mode & 0o077:
        os.chmod(str(path), 0o700)
    return path
