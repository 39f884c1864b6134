"""One pass over a shard: where its samples lie, and the CRC32 of each.

Headers are walked in memory with the same walker that training uses, piece by piece: a process holds one piece and the
sample that is cut by its end, not the shard.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flip.data import tar
from flip.data.etag import ETag
from flip.data.manifest import BLOCK
from flip.data.reader import Reader
from flip.data.storage import Stat, is_remote
from flip.exitcodes import DataError, PermissionDenied, StorageError

PIECE = 16 << 20
"""Bytes of one request: half of what the allocator keeps for the next one."""

REMEDY = "Fetch or make the shard again, or leave it out (--skip-damaged)."


class Scan(NamedTuple):
    """What one pass over a shard finds: arrays of an entry per sample. The first sample starts at 0, whatever stands
    before it."""

    blocks: NDArray[np.uint32]
    """How many blocks there are from its start to the next one's, or to the end of the last one's members ..."""
    crcs: NDArray[np.uint32]
    """... and the CRC32 of those."""

    @property
    def starts(self) -> NDArray[np.uint32]:
        """Per sample: the block at which it starts."""
        return np.cumsum(self.blocks, dtype=np.uint32) - self.blocks

    @property
    def end(self) -> int:
        """The byte at which its members end."""
        return int(self.blocks.sum(dtype=np.int64)) * BLOCK


def scan(key: str, stat: Stat, reader: Reader) -> Scan:
    """Read a shard once and walk it. Raises DataError naming shard and byte; what ``Reader.read`` does.

    A byte that was spoiled on its way here would be the truth from now on, so an object is checked by its ETag or,
    where that follows from no MD5 (encrypted, of parts that the server does not tell), by reading it once more.
    """
    if not stat.size:
        raise DataError("the shard is empty", key, remedy=REMEDY)
    parts = reader.parts(key, stat) if is_remote(key) and "-" in stat.etag else []
    found, etag = _read(key, stat, parts, reader)
    if is_remote(key) and etag != stat.etag and _read(key, stat, parts, reader)[1] != etag:
        raise StorageError("two readings of the shard differ", key, remedy="Look at the network, then index again.")
    if isinstance(found, tar.Broken):
        raise DataError(f"not a whole tar: {found}", key, remedy=REMEDY) from found
    return found


def walk(pieces: Iterable[bytes]) -> Scan:
    """The scan of a tar that comes in pieces. Raises tar.Broken."""
    pieces, blocks, crcs = iter(pieces), list[int](), list[int]()
    rest, base, broken = b"", 0, tar.Broken(0, "an empty archive")
    for piece in pieces:
        view = memoryview(rest + piece)
        starts, end, found = _samples(view)
        # It begins with the shard or with its first sample: in either case that one's start is 0.
        borders = [0, *starts[1:], *([] if found else [end])] if starts else [0]
        for start, stop in pairwise(borders):
            blocks.append((stop - start) // BLOCK)
            crcs.append(zlib.crc32(view[start:stop]))
        if found is None:
            _check_rest(pieces, base + len(view))
            return Scan(np.array(blocks, dtype=np.uint32), np.array(crcs, dtype=np.uint32))
        broken = tar.Broken(base + found.offset, found.reason)
        if not isinstance(found, tar.Cut):
            break
        rest, base = bytes(view[borders[-1] :]), base + borders[-1]  # the last sample's end is not certain yet
    raise broken


def _samples(view: memoryview) -> tuple[list[int], int, tar.Broken | None]:
    """Starts of the samples, the end of the last one, and what ended the walk before the archive's end."""
    starts, end = list[int](), 0
    try:
        for sample in tar.samples(view, whole=True):
            starts.append(sample.start)
            end = sample.end
    except tar.Broken as error:
        return starts, end, error
    return starts, end, None


def _check_rest(pieces: Iterator[bytes], at: int) -> None:
    for piece in pieces:
        try:
            tar.check_rest(memoryview(piece))
        except tar.Broken as error:
            raise tar.Broken(at + error.offset, error.reason) from None
        at += len(piece)


def _read(key: str, stat: Stat, parts: Sequence[int], reader: Reader) -> tuple[Scan | tar.Broken, str]:
    """What one reading found, and the ETag that an object's bytes have as far as they were read."""
    etag = ETag(parts)

    def pieces() -> Iterator[bytes]:
        for at in range(0, stat.size, PIECE):
            piece = reader.read(key, at, min(at + PIECE, stat.size), stat.etag)
            if is_remote(key):
                etag.update(piece)
            yield piece

    try:
        return walk(pieces()), etag.text()
    except tar.Broken as error:
        return error, etag.text()


def file_stat(key: str) -> Stat:
    """Of a shard that is a file and may be read. Raises as ``scan`` does."""
    try:
        with open(key, "rb") as file:
            found = os.fstat(file.fileno())
            return Stat(found.st_size, "", found.st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError("the shard is missing", key, remedy="Check the path and the braces.") from None
    except IsADirectoryError:
        raise DataError("a folder is no shard", key, remedy=f"Name its files: '{key}/*.tar'") from None
    except PermissionError:
        raise PermissionDenied("the shard may not be read", key, remedy="Grant read access to it.") from None
    except OSError as error:
        raise StorageError(f"the shard cannot be read: {error.strerror}", key) from error
