"""Deletes files and folders: the only module of the product and lab/ that does (tests/security/test_calls.py).

The caller computes a target from its own configuration, or has created it. A target is never read from a record: a
record may be copied from another run, or prepared by another user. No function follows a link among the names that it
deletes. Standard library, Python >= 3.6.
"""

import errno
import os
import re
import shutil
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Collection, Iterable, Iterator, List, Optional, Sequence, Tuple

from flip.files.ownership import PathLike, user_name

COMMIT_FILE = "commit.json"
DAMAGED_FILE = "damaged.json"
_SHARD = re.compile(r"shard-[0-9]{5,9}-model-00001-of-00001\.safetensors\Z")
#: NAME.tmp.<hex>, .tmp.<hex>.NAME (files.atomic_path), NAME.new.<hex>.
_TEMPORARY = re.compile(r"\.(tmp|new)\.[0-9a-f]{16}\Z|\A\.tmp\.[0-9a-f]{16}\.")
_RANDOM = re.compile(r"[0-9a-f]{16}\Z")
_LINKED = "it, or a folder above it, is a symbolic link or no folder"


def delete_file(path: PathLike, missing_ok: bool = False) -> bool:
    """Delete a file, or a link itself, and return whether it existed.

    ``missing_ok``: return False if it does not exist, instead of raising FileNotFoundError. Raises OSError.
    """
    try:
        os.unlink(str(path))
    except FileNotFoundError:
        if not missing_ok:
            raise
        return False
    return True


def delete_empty_folder(path: PathLike) -> bool:
    """Delete a folder if it is empty; returns whether it was. Raises OSError if it is no folder."""
    try:
        os.rmdir(str(path))
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def delete_own_folder(path: PathLike) -> None:
    """Delete a folder of the current user and everything below it. It may be missing.

    For folders that the toolkit has created under a name of its own. Raises PermissionError if ``path`` is a link or
    belongs to another user, OSError if something cannot be deleted.
    """
    try:
        info = os.lstat(str(path))
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        reason = "not deleted: it is no folder of %s" % user_name(os.geteuid())
        raise PermissionError(errno.EPERM, reason, str(path))
    shutil.rmtree(str(path))


def discard_own_folder(path: PathLike) -> None:
    """Like ``delete_own_folder``, but raises nothing: what cannot be deleted stays."""
    try:
        info = os.lstat(str(path))
    except OSError:
        return
    if stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid():
        shutil.rmtree(str(path), ignore_errors=True)


def delete_folder_below(top: PathLike, names: Sequence[str], emptied: int = 0) -> None:
    """Delete the folder TOP/NAME/.../NAME of the current user and everything below it. It may be missing.

    ``emptied``: how many of the folders above it are deleted too if they are then empty. For commands: Python >= 3.11.

    Raises PermissionError if one of ``names`` is a link or no folder, or if the folder, or the one that contains it,
    belongs to another user; OSError if something cannot be deleted.
    """
    path = os.path.join(str(top), *names)
    try:
        with _opened_below(top, names) as folders:
            for folder in folders[-2:]:
                owner = os.fstat(folder).st_uid
                if owner != os.geteuid():
                    reason = "not deleted: it, or its folder, belongs to %s" % user_name(owner)
                    raise PermissionError(errno.EPERM, reason, path)
            shutil.rmtree(names[-1], dir_fd=folders[-2])
            for level in range(-2, -2 - emptied, -1):
                if os.listdir(folders[level]):
                    break
                os.rmdir(names[level], dir_fd=folders[level - 1])
    except _Linked:
        raise PermissionError(errno.EPERM, "not deleted: %s" % _LINKED, path)
    except FileNotFoundError:
        if os.path.lexists(path):
            raise


def is_temporary(name: str) -> bool:
    """Whether writers give such a name to a temporary file."""
    return bool(_TEMPORARY.search(name))


def checkpoint_files(names: Iterable[str], listed: Optional[Collection[str]] = None) -> List[str]:
    """Those of ``names`` that belong to a checkpoint, commit.json first. Only these files are ever deleted.

    ``listed``: the files of the checkpoint, without which a shard does not belong to it. None: the checkpoint was never
    complete, or its commit.json is damaged; then all shards belong to it.
    """
    own = [name for name in names if _is_checkpoint_file(name, listed)]
    return sorted(own, key=lambda name: (name != COMMIT_FILE, name))


def delete_commit_file(path: Path) -> str:
    """Delete commit.json of a checkpoint and sync the folder, so that the checkpoint no longer exists.

    Returns "" if it is deleted, else why it is left alone. ``path``: RUN/checkpoints/STAGE/S-n, which may be missing.
    """
    return _in_checkpoint(path, _delete_commit_file)


def delete_checkpoint(path: Path, listed: Optional[Collection[str]] = None) -> str:
    """Delete the files of a checkpoint, commit.json first, then its folder, unless other files are in it.

    Returns "" if it is deleted, else why it is left alone. ``path`` and ``listed``: as in ``delete_commit_file`` and
    ``checkpoint_files``. Raises OSError if a file cannot be deleted.
    """

    def delete(above: int, folder: int) -> str:
        _delete_commit_file(above, folder)
        for name in checkpoint_files(os.listdir(folder), listed):
            os.unlink(name, dir_fd=folder)
        others = sorted(os.listdir(folder))
        if others:
            return "files stay that no checkpoint has: %s" % ", ".join(others[:5])
        os.rmdir(path.name, dir_fd=above)
        return ""

    return _in_checkpoint(path, delete)


def delete_remote_checkpoint(
    names: Iterable[str], listed: Optional[Collection[str]], delete: Callable[[str], None]
) -> None:
    """Call ``delete`` for the files of a remote checkpoint, commit.json first. Arguments: see ``checkpoint_files``.

    ``delete``: deletes one file of the checkpoint's folder, whose address the caller has computed.
    """
    for name in checkpoint_files(names, listed):
        delete(name)


def _is_checkpoint_file(name: str, listed: Optional[Collection[str]]) -> bool:
    final, mark, digits = name.partition(".tmp.")
    is_shard = bool(_SHARD.match(final))
    if not is_shard and final not in (COMMIT_FILE, DAMAGED_FILE):
        return False
    if mark:
        return bool(_RANDOM.match(digits))
    return not is_shard or listed is None or name in listed


def _delete_commit_file(above: int, folder: int) -> str:
    try:
        os.unlink(COMMIT_FILE, dir_fd=folder)
    except FileNotFoundError:
        return ""
    os.fsync(folder)
    return ""


def _in_checkpoint(path: Path, function: Callable[[int, int], str]) -> str:
    """Call ``function`` with descriptors of the folders STAGE and S-n of a checkpoint, opened without following links.

    Returns its result; "" if the checkpoint is missing; ``_LINKED`` if a component of the path is a link.
    """
    try:
        with _opened(path) as (above, folder):
            return function(above, folder)
    except _Linked:
        return _LINKED
    except FileNotFoundError:
        if os.path.lexists(str(path)):
            raise
        return ""


class _Linked(Exception):
    """A component of a path is a link, or no folder."""


@contextmanager
def _opened(path: Path) -> Iterator[Tuple[int, int]]:
    stage = path.parent
    with _opened_below(stage.parent.parent, (stage.parent.name, stage.name, path.name)) as folders:
        yield folders[-2], folders[-1]


@contextmanager
def _opened_below(top: PathLike, names: Sequence[str]) -> Iterator[List[int]]:
    """Yield descriptors of ``top`` and of each folder on the way down. Raises _Linked if a name is a link."""
    descriptors = [os.open(str(top), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
    try:
        for name in names:
            descriptors.append(_open_below(descriptors[-1], name))
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _open_below(folder: int, name: str) -> int:
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise _Linked()
        raise
