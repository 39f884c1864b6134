"""What lies behind a reader: one small protocol, and local files behind it. Object storage is in ``s3.py``.

A back-end tries once and says what happened; whether to try again is decided in ``retry.py``, for all of them alike.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol, TypeVar

from flip.runs.errors import DataError, PermissionDenied

_T = TypeVar("_T")

RequestRunner = Callable[[Callable[[], Any]], Any]
"""Makes one request of several, by itself or again and again."""


def run_once(request: Callable[[], Any]) -> Any:
    """Make it, once."""
    return request()


class RangeResponse(NamedTuple):
    """Bytes, and the ETag of the object that they are of, from one and the same reply; ``""``: there is none."""

    data: bytes
    etag: str


class ObjectStat(NamedTuple):
    """Two that are equal are of one and the same object or, but for sleight of hand, file."""

    size: int
    etag: str
    """Of an object."""
    changed: int = 0
    """Of a file: when, ns."""


class RequestError(Exception):
    """An attempt that failed: its class (a key of ``retry.TABLE``) and what to tell.

    ``data``: the bytes that had come, in order, before it broke off; ``etag``: of the object that they are of.
    """

    def __init__(self, kind: str, text: str, data: bytes = b"", etag: str = "") -> None:
        super().__init__(text)
        self.kind, self.data, self.etag = kind, data, etag


class Storage(Protocol):
    """Raises Fault for what may pass, FlipError for what cannot."""

    def get(self, key: str, start: int, stop: int) -> Future[RangeResponse]:
        """Bytes [start, stop), stop > start: all of them, or Fault. One request; cancelled, it is given up."""

    def stat(self, key: str) -> ObjectStat:
        """One request."""

    def parts(self, key: str, stat: ObjectStat) -> list[int]:
        """Sizes of the parts that an object was uploaded in; none where that is not told. A request per part."""

    def list(self, prefix: str, each: RequestRunner = run_once) -> Iterator[tuple[str, ObjectStat]]:
        """Keys that begin with ``prefix`` and what ``stat`` would tell, in no given order. ``each`` makes the request
        for a page, and may make it again.
        """

    def reconnect(self) -> None:
        """Start over with fresh connections and credentials."""


def completed_future(function: Callable[..., _T], *arguments: object) -> Future[_T]:
    """What a call gives or raises, as a request that has its answer."""
    answer: Future[_T] = Future()
    try:
        answer.set_result(function(*arguments))
    except BaseException as error:  # whatever it is, it belongs to whoever asks for the answer
        answer.set_exception(error)
    return answer


def is_remote(key: str) -> bool:
    return key.startswith("s3://")


class LocalStorage:
    """Files of this machine or its mounts; the key is a path."""

    def get(self, key: str, start: int, stop: int) -> Future[RangeResponse]:
        return completed_future(self._get, key, start, stop)

    def _get(self, key: str, start: int, stop: int) -> RangeResponse:
        try:
            handle = os.open(key, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _refusal(error, key) from None
        try:
            if (size := os.fstat(handle).st_size) < stop:  # before memory is taken for what a manifest states
                raise ends_early(key, size, stop)
            pieces, at = [], start
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
            found = os.stat(key)
        except OSError as error:
            raise _refusal(error, key) from None
        return ObjectStat(found.st_size, "", found.st_mtime_ns)

    def parts(self, key: str, stat: ObjectStat) -> list[int]:
        return []

    def list(self, prefix: str, each: RequestRunner = run_once) -> Iterator[tuple[str, ObjectStat]]:
        yield from ((path, self.stat(path)) for path in glob.iglob(glob.escape(prefix) + "*"))

    def reconnect(self) -> None:
        pass


def _refusal(error: OSError, key: str) -> Exception:
    if isinstance(error, FileNotFoundError):
        return DataError("the shard is missing", key, remedy="Restore it, or index the others again.")
    if isinstance(error, PermissionError):
        return PermissionDenied("the shard may not be read", key, remedy="Grant read access to it.")
    return RequestError("io", str(error))


def ends_early(key: str, size: int, stop: int) -> DataError:
    return DataError(
        f"the shard ends at byte {size}, needed were {stop}",
        key,
        remedy="It is not the file that was indexed: restore it, or index the shards again.",
    )
