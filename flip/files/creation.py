"""Makes folders and opens files to write: the only module of the project that does so (tests/security/test_calls.py).

Only the owner may write to folders and files of runs and caches, whatever the umask and default ACLs allow.

- ``closed_folder``, ``new_folder``: create a folder. ``run_folder``: also closes one that a copy left open.
- ``private_folder``: only the owner may enter it.
- ``open_append``, ``open_lock``: open a file of this user, never one that a prepared link leads to.
- ``atomic_write``, ``atomic_path``: write a new file under a random name and rename it.

Outputs that a user names follow the umask and default ACLs: ``output_folder``, ``new_output_folder``, ``create_file``,
and the atomic writers with ``mode=OUTPUT_MODE``. Modes are passed to mkdir and open, so that no chmod
grants what the umask withholds.

Standard library, Python >= 3.6.
"""

import contextlib
import errno
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any, Iterator, Optional, Tuple

from flip.files import acl, deletion
from flip.files.ownership import PathLike, user_name, why_untrusted_handle

#: Bytes of a file that are read if its reader states no other limit. flip.runs.records lists the larger records.
RECORD_LIMIT = 1 << 20

#: Modes of new folders and files of runs and caches, reduced by the umask. With a default ACL, which replaces the
#: umask, their group bits become the mask of the ACL.
FOLDER_MODE = 0o755
FILE_MODE = 0o644

#: Mode of new files that a user names.
OUTPUT_MODE = 0o666

#: What to do with a file that is refused because another user may have prepared it.
COPY_IT = "Check its content, then replace it by a copy of your own (cp, then mv)"

#: Write permission for others than the owner.
OPEN_TO_OTHERS = stat.S_IWGRP | stat.S_IWOTH

#: Names of ``create_sibling``: NAME.tmp.<hex>, and .tmp.<hex>.NAME for ``atomic_path``.
_TEMPORARY_NAME = re.compile(r"(.+)\.tmp\.[0-9a-f]{16}\Z|\.tmp\.[0-9a-f]{16}\.(.+)\Z")


class RefusedPath(PermissionError):
    """A file or folder that another user may have prepared. Its text has the path, the reason and the remedy."""

    def __str__(self) -> str:
        return "%s: %s" % (self.filename, self.strerror)


# -- folders of runs and caches ---------------------------------------------------------------------------------------


def closed_folder(path: PathLike) -> Path:
    """Create a folder and its missing parents so that only the user may write to them.

    An existing folder is left as it is. Raises OSError.
    """
    path = Path(path)
    if not path.is_dir():
        closed_folder(path.parent)
        try:
            new_folder(path)
        except FileExistsError:  # perhaps by another process, at the same time
            if not path.is_dir():
                raise
    return path


def run_folder(path: PathLike) -> Path:
    """Like ``closed_folder``, and close an existing folder, which a copy of a run leaves open to a group.

    Raises RefusedPath if it, or a link in its place, belongs to another user.
    """
    path = closed_folder(path)
    close_folder(path)
    return path


def new_folder(path: PathLike, mode: int = FOLDER_MODE) -> Path:
    """Create a folder to which only the user may write. Raises FileExistsError if its name is taken, OSError."""
    os.mkdir(str(path), mode)
    handle = os.open(str(path), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _close_default_acl(handle)
    finally:
        os.close(handle)
    return Path(path)


def close_folder(path: PathLike) -> None:
    """Take write access to a folder away from others than the owner. No permission is added.

    Raises RefusedPath if the folder, or a link in its place, belongs to another user; OSError.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    info = os.lstat(str(path))
    if stat.S_ISLNK(info.st_mode):  # of the user: for example to a file system with more space
        _refuse_other_owner(info, path)
        flags &= ~os.O_NOFOLLOW
    handle = os.open(str(path), flags)
    try:
        _refuse_other_owner(os.fstat(handle), path)
        _close_mode(handle)
        _close_default_acl(handle)
    finally:
        os.close(handle)


def close_folders(path: PathLike, depth: int) -> None:
    """``close_folder`` for a folder of this user and the folders in it, ``depth`` levels deep.

    Links and folders of other users are left alone: the functions that write to them refuse them. Private folders are
    left alone too, because others cannot enter them.
    """
    info = os.lstat(str(path))
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or not info.st_mode & 0o077:
        return
    close_folder(path)
    if depth:
        with os.scandir(str(path)) as entries:
            folders = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        for folder in folders:
            with contextlib.suppress(FileNotFoundError, PermissionError):  # deleted meanwhile; closed to its owner
                close_folders(folder, depth - 1)


def close_file(path: PathLike) -> None:
    """Take write access to a file away from others than the owner. Does nothing if the file does not exist.

    Others may have written it before. Raises RefusedPath if it is a link, is no regular file or belongs to another
    user; OSError.
    """
    with contextlib.suppress(FileNotFoundError), _opened_unfollowed(path) as handle:
        info = os.fstat(handle)
        if info.st_uid not in (os.geteuid(), 0):
            raise _unread(path, "it belongs to %s" % user_name(info.st_uid))
        _close_mode(handle)


def refuse_written_by_others(path: PathLike, remedy: str) -> None:
    """Raise RefusedPath if another user owns a file or may write to it, or if it is a link or no regular file.

    Does nothing if the file does not exist. Raises OSError.
    """
    with contextlib.suppress(FileNotFoundError), _opened_unfollowed(path, remedy) as handle:
        reason = why_untrusted_handle(handle)
        if reason:
            raise _unread(path, reason, remedy)


def private_folder(path: PathLike) -> Path:
    """Create a folder with mode 0700, or check that the existing one belongs to the user and is closed to others.

    Its parents are created too. Raises RefusedPath if another user prepared it.
    """
    path = Path(path)
    closed_folder(path.parent)
    try:
        new_folder(path, 0o700)
    except FileExistsError:
        pass
    info = os.lstat(str(path))
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        reason = "is not a folder of %s; remove it or choose another place" % user_name(os.geteuid())
        raise RefusedPath(errno.EPERM, reason, str(path))
    if info.st_mode & 0o077:
        os.chmod(str(path), 0o700)
    return path


def refuse_prepared(folder: PathLike) -> None:
    """Raise RefusedPath if a folder has an entry that is no file of this user alone, such as a link.

    For folders in which a shell or a library opens files by name.
    """
    with os.scandir(str(folder)) as entries:
        for entry in entries:
            _refuse_other_file(entry.stat(follow_symlinks=False), entry.path)


def close_umask() -> None:
    """Deny write access for others than the owner to the files that libraries create in this process."""
    os.umask(os.umask(OPEN_TO_OTHERS) | OPEN_TO_OTHERS)


# -- folders that a user names ----------------------------------------------------------------------------------------


def output_folder(path: PathLike, new: bool = False) -> Path:
    """Create a folder that a user names, and its missing parents, with the permissions of umask and default ACL.

    ``new``: raise FileExistsError if it exists. Raises OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(exist_ok=not new)
    return path


def new_output_folder(path: PathLike) -> Path:
    """Create a folder that a user names. Others cannot write to it until ``publish_folder``.

    A library that opens files by name in it must not follow a link that another user creates in the meantime. Raises
    FileExistsError if its name is taken, OSError.
    """
    os.mkdir(str(path), FOLDER_MODE)
    return Path(path)


def publish_folder(path: PathLike) -> None:
    """Give a folder of ``new_output_folder`` the write permissions that umask and default ACL grant to others."""
    probe, handle = create_sibling(Path(path) / "probe", OUTPUT_MODE)
    try:
        granted = os.fstat(handle).st_mode & OPEN_TO_OTHERS
    finally:
        os.close(handle)
        deletion.delete_file(probe)
    if granted:
        os.chmod(str(path), stat.S_IMODE(os.stat(str(path)).st_mode) | granted)


def folder_like(path: PathLike, model: PathLike) -> None:
    """Create a folder with the mode of the folder ``model``, so that the same users may write to it.

    Raises FileExistsError if its name is taken, OSError.
    """
    os.mkdir(str(path), FOLDER_MODE)
    os.chmod(str(path), stat.S_IMODE(os.stat(str(model)).st_mode))


# -- files ------------------------------------------------------------------------------------------------------------


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
        return _read_limited(file, path, limit)


def read_trusted(path: PathLike, limit: int = RECORD_LIMIT, remedy: str = COPY_IT) -> bytes:
    """``read_regular`` for a file that is obeyed: only this user or root can have written it.

    The opened file is checked, so an exchange of the path in the meantime has no effect. Raises RefusedPath if it is a
    link, is no regular file, belongs to another user, or if another user may write to it.
    """
    with _opened_unfollowed(path, remedy) as handle:
        reason = why_untrusted_handle(handle)
        if reason:
            raise _unread(path, reason, remedy)
        with os.fdopen(os.dup(handle), "rb") as file:
            return _read_limited(file, path, limit)


def open_append(path: PathLike, encoding: Optional[str] = None, mode: int = FILE_MODE) -> Any:
    """Open a file of this user to append to it, or create it: bytes, or text if there is an ``encoding``.

    Raises RefusedPath if it is a link, has other links, is no regular file or belongs to another user; OSError.
    """
    handle = _open_own(path, os.O_WRONLY | os.O_APPEND, mode)
    return open(str(path), "ab" if encoding is None else "a", encoding=encoding, opener=lambda *_: handle)


def open_lock(path: PathLike, mode: int = FILE_MODE) -> int:
    """Open a file of this user to lock, read or change it in place, or create it, and return its descriptor.

    Raises as ``open_append``.
    """
    return _open_own(path, os.O_RDWR, mode)


def create_file(path: PathLike, mode: int = OUTPUT_MODE) -> Any:
    """Create a file and open it for writing bytes. Raises FileExistsError if its name is taken, also by a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(str(path), "wb", opener=lambda *_: os.open(str(path), flags, mode))


def create_sibling(path: PathLike, mode: int = FILE_MODE, name: str = "{name}.tmp.{random}") -> Tuple[Path, int]:
    """Create a new file in the folder of ``path``, under a name that cannot be guessed, and return (its path, its
    descriptor open for writing).

    An existing file or link is never opened. ``mode`` is reduced by the umask; by default only the user may write.
    """
    path = Path(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        temporary = path.with_name(name.format(name=path.name, random=secrets.token_hex(8)))
        try:
            return temporary, os.open(str(temporary), flags, mode)
        except FileExistsError:
            continue


def final_path(path: PathLike) -> Path:
    """The path that a temporary file or folder replaces at the end; the path itself if its name is no temporary one."""
    path = Path(path)
    match = _TEMPORARY_NAME.match(path.name)
    if match:
        return path.with_name(match.group(1) or match.group(2))
    return path


@contextlib.contextmanager
def atomic_write(
    path: PathLike, mode: int = FILE_MODE, encoding: Optional[str] = None, sync: bool = True
) -> Iterator[Any]:
    """Open a new file for writing. It replaces ``path`` at the end of the block, or is deleted if the block raises.

    Readers see the old or the new file. A link at ``path`` is replaced. Bytes, or text if there is an ``encoding``.
    ``sync``: make the file durable first. Raises OSError.
    """
    temporary, handle = create_sibling(path, mode)
    with _renamed(temporary, path, sync):
        with os.fdopen(handle, "wb" if encoding is None else "w", encoding=encoding) as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_path(path: PathLike, mode: int = FILE_MODE) -> Iterator[Path]:
    """Like ``atomic_write``, for a library that opens files by name: yields the path of an empty file.

    The library may replace that file; its permissions are restored. Its name has the suffix of ``path``.
    """
    temporary, handle = create_sibling(path, mode, ".tmp.{random}.{name}")
    permissions = stat.S_IMODE(os.fstat(handle).st_mode)
    os.close(handle)
    with _renamed(temporary, path, sync=True):
        yield temporary
        handle = os.open(str(temporary), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _refuse_other_file(os.fstat(handle), temporary)
            if stat.S_IMODE(os.fstat(handle).st_mode) != permissions:
                os.fchmod(handle, permissions)
            os.fsync(handle)
        finally:
            os.close(handle)


def replace_link(path: PathLike, target: str) -> None:
    """Create the symbolic link ``path`` to ``target``, in place of a link or file of this name. Raises OSError."""
    path = Path(path)
    temporary = path.with_name("%s.new.%s" % (path.name, secrets.token_hex(8)))
    os.symlink(target, str(temporary))
    with _renamed(temporary, path, sync=False):
        pass


def fsync_path(path: PathLike) -> None:
    """Make the content of a file, or renames inside a folder, durable."""
    handle = os.open(str(path), os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- helpers ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _renamed(temporary: Path, path: PathLike, sync: bool) -> Iterator[None]:
    """Rename ``temporary`` to ``path`` after the block, or delete it if the block or the rename raises."""
    try:
        yield
        os.replace(str(temporary), str(path))
    except BaseException:
        deletion.delete_file(temporary, missing_ok=True)
        raise
    if sync:
        fsync_path(Path(path).parent)


def _read_limited(file: Any, path: PathLike, limit: int) -> bytes:
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        raise ValueError("%s: %d bytes, more than the limit of %d" % (path, size, limit))
    data = file.read(size)  # type: bytes
    return data


@contextlib.contextmanager
def _opened_unfollowed(path: PathLike, remedy: str = COPY_IT) -> Iterator[int]:
    """A descriptor to read a regular file. Raises RefusedPath if it is a link or another kind of file, OSError."""
    try:
        handle = os.open(str(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP and os.path.islink(str(path)):
            raise _unread(path, "it is a symbolic link", remedy)
        raise
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise _unread(path, "it is not a regular file", remedy)
        yield handle
    finally:
        os.close(handle)


def _open_own(path: PathLike, flags: int, mode: int) -> int:
    """Open or create a regular file of this user, which has no second name and only the user may write to."""
    flags |= os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(str(path), flags, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _refusal(path, "is a symbolic link")
        if error.errno == errno.ENXIO:
            raise _refusal(path, "is not a regular file")
        raise
    try:
        _refuse_other_file(os.fstat(handle), path)
        _close_mode(handle)
        os.set_blocking(handle, True)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _refuse_other_file(info: os.stat_result, path: PathLike) -> None:
    if stat.S_ISLNK(info.st_mode):
        raise _refusal(path, "is a symbolic link")
    if not stat.S_ISREG(info.st_mode):
        raise _refusal(path, "is not a regular file")
    if info.st_nlink > 1:
        raise _refusal(path, "has a second name (a hard link)")
    _refuse_other_owner(info, path)


def _refuse_other_owner(info: os.stat_result, path: PathLike) -> None:
    """Raise RefusedPath unless the user or root owns a file or folder."""
    if info.st_uid not in (os.geteuid(), 0):
        raise _refusal(path, "belongs to %s" % user_name(info.st_uid))


def _refusal(path: PathLike, reason: str) -> RefusedPath:
    text = "%s, so it is not written to: another user may have prepared it. Remove it" % reason
    return RefusedPath(errno.EPERM, text, str(path))


def _unread(path: PathLike, reason: str, remedy: str = COPY_IT) -> RefusedPath:
    text = "not used, because another user may have prepared it: %s. %s" % (reason, remedy)
    return RefusedPath(errno.EPERM, text, str(path))


def _close_mode(handle: int) -> None:
    """Take the write bits of others from a file or folder of this user; with an ACL, those of its mask and others."""
    info = os.fstat(handle)
    if info.st_mode & OPEN_TO_OTHERS and info.st_uid == os.geteuid():
        with contextlib.suppress(OSError):  # a file system without modes
            os.fchmod(handle, stat.S_IMODE(info.st_mode) & ~OPEN_TO_OTHERS)


def _close_default_acl(handle: int) -> None:
    """Take the write bits of others from the ACL that new files in a folder of this user inherit."""
    entries = acl.read_acl(handle, acl.DEFAULT)
    closed = acl.without_writers(entries)
    if closed != entries and os.fstat(handle).st_uid == os.geteuid():
        acl.write_acl(handle, acl.DEFAULT, closed)
