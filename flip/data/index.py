"""Making a manifest of shards, local or in object storage.

Each shard is read once: the CRC of a chunk is put together from those of its samples, as how many make a chunk is known
when all are counted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from flip.data import crc
from flip.data import manifest as manifests
from flip.data.manifest import Manifest, Table
from flip.data.reader import Reader
from flip.data.scan import Scan, file_size, scan
from flip.data.storage import Stat, is_remote
from flip.exitcodes import ConfigError, DataError

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
    stats = [reader.stat(key) if is_remote(key) else Stat(file_size(key), "") for key in keys]
    total = sum(stat.size for stat in stats)
    for key, stat in zip(keys, stats, strict=True):
        scans.append(scan(key, stat, reader))
        done += stat.size
        if progress:
            progress(done, total)
    samples = sum(len(found.blocks) for found in scans)
    if not samples:
        raise DataError("the shards hold no samples", keys[0], remedy="Members must be named KEY.EXTENSION.")
    chunk = chunk or choose_chunk(samples)
    if not 0 < chunk <= samples:
        raise ConfigError(f"chunk must lie in 1 .. {samples}, the number of samples", value=chunk)
    rows = [(len(found.blocks), stat.size, found.end) for found, stat in zip(scans, stats, strict=True)]
    starts = np.concatenate([found.starts for found in scans])
    blocks, crcs = (np.concatenate([found[field] for found in scans]) for field in range(2))
    table = Table(keys, np.array(rows, dtype=np.int64), chunk, starts[::chunk], [stat.etag for stat in stats])
    return manifests.write(out, table, crc.chunked(crcs, blocks, chunk))


def choose_chunk(samples: int) -> int:
    """R: the largest power of two up to 256 that leaves at least 4096 chunks, else 1."""
    return next((r for r in (256, 128, 64, 32, 16, 8, 4, 2) if samples >= 4096 * r), 1)
