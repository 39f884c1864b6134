"""The files of a checkpoint at a URL: put there, looked at, fetched, deleted, with patience
(``flip.data.storage.retry``)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from flip.data.storage.base import RequestError
from flip.data.storage.fsspec_storage import FsspecStorage
from flip.data.storage.retry import ErrorWording, OutageDetector, RetryAction, RetryPolicy, RetryState
from flip.data.storage.s3 import S3Storage
from flip.runs import commit, ownership
from flip.runs.errors import PermissionDenied
from flip.runs.rundir import RunDir, create_json, read_record

PIECE, AT_ONCE = 1 << 24, 4
"""Bytes per request when fetching, and files that are fetched at once."""
_REMEDY = "Look at the bucket and at checkpoint.url."
WRITING = ErrorWording("writing", "write", "the place of the checkpoint", _REMEDY)
READING = ErrorWording("reading", "read", "a file of the checkpoint", _REMEDY)
_T = TypeVar("_T")


class Remote:
    """One checkpoint's folder. Raises StorageError after ``patience``, PermissionDenied, DataError, ConfigError."""

    def __init__(self, url: str, patience: RetryPolicy) -> None:
        self.url, self._patience, self._granted = url.rstrip("/"), patience, False
        self._outages = OutageDetector()
        self._storage: S3Storage | FsspecStorage = (
            S3Storage(patience.timeout) if url.startswith("s3://") else FsspecStorage()
        )

    def put(self, name: str, data: bytes | memoryview) -> dict[str, Any]:
        """Write a file and return what tells it: bytes, and the ETag where the storage has such a thing."""
        key = f"{self.url}/{name}"
        etag = self._storage.put(key, data, lambda request: self._persist(key, request, WRITING))
        return {"bytes": memoryview(data).nbytes} | ({"etag": etag} if etag else {})

    def check(self, name: str, expected: Mapping[str, Any]) -> None:
        """Raise CorruptCheckpoint unless size and ETag are those that it was written with: its bytes are not read."""
        found = self._present(name)
        told = (found.size, found.etag) if expected.get("etag") else (found.size, "")
        if told != (expected["bytes"], expected.get("etag", "")):
            raise commit.CorruptCheckpoint(f"{self.url}/{name} is another object than was committed: {told}")

    def verify(self, files: Mapping[str, Mapping[str, Any]], folder: Path | None = None) -> None:
        """Read files and compare size, ETag and SHA-256; keep nothing of them, or copy them into a ``folder``.

        Raises CorruptCheckpoint where one is not what was committed.
        """
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda name: self._verify(name, files[name], folder and folder / name), files))

    def read(self, name: str, expected: Mapping[str, Any], start: int, stop: int) -> bytearray:
        """Bytes [start, stop) of a file. They have no checksum of their own: size and ETag tell that it is the object
        that was committed, where the storage has ETags. Raises CorruptCheckpoint where it is another one.
        """
        return bytearray().join(self._pieces(name, expected, start, stop))

    def remove(self) -> None:
        """Delete whatever is there, commit.json first."""
        pages = self._storage.list(self.url + "/", lambda request: self._persist(self.url, request, WRITING))
        keys = [key for key, _ in pages]
        for key in sorted(keys, key=lambda key: not key.endswith("/" + commit.COMMIT_FILE)):
            self._persist(key, lambda key=key: self._storage.delete(key), WRITING)  # type: ignore[misc]

    def _present(self, name: str) -> Any:
        key = f"{self.url}/{name}"

        def there() -> Any:
            try:
                return self._storage.stat(key)
            except RequestError as fault:
                if fault.kind == "missing":
                    raise commit.CorruptCheckpoint(f"{key} is missing") from fault
                raise

        return self._persist(key, there, READING)

    def _verify(self, name: str, expected: Mapping[str, Any], target: Path | None) -> None:
        """What came with a wrong byte is read once more: not each of them lay there so."""
        self.check(name, expected)
        for _ in range(2):
            digest = hashlib.sha256()
            with open(target or os.devnull, "wb") as file:
                for piece in self._pieces(name, expected, 0, expected["bytes"]):
                    digest.update(piece)
                    file.write(piece)
            if digest.hexdigest() == expected["sha256"]:
                return
            self._storage.reconnect()
        raise commit.CorruptCheckpoint(
            f"{self.url}/{name} does not have the checksum that was committed, fetched twice"
        )

    def _pieces(self, name: str, expected: Mapping[str, Any], start: int, stop: int) -> Iterator[bytes]:
        key = f"{self.url}/{name}"
        for at in range(start, stop, PIECE):
            got = self._persist(
                key,
                lambda at=at: self._storage.get(key, at, min(at + PIECE, stop)).result(),  # type: ignore[misc]
                READING,
            )
            if got.etag and got.etag != expected.get("etag", got.etag):
                raise commit.CorruptCheckpoint(f"{key} is another object than was committed: {got.etag}")
            yield got.data

    def _persist(self, key: str, request: Callable[[], _T], words: ErrorWording) -> _T:
        attempts = RetryState(self._patience, lambda: self._granted, words=words, outages=self._outages)
        while True:
            try:
                answer = request()
            except RequestError as fault:
                if attempts.failed(key, fault) is RetryAction.RECONNECT:
                    self._storage.reconnect()
            else:
                self._granted = True
                self._outages.succeeded()
                return answer


def base(run: RunDir, url: str) -> str:
    """Where this run's checkpoints lie below ``url``, decided once: another run of the same name lies elsewhere.

    Call it where the attempt holds the run. ``url`` may be a folder's absolute path.
    """
    known = read_record(run.checkpoints / "url.json")
    if known is not None:
        return str(known["url"])
    wanted = f"{_address(url)}/{run.sweep}/{run.name}-{os.urandom(4).hex()}"
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    create_json(run.checkpoints / "url.json", {"url": wanted})
    return str((read_record(run.checkpoints / "url.json") or {})["url"])


def _address(url: str) -> str:
    return (url if "://" in url else f"file://{url}").rstrip("/")


def marked(record: Mapping[str, Any]) -> bytes:
    """commit.json as it lies at the URL; the run directory holds the same."""
    return (json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def verify(source: commit.Commit, patience: RetryPolicy, part: int = 0, parts: int = 1) -> None:
    """As ``commit.verify``, of files that were just written: read from the storage, at a URL by sizes and ETags."""
    if "url" not in source.record:
        commit.verify(source, part, parts, uncached=True)
        return
    there, files = Remote(source.record["url"], patience), source.record["files"]
    for name in sorted(files)[part::parts]:
        there.check(name, files[name])


def refuse_foreign(source: commit.Commit, url: str) -> None:
    """Raise PermissionDenied for an address that another user's record names: it may be any host, or file:///.

    Addresses below ``url``, which the user of this process has named, are accepted.
    """
    address, record = source.record["url"], source.path / commit.COMMIT_FILE
    reason = ownership.untrusted(record)
    below = url and f"{address}/".startswith(f"{_address(url)}/") and ".." not in address.split("/")
    if reason and not below:
        what = f"names an address, and its record is not trusted: {reason}"
        remedy = (
            "To read it all the same, name a place above it: flip.load(..., url=ADDRESS), evaluate.py --url ADDRESS, or"
            " checkpoint.url of the run that begins from it."
        )
        raise PermissionDenied(what, str(record), address, remedy)


@contextmanager
def at_hand(source: commit.Commit, patience: RetryPolicy | None = None, url: str = "") -> Iterator[Path]:
    """The folder where a commit's files lie verified on this machine: its own, or a copy for as long as it is needed.

    ``url``: addresses below it are read even if another user wrote the commit's record. Raises CorruptCheckpoint,
    PermissionDenied for another address in such a record, and what ``Remote`` raises.
    """
    if "url" not in source.record:
        commit.verify(source)
        yield source.path
        return
    refuse_foreign(source, url)
    with TemporaryDirectory(prefix="flip-") as folder:
        Remote(source.record["url"], patience or RetryPolicy()).verify(source.record["files"], Path(folder))
        yield Path(folder)
