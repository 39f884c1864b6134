"""Chunks kept as files on this node's disk: what was read once is not fetched again. It never changes what is read.

    FOLDER/flip-chunks-<uid>/<digest of the manifest>/<chunk>    the chunk's bytes, as storage has them
    FOLDER/flip-chunks-<uid>/size                                about the sum of their lengths, locked by its writer

A file appears whole and its CRC32 is checked whenever it is read, so that nothing is synced and nothing must be
cleaned up after a crash. Processes and runs of one user share the folder, whose mode is 0700. Other users have their
own: bytes that somebody else wrote are not trusted, and eviction deletes files.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from flip.data.manifest.manifest import Manifest
from flip.data.storage.checksums import crc32
from flip.runs.ownership import private_folder, read_regular

ROOM = 0.1
"""Share of the bytes allowed that is freed at once: looking for the oldest files takes a while."""

log = logging.getLogger("flip.data")


class Cache:
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
