"""The one call behind which storage lies: bytes [start, stop) of a key, whole or an error.

Trouble with I/O never replaces a sample. What may pass is tried again with jitter until a deadline (then StorageError);
what cannot pass (no such shard, a shard of another length, bytes that are wrong twice in the same way) is a DataError.
"""

from __future__ import annotations

import os
import random
import time
import zlib
from collections.abc import Callable
from typing import TypeVar

from flip.data import tar
from flip.data.manifest import Manifest
from flip.exitcodes import DataError, PermissionDenied, StorageError

Sample = dict[str, memoryview]
"""Member (extension) -> its bytes, a view of the chunk's buffer."""

_T = TypeVar("_T")


class _Again(Exception):
    """Something that may pass."""


class Reader:
    """Reads local files. ``deadline``: seconds of outage that a read rides out."""

    def __init__(self, deadline: float = 600.0) -> None:
        self.deadline = deadline

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a shard. Raises DataError, PermissionDenied or StorageError."""
        return self._persist(key, lambda: self._once(key, start, stop))

    def read_chunk(self, manifest: Manifest, j: int) -> list[Sample]:
        """The samples of chunk j, their bytes checked against the manifest's CRC."""
        reads, seen = manifest.chunk_reads(j), set[int]()

        def attempt() -> list[bytes]:
            pieces = [self._once(key, start, stop) for key, start, stop, _ in reads]
            crc = 0
            for piece in pieces:
                crc = zlib.crc32(piece, crc)
            if crc == manifest.checksums[j]:
                return pieces
            if crc in seen:
                raise _rot(manifest, j, f"CRC32 {crc:#010x}, indexed was {int(manifest.checksums[j]):#010x}")
            seen.add(crc)
            raise _Again(f"chunk {j} has a wrong CRC32")

        pieces = self._persist(reads[0][0], attempt)
        found: list[Sample] = []
        for piece, (key, start, _, count) in zip(pieces, reads, strict=True):
            view = memoryview(piece)
            try:
                walked = list(tar.samples(view))
            except tar.Broken as error:
                raise _rot(manifest, j, f"{error} after {start} of {key}") from error
            if len(walked) != count:
                raise _rot(manifest, j, f"{len(walked)} samples, indexed were {count}")
            found += [{name: view[at : at + size] for name, (at, size) in s.members.items()} for s in walked]
        return found

    def _once(self, key: str, start: int, stop: int) -> bytes:
        try:
            handle = os.open(key, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DataError("the shard is missing", key, remedy="Restore it, or index the others again.") from None
        except PermissionError:
            raise PermissionDenied("the shard may not be read", key, remedy="Grant read access to it.") from None
        try:
            pieces, at = [], start
            while at < stop:
                piece = os.pread(handle, stop - at, at)
                if not piece:
                    raise DataError(
                        f"the shard ends at byte {os.fstat(handle).st_size}, needed were {stop}",
                        key,
                        remedy="It is not the file that was indexed: restore it, or index the shards again.",
                    )
                pieces.append(piece)
                at += len(piece)
        finally:
            os.close(handle)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _persist(self, key: str, attempt: Callable[[], _T]) -> _T:
        end, wait = time.monotonic() + self.deadline, 0.05
        while True:
            try:
                return attempt()
            except (OSError, _Again) as error:
                pause = random.uniform(0, wait)
                if time.monotonic() + pause > end:
                    what = f"reading failed for {self.deadline:g} s, at last with: {error}"
                    raise StorageError(what, key, remedy="The run may be started again later.") from error
            time.sleep(pause)
            wait = min(2 * wait, 30.0)


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
