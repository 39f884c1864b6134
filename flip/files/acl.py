"""POSIX access control lists (ACLs) of files and folders, as Linux stores them in extended attributes.

A folder's *default* ACL is inherited by what is created in it, and then replaces the umask. The group bits of the mode
are the mask of an *access* ACL: they limit all its entries but those of the owner and of other users. Standard library,
Python >= 3.6. Systems and file systems without ACLs have none.
"""

import errno
import os
import struct
from typing import Iterable, List, NamedTuple, Union

ACCESS = "system.posix_acl_access"
DEFAULT = "system.posix_acl_default"

#: Tags of entries: the owner, a named user, the file's group, a named group, the mask, and all other users.
USER_OBJ = 0x01
USER = 0x02
GROUP_OBJ = 0x04
GROUP = 0x08
MASK = 0x10
OTHER = 0x20

#: Write permission of an entry.
WRITE = 0o2

#: Id of an entry that names no user or group.
NO_ID = 0xFFFFFFFF

_VERSION = 2
_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")

#: Errors of getxattr for "no ACL": none is set, or the file system has none.
_NO_ACL = (errno.ENODATA, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)

Entry = NamedTuple("Entry", [("tag", int), ("permissions", int), ("id", int)])

#: A path, or a descriptor of an open file or folder.
Place = Union[int, str, "os.PathLike[str]"]


def read_acl(place: Place, kind: str) -> List[Entry]:
    """Return the entries of an ACL; none if there is no ACL of this kind (``ACCESS`` or ``DEFAULT``).

    A link is followed. Raises OSError if the ACL cannot be read or has an unknown format.
    """
    if not hasattr(os, "getxattr"):  # not Linux
        return []
    try:
        data = os.getxattr(place, kind)
    except OSError as error:
        if error.errno in _NO_ACL:
            return []
        raise
    return decode(data)


def write_acl(place: Place, kind: str, entries: Iterable[Entry]) -> None:
    """Replace an ACL. Raises OSError."""
    os.setxattr(place, kind, encode(entries))


def writers(entries: Iterable[Entry]) -> List[Entry]:
    """Return the entries that give others than the owner write access, after the mask has limited them."""
    entries = list(entries)
    masked = [entry for entry in entries if entry.tag == MASK]
    named = [entry for entry in entries if entry.tag in (USER, GROUP_OBJ, GROUP) and entry.permissions & WRITE]
    if masked and not masked[0].permissions & WRITE:
        named = []
    return named + [entry for entry in entries if entry.tag == OTHER and entry.permissions & WRITE]


def without_writers(entries: Iterable[Entry]) -> List[Entry]:
    """Return the entries without write access for others than the owner."""
    closed = []
    for entry in entries:
        if entry.tag != USER_OBJ:
            entry = entry._replace(permissions=entry.permissions & ~WRITE)
        closed.append(entry)
    return closed


def decode(data: bytes) -> List[Entry]:
    """Return the entries of an ACL from the bytes of its extended attribute. Raises OSError if they are none."""
    body = data[_HEADER.size :]
    if data[: _HEADER.size] != _HEADER.pack(_VERSION) or len(body) % _ENTRY.size:
        raise OSError(errno.EINVAL, "access control list of an unknown format (%s)" % data[:16].hex())
    return [Entry(*fields) for fields in _ENTRY.iter_unpack(body)]


def encode(entries: Iterable[Entry]) -> bytes:
    """Return the bytes of the extended attribute for entries."""
    return _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in entries)
