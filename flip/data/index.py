"""Making a manifest of local shards.

The headers are walked in a memory map with the same walker that training uses, and the CRC of each chunk is taken over
what the reader reads for it: what is checked later is by construction what was seen here.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from flip.data import manifest as manifests
from flip.data import tar
from flip.data.manifest import BLOCK, Manifest, Table
from flip.data.reader import Reader
from flip.exitcodes import ConfigError, DataError, PermissionDenied, StorageError

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all; every byte is passed twice, headers first."""


def index(
    shards: Sequence[str], out: os.PathLike[str] | str, chunk: int = 0, progress: Progress | None = None
) -> Manifest:
    """Walk the shards, sorted by name, and write their manifest to ``out``. ``chunk``: R; 0: ``choose_chunk``.

    ``.tail`` of the result counts the samples that training leaves out. Raises ConfigError (no shards, one named twice,
    a manifest there already), DataError (a shard that is missing, cut off, not a tar, or holds nothing; no samples),
    PermissionDenied, StorageError; OSError where ``out`` cannot be written.
    """
    out = Path(out).absolute()
    keys = sorted(os.path.abspath(shard) for shard in shards)
    if not keys:
        raise ConfigError("no shards to index", remedy="Name at least one .tar file.")
    for key, after in pairwise(keys):
        if key == after or "\n" in key:
            raise ConfigError("a shard is named twice, or its name holds a line break", value=key)
    manifests.refuse_existing(out)
    sizes = [_size(key) for key in keys]
    total, done = 2 * sum(sizes), 0
    starts, rows = [], []
    for key, size in zip(keys, sizes, strict=True):
        offsets, end = walk(key)
        starts.append(offsets)
        rows.append((len(offsets), size, end))
        done += size
        if progress:
            progress(done, total)
    samples = sum(count for count, *_ in rows)
    if not samples:
        raise DataError("the shards hold no samples", keys[0], remedy="Members must be named KEY.EXTENSION.")
    chunk = chunk or choose_chunk(samples)
    if not 0 < chunk <= samples:
        raise ConfigError(f"chunk must lie in 1 .. {samples}, the number of samples", value=chunk)
    table = Table(keys, np.array(rows, dtype=np.int64), chunk, np.concatenate(starts)[::chunk])
    checksums = _checksums(table, lambda more: progress(done + more, total) if progress else None)
    return manifests.write(out, table, checksums)


def choose_chunk(samples: int) -> int:
    """R: the largest power of two up to 256 that leaves at least 4096 chunks, else 1."""
    return next((r for r in (256, 128, 64, 32, 16, 8, 4, 2) if samples >= 4096 * r), 1)


def walk(key: str) -> tuple[NDArray[np.uint32], int]:
    """Where each sample of a shard starts, in blocks, and the byte at which its members end.

    The first sample starts at 0, whatever stands before it. Raises DataError naming shard and byte.
    """
    with _open(key) as file:
        try:
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise DataError("the shard is empty", key, remedy=_REMEDY) from None
        with whole, memoryview(whole) as view:
            try:
                found = [(sample.start, sample.end) for sample in tar.samples(view, whole=True)]
            except tar.Broken as error:
                raise DataError(f"not a whole tar: {error}", key, remedy=_REMEDY) from error
    starts = np.array([start for start, _ in found], dtype=np.int64) // BLOCK
    starts[:1] = 0
    return starts.astype(np.uint32), found[-1][1] if found else 0


_REMEDY = "Fetch or make the shard again, or leave it out."


def _checksums(table: Table, progress: Callable[[int], None]) -> NDArray[np.uint32]:
    reader, checksums, done = Reader(), np.empty(table.chunks, dtype=np.uint32), 0
    for j in range(table.chunks):
        crc = 0
        for key, start, stop, _ in table.chunk_reads(j):
            crc = zlib.crc32(reader.read(key, start, stop), crc)
            done += stop - start
        checksums[j] = crc
        progress(done)
    return checksums


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
