"""The interface of a storage, its errors, and local files.

A storage tries each request once and raises ``RequestError``; ``retry.py`` decides about retries for all of them.
"""

import contextlib
import glob
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from mmap import PAGESIZE
from typing import Any, NamedTuple, Protocol, TypeVar

from flip.runs.addresses import SHARD_PREFIXES
from flip.runs.errors import DataError

_T = TypeVar("_T")
_REGION = re.compile(r"[a-z0-9-]{1,40}")

SLOWEST = 1 << 16
"""Bytes per second; a slower body counts as stalled."""

RequestRunner = Callable[[Callable[[], Any]], Any]
"""Calls a function that makes one request, perhaps several times, and returns its result."""


def run_once(request: Callable[[], Any]) -> Any:
    """The ``RequestRunner`` without retries."""
    return request()


class RangeResponse(NamedTuple):
    """Bytes and the object's ETag from the same response; ``""`` if there is none."""

    data: bytes
    etag: str


class ObjectStat(NamedTuple):
    """Properties of an object or file; equal ones mean the same content."""

    size: int
    etag: str
    """ETag of an object, or another text that names its version; empty for a file, and if the storage has none."""
    changed: int = 0
    """Time of the last change of a file, in ns; 0 for an object."""


class RequestError(Exception):
    """A failed attempt of a request.

    Args:
        kind: a key of ``retry.ACTION_BY_KIND``.
        text: the error as text.
        data: the bytes received before the failure, from the start of the range.
        etag: ETag of the object of ``data``.
        remedy: what to change if no request has succeeded before.
    """

    def __init__(self, kind: str, text: str, data: bytes = b"", etag: str = "", remedy: str = "") -> None:
        super().__init__(text)
        self.kind = kind
        self.data = data
        self.etag = etag
        self.remedy = remedy


class Storage(Protocol):
    """What storage clients need of a storage. Keys are addresses, such as ``s3://bucket/path``, or paths of files.

    Methods and futures raise RequestError if a request failed, and FlipError if no retry can help.
    """

    def get(self, key: str, start: int, stop: int) -> Future[RangeResponse]:
        """All bytes of [start, stop), stop > start, in one request, which can be cancelled."""

    def stat(self, key: str) -> ObjectStat:
        """Size and ETag, in one request."""

    def parts(self, key: str, stat: ObjectStat) -> list[int]:
        """Sizes in bytes of the parts in which an object was uploaded, by one request per part; empty if unknown."""

    def list(self, prefix: str, each: RequestRunner = run_once) -> Iterator[tuple[str, ObjectStat]]:
        """Keys with this prefix and their ``stat``, in any order. ``each`` makes the request of a page."""

    def reconnect(self) -> None:
        """Use new connections and credentials from now on."""


def plain_etag(text: str) -> str:
    """An ETag without quotes and without ``W/``, which proxies add to mark it as weak.

    That mark does not matter: bytes are also compared by their CRC32.
    """
    return text.strip().removeprefix("W/").strip('"')


def completed_future(function: Callable[..., _T], *arguments: object) -> Future[_T]:
    """Call a function and return its result or error as a future."""
    future: Future[_T] = Future()
    try:
        future.set_result(function(*arguments))
    except BaseException as error:  # any error belongs to the caller of result()
        future.set_exception(error)
    return future


def is_remote(key: str) -> bool:
    """Whether a key is an address, and not a path."""
    return key.startswith(SHARD_PREFIXES)


class LocalStorage:
    """Files of this machine or its mounts; the key is a path. ``absent_is_outage``: see RetryPolicy."""

    def __init__(self, absent_is_outage: bool = False) -> None:
        self._absent_is_outage = absent_is_outage

    def get(self, key: str, start: int, stop: int) -> Future[RangeResponse]:
        return completed_future(self._get, key, start, stop)

    def _get(self, key: str, start: int, stop: int) -> RangeResponse:
        try:
            handle = os.open(key, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._open_error(error, key) from None
        try:
            if (size := os.fstat(handle).st_size) < stop:  # before memory is allocated: the manifest may be wrong
                raise ends_early(key, size, stop)
            pieces = []
            at = start
            while at < stop:
                piece = os.pread(handle, stop - at, at)
                if not piece:
                    raise ends_early(key, os.fstat(handle).st_size, stop)
                pieces.append(piece)
                at += len(piece)
        except OSError as error:
            raise RequestError("io", str(error)) from error
        finally:
            os.close(handle)
        return RangeResponse(pieces[0] if len(pieces) == 1 else b"".join(pieces), "")

    def stat(self, key: str) -> ObjectStat:
        try:
            stat = os.stat(key)
        except OSError as error:
            raise self._open_error(error, key) from None
        return ObjectStat(stat.st_size, "", stat.st_mtime_ns)

    def parts(self, key: str, stat: ObjectStat) -> list[int]:
        return []

    def list(self, prefix: str, each: RequestRunner = run_once) -> Iterator[tuple[str, ObjectStat]]:
        yield from ((path, self.stat(path)) for path in glob.iglob(glob.escape(prefix) + "*"))

    def reconnect(self) -> None:
        pass

    def _open_error(self, error: OSError, key: str) -> Exception:
        absent = self._absent_is_outage and not os.path.isdir(os.path.dirname(key) or ".")
        if isinstance(error, FileNotFoundError) and not absent:
            return DataError("the shard is missing", key, remedy="Restore it, or index the others again.")
        return RequestError("denied" if isinstance(error, PermissionError) else "io", str(error))


def drop_cached_pages(key: str, start: int, stop: int) -> None:
    """Let the next read of a local file come from its disk or server, not from this machine's memory."""
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    with contextlib.suppress(OSError):  # the next read reports the error
        handle = os.open(key, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # the kernel drops only whole pages
            first = start // PAGESIZE * PAGESIZE
            last = -(-stop // PAGESIZE) * PAGESIZE
            os.posix_fadvise(handle, first, last - first, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def ends_early(key: str, size: int, stop: int) -> DataError:
    """The error for a shard of ``size`` bytes that is read up to byte ``stop``."""
    remedy = "It is not the file that was indexed: restore it, or index the shards again."
    return DataError(f"the shard ends at byte {size}, needed were {stop}", key, remedy=remedy)


def redirected(text: str, region: str) -> RequestError:
    """The error of a server that names another place for the bucket. ``region``: as it says, "" if it does not."""
    remedy = "Set AWS_REGION to the bucket's region, and check AWS_ENDPOINT_URL and the name of the bucket."
    if _REGION.fullmatch(region):
        text = f"{text}, the bucket is in region {region}"
        remedy = f"Set AWS_REGION={region}, and AWS_ENDPOINT_URL, if it is set, to the address of that region."
    return RequestError("redirect", text, remedy=remedy)
