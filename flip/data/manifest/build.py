"""Making a manifest of shards, local or in object storage.

Each shard is read once: the CRC of a chunk is put together from those of its samples, as how many make a chunk is known
when all are counted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flip.data.manifest import manifest as manifests
from flip.data.manifest.census import Completeness
from flip.data.manifest.chunks import Chunks
from flip.data.manifest.gather import Gathered, Progress, gather, listed, sorted_keys
from flip.data.manifest.kept import Keeping
from flip.data.manifest.manifest import Manifest, Table
from flip.data.manifest.scan import Scan
from flip.data.manifest.scans import Shard
from flip.runs.errors import ConfigError, DataError

if TYPE_CHECKING:
    from flip.data.manifest.filters import Filters


def index(
    shards: Sequence[str], out: os.PathLike[str] | str, chunk: int = 0, progress: Progress | None = None,
    workers: int = 0, filters: Filters | None = None,
) -> Manifest:  # fmt: skip
    """Walk the shards, sorted by name, and write their manifest to ``out``. ``chunk``: R; 0: ``choose_chunk``.
    ``filters``: which samples are kept; by default all.

    ``.tail`` of the result counts the samples that training leaves out. Raises ConfigError (no shards, one named twice,
    a manifest there already, no such address), Damaged, a DataError (shards that are missing, cut off, no tar, or hold
    nothing), DataError (no samples), PermissionDenied, StorageError; OSError where ``out`` cannot be written. What was
    scanned until then is kept beside ``out`` and used by the next call.
    """
    out, keys = Path(out).absolute(), sorted_keys(shards)
    manifests.refuse_existing(out)
    return merge(gather(keys, out, progress, workers, filters=filters), out, chunk, filters=filters)


def refuse_filters(old: Manifest | None, filters: Filters | None) -> None:
    """Raise ConfigError where a manifest is to be added to, and there or here samples are filtered."""
    if old and (filters or old.kept):
        raise ConfigError("filters do not go with --add", remedy="Index all shards anew, with the filters.")


def merge(
    found: Gathered, out: Path, chunk: int = 0, old: Manifest | None = None, progress: Progress | None = None,
    filters: Filters | None = None, complete: Completeness | None = None,
) -> Manifest:  # fmt: skip
    """Write the manifest of shards that were scanned, and remove the scans. Raises as ``index`` does.

    ``old``: its shards come first, unread, with its R (not ``chunk``) and exceptions: its samples keep their ids.
    ``progress``: here in shards. ``complete``: counts the samples of the scanned shards; where it refuses them, it
    raises Incomplete and the scans are kept.
    """
    samples = sum(map(found.scans.samples, found.shards))
    refuse_filters(old, filters)
    if not samples and filters:
        _tell_why_none(found, filters, out)
    if not samples:
        raise DataError("the shards hold no samples", str(out), remedy="Members must be named KEY.EXTENSION.")
    chunk = old.chunk if old else chunk or choose_chunk(samples)
    if not old and not 0 < chunk <= samples:
        raise ConfigError(f"chunk must lie in 1 .. {samples}, the number of samples", value=chunk)
    chunks, keeping, counts = Chunks(chunk, old), Keeping(), np.zeros(256, dtype=np.int64)
    keys, etags, rows = (list(old.keys), list(old.etags), old.shards.tolist()) if old else ([], [], [])
    for number, shard in enumerate(found.shards, 1):
        one = _scan(found, shard, out)
        chunks.add(one)
        keeping.add(one.dropped == 0, int(one.head[0]))
        counts += np.bincount(one.dropped, minlength=256)
        if complete:
            complete.add(one.census)
        keys.append(shard.key)
        etags.append(shard.stat.etag)
        rows.append([len(one.crcs), shard.stat.size, one.end])
        if progress:
            progress(number, len(found.shards), "")
    if complete:
        complete.check(str(out))
    offsets, checksums = chunks.tables()
    table = Table(keys, np.array(rows, dtype=np.int64), chunk, offsets, etags, None if old else keeping.kept())
    settings = _settings(found, keys, old) | (filters.settings(counts) if filters else {})
    made = manifests.write(out, table, checksums, old.exceptions if old else {}, settings)
    found.scans.remove()
    return made


def _tell_why_none(found: Gathered, filters: Filters, out: Path) -> None:
    """Raises ConfigError with how many samples each filter dropped; not where there were none to drop."""
    counts = np.zeros(256, dtype=np.int64)
    for shard in found.shards:
        counts += np.bincount(_scan(found, shard, out).dropped, minlength=256)
    dropped = [f"{count:,} x {reason}" for reason, count in filters.settings(counts)["dropped"].items()]
    if dropped:
        remedy = f"Dropped were {'; '.join(dropped)}. Choose others."
        raise ConfigError("no sample passes the filters", "--filter", ", ".join(filters.names), remedy)


def _scan(found: Gathered, shard: Shard, out: Path) -> Scan:
    try:
        return found.scans.read(shard)
    except DataError:
        manifests.refuse_existing(out)  # whoever wrote it meanwhile has removed the scans
        raise


def _settings(found: Gathered, keys: Sequence[str], old: Manifest | None) -> dict[str, Any]:
    """Those of the old manifest, and which shards were left out."""
    settings = dict(old.settings) if old else {}
    there = set(keys)  # also what was left out once, then mended and added
    left_out = [one for one in settings.pop("left_out", []) if one["shard"] not in there] + listed(found.damaged)
    return settings | ({"left_out": left_out} if left_out else {})


def choose_chunk(samples: int) -> int:
    """R: the largest power of two up to 256 that leaves at least 4096 chunks, else 1."""
    return next((r for r in (256, 128, 64, 32, 16, 8, 4, 2) if samples >= 4096 * r), 1)
