"""Who owns a path, who else may write to it, and who could exchange it through a folder above.

The trust boundary (SECURITY.md): a file is trusted if it belongs to the current user or to root and no other user may
write to it. Everything else is data: it may be read, with a limit, but is never executed. As the mode of a file says
nothing about the folders that lead to it, ``exposures`` also checks those. Standard library, Python >= 3.6.

Batch scripts contain the text of this module (``jobs/slurm/batch_script.py``), because they check the code before they
execute any of it: it imports only ``flip.files.acl``, in the line below.
"""

import errno
import grp
import json
import os
import pwd
import stat
import sys
from typing import Collection, FrozenSet, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from flip.files.acl import ACCESS, GROUP, GROUP_OBJ, USER, read_acl, writers

PathLike = Union[str, "os.PathLike[str]"]

#: Names or numbers of groups, separated by commas, in this environment variable: their members may write to what is
#: executed, and own the folders above it.
TRUSTED_GROUP = "FLIP_TRUST_GROUP"

#: Largest record of trusted groups, bytes.
RECORD_BYTES = 64 << 10

#: Most links on the way to a path, as in Linux.
MAX_LINKS = 40

#: Folders of a checkout that contain no code of it.
NOT_CODE = (".git", ".venv", ".venv-bench")

#: Exit code of ``main``: permission, see ``flip.runs.errors``.
REFUSED = 77

#: Exit code of ``main`` if the code cannot be read, as Python's own for a missing file.
UNREADABLE = 2

Exposure = NamedTuple("Exposure", [("place", str), ("reason", str), ("group", Optional[int])])
"""A folder, or a link, through which another user can exchange what lies behind it.

``group``: number of the group whose members can; None: no group, or not only its members.
"""


def why_untrusted(path: PathLike) -> str:
    """Return why a file or folder is not trusted, or "" if it is. The last component is not followed if it is a link.

    Raises OSError if it does not exist.
    """
    return _Rule().reason(str(path), os.lstat(str(path)))


def why_untrusted_handle(handle: int) -> str:
    """Return why an open file or folder is not trusted, or "" if it is. Raises OSError."""
    return _Rule().reason(handle, os.fstat(handle))


def why_untrusted_inside(folder: PathLike) -> str:
    """Return why a folder, or anything below it, is not trusted ("PATH: reason"), or "".

    Links are trusted if they lead to something in the folder, which is checked itself. ``NOT_CODE`` is skipped.
    Raises OSError if the folder does not exist.
    """
    rule = _Rule()
    top = str(folder)
    reason = rule.reason(top, os.lstat(top))
    if reason:
        return "%s: %s" % (top, reason)
    for place, folders, names in os.walk(top):
        folders[:] = [name for name in folders if name not in NOT_CODE]
        for name in sorted(folders) + sorted(names):
            path = os.path.join(place, name)
            try:
                info = os.lstat(path)
            except FileNotFoundError:  # a temporary file of Python's bytecode
                continue
            if stat.S_ISLNK(info.st_mode) and _leads_inside(path, top):
                continue
            reason = rule.reason(path, info)
            if reason:
                return "%s: %s" % (path, reason)
    return ""


def why_untrusted_target(path: PathLike, owners: Collection[int] = ()) -> str:
    """Return why the file to which a path leads is not trusted ("PATH: reason"), or "". Links are followed.

    It may also belong to one of ``owners``, or to a member of a trusted group. Raises OSError if it does not exist.
    """
    real = os.path.realpath(str(path))
    reason = _Rule(owners, members=True).reason(real, os.lstat(real))
    return reason and "%s: %s" % (real, reason)


def exposures(path: PathLike, owners: Collection[int] = ()) -> List[Exposure]:
    """Return the folders and links on the way to a path through which another user can exchange it.

    Each folder must belong to the user, to root, to one of ``owners`` or to a member of a trusted group, because its
    owner may rename what is in it. Others may write to it only if it is sticky; members of a trusted group always may.

    All folders from the root on are checked, including those to which links lead, but not the file or folder at the
    end. The check stops at a folder that does not exist or cannot be read.
    """
    rule = _Rule(owners, members=True)
    distinct = []  # type: List[Exposure]
    for place, info in _way(os.path.join(os.getcwd(), str(path))):
        distinct += [exposure for exposure in rule.exposures(place, info) if exposure not in distinct]
    return distinct


def follow(path: PathLike) -> Tuple[str, str]:
    """Return where a path leads, without links, and why a link on the way is not followed ("LINK: reason"), or "".

    A link is followed if it belongs to the user, to root or to a member of a trusted group, and no other user may write
    to its folder. Both answers come from the same walk, so that a later exchange of a link cannot change the first.
    Raises OSError if the path does not exist.
    """
    rule = _Rule(members=True)
    end = ""
    refused = ""
    for place, info, rest in _steps(os.path.join(os.getcwd(), str(path))):
        if stat.S_ISLNK(info.st_mode):
            refused = refused or _link_reason(rule, place, info)
        elif not rest:
            end = place
    if not end:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return end, refused


def _link_reason(rule: "_Rule", link: str, info: os.stat_result) -> str:
    for exposure in rule.exposures(link, info):
        return "%s: %s" % (link, exposure.reason)
    folder = os.path.dirname(link)
    for exposure in rule.exposures(folder, os.lstat(folder)):
        return "%s: it is a link in %s: %s" % (link, folder, exposure.reason)
    return ""


def trusted_groups() -> FrozenSet[int]:
    """Return the numbers of the groups that FLIP_TRUST_GROUP names, and of those in the user's record."""
    numbers = set(recorded_groups())
    for name in os.environ.get(TRUSTED_GROUP, "").split(","):
        number = group_number(name.strip())
        if number is not None:
            numbers.add(number)
    return frozenset(numbers)


def trust_record() -> str:
    """Return the path of the user's record of trusted groups, JSON with ``groups``; "" without a home folder."""
    base = os.environ.get("XDG_CONFIG_HOME", "") or os.path.join(os.path.expanduser("~"), ".config")
    if not os.path.isabs(base):
        return ""
    return os.path.join(base, "flip", "trusted_groups.json")


def recorded_groups() -> FrozenSet[int]:
    """Return the groups of ``trust_record``; none if another user may write to the file, or exchange it."""
    path = trust_record()
    strict = _Rule(groups=frozenset())
    try:
        if not path or strict.reason(path, os.lstat(path)):
            return frozenset()
        for place, info in _way(path):
            for _ in strict.exposures(place, info):
                return frozenset()
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            groups = json.loads(file.read(RECORD_BYTES).decode("utf-8"))["groups"]
        return frozenset(number for number in groups if type(number) is int)
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


def is_mine(path: PathLike) -> bool:
    """Whether the current user owns a path (a link itself, not what it leads to). False if it does not exist."""
    try:
        return os.lstat(str(path)).st_uid == os.geteuid()
    except FileNotFoundError:
        return False


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


def group_number(name: str) -> Optional[int]:
    """Return the number of a group that is given by name or number; None if no group has the name."""
    if name.isdigit():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def main(argv: Sequence[str]) -> int:
    """Check folders of code before a batch script executes them; returns an exit code.

    ``argv``: the folders, then ``--`` and the exposed places that the submission accepted. Standard error gets the
    reason of a refusal, standard output the warnings about accepted places.
    """
    end = argv.index("--")
    accepted = argv[end + 1 :]
    warnings = []  # type: List[str]
    for folder in argv[:end]:
        try:
            reason = why_untrusted_inside(folder)
        except OSError as error:
            print("%s: %s" % (folder, error), file=sys.stderr)
            return UNREADABLE
        for exposure in exposures(folder):
            text = "%s: %s" % (exposure.place, exposure.reason)
            if exposure.place in accepted:
                warnings.append("warning: %s, so that others could exchange the code of this run" % text)
            else:
                reason = reason or text
        if reason:
            print("%s: not executed" % reason, file=sys.stderr)
            return REFUSED
    for i, warning in enumerate(warnings):
        if warning not in warnings[:i]:
            print(warning)
    return 0


class _Rule:
    """Which owners and groups count as the user.

    ``owners``: further trusted owners. ``members``: whether members of a trusted group may be owners. ``groups``: the
    trusted groups; None: those of ``trusted_groups``, which are read when they matter.
    """

    def __init__(
        self, owners: Collection[int] = (), members: bool = False, groups: Optional[FrozenSet[int]] = None
    ) -> None:
        self.owners = frozenset(owners) | {os.geteuid(), 0}
        self.members = members
        self._groups = groups

    @property
    def groups(self) -> FrozenSet[int]:
        if self._groups is None:
            self._groups = trusted_groups()
        return self._groups

    def reason(self, path: Union[int, str], info: os.stat_result) -> str:
        """Return why a file or folder is not trusted, or "". ``path``: or the descriptor of an open one."""
        if stat.S_ISLNK(info.st_mode):
            return "it is a symbolic link"
        if not self._trusts_owner(info.st_uid):
            return "it belongs to %s" % user_name(info.st_uid)
        for reason, _ in self._other_writers(path, info):
            return reason
        return ""

    def exposures(self, place: str, info: os.stat_result) -> Iterator[Exposure]:
        """Yield the ways in which another user can exchange what lies behind a folder or link."""
        link = stat.S_ISLNK(info.st_mode)
        if not self._trusts_owner(info.st_uid) and (link or not _unmapped(info.st_uid)):
            if link:
                kind = "it is a link that belongs"
            else:
                kind = "it belongs"
            group = None
            if not link and _is_member(info.st_uid, frozenset([info.st_gid])):
                group = info.st_gid
            yield Exposure(place, "%s to %s" % (kind, user_name(info.st_uid)), group)
        if link or info.st_mode & stat.S_ISVTX:  # sticky: only its owner may rename or delete an entry of others
            return
        for reason, group in self._other_writers(place, info):
            yield Exposure(place, reason, group)

    def _trusts_owner(self, uid: int) -> bool:
        return uid in self.owners or (self.members and bool(self.groups) and _is_member(uid, self.groups))

    def _other_writers(self, path: Union[int, str], info: os.stat_result) -> Iterator[Tuple[str, Optional[int]]]:
        """Yield (reason, group or None) for each way in which other users may write to a path that is no link."""
        if info.st_mode & stat.S_IWOTH:
            yield "every user may write to it", None
        if not info.st_mode & stat.S_IWGRP:  # with an ACL the mask, which limits all users and groups that it names
            return
        try:
            entries = read_acl(path, ACCESS)
        except OSError as error:
            yield "its access control list cannot be read (%s)" % (error.strerror or error), None
            return
        if not entries and not self._own_group(info.st_gid):
            yield "members of the group %s may write to it" % group_name(info.st_gid), info.st_gid
        for entry in writers(entries):
            if entry.tag == USER and entry.id not in self.owners and not _is_member(entry.id, self.groups):
                yield "its access control list lets %s write to it" % user_name(entry.id), None
            if entry.tag in (GROUP, GROUP_OBJ):
                gid = info.st_gid if entry.tag == GROUP_OBJ else entry.id
                if not self._own_group(gid):
                    reason = "its access control list lets members of the group %s write to it"
                    yield reason % group_name(gid), gid

    def _own_group(self, gid: int) -> bool:
        """Whether a group is root's, has only the current user (a user-private group), or is trusted."""
        if gid == 0:
            return True
        try:
            group = grp.getgrgid(gid)
            user = pwd.getpwuid(os.geteuid())
        except KeyError:
            return gid in self.groups
        if gid in self.groups:
            return True
        if group.gr_name != user.pw_name or gid != user.pw_gid or set(group.gr_mem) - {user.pw_name}:
            return False
        return not _other_primary_members(gid)


def _way(path: str) -> Iterator[Tuple[str, os.stat_result]]:
    """Yield each folder and link through which an absolute path is resolved, from the root, with its lstat."""
    for place, info, rest in _steps(path):
        if rest or stat.S_ISLNK(info.st_mode):
            yield place, info


def _steps(path: str) -> Iterator[Tuple[str, os.stat_result, bool]]:
    """Yield as ``_way``, and also the end of the path; the last value: whether components of the path remain."""
    rest = _parts(path)
    place = os.sep
    links = 0
    yield place, os.lstat(place), bool(rest)
    while rest:
        part = rest.pop(0)
        if part == os.pardir:
            place = os.path.dirname(place)
            yield place, os.lstat(place), bool(rest)
            continue
        step = os.path.join(place, part)
        try:
            info = os.lstat(step)
        except OSError:  # missing, or in a folder that this user cannot enter: nothing is executed from there
            return
        if stat.S_ISLNK(info.st_mode):
            yield step, info, bool(rest)
            links += 1
            if links > MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            target = os.readlink(step)
            rest[:0] = _parts(target)
            if os.path.isabs(target):
                place = os.sep
            continue
        place = step
        yield place, info, bool(rest)


def _parts(path: str) -> List[str]:
    return [part for part in path.split(os.sep) if part not in ("", os.curdir)]


def _leads_inside(link: str, folder: str) -> bool:
    return os.path.realpath(link).startswith(os.path.realpath(folder) + os.sep)


def _is_member(uid: int, groups: FrozenSet[int]) -> bool:
    """Whether a user belongs to one of the groups. A user without an entry in the user database belongs to none."""
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return False
    return bool(groups.intersection(os.getgrouplist(user.pw_name, user.pw_gid)))


def _other_primary_members(gid: int) -> bool:
    """Whether another account has the group as its primary group: the group itself does not list it.

    The user database is read, which has all accounts of files; a directory service (sssd, LDAP) may list none of its.
    """
    own = (os.geteuid(), 0)
    return any(account.pw_gid == gid and account.pw_uid not in own for account in pwd.getpwall())


def _unmapped(uid: int) -> bool:
    """Whether ``uid`` stands for all users that a user namespace (a rootless container) does not map.

    The host's root is one of them, so the folders above a home folder seem to belong to this number.
    """
    try:
        with open("/proc/sys/kernel/overflowuid") as file:
            if uid != int(file.read()):
                return False
        with open("/proc/self/uid_map") as file:
            return sum(int(line.split()[2]) for line in file) < 2**32 - 1
    except (OSError, ValueError):
        return False
