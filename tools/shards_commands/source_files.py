"""Reads files and texts of a source of `shards make`: below the named folders only, without changing a character.

A shared folder can hold links of other users. A file that lies elsewhere, after links are followed, is therefore
refused: its content would become public with the shards.
"""

import errno
import math
import os
import stat
from collections.abc import Sequence
from typing import Any, BinaryIO

from flip.data.decode import DecodeError
from flip.data.manifest.tar import SAMPLE_LIMIT
from flip.runs.errors import STORAGE_ERRNOS, ConfigError, StorageError

OUTSIDE = "lies outside of the source: name a folder that contains it with --images, or copy it"
NOT_UTF8 = "is not UTF-8: convert it, for example with iconv -f LATIN1 -t UTF-8"
_NOT_OF_THE_FILE = (*STORAGE_ERRNOS, errno.EMFILE, errno.ENFILE)
"""Errors of the storage or the machine, for which no row is refused."""
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_MARKS = (
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_KINDS = {bool: "true or false", dict: "an object", list: "a list", float: "not a finite number", bytes: "bytes"}


class SourceFiles:
    """The files below some folders.

    Args:
        folders: relative names are relative to the first one.
    """

    def __init__(self, folders: Sequence[str]) -> None:
        self._base = folders[0]
        self._folders = [os.path.realpath(folder) for folder in folders]

    def contains(self, path: str) -> bool:
        """Whether a path, after links are followed, lies in one of the folders."""
        return self._place(path) is not None

    def read(self, name: str, what: str) -> bytes:
        """The content of a regular file. ``what`` it is, for errors.

        Raises DecodeError if the row cannot be used, StorageError if the storage fails.
        """
        path = os.path.join(self._base, name)
        try:
            place = self._place(path)
            if place is not None:
                return _read_below(*place)
        except FileNotFoundError:
            if "://" in name:
                raise DecodeError(f"the {what} is a URL: download it first, for example with img2dataset") from None
            raise DecodeError(f"the {what} does not exist ({path})") from None
        except (OSError, ValueError) as error:  # ValueError: not a regular file, too large, or a null in its name
            reason = f"the {what} cannot be read: {getattr(error, 'strerror', None) or error}"
            if isinstance(error, OSError) and error.errno in _NOT_OF_THE_FILE:
                raise StorageError(reason, path, remedy="Give the same command again when it can be read.") from error
            raise DecodeError(reason) from error
        raise DecodeError(f"the {what} {OUTSIDE}")

    def open(self, path: str) -> BinaryIO:
        """Open a regular file to read it. Raises ConfigError if it lies outside of the folders or cannot be read."""
        place = self._place(path)
        if place is None:
            raise ConfigError(f"the file {OUTSIDE}", path)
        try:
            return os.fdopen(_open_below(*place)[0], "rb")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"the file cannot be read: {reason}", path) from error

    def read_text(self, name: str) -> str:
        """The text of a text file. Raises as ``read``, and DecodeError if it is neither UTF-8 nor marked as UTF-16."""
        data = self.read(name, "text file")
        try:
            return data.decode(encoding_of(data))
        except UnicodeDecodeError:
            raise DecodeError(f"its text file {NOT_UTF8}") from None

    def _place(self, path: str) -> tuple[str, str] | None:
        """The folder that contains a path, and the path below it; None if none does."""
        real = os.path.realpath(path)
        for folder in self._folders:
            if os.path.commonpath([folder, real]) == folder:
                return folder, os.path.relpath(real, folder)
        return None


def encoding_of(head: bytes) -> str:
    """The encoding of a text by its byte order mark; without one, UTF-8."""
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "utf-8-sig")


def text_of(value: Any, what: str) -> str:
    """A text or finite number of a row as text; empty for a missing value.

    Raises DecodeError for other values, and for text with bytes that are not UTF-8 (as lone surrogates).
    """
    if value is None:
        return ""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and (isinstance(value, int) or math.isfinite(value)):
        return str(value)
    if not isinstance(value, str):
        raise DecodeError(f"its {what} is no text but {_KINDS.get(type(value), type(value).__name__)}")
    if not is_unicode(value):
        raise DecodeError(f"its {what} {NOT_UTF8}")
    return value


def texts_of(value: Any, what: str) -> list[str]:
    """The texts of a row: one, or a list of several. Raises as ``text_of``."""
    values = value if isinstance(value, list) else [value]
    return [text_of(item, what) for item in values if item is not None]


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it has no lone surrogates, which stand for bytes that are not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_below(folder: str, path: str) -> bytes:
    """The bytes of a file, opened by ``_open_below``. Raises OSError, ValueError."""
    descriptor, size = _open_below(folder, path)
    with os.fdopen(descriptor, "rb") as file:
        if size > SAMPLE_LIMIT:
            raise ValueError(f"{size} bytes, more than the limit of {SAMPLE_LIMIT}")
        return file.read(size)


def _open_below(folder: str, path: str) -> tuple[int, int]:
    """Open a regular file below a folder without following a link, also if one replaces a part of the path now.

    Returns its descriptor and its bytes. Raises OSError, ValueError.
    """
    *parents, name = path.split(os.sep)
    place = os.open(folder, _FOLDER)
    try:
        for parent in parents:
            inner = os.open(parent, _FOLDER, dir_fd=place)
            os.close(place)
            place = inner
        descriptor = os.open(name, _FILE, dir_fd=place)
    finally:
        os.close(place)
    try:
        info = os.fstat(descriptor)
        if stat.S_ISDIR(info.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("not a regular file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, info.st_size
