"""Making a manifest of shards, local or in object storage.

The headers are walked in memory with the same walker that training uses. Each shard is read once: the CRC of a chunk is
put together from those of its samples, as how many make a chunk is known when all are counted.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flip.data import crc, tar
from flip.data import manifest as manifests
from flip.data.manifest import BLOCK, Manifest, Table
from flip.data.reader import Reader
from flip.data.storage import Stat, is_remote
from flip.exitcodes import ConfigError, DataError, PermissionDenied, StorageError

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def index(
    shards: Sequence[str], out: os.PathLike[str] | str, chunk: int = 0, progress: Progress | None = None
) -> Manifest:
    """Walk the shards, sorted by name, and write their manifest to ``out``. ``chunk``: R; 0: ``choose_chunk``.

    ``.tail`` of the result counts the samples that training leaves out. Raises ConfigError (no shards, one named twice,
    a manifest there already, no such address), DataError (a shard that is missing, cut off, not a tar, or holds
    nothing; no samples), PermissionDenied, StorageError; OSError where ``out`` cannot be written.
    """
    out = Path(out).absolute()
    keys = sorted(shard if is_remote(shard) else os.path.abspath(shard) for shard in shards)
    if not keys:
        raise ConfigError("no shards to index", remedy="Name at least one .tar file.")
    for key, after in pairwise(keys):
        if key == after or "\n" in key:
            raise ConfigError("a shard is named twice, or its name holds a line break", value=key)
    manifests.refuse_existing(out)
    reader, scans, done = Reader(), list[Scan](), 0
    stats = [reader.stat(key) if is_remote(key) else Stat(_size(key), "") for key in keys]
    total = sum(stat.size for stat in stats)
    for key, stat in zip(keys, stats, strict=True):
        scans.append(scan(key, stat, reader))
        done += stat.size
        if progress:
            progress(done, total)
    samples = sum(len(found.starts) for found in scans)
    if not samples:
        raise DataError("the shards hold no samples", keys[0], remedy="Members must be named KEY.EXTENSION.")
    chunk = chunk or choose_chunk(samples)
    if not 0 < chunk <= samples:
        raise ConfigError(f"chunk must lie in 1 .. {samples}, the number of samples", value=chunk)
    rows = [(len(found.starts), stat.size, found.end) for found, stat in zip(scans, stats, strict=True)]
    starts, blocks, crcs = (np.concatenate([found[field] for found in scans]) for field in range(3))
    table = Table(keys, np.array(rows, dtype=np.int64), chunk, starts[::chunk], [stat.etag for stat in stats])
    return manifests.write(out, table, crc.chunked(crcs, blocks, chunk))


def choose_chunk(samples: int) -> int:
    """R: the largest power of two up to 256 that leaves at least 4096 chunks, else 1."""
    return next((r for r in (256, 128, 64, 32, 16, 8, 4, 2) if samples >= 4096 * r), 1)


class Scan(NamedTuple):
    """What one pass over a shard finds. The first sample starts at 0, whatever stands before it."""

    starts: NDArray[np.uint32]
    """Per sample: the block at which it starts ..."""
    blocks: NDArray[np.uint32]
    """... how many blocks there are to the next one's start or the end ..."""
    crcs: NDArray[np.uint32]
    """... and the CRC32 of those."""
    end: int
    """The byte at which its members end."""


def scan(key: str, stat: Stat, reader: Reader) -> Scan:
    """Walk a shard: a file in a memory map, an object in memory, read once. Raises DataError naming shard and byte."""
    if not stat.size:
        raise DataError("the shard is empty", key, remedy=_REMEDY)
    if is_remote(key):
        return _scan(key, memoryview(_fetched(key, stat, reader)))
    with _open(key) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole, memoryview(whole) as view:
        return _scan(key, view)


def _scan(key: str, view: memoryview) -> Scan:
    try:
        found = [(sample.start, sample.end) for sample in tar.samples(view, whole=True)]
    except tar.Broken as error:
        raise DataError(f"not a whole tar: {error}", key, remedy=_REMEDY) from error
    end = found[-1][1] if found else 0
    borders = [0, *(start for start, _ in found[1:]), end] if found else []
    crcs = []
    for start, stop in pairwise(borders):
        with view[start:stop] as piece:
            crcs.append(zlib.crc32(piece))
    places = np.array(borders, dtype=np.int64) // BLOCK
    return Scan(places[:-1].astype(np.uint32), np.diff(places).astype(np.uint32), np.array(crcs, dtype=np.uint32), end)


def _fetched(key: str, stat: Stat, reader: Reader) -> bytearray:
    """All of an object. A byte that was spoiled on its way here would be the truth from now on, so the whole is checked
    by the object's ETag or, where that is no MD5 (uploaded in parts, encrypted), by reading it once more."""
    whole, digest = _read(key, stat, reader)
    if digest != stat.etag and _read(key, stat, reader)[1] != digest:
        raise StorageError("two readings of the shard differ", key, remedy="Look at the network, then index again.")
    return whole


def _read(key: str, stat: Stat, reader: Reader) -> tuple[bytearray, str]:
    whole = bytearray()
    for at in range(0, stat.size, _PIECE):
        whole += reader.read(key, at, min(at + _PIECE, stat.size), stat.etag)
    return whole, hashlib.md5(whole, usedforsecurity=False).hexdigest()


_PIECE = 32 << 20
"""Bytes of one request."""

_REMEDY = "Fetch or make the shard again, or leave it out."


def _size(key: str) -> int:
    with _open(key) as file:
        return os.fstat(file.fileno()).st_size


def _open(key: str) -> BinaryIO:
    try:
        return open(key, "rb")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError("the shard is missing", key, remedy="Check the path and the braces.") from None
    except IsADirectoryError:
        raise DataError("a folder is no shard", key, remedy=f"Name its files: '{key}/*.tar'") from None
    except PermissionError:
        raise PermissionDenied("the shard may not be read", key, remedy="Grant read access to it.") from None
    except OSError as error:
        raise StorageError(f"the shard cannot be read: {error.strerror}", key) from error
