"""Checkpoints in object storage: writes, verifies, reads and deletes their files, with retries."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, TypeVar

from flip.data.storage.base import RequestError
from flip.data.storage.retry import DEFAULT_POLICY, ErrorWording, OutageDetector, RetryPolicy, RetryState
from flip.data.storage.storages import open_storage
from flip.files import ownership
from flip.files.creation import atomic_write
from flip.runs import checkpoint_folder
from flip.runs.addresses import as_url, require_admitted, scheme_of
from flip.runs.errors import PermissionDenied

PART_BYTES = 1 << 24
PARALLEL_FILES = 4
"""Bytes per read request, and files that are read at the same time."""
_REMEDY = "Check the bucket and checkpoint.url."
WRITING = ErrorWording("writing", "write", "the place of the checkpoint", _REMEDY)
READING = ErrorWording("reading", "read", "a file of the checkpoint", _REMEDY)
_T = TypeVar("_T")


class RemoteCheckpoint:
    """The folder of one checkpoint at a URL. ``retry_policy``: how long a request is repeated.

    Raises StorageError if that time is over, PermissionDenied, DataError, ConfigError.
    """

    _answered: ClassVar[set[str]] = set()
    """Buckets, or whole URLs of other storage, that have served this process. Each checkpoint is another object, and
    what denies access to a later one is no missing right."""

    def __init__(self, url: str, retry_policy: RetryPolicy) -> None:
        require_admitted(url)  # it may come from a record
        self.url = url.rstrip("/")
        self._retry_policy = retry_policy
        if scheme_of(self.url) == "s3":
            self._place = self.url.split("/")[2]
        else:
            self._place = self.url
        self._outages = OutageDetector()
        self._storage = open_storage(self.url, retry_policy.timeout)

    def put(self, name: str, data: bytes | memoryview) -> dict[str, Any]:
        """Write a file and return its record: bytes, and the ETag if the storage has ETags."""
        key = f"{self.url}/{name}"
        etag = self._storage.put(key, data, lambda request: self._with_retries(key, request, WRITING))
        return {"bytes": memoryview(data).nbytes} | ({"etag": etag} if etag else {})

    def check(self, name: str, expected: Mapping[str, Any]) -> None:
        """Raise CorruptCheckpoint unless a file has the size and ETag of its record. Reads no bytes of it."""
        key = f"{self.url}/{name}"

        def request() -> Any:
            try:
                return self._storage.stat(key)
            except RequestError as fault:
                if fault.kind == "missing":
                    raise checkpoint_folder.CorruptCheckpoint(f"{key} is missing") from fault
                raise

        stat = self._with_retries(key, request, READING)
        etag = expected.get("etag", "")
        state = (stat.size, stat.etag if etag else "")
        if state != (expected["bytes"], etag):
            raise checkpoint_folder.CorruptCheckpoint(f"{key} is another object than was saved: {state}")

    def verify(self, files: Mapping[str, Mapping[str, Any]], folder: Path | None = None) -> None:
        """Read files, compare size, ETag and SHA-256, and write them to ``folder`` if given.

        Raises CorruptCheckpoint if a file is not as saved.
        """
        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            list(pool.map(lambda name: self._verify(name, files[name], folder and folder / name), files))

    def read(self, name: str, expected: Mapping[str, Any], start: int, stop: int) -> bytearray:
        """Bytes [start, stop) of a file. A range has no checksum: size and ETag, if any, identify the object.

        Raises CorruptCheckpoint if it is another object.
        """
        return bytearray().join(self._parts(name, expected, start, stop))

    def read_small(self, name: str, limit: int) -> bytes | None:
        """The first ``limit`` + 1 bytes of a file; None if it does not exist."""
        key = f"{self.url}/{name}"

        def request() -> bytes | None:
            try:
                size = self._storage.stat(key).size
                if size:
                    return self._storage.get(key, 0, min(size, limit + 1)).result().data
                return b""
            except RequestError as fault:
                if fault.kind == "missing":
                    return None
                raise

        return self._with_retries(key, request, READING)

    def names(self) -> list[str]:
        """The names of all files below the folder, with their relative paths."""
        prefix = self.url + "/"
        pages = self._storage.list(prefix, lambda request: self._with_retries(self.url, request, WRITING))
        return [key.removeprefix(prefix) for key, _ in pages]

    def delete(self, name: str) -> None:
        """Delete one file, which may be missing. ``flip.files.deletion`` decides which names of a checkpoint."""
        key = f"{self.url}/{name}"
        self._with_retries(key, partial(self._storage.delete, key), WRITING)

    def _verify(self, name: str, expected: Mapping[str, Any], target: Path | None) -> None:
        """A file with a wrong checksum is read twice: the network may have corrupted it."""
        self.check(name, expected)
        for _ in range(2):
            digest = hashlib.sha256()
            with ExitStack() as stack:
                file = None
                if target is not None:
                    file = stack.enter_context(atomic_write(target, sync=False))
                for part in self._parts(name, expected, 0, expected["bytes"]):
                    digest.update(part)
                    if file is not None:
                        file.write(part)
            if digest.hexdigest() == expected["sha256"]:
                return
            self._storage.reconnect()
        text = f"{self.url}/{name} does not have the checksum that was saved, fetched twice"
        raise checkpoint_folder.CorruptCheckpoint(text)

    def _parts(self, name: str, expected: Mapping[str, Any], start: int, stop: int) -> Iterator[bytes]:
        key = f"{self.url}/{name}"
        for first in range(start, stop, PART_BYTES):
            request = partial(self._storage.get, key, first, min(first + PART_BYTES, stop))
            response = self._with_retries(key, lambda request=request: request().result(), READING)  # type: ignore[misc]
            if response.etag and response.etag != expected.get("etag", response.etag):
                raise checkpoint_folder.CorruptCheckpoint(f"{key} is another object than was saved: {response.etag}")
            yield response.data

    def _has_answered(self) -> bool:
        return self._place in self._answered

    def _with_retries(self, key: str, request: Callable[[], _T], wording: ErrorWording) -> _T:
        def recorded() -> _T:
            answer = request()
            self._answered.add(self._place)
            self._outages.succeeded()
            return answer

        state = RetryState(self._retry_policy, self._has_answered, wording=wording, outages=self._outages)
        return state.until_success(key, recorded, self._storage.reconnect)


def verify(source: checkpoint_folder.SavedCheckpoint, retry_policy: RetryPolicy, part: int = 0, parts: int = 1) -> None:
    """``checkpoint_folder.verify`` for files that were just written: on disk without the page cache; at a URL by size
    and ETag, or by a checksum of what is read if the storage has no ETags."""
    if "url" not in source.record:
        checkpoint_folder.verify(source, part, parts, uncached=True)
        return
    remote = RemoteCheckpoint(source.record["url"], retry_policy)
    files = source.record["files"]
    own = {name: files[name] for name in sorted(files)[part::parts]}
    remote.verify({name: expected for name, expected in own.items() if not expected.get("etag")})
    for name, expected in own.items():
        if expected.get("etag"):
            remote.check(name, expected)


def refuse_foreign(source: checkpoint_folder.SavedCheckpoint, url: str) -> None:
    """Raise PermissionDenied for an address in another user's record, which may be any host, or file:///.

    Addresses below ``url``, which the user of this process has named, are accepted.
    """
    address = source.record["url"]
    record = source.path / checkpoint_folder.COMMIT_FILE
    reason = ownership.why_untrusted(record)
    below = url and f"{address}/".startswith(f"{as_url(url)}/") and ".." not in address.split("/")
    if reason and not below:
        what = f"names an address, and its record is not trusted: {reason}"
        remedy = (
            "To read it anyway, name a place above it: flip.load(..., url=ADDRESS), flip evaluate --url ADDRESS, or"
            " checkpoint.url of the run that starts from it."
        )
        raise PermissionDenied(what, str(record), address, remedy)


@contextmanager
def local_copy(
    source: checkpoint_folder.SavedCheckpoint, retry_policy: RetryPolicy = DEFAULT_POLICY, url: str = ""
) -> Iterator[Path]:
    """A folder with the verified files of a checkpoint: its own, or a temporary copy if they are at a URL.

    ``url``: as in ``refuse_foreign``. Raises CorruptCheckpoint, PermissionDenied, and what ``RemoteCheckpoint`` raises.
    """
    if "url" not in source.record:
        checkpoint_folder.verify(source)
        yield source.path
        return
    refuse_foreign(source, url)
    with TemporaryDirectory(prefix="flip-") as folder:
        remote = RemoteCheckpoint(source.record["url"], retry_policy)
        remote.verify(source.record["files"], Path(folder))
        yield Path(folder)
