"""The one call behind which storage lies: bytes [start, stop) of a key, whole or an error.

Trouble with I/O never replaces a sample. What may pass is tried again with jitter until a deadline (then StorageError);
what cannot pass (no such shard, another one, bytes that are wrong twice in the same way) is a DataError.
"""

from __future__ import annotations

import dataclasses
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from flip.data import tar
from flip.data.counters import Counters
from flip.data.manifest import Manifest
from flip.data.retry import Attempts, Clock, Do, Gate, Patience
from flip.data.storage import Fault, Got, Local, Stat, Storage, is_remote
from flip.exitcodes import DataError

Sample = dict[str, memoryview]
"""Member (extension) -> its bytes, a view of the chunk's buffer."""

_T = TypeVar("_T")


class Reader:
    """Reads local files and, by keys ``s3://bucket/path``, object storage. Threads may share one.

    ``deadline``: seconds of outage that a read rides out; ``patience`` has the rest, which seldom needs a change.
    """

    def __init__(
        self, deadline: float | None = None, patience: Patience | None = None, clock: Clock | None = None,
        remote: Storage | None = None,
    ) -> None:  # fmt: skip
        self.patience = patience or Patience()
        if deadline is not None:
            self.patience = dataclasses.replace(self.patience, deadline=deadline)
        self._clock, self._gate = clock or Clock(), Gate(self.patience.requests)
        self._local, self._remote = Local(), remote
        self._lock, self._counters, self._granted = threading.Lock(), Counters(), False

    @property
    def counters(self) -> Counters:
        """A copy of the counts until now."""
        with self._lock:
            retries = dict(self._counters.retries)
            return dataclasses.replace(self._counters, retries=retries, cap=self._gate.cap)

    def read(self, key: str, start: int, stop: int, etag: str = "") -> bytes:
        """Bytes [start, stop) of a shard. ``etag``: the one that it must have, where known.

        Raises DataError, PermissionDenied, StorageError, or ConfigError where no storage has such an address.
        """
        return self._read(self._attempts(), key, start, stop, etag)

    def read_chunk(self, manifest: Manifest, j: int) -> list[Sample]:
        """The samples of chunk j, their bytes checked against the manifest's CRC. Raises as ``read`` does."""
        reads = manifest.chunk_places(j)
        pieces = self._checked(manifest, j, reads)
        found: list[Sample] = []
        for piece, (shard, start, _, count) in zip(pieces, reads, strict=True):
            view = memoryview(piece)
            try:
                walked = list(tar.samples(view))
            except tar.Broken as error:
                raise _rot(manifest, j, f"{error} after {start} of {manifest.keys[shard]}") from error
            if len(walked) != count:
                raise _rot(manifest, j, f"{len(walked)} samples, indexed were {count}")
            found += [{name: view[at : at + size] for name, (at, size) in s.members.items()} for s in walked]
        return found

    def stat(self, key: str) -> Stat:
        """Size and ETag (``""``: a local file). Raises as ``read`` does."""
        return self._persist(key, lambda storage: storage.stat(key))

    def parts(self, key: str, stat: Stat) -> Sequence[int]:
        """Sizes of the parts that an object was uploaded in, where the server tells them. Raises as ``read`` does."""
        return self._persist(key, lambda storage: storage.parts(key, stat))

    def list(self, prefix: str) -> dict[str, Stat]:
        """Keys that begin with ``prefix``, sorted, with size and ETag. Raises as ``read`` does."""
        return self._persist(prefix, lambda storage: dict(sorted(storage.list(prefix))))

    def _checked(self, manifest: Manifest, j: int, reads: Sequence[tuple[int, int, int, int]]) -> Sequence[bytes]:
        """The bytes of a chunk, with the right CRC."""
        attempts, seen = self._attempts(), set[int]()
        while True:
            pieces = [
                self._read(attempts, manifest.keys[shard], start, stop, manifest.etags[shard])
                for shard, start, stop, _ in reads
            ]
            crc = 0
            for piece in pieces:
                crc = zlib.crc32(piece, crc)
            if crc == manifest.checksums[j]:
                return pieces
            if crc in seen:
                raise _rot(manifest, j, f"CRC32 {crc:#010x}, indexed was {int(manifest.checksums[j]):#010x}")
            seen.add(crc)
            self._failed(attempts, manifest.keys[reads[0][0]], Fault("checksum", f"chunk {j} has a wrong CRC32"))

    def _read(self, attempts: Attempts, key: str, start: int, stop: int, etag: str) -> bytes:
        """Where a body broke off, the next attempt goes on from the byte reached, if it is of the same object."""
        pieces, at, of = list[bytes](), start, ""
        while at < stop:
            got, fault = self._once(key, lambda storage: storage.get(key, at, stop))  # noqa: B023
            if fault is not None:
                got = Got(fault.data, fault.etag)
            assert got is not None
            if etag and got.etag not in ("", etag):
                fault = Fault("changed", f"its ETag is {got.etag}, indexed was {etag}")
            if fault is not None:
                self._failed(attempts, key, fault)
                if not (got.data and got.etag):
                    continue
            if pieces and got.etag != of:
                pieces, at = [], start  # another object: from the start, once more
                continue
            pieces.append(got.data)
            at, of = at + len(got.data), got.etag
            if fault is not None:
                self._count(resumed=len(got.data))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _persist(self, key: str, request: Callable[[Storage], _T]) -> _T:
        attempts = self._attempts()
        while True:
            found, fault = self._once(key, request)
            if fault is None:
                return cast(_T, found)
            self._failed(attempts, key, fault)

    def _once(self, key: str, request: Callable[[Storage], _T]) -> tuple[_T | None, Fault | None]:
        """One request through the gate, counted: what came of it, or the fault."""
        storage = self._storage(key)
        ticket, begin, found, fault = self._gate.enter(), time.perf_counter(), None, None
        try:
            found = request(storage)
            self._granted = True
        except Fault as error:
            fault = error
        finally:
            self._gate.leave(ticket, fault.kind if fault else "")
            data = fault.data if fault else found.data if isinstance(found, Got) else b""
            self._count(requests=1, bytes=len(data), seconds=time.perf_counter() - begin)
        return found, fault

    def _failed(self, attempts: Attempts, key: str, fault: Fault) -> None:
        """Count it and wait for the next attempt. Raises FlipError where there is to be none."""
        self._count(kind=fault.kind)
        if attempts.failed(key, fault) is Do.ANEW:
            self._storage(key).renew()

    def _attempts(self) -> Attempts:
        return Attempts(self.patience, lambda: self._granted, self._clock)

    def _storage(self, key: str) -> Storage:
        if not is_remote(key):
            return self._local
        with self._lock:
            if self._remote is None:
                from flip.data.s3 import S3  # not needed where shards are local

                self._remote = S3(self.patience.timeout)
            return self._remote

    def _count(self, requests: int = 0, bytes: int = 0, seconds: float = 0.0, resumed: int = 0, kind: str = "") -> None:
        with self._lock:
            counters = self._counters
            counters.requests, counters.bytes = counters.requests + requests, counters.bytes + bytes
            counters.seconds, counters.resumed = counters.seconds + seconds, counters.resumed + resumed
            if kind:
                counters.retries[kind] += 1


def _rot(manifest: Manifest, j: int, what: str) -> DataError:
    reads = manifest.chunk_reads(j)
    ids = manifest.chunk_ids(j)
    first, last = ids.start, ids.stop - 1
    where = ", ".join(f"{key} bytes {start}-{stop}" for key, start, stop, _ in reads)
    return DataError(
        f"chunk {j} (samples {first} to {last}) is damaged: {what}",
        where,
        remedy="Restore the shard, or leave the samples out: "
        f"python tools/shards.py except {manifest.folder} --ids {first}-{last} --out NEW_FOLDER",
    )
