"""Chunks of a data set: read by one range each, checked, their samples found, and kept on the node's own disk.

``ChunkReader`` reads them from storage or from ``ChunkCache``, which never changes what is read:

    FOLDER/flip-chunks-<uid>/<digest of the manifest>/<chunk>    the chunk's bytes, as storage has them
    FOLDER/flip-chunks-<uid>/size                                about the sum of their lengths, locked by its writer

A file appears whole and its CRC32 is checked whenever it is read, so that nothing is synced and nothing must be
cleaned up after a crash. Processes and runs of one user share the folder, whose mode is 0700. Other users have their
own: bytes that somebody else wrote are not trusted, and eviction deletes files.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flip.data.manifest import tar
from flip.data.manifest.manifest import Manifest
from flip.data.storage.base import RequestError, Storage
from flip.data.storage.checksums import crc32
from flip.data.storage.client import IOStats, StorageClient
from flip.data.storage.retry import Clock, Outage, RetryPolicy
from flip.runs.errors import DataError
from flip.runs.ownership import private_folder, read_regular

ROOM = 0.1
"""Share of the bytes allowed that is freed at once: looking for the oldest files takes a while."""

log = logging.getLogger("flip.data")

Sample = dict[str, memoryview]
"""Member (extension) -> its bytes, a view of the chunk's buffer."""
Reads = Sequence[tuple[int, int, int, int]]
"""As ``ChunkTable.chunk_ranges`` gives them."""


class ChunkCache:
    """``most``: bytes that it may hold, all processes together. Threads may share one. Raises nothing."""

    def __init__(self, folder: str | os.PathLike[str], most: int) -> None:
        self._folder = Path(folder) / f"flip-chunks-{os.geteuid()}"
        self._most, self._lock = most, threading.Lock()
        self.hits = self.misses = 0
        self.failures = 0
        """Files that were damaged, could not be read, or could not be written."""

    def get(self, manifest: Manifest, j: int) -> memoryview | None:
        """The bytes of chunk j, with the right CRC; None: they are to be fetched."""
        path, data = self._path(manifest, j), None
        try:
            private_folder(self._folder)
            data = read_regular(path, self._most)
            if crc32(data) != manifest.checksums[j]:
                data = None
                path.unlink()
                self._failed(f"{path} is damaged")
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            self._failed(error)
        with self._lock:
            self.hits, self.misses = self.hits + (data is not None), self.misses + (data is None)
        return None if data is None else memoryview(data)

    def put(self, manifest: Manifest, j: int, pieces: Sequence[bytes]) -> None:
        """Keep the bytes of chunk j, the oldest ones giving way. Where the disk takes none, it is told once."""
        path, size = self._path(manifest, j), sum(map(len, pieces))
        temporary = path.with_name(f"{j}.tmp.{os.getpid()}.{threading.get_ident()}")
        if size > self._most:
            return
        try:
            private_folder(self._folder)
            path.parent.mkdir(exist_ok=True)
            with self._sum() as total:
                total[0] += size
                if total[0] > self._most:
                    total[0] = self._evict((1 - ROOM) * self._most - size) + size
            try:
                with open(temporary, "wb") as file:
                    file.writelines(pieces)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except FileNotFoundError:  # it was the oldest one before it was in place
            pass
        except OSError as error:
            self._failed(error)

    def _path(self, manifest: Manifest, j: int) -> Path:
        return self._folder / manifest.digest / str(j)

    @contextlib.contextmanager
    def _sum(self) -> Iterator[list[int]]:
        """The sum of all lengths, to be changed, among processes and threads. What fails later leaves it too large."""
        with open(self._folder / "size", "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            total = [int(text) if text.isdecimal() else self._evict(self._most)]
            yield total
            file.truncate(0)
            file.write(str(total[0]))

    def _evict(self, most: float) -> int:
        """Delete the oldest chunks and what killed processes left, until ``most`` bytes are left; return their sum.

        Links are neither followed nor counted: a prepared one must not lead to files of another place.
        """
        found = []
        for folder in self._folder.iterdir():
            with contextlib.suppress(NotADirectoryError), os.scandir(folder) as entries:
                for entry in entries if not folder.is_symlink() else ():
                    with contextlib.suppress(FileNotFoundError):  # it was damaged, or is in place now
                        info = entry.stat(follow_symlinks=False)
                        found += [(info.st_mtime_ns, info.st_size, entry.path)] if stat.S_ISREG(info.st_mode) else []
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= most:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return total

    def _failed(self, what: object) -> None:
        with self._lock:
            self.failures += 1
            first = self.failures == 1
        if first:
            log.warning("the cache of chunks does without a file, and will not tell of others: %s", what)


@dataclass
class Chunk:
    """Chunk j of a manifest: its bytes, with the right CRC, a piece for each of ``manifest.chunk_ranges(j)``."""

    manifest: Manifest
    j: int
    pieces: Sequence[bytes | memoryview]

    @cached_property
    def samples(self) -> list[Sample]:
        """Found when they are first asked for, by the thread that asks: one that reads in the background would only
        take the interpreter from it. Raises DataError where the bytes are not the tar that was indexed.
        """
        manifest, j = self.manifest, self.j
        found: list[Sample] = []
        for piece, (shard, start, _, count) in zip(self.pieces, manifest.chunk_ranges(j), strict=True):
            held, picks = manifest.select(shard, manifest.chunk_ids(j).start + len(found), count)
            view = memoryview(piece)
            try:
                walked = tar.indexed(view, held)
            except tar.InvalidTar as error:
                raise corrupt_chunk(manifest, j, f"{error} after {start} of {manifest.keys[shard]}") from error
            members = (walked[i].members.items() for i in picks)
            found += [{name: view[at : at + size] for name, (at, size) in one} for one in members]
        return found


def corrupt_chunk(manifest: Manifest, j: int, what: str) -> DataError:
    """Bytes that storage will not give back as they were indexed."""
    ids = manifest.chunk_ids(j)
    first, last = ids.start, ids.stop - 1
    where = ", ".join(f"{key} bytes {start}-{stop}" for key, start, stop, _ in manifest.chunk_reads(j))
    return DataError(
        f"chunk {j} (samples {first} to {last}) is damaged: {what}",
        where,
        remedy="Restore the shard, or leave the samples out: "
        f"python tools/shards.py exclude {manifest.folder} --ids {first}-{last} --out NEW_FOLDER",
    )


class ChunkReader(StorageClient):
    """Reads chunks of manifests, checked against their CRC. Threads may share one.

    ``cache``: chunks are looked for there first, and kept; all else as in ``StorageClient``.
    """

    def __init__(
        self, deadline: float | None = None, retry_policy: RetryPolicy | None = None, clock: Clock | None = None,
        remote: Storage | None = None, cache: ChunkCache | None = None, report: Callable[[Outage], None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(deadline, retry_policy, clock, remote, report)
        self._cache = cache

    @property
    def counters(self) -> IOStats:
        """A copy of the counts until now, with those of the cache."""
        found = super().counters
        if self._cache is not None:
            found.cache_hits, found.cache_misses = self._cache.hits, self._cache.misses
            found.cache_failures = self._cache.failures
        return found

    def read_chunk(self, manifest: Manifest, j: int) -> list[Sample]:
        """The samples of chunk j. Raises as ``read`` does."""
        return self.fetch(manifest, j).samples

    def fetch(self, manifest: Manifest, j: int) -> Chunk:
        """Chunk j, its bytes checked against the manifest's CRC. Raises as ``read`` does."""
        return Chunk(manifest, j, self._cached(manifest, j, manifest.chunk_ranges(j)))

    def _cached(self, manifest: Manifest, j: int, reads: Reads) -> Sequence[bytes | memoryview]:
        """The bytes of a chunk, with the right CRC, a piece for each read."""
        if self._cache is None:
            return self._checked(manifest, j, reads)
        whole = self._cache.get(manifest, j)
        if whole is None:
            pieces = self._checked(manifest, j, reads)
            self._cache.put(manifest, j, pieces)
            return pieces
        ends = list(itertools.accumulate(stop - start for _, start, stop, _ in reads))
        return [whole[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]

    def _checked(self, manifest: Manifest, j: int, reads: Reads) -> Sequence[bytes]:
        """``_cached`` from storage."""
        attempts, seen = self._attempts(), set[int]()
        while True:
            pieces = [
                self._read(attempts, manifest.keys[shard], start, stop, manifest.etags[shard])
                for shard, start, stop, _ in reads
            ]
            crc = 0
            for piece in pieces:
                crc = crc32(piece, crc)
            if crc == manifest.checksums[j]:
                return pieces
            if crc in seen:
                raise corrupt_chunk(manifest, j, f"CRC32 {crc:#010x}, indexed was {int(manifest.checksums[j]):#010x}")
            seen.add(crc)
            self._failed(attempts, manifest.keys[reads[0][0]], RequestError("checksum", f"chunk {j} has a wrong CRC32"))
