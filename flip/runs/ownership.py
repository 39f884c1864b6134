"""Who owns a path and who else may write to it, and file access that never follows a prepared link.

The trust boundary (SECURITY.md): a file is trusted if it belongs to the current user or to root and no other user may
write to it. Everything else is data: it may be read, with a limit, but is never executed. Standard library, Python 3.6.
"""

import errno
import grp
import os
import pwd
import secrets
import stat
from pathlib import Path
from typing import Any, Union

PathLike = Union[str, "os.PathLike[str]"]

#: Largest record (JSON, YAML) that is read, bytes.
RECORD_LIMIT = 64 << 20

#: Name or number of a group whose members may write to folders that are executed from, in this environment variable.
TRUSTED_GROUP = "FLIP_TRUST_GROUP"


def untrusted(path: PathLike) -> str:
    """Return why a file or folder is not trusted, or "" if it is. The last component is not followed if it is a link.

    Raises OSError if it does not exist.
    """
    info = os.lstat(str(path))
    if stat.S_ISLNK(info.st_mode):
        return "it is a symbolic link"
    if info.st_uid not in (os.geteuid(), 0):
        return "it belongs to %s" % user_name(info.st_uid)
    if info.st_mode & stat.S_IWOTH:
        return "every user may write to it"
    if info.st_mode & stat.S_IWGRP and not _own_group(info.st_gid):
        return "members of the group %s may write to it" % group_name(info.st_gid)
    return ""


def untrusted_inside(folder: PathLike) -> str:
    """Return why a folder, or anything below it, is not trusted ("PATH: reason"), or ""."""
    reason = untrusted(folder)
    if reason:
        return "%s: %s" % (folder, reason)
    for place, folders, names in os.walk(str(folder)):
        for name in sorted(folders) + sorted(names):
            path = os.path.join(place, name)
            reason = untrusted(path)
            if reason:
                return "%s: %s" % (path, reason)
    return ""


def is_mine(path: PathLike) -> bool:
    """Whether the current user owns a path (a link itself, not what it leads to). False if it does not exist."""
    try:
        return os.lstat(str(path)).st_uid == os.geteuid()
    except FileNotFoundError:
        return False


def _own_group(gid: int) -> bool:
    """Whether a group is root's, is declared as trusted, or has only the current user (a user-private group)."""
    trusted = os.environ.get(TRUSTED_GROUP)
    if gid == 0 or trusted == str(gid):
        return True
    try:
        group = grp.getgrgid(gid)
        if trusted == group.gr_name:
            return True
        user = pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return group.gr_name == user.pw_name and gid == user.pw_gid and not set(group.gr_mem) - {user.pw_name}


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):  # the second: a record may hold any number
        return "uid %d" % uid


def group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return "gid %d" % gid


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
