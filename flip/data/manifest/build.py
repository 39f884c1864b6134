"""Builds the manifest of tar shards: scans them in several processes, then assembles the tables.

Each shard is read once: the CRC of a chunk is combined from the CRCs of its samples, because the chunk size follows
from the number of samples. Finished scans are kept beside the output folder, and a later call uses them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from flip import concurrency
from flip.concurrency import DaemonExecutor
from flip.config.resolve import default_chunk
from flip.data.manifest import manifest as manifests
from flip.data.manifest.census import Completeness
from flip.data.manifest.manifest import MARK, ChunkTable, Manifest, SampleFilterBuilder, refuse_existing
from flip.data.manifest.scan import REMEDY, Scan, ScanJournal, Shard, file_stat, scan
from flip.data.storage import checksums
from flip.data.storage.base import ObjectStat, is_remote
from flip.data.storage.client import StorageClient
from flip.runs.errors import ConfigError, DataError

if TYPE_CHECKING:
    from flip.data.manifest.filters import Filters

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and a word on the shards; first with what need not be done."""

_THREADS = 16
"""Shards that are asked for their sizes at once."""

_WORTH = 64 << 20
"""Bytes to read for which one process more is worth its start."""

_NAMED = 3

_FILE = re.compile(r"file:(?://(?:localhost)?)?(/(?!/).*)", re.DOTALL | re.IGNORECASE)
_CHAINED = re.compile(":{2}")
_URL = re.compile(r"pipe:|[a-z][a-z0-9+.-]*:/", re.IGNORECASE)


class DamagedShards(DataError):
    """Shards that cannot be indexed. ``errors``: shard -> what is wrong with it."""

    def __init__(self, errors: Mapping[str, DataError], shards: int, kept: Path) -> None:
        self.errors = dict(errors)
        first = list(errors.values())[:_NAMED]
        where, what, remedy = first[0].where, first[0].what, first[0].remedy
        if len(errors) > 1:
            named = "; ".join(f"{error.where}: {error.what}" for error in first)
            more = f"; and {len(errors) - _NAMED:,} more" if len(errors) > _NAMED else ""
            where, what = "", f"{len(errors):,} of {shards:,} shards cannot be indexed: {named}{more}"
            remedy = remedy if len({error.remedy for error in errors.values()}) == 1 else REMEDY
        if kept.exists():
            remedy += f" The scans of the others are kept in {kept}: give the same command again."
        super().__init__(what, where, remedy=remedy)


@dataclass
class ScanResults:
    """``shards``: those that have a scan, sorted by key; ``reused``: how many had one before; ``read``: bytes of
    the others."""

    scans: ScanJournal
    shards: list[Shard]
    reused: int
    read: int
    damaged: dict[str, DataError] = field(default_factory=dict)


def skipped_shards(damaged: Mapping[str, DataError]) -> list[dict[str, str]]:
    """As they stand in reports and in a manifest's settings."""
    return [{"shard": key, "reason": error.what} for key, error in damaged.items()]


def part_folder(out: Path) -> Path:
    """Where scans are kept until the manifest ``out`` is written."""
    return out.with_name(f"{out.name}.part")


def as_path(shard: str) -> str:
    """A path for a URL file://; all else as it is."""
    match = _FILE.fullmatch(shard)
    return unquote(match[1], errors="surrogateescape") if match else shard


def _key(shard: str) -> str:
    """A URL s3:// or an absolute path. Raises ConfigError for what is in no storage of ours: it is no file that is
    missing below the working directory."""
    shard = as_path(shard)
    if "::s3://" in shard or (_CHAINED.search(shard) and not is_remote(shard) and not os.path.lexists(shard)):
        raise ConfigError("several shards in one name", shard, remedy="Name them one by one, or as {a,b}.tar.")
    if is_remote(shard):
        return shard
    if _URL.match(shard) and not os.path.lexists(shard):
        remedy = "Fetch it first; of a storage that speaks S3 (AWS_ENDPOINT_URL) name it s3://BUCKET/KEY."
        raise ConfigError("shards are files or s3:// objects, and this is neither", shard, remedy=remedy)
    return os.path.abspath(shard)


def sorted_keys(shards: Iterable[str], old: Sequence[str] = ()) -> list[str]:
    """URLs and absolute paths. Raises ConfigError (none, one named twice, among ``old``, or in no storage of ours)."""
    keys = sorted(map(_key, shards))
    if not keys:
        raise ConfigError("no shards to index", remedy="Name at least one .tar file.")
    for key, after in pairwise(keys):
        if key == after or "\n" in key:
            raise ConfigError("a shard is named twice, or its name holds a line break", value=key)
    for key in sorted(set(old).intersection(keys))[:1]:
        raise ConfigError("a shard is in the old manifest already", value=key, remedy="Name the new ones alone.")
    return keys


def scan_shards(
    keys: Sequence[str], out: Path, progress: Progress | None = None, workers: int = 0,
    known: Mapping[str, ObjectStat] | None = None, skip_damaged: bool = False, filters: Filters | None = None,
) -> ScanResults:  # fmt: skip
    """Scan the shards that have no scan beside ``out`` yet. ``workers``: processes at most; below 2 this one does it.
    ``known``: what a listing told of objects, which are then not asked for one by one.

    Raises, when all others are scanned, DamagedShards unless ``skip_damaged``; before that where one is missing.
    Further PermissionDenied, StorageError, and OSError where ``out`` cannot be written. What is scanned by then is
    kept. ConfigError where another process has written the manifest meanwhile: then nothing is kept.
    """
    folder = part_folder(out)
    shards, damaged = _stat_shards(keys, known or {})
    if damaged and not skip_damaged:
        raise DamagedShards(damaged, len(keys), folder)
    scans = ScanJournal(folder, filters.names if filters else ())
    todo = [shard for shard in shards if shard not in scans]
    total, left = sum(shard.stat.size for shard in shards), sum(shard.stat.size for shard in todo)
    done, ended = total - left, len(shards) - len(todo)
    processes = min(workers, len(todo), 1 + left // _WORTH)
    answers = concurrency.map_in_processes(_scanner, (filters,), todo, processes if processes > 1 else 0, "index")
    try:
        if todo:
            scans.begin()  # what cannot be written is told before hours of reading
        _tell(progress, done, total, ended, len(shards))
        for shard, found in answers:
            refuse_existing(out)
            if isinstance(found, DataError):
                damaged[shard.key] = found
            else:
                scans.add(shard, found)
            done, ended = done + shard.stat.size, ended + 1
            _tell(progress, done, total, ended, len(shards))
    finally:
        answers.close()
        (scans.remove if (out / MARK).exists() else scans.close)()
    damaged = dict(sorted(damaged.items()))
    if damaged and not skip_damaged:
        raise DamagedShards(damaged, len(keys), folder)
    return ScanResults(scans, [s for s in shards if s.key not in damaged], len(shards) - len(todo), left, damaged)


def _stat_shards(keys: Sequence[str], known: Mapping[str, ObjectStat]) -> tuple[list[Shard], dict[str, DataError]]:
    reader = StorageClient()

    def ask(key: str) -> ObjectStat | DataError:
        try:
            return known.get(key) or (reader.stat(key) if is_remote(key) else file_stat(key))
        except DataError as error:
            return error

    threads = DaemonExecutor(min(_THREADS, len(keys)), "stat")
    try:
        answers = [threads.submit(ask, key) for key in keys]
        found = [(key, answer.result()) for key, answer in zip(keys, answers, strict=True)]
    finally:
        threads.close()
    return (
        [Shard(key, stat) for key, stat in found if isinstance(stat, ObjectStat)],
        {key: error for key, error in found if isinstance(error, DataError)},
    )


def _scanner(filters: Filters | None) -> Callable[[Shard], tuple[Shard, Scan | DataError]]:
    reader = StorageClient()

    def one(shard: Shard) -> tuple[Shard, Scan | DataError]:
        try:
            return shard, scan(shard.key, shard.stat, reader, filters)
        except DataError as error:
            return shard, error

    return one


def _tell(progress: Progress | None, done: int, total: int, ended: int, shards: int) -> None:
    if progress:
        progress(done, total, f"{ended:,} of {shards:,} shards")


def index(
    shards: Sequence[str], out: os.PathLike[str] | str, chunk: int = 0, progress: Progress | None = None,
    workers: int = 0, filters: Filters | None = None,
) -> Manifest:  # fmt: skip
    """Walk the shards, sorted by name, and write their manifest to ``out``. ``chunk``: R; 0: ``default_chunk``.
    ``filters``: which samples are kept; by default all.

    ``.tail`` of the result counts the samples that training leaves out. Raises ConfigError (no shards, one named twice,
    a manifest there already, no such address), DamagedShards, a DataError (shards that are missing, cut off, no tar, or
    hold nothing), DataError (no samples), PermissionDenied, StorageError; OSError where ``out`` cannot be written. What
    was scanned until then is kept beside ``out`` and used by the next call.
    """
    out, keys = Path(out).absolute(), sorted_keys(shards)
    refuse_existing(out)
    return merge(scan_shards(keys, out, progress, workers, filters=filters), out, chunk, filters=filters)


def refuse_filters(old: Manifest | None, filters: Filters | None) -> None:
    """Raise ConfigError where a manifest is to be added to, and there or here samples are filtered."""
    if old and (filters or old.sample_filter):
        raise ConfigError("filters do not go with --add", remedy="Index all shards anew, with the filters.")


def merge(
    found: ScanResults, out: Path, chunk: int = 0, old: Manifest | None = None, progress: Progress | None = None,
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
    chunk = old.chunk if old else chunk or default_chunk(samples)
    if not old and not 0 < chunk <= samples:
        raise ConfigError(f"chunk must lie in 1 .. {samples}, the number of samples", value=chunk)
    chunks, keeping, counts = ChunkTableBuilder(chunk, old), SampleFilterBuilder(), np.zeros(256, dtype=np.int64)
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
    table = ChunkTable(keys, np.array(rows, dtype=np.int64), chunk, offsets, etags, None if old else keeping.build())
    settings = _settings(found, keys, old) | (filters.settings(counts) if filters else {})
    made = manifests.write(out, table, checksums, old.exceptions if old else {}, settings)
    found.scans.remove()
    return made


def _tell_why_none(found: ScanResults, filters: Filters, out: Path) -> None:
    """Raises ConfigError with how many samples each filter dropped; not where there were none to drop."""
    counts = np.zeros(256, dtype=np.int64)
    for shard in found.shards:
        counts += np.bincount(_scan(found, shard, out).dropped, minlength=256)
    dropped = [f"{count:,} x {reason}" for reason, count in filters.settings(counts)["dropped"].items()]
    if dropped:
        remedy = f"Dropped were {'; '.join(dropped)}. Choose others."
        raise ConfigError("no sample passes the filters", "--filter", ", ".join(filters.names), remedy)


def _scan(found: ScanResults, shard: Shard, out: Path) -> Scan:
    try:
        return found.scans.read(shard)
    except DataError:
        refuse_existing(out)  # whoever wrote it meanwhile has removed the scans
        raise


def _settings(found: ScanResults, keys: Sequence[str], old: Manifest | None) -> dict[str, Any]:
    """Those of the old manifest, and which shards were left out."""
    settings = dict(old.settings) if old else {}
    there = set(keys)  # also what was left out once, then mended and added
    left_out = [one for one in settings.pop("left_out", []) if one["shard"] not in there] + skipped_shards(
        found.damaged
    )
    return settings | ({"left_out": left_out} if left_out else {})


_GROUP = 1 << 22
"""Samples whose CRCs are put together at once: enough for numpy, 32 MB."""


class ChunkTableBuilder:
    """Chunks of ``chunk`` samples. ``old``: they go on where those of a manifest with that R end, whose last one, if it
    is not full, takes in the first samples that are added."""

    def __init__(self, chunk: int, old: Manifest | None = None) -> None:
        self._chunk, self._samples = chunk, old.samples if old else 0
        self._offsets: list[NDArray[np.uint32]] = [old.offsets] if old else []
        full = self._samples // chunk
        self._checksums: list[NDArray[np.uint32]] = [old.checksums[:full]] if old else []
        crcs, blocks = np.zeros((2, self._samples % chunk), dtype=np.uint32)
        if old and len(crcs):
            crcs[0] = old.checksums[full]  # of all of them, the others are empty; how long the first is does not matter
        self._crcs, self._blocks, self._waiting = [crcs], [blocks], len(crcs)

    def add(self, scan: Scan) -> None:
        """The next shard."""
        self._offsets.append(scan.starts[-self._samples % self._chunk :: self._chunk])
        self._crcs.append(scan.crcs)
        self._blocks.append(scan.blocks)
        self._samples += len(scan.crcs)
        self._waiting += len(scan.crcs)
        if self._waiting >= max(_GROUP, self._chunk):
            self._put_together(self._waiting // self._chunk * self._chunk)

    def tables(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Offsets (blocks) and CRCs, per chunk, when all are added."""
        self._put_together(self._waiting)
        return np.concatenate(self._offsets), np.concatenate(self._checksums)

    def _put_together(self, count: int) -> None:
        crcs, blocks = np.concatenate(self._crcs), np.concatenate(self._blocks)
        self._checksums.append(checksums.combine(crcs[:count], blocks[:count], self._chunk))
        self._crcs, self._blocks, self._waiting = [crcs[count:]], [blocks[count:]], self._waiting - count
