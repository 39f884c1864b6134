"""Chunks of a data set: read by ranges, checked, split into samples, and cached on the node's disk.

``ChunkReader`` reads them from storage or from ``ChunkCache``, whose files do not change what is read:

    FOLDER/flip-chunks-<uid>/<digest of the manifest>/<chunk>    the bytes of the chunk
    FOLDER/flip-chunks-<uid>/size                                about the sum of all lengths, locked by its writer

A file appears complete, and its CRC32 is checked at each read: nothing is synced, and nothing needs cleaning up after a
crash. Processes and runs of one user share the folder, with mode 0700; bytes of other users are not trusted.
"""

import contextlib
import fcntl
import itertools
import logging
import os
import re
import shlex
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flip.data.manifest import tar
from flip.data.manifest.manifest import Manifest
from flip.data.parquet.page_table import PageTable
from flip.data.storage.base import RequestError, Storage, drop_cached_pages, is_remote
from flip.data.storage.checksums import crc32
from flip.data.storage.client import IOStats, StorageClient
from flip.data.storage.retry import DEFAULT_POLICY, Clock, Outage, RetryPolicy
from flip.files import deletion
from flip.files.creation import atomic_write, open_lock, private_folder, read_regular, run_folder
from flip.runs.errors import DataError

FREED_SHARE = 0.1
"""Share of the limit that an eviction frees at once: listing the oldest files takes a while."""

log = logging.getLogger("flip.data")

DIGITS = 20
"""Digits of the number in the file ``size``."""
Sample = dict[str, memoryview]
"""Member (extension) -> its bytes, a view of the chunk's buffer."""
ChunkRanges = Sequence[tuple[int, int, int, int]]
"""As returned by ``ChunkTable.chunk_ranges``."""

_OWN_NAME = re.compile(r"[0-9]+(\.tmp\.[0-9a-f.]+)?")
"""The name of a chunk, or of a temporary file of its writer."""


class ChunkCache:
    """Chunks in a folder, at most ``limit`` bytes for all processes. Threads may share an instance.

    No method raises an error of the file system: failures are counted, and the first one is logged.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        self._folder = Path(folder) / f"flip-chunks-{os.geteuid()}"
        self._limit = limit
        self._lock = threading.Lock()
        self.hits = 0
        self.misses = 0
        self.failures = 0
        """Files that were damaged, or could not be read or written."""

    def get(self, manifest: Manifest, j: int) -> memoryview | None:
        """The bytes of chunk j, with the right CRC; None if they are not cached."""
        path = self._path(manifest, j)
        data = None
        try:
            private_folder(self._folder)
            data = read_regular(path, self._limit)
            if crc32(data) != manifest.checksums[j]:
                data = None
                deletion.delete_file(path, missing_ok=True)
                self._failed(f"{path} is damaged")
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            self._failed(error)
        with self._lock:
            self.hits += data is not None
            self.misses += data is None
        if data is None:
            return None
        return memoryview(data)

    def put(self, manifest: Manifest, j: int, pieces: Sequence[bytes]) -> None:
        """Store the bytes of chunk j, replacing the oldest chunks. The first failure is logged."""
        path = self._path(manifest, j)
        size = sum(map(len, pieces))
        if size > self._limit:
            return
        try:
            private_folder(self._folder)
            run_folder(path.parent)
            with self._locked_total() as total:
                total[0] += size
                if total[0] > self._limit:
                    total[0] = self._evict((1 - FREED_SHARE) * self._limit - size) + size
            with atomic_write(path, sync=False) as file:
                file.writelines(pieces)
        except FileNotFoundError:  # evicted as the oldest file before it was complete
            pass
        except OSError as error:
            self._failed(error)

    def _path(self, manifest: Manifest, j: int) -> Path:
        return self._folder / manifest.digest / str(j)

    @contextlib.contextmanager
    def _locked_total(self) -> Iterator[list[int]]:
        """Yield [the bytes of all chunks], locked; the number that the block leaves there is stored.

        It is too large if the chunk that is counted cannot be written afterwards.
        """
        with os.fdopen(open_lock(self._folder / "size", 0o600), "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            text = file.read(DIGITS)
            total = [int(text) if text.isdigit() else self._evict(self._limit)]
            yield total
            os.pwrite(file.fileno(), f"{total[0]:0{DIGITS}d}".encode(), 0)  # in place, which also works on a full disk

    def _evict(self, limit: float) -> int:
        """Delete the oldest chunks and files of killed processes until ``limit`` bytes are left; return their sum.

        Links are ignored: a prepared link must not lead to files elsewhere.
        """
        files = []
        for folder in self._folder.iterdir():
            with contextlib.suppress(NotADirectoryError), os.scandir(folder) as entries:
                own = []
                if not folder.is_symlink():
                    own = [entry for entry in entries if _OWN_NAME.fullmatch(entry.name)]
                for entry in own:
                    with contextlib.suppress(FileNotFoundError):  # deleted or renamed meanwhile
                        info = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(info.st_mode):
                            files += [(info.st_mtime_ns, info.st_size, entry.path)]
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= limit:
                break
            deletion.delete_file(path, missing_ok=True)
            total -= size
        return total

    def _failed(self, what: object) -> None:
        with self._lock:
            self.failures += 1
            first = self.failures == 1
        if first:
            log.warning("the chunk cache skips a file; further failures are only counted: %s", what)


@dataclass
class Chunk:
    """Chunk j of a manifest, checked by its CRC. ``pieces``: its bytes, one piece per ``manifest.chunk_ranges(j)``."""

    manifest: Manifest
    j: int
    pieces: Sequence[bytes | memoryview]

    @cached_property
    def samples(self) -> list[Sample]:
        """The samples of the chunk, which are parsed at the first access.

        Thus the thread that needs them parses them; in reader threads that would only take CPU time from it.

        Raises DataError if the bytes are not the tar that was indexed.
        """
        if self.manifest.pages:
            return self._of_parquet(self.manifest.pages)
        samples: list[Sample] = []
        for view, sample in self._parsed():
            samples.append({name: view[at : at + size] for name, (at, size) in sample.members.items()})
        return samples

    def keys(self) -> list[str]:
        """The keys of the samples; of a parquet file the numbers of their rows. Raises as ``samples``."""
        if self.manifest.pages:
            return [f"{self.manifest.locate(id)[1]:09d}" for id in self.manifest.chunk_ids(self.j)]
        return [sample.key for _, sample in self._parsed()]

    def _of_parquet(self, pages: PageTable) -> list[Sample]:
        try:
            return pages.samples(self.j, [memoryview(piece) for piece in self.pieces])
        except ValueError as error:
            raise corrupt_chunk(self.manifest, self.j, str(error)) from error

    def _parsed(self) -> Iterator[tuple[memoryview, tar.Sample]]:
        """Each sample, with the bytes in which its members are."""
        manifest = self.manifest
        id = manifest.chunk_ids(self.j).start
        for piece, (shard, start, _, count) in zip(self.pieces, manifest.chunk_ranges(self.j), strict=True):
            in_tar, selected = manifest.select(shard, id, count)
            view = memoryview(piece)
            try:
                parsed = tar.indexed(view, in_tar)
            except tar.InvalidTar as error:
                raise corrupt_chunk(manifest, self.j, f"{error} after {start} of {manifest.keys[shard]}") from error
            for i in selected:
                yield view, parsed[i]
            id += count


def corrupt_chunk(manifest: Manifest, j: int, what: str) -> DataError:
    """The error for a chunk whose bytes are not those that were indexed."""
    ids = manifest.chunk_ids(j)
    first = ids.start
    last = ids.stop - 1
    where = ", ".join(f"{key} bytes {start}-{stop}" for key, start, stop, _ in manifest.chunk_reads(j))
    return DataError(
        f"chunk {j} (samples {first} to {last}) is damaged: {what}",
        where,
        remedy="Restore the shard, or leave the samples out: "
        f"flip shards exclude {shlex.quote(str(manifest.folder))} --ids {first}-{last} --out NEW_FOLDER",
    )


class ChunkReader(StorageClient):
    """Reads chunks of manifests and checks their CRC. Threads may share an instance.

    ``cache``: read before storage and filled from it. Other arguments are those of ``StorageClient``.
    """

    def __init__(
        self, deadline: float | None = None, retry_policy: RetryPolicy = DEFAULT_POLICY, clock: Clock | None = None,
        remote: Storage | None = None, cache: ChunkCache | None = None, report: Callable[[Outage], None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(deadline, retry_policy, clock, remote, report)
        self._cache = cache

    @property
    def counters(self) -> IOStats:
        """A copy of the current counters, including those of the cache."""
        stats = super().counters
        if self._cache is not None:
            stats.cache_hits = self._cache.hits
            stats.cache_misses = self._cache.misses
            stats.cache_failures = self._cache.failures
        return stats

    def samples(self, manifest: Manifest) -> Iterator[tuple[int, Sample]]:
        """Yield (id, sample) in order, without excluded samples. Chunks with excluded samples only are not read."""
        for j in range(manifest.chunks):
            ids = [id for id in manifest.chunk_ids(j) if id not in manifest.exceptions]
            chunk = self.read_chunk(manifest, j) if ids else []
            yield from ((id, chunk[id - manifest.chunk_ids(j)[0]]) for id in ids)

    def read_chunk(self, manifest: Manifest, j: int) -> list[Sample]:
        """The samples of chunk j. Raises as ``read`` does."""
        return self.fetch(manifest, j).samples

    def fetch(self, manifest: Manifest, j: int) -> Chunk:
        """Chunk j, its bytes checked against the manifest's CRC. Raises as ``read`` does."""
        ranges = manifest.chunk_ranges(j)
        data = None
        if self._cache:
            data = self._cache.get(manifest, j)
        if data is not None:
            ends = list(itertools.accumulate(stop - start for _, start, stop, _ in ranges))
            return Chunk(manifest, j, [data[start:stop] for start, stop in zip([0, *ends], ends, strict=False)])
        pieces = self._fetch(manifest, j, ranges)
        if self._cache:
            self._cache.put(manifest, j, pieces)
        return Chunk(manifest, j, pieces)

    def _fetch(self, manifest: Manifest, j: int, ranges: ChunkRanges) -> Sequence[bytes]:
        """The bytes of a chunk from storage, with the right CRC, a piece for each range."""
        attempts = self._attempts()
        wrong: set[int] = set()

        def request_pieces() -> Sequence[bytes]:
            pieces = [
                self._read(attempts, manifest.keys[shard], start, stop, manifest.etags[shard])
                for shard, start, stop, _ in ranges
            ]
            crc = 0
            for piece in pieces:
                crc = crc32(piece, crc)
            if crc == manifest.checksums[j]:
                return pieces
            if crc in wrong:
                raise corrupt_chunk(manifest, j, f"CRC32 {crc:#010x}, indexed was {int(manifest.checksums[j]):#010x}")
            wrong.add(crc)
            for shard, start, stop, _ in ranges:
                if not is_remote(manifest.keys[shard]):
                    drop_cached_pages(manifest.keys[shard], start, stop)
            raise RequestError("checksum", f"chunk {j} has a wrong CRC32")

        return self._retry(attempts, manifest.keys[ranges[0][0]], request_pieces)
