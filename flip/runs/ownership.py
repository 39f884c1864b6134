"""Who owns a path and who else may write to it.

The trust boundary (SECURITY.md): a file is trusted if it belongs to the current user or to root and no other user may
write to it. Everything else is data: it may be read, with a limit, but is never executed. Standard library, Python 3.6.
"""

import grp
import os
import pwd
import stat
from typing import Union

PathLike = Union[str, "os.PathLike[str]"]

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
