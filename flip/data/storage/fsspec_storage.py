"""Any storage of the table of schemes, over fsspec. One attempt per call, with a limit of time.

fsspec has no common way to ask for a version together with bytes. The version of an object, its ETag or else its size
and the time of its last change, is therefore asked for once per object and process, before its first range, and again
after ``reconnect``, which follows a wrong checksum: then a changed object is named as such.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, InvalidStateError
from datetime import datetime
from typing import Any, TypeVar

from flip.data.storage.base import (
    SLOWEST,
    ObjectStat,
    RangeResponse,
    RequestError,
    RequestRunner,
    ends_early,
    plain_etag,
    run_once,
)
from flip.data.storage.ranges import by_status, refuse_incomplete
from flip.files.creation import atomic_write, run_folder
from flip.runs.addresses import SCHEMES, require_admitted, scheme_of
from flip.runs.credentials import scrub
from flip.runs.errors import ConfigError, FlipError

_T = TypeVar("_T")

_ETAGS = ("ETag", "etag", "blob_id")
_TIMES = ("mtime", "modified", "last_modified", "LastModified", "updated", "created")
"""Names under which file systems report the version of an object, the best first."""
_OF_RIGHTS = re.compile(r"auth|credential|permission|denied|forbidden", re.IGNORECASE)
"""Names of errors of packages that concern rights."""


class FsspecStorage:
    """Keys are URLs. The package of a protocol finds the credentials. ``timeout``: seconds without an answer."""

    def __init__(self, timeout: float = 15.0) -> None:
        self.timeout = timeout
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._file_systems: dict[str, Any] = {}
        """Scheme and account, as text -> file system."""
        self._versions: dict[str, str] = {}
        """Key -> version of the object."""

    def get(self, key: str, start: int, stop: int) -> Future[RangeResponse]:
        return self._in_time(stop - start, lambda: self._get(key, start, stop))

    def _get(self, key: str, start: int, stop: int) -> RangeResponse:
        version = self._versions.get(key)
        if version is None:
            version = self._stat(key).etag
        limit = self._limit(stop - start)
        data = self._call(key, lambda files, path: _range(files, path, start, stop, limit))
        if len(data) < stop - start and (size := self._stat(key).size) < stop:
            raise ends_early(key, size, stop)
        refuse_incomplete(data, stop - start, "")
        return RangeResponse(data, version)

    def stat(self, key: str) -> ObjectStat:
        return self._in_time(0, lambda: self._stat(key)).result()

    def _stat(self, key: str) -> ObjectStat:
        def info(files: Any, path: str) -> Mapping[str, Any]:
            files.invalidate_cache()
            found: Mapping[str, Any] = files.info(path)
            if found.get("type") == "directory":
                raise FileNotFoundError(f"{path} is a folder")
            return found

        stat = _stat_of(self._call(key, info))
        self._versions[key] = stat.etag
        return stat

    def parts(self, key: str, stat: ObjectStat) -> list[int]:
        return []

    def list(self, prefix: str, each: RequestRunner = run_once) -> Iterator[tuple[str, ObjectStat]]:
        """Keys that start with ``prefix``; the folder that it names is listed with all below it.

        They start with ``prefix`` as given: the paths of a file system lack parts of a URL that choose the store, such
        as the account in ``abfs://container@account/path``.
        """
        folder = prefix.rpartition("/")[0]

        def find(files: Any, path: str) -> dict[str, ObjectStat]:
            files.invalidate_cache()
            entries = {}
            if files.exists(path):
                entries = files.find(path, detail=True)
            return {name[len(path.rstrip("/")) :]: _stat_of(info) for name, info in entries.items()}

        below = each(lambda: self._call(folder, find))
        for name, stat in below.items():
            if (key := folder + name).startswith(prefix):
                yield key, stat

    def put(self, key: str, data: bytes | memoryview, each: RequestRunner = run_once) -> str:
        from fsspec.implementations.local import LocalFileSystem

        def write(files: Any, path: str) -> None:
            if isinstance(files, LocalFileSystem):
                run_folder(os.path.dirname(path))
                with atomic_write(path) as file:  # durable, as objects are once they are accepted
                    file.write(data)
                return
            files.makedirs(files._parent(path), exist_ok=True)
            files.pipe_file(path, bytes(data))

        require_admitted(key)
        each(lambda: self._call(key, write))
        return ""

    def delete(self, key: str) -> None:
        self._call(key, lambda files, path: files.rm_file(path) if files.exists(path) else None)

    def reconnect(self) -> None:
        with self._lock:
            self._file_systems = {}
            self._versions = {}

    def _limit(self, size: int) -> float:
        return self.timeout + size / SLOWEST

    def _in_time(self, size: int, request: Callable[[], _T]) -> Future[_T]:
        """The result of a request in a thread of its own; RequestError if it takes too long for ``size`` bytes.

        A file system that hangs keeps its thread, which does not hold up the end of the process.
        """
        future: Future[_T] = Future()

        def run() -> None:
            try:
                _finish(future, request())
            except BaseException as error:  # any error belongs to the caller of result()
                _finish(future, error=error)
            finally:
                timer.cancel()

        late = RequestError("stall", f"no answer in {self._limit(size):.0f} s")
        timer = threading.Timer(self._limit(size) + 1, lambda: _finish(future, error=late))
        timer.daemon = True
        timer.start()
        threading.Thread(target=run, name="fsspec", daemon=True).start()
        return future

    def _call(self, key: str, request: Callable[[Any, str], _T]) -> _T:
        """The result of a request to the file system of a key. Raises RequestError, FlipError."""
        require_admitted(key, thing="")
        try:
            files = self._files(key)
            return request(files, files._strip_protocol(key))
        except (FlipError, RequestError):
            raise
        except Exception as error:  # the packages of protocols raise unrelated classes of their own
            raise classify(error, key) from error

    def _files(self, key: str) -> Any:
        """The file system of a key. After a fork, connections of the parent are not used."""
        import fsspec

        scheme = scheme_of(key) or "file"
        try:
            kind: Any = fsspec.get_filesystem_class(scheme)
        except (ImportError, ValueError) as error:
            raise _missing_package(scheme, key, error) from error
        options = {**kind._get_kwargs_from_urls(key)}
        name = f"{scheme} {json.dumps(options, sort_keys=True, default=str)}"
        with self._lock:
            if self._owner != os.getpid():
                self._owner = os.getpid()
                self._file_systems = {}
            files = self._file_systems.get(name)
            if files is None:
                try:
                    files = _one_attempt(kind, scheme, options)
                except ImportError as error:
                    raise _missing_package(scheme, key, error) from error
                except (ValueError, TypeError) as error:  # the rest of the address, or a setting of fsspec
                    raise ConfigError(f"this address cannot be used: {scrub(str(error))}", key) from error
                self._file_systems[name] = files
        return files


def _one_attempt(kind: Any, scheme: str, options: dict[str, Any]) -> Any:
    """A file system that repeats no request itself: ``flip.data.storage.retry`` does, and counts the attempts."""
    if scheme != "s3":
        return kind(**options, skip_instance_cache=True)
    files = kind(**options, config_kwargs={"retries": {"total_max_attempts": 1}}, skip_instance_cache=True)
    files.retries = 1  # s3fs has a loop of its own around that of botocore
    return files


def _finish(future: Future[_T], result: Any = None, error: BaseException | None = None) -> None:
    """Set the result or error of a future, unless it has one or was cancelled."""
    try:
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
    except InvalidStateError:
        pass


def _range(files: Any, path: str, start: int, stop: int, limit: float) -> bytes:
    """Bytes [start, stop), and no others: file objects of fsspec read ahead, some by megabytes."""
    from fsspec.asyn import sync
    from fsspec.spec import AbstractFileSystem

    data: bytes
    if files.async_impl:
        data = sync(files.loop, files._cat_file, path, start=start, end=stop, timeout=limit)
        return data
    if type(files).cat_file is not AbstractFileSystem.cat_file:
        data = files.cat_file(path, start=start, end=stop)
        return data
    with files.open(path, "rb", cache_type="none") as file:
        file.seek(start)
        data = file.read(stop - start)
    return data


def _stat_of(info: Mapping[str, Any]) -> ObjectStat:
    """Size and version of an object: its ETag, or else size and time of its last change; "" if it has neither."""
    size = int(info["size"] or 0)
    for name in _ETAGS:
        if info.get(name):
            return ObjectStat(size, plain_etag(str(info[name])))
    for name in _TIMES:
        if info.get(name):
            return ObjectStat(size, f"{size}@{_time(info[name])}")
    return ObjectStat(size, "")


def _time(value: Any) -> str:
    """A time as seconds since 1970 if it is a number or a datetime: listings and single objects differ in the form."""
    if isinstance(value, datetime):
        value = value.timestamp()
    if isinstance(value, int | float):
        return f"{value:.6f}"
    return str(value)


def classify(error: Exception, key: str) -> RequestError:
    """The RequestError of an error of a file system, by its class and the HTTP status in it or in its cause."""
    text = scrub(str(error)) or type(error).__name__
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        if scheme_of(key) == "memory":
            text += "; memory:// is the memory of one process, and loader processes have their own: data.workers 0"
        return RequestError("missing", text)
    if isinstance(error, PermissionError):
        return RequestError("denied", text)
    if isinstance(error, TimeoutError):
        return RequestError("stall", text)
    status = _status(error)
    if status:
        failed = by_status(status, str(status) if status != 400 else "Bad Request")
        return RequestError(failed.kind, text, remedy=failed.remedy)
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        return RequestError("io", text)
    if _OF_RIGHTS.search(type(error).__name__):
        return RequestError("denied", f"{type(error).__name__}: {text}")
    return RequestError("connection", f"{type(error).__name__}: {text}")


def _status(error: BaseException | None) -> int:
    """The HTTP status of an error, which each package stores under another name; 0 if it has none."""
    while error is not None:
        response = getattr(error, "response", None)
        of_boto = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        places = (
            getattr(error, "status", None), getattr(error, "status_code", None), getattr(error, "code", None),
            getattr(response, "status_code", None), getattr(response, "status", None), of_boto.get("HTTPStatusCode"),
        )  # fmt: skip
        for place in places:
            if str(place).isdecimal() and 300 <= int(str(place)) < 600:
                return int(str(place))
        error = error.__cause__
    return 0


def _missing_package(scheme: str, key: str, error: Exception) -> ConfigError:
    package = SCHEMES[scheme].package
    if not package:
        return ConfigError(f"{scheme}:// cannot be read: {error}", key)
    what = f"{scheme}:// needs the package {package}, which is not installed"
    return ConfigError(what, key, remedy=f"Install it, on the nodes too: pip install {package}")
