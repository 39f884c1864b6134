"""Builds the manifest of tar shards: scans them in several processes, then assembles the tables.

Each shard is read once: the CRC of a chunk is combined from the CRCs of its samples, because the chunk size follows
from the number of samples. Finished scans are stored next to the output folder, and a later call uses them.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from flip import concurrency
from flip.concurrency import DaemonExecutor
from flip.config.resolve import default_chunk
from flip.data.manifest import manifest as manifests
from flip.data.manifest.build_parquet import MergedParquet
from flip.data.manifest.census import Completeness
from flip.data.manifest.labels import LabelCounts
from flip.data.manifest.manifest import MARK, ChunkTable, Manifest, SampleFilterBuilder, refuse_existing
from flip.data.manifest.row_texts import Columns
from flip.data.manifest.scan import REMEDY, Scan, ScanJournal, Shard, file_stat, scan_shard
from flip.data.manifest.scan_parquet import ParquetScan, scan_parquet
from flip.data.storage.base import ObjectStat, is_remote
from flip.data.storage.checksums import BLOCK, crc32_combine
from flip.data.storage.client import StorageClient
from flip.runs.addresses import SHARDS, admitted_forms, require_admitted, scheme_of, why_refused
from flip.runs.credentials import exposes
from flip.runs.errors import ConfigError, DataError, FlipError

if TYPE_CHECKING:
    from flip.data.manifest.filters import Filters

Progress = Callable[[int, int, str], None]
"""Called with bytes done, total bytes, and a text; at first with what an earlier call has done."""

_THREADS = 16
"""Shards whose sizes are requested at once."""
_BYTES_PER_PROCESS = 64 << 20
"""Bytes to read for which starting another process pays off."""
_NAMED = 3
"""Damaged shards that an error names."""
_FILE = re.compile(r"file:(?://(?:localhost)?)?(/(?!/).*)", re.DOTALL | re.IGNORECASE)
_CHAINED = re.compile(":{2}")
_URL_IN_CHAIN = re.compile(r":{2}[A-Za-z0-9+.-]+://")
_URL = re.compile(r"pipe:|[a-z][a-z0-9+.-]*:/", re.IGNORECASE)


class DamagedShards(DataError):
    """Shards that cannot be indexed. ``errors``: shard -> its error."""

    def __init__(self, errors: Mapping[str, DataError], shards: int, scans: Path) -> None:
        self.errors = dict(errors)
        first = list(errors.values())[:_NAMED]
        where = first[0].where
        what = first[0].what
        remedy = first[0].remedy
        if len(errors) > 1:
            named = "; ".join(f"{error.where}: {error.what}" for error in first)
            more = ""
            if len(errors) > _NAMED:
                more = f"; and {len(errors) - _NAMED:,} more"
            where = ""
            what = f"{len(errors):,} of {shards:,} shards cannot be indexed: {named}{more}"
            if len({error.remedy for error in errors.values()}) != 1:
                remedy = REMEDY
        if scans.exists():
            remedy += f" The scans of the others are kept in {scans}: give the same command again."
        super().__init__(what, where, remedy=remedy)


@dataclass
class ScanResults:
    """Scans of ``shards``, sorted by key."""

    scans: ScanJournal
    shards: list[Shard]
    reused: int
    """Shards that were scanned by an earlier call."""
    read: int
    """Bytes of the other shards."""
    damaged: dict[str, DataError] = field(default_factory=dict)


def skipped_shards(damaged: Mapping[str, DataError]) -> list[dict[str, str]]:
    """Damaged shards in the format of reports and of a manifest's settings."""
    return [{"shard": key, "reason": error.what} for key, error in damaged.items()]


def part_folder(out: Path) -> Path:
    """The folder of scans until the manifest ``out`` is written."""
    return out.with_name(f"{out.name}.part")


def as_path(shard: str) -> str:
    """Convert a file:// URL to a path; other names are returned unchanged."""
    match = _FILE.fullmatch(shard)
    if match:
        return unquote(match[1], errors="surrogateescape")
    return shard


def shard_key(shard: str) -> str:
    """An admitted URL or an absolute path. Raises ConfigError for URLs of other storages and for several shards."""
    shard = as_path(shard)
    if _URL_IN_CHAIN.search(shard) or (_CHAINED.search(shard) and not is_remote(shard) and not os.path.lexists(shard)):
        raise ConfigError("several shards in one name", shard, remedy="Name them one by one, or as {a,b}.tar.")
    if is_remote(shard):
        if scheme_of(shard) != "s3":  # keys of S3 may have any characters
            require_admitted(shard, thing=SHARDS)
            refuse_credentials(shard)
        return shard
    if _URL.match(shard) and not os.path.lexists(shard):
        what = f"shards are files or objects, and this is neither: {why_refused(shard, SHARDS)}"
        raise ConfigError(what, shard, remedy=admitted_forms(SHARDS))
    return os.path.abspath(shard)


def refuse_credentials(address: str) -> None:
    """Raise ConfigError for an address with a user or secret parameters: others can read the manifest."""
    if exposes(address):
        remedy = "Name it without them. docs/reading.md says where credentials belong."
        raise ConfigError("the address of a shard contains credentials", scheme_of(address), remedy=remedy)


def sorted_keys(shards: Iterable[str], old: Sequence[str] = ()) -> list[str]:
    """URLs and absolute paths of shards. Raises ConfigError if there is none, or one is invalid, repeated or old."""
    keys = sorted(map(shard_key, shards))
    if not keys:
        raise ConfigError("no shards to index", remedy="Name at least one .tar file.")
    for key, before in zip(keys, ["", *keys], strict=False):
        if key == before or "\n" in key:
            raise ConfigError("a shard is named twice, or its name holds a line break", value=key)
    for key in sorted(set(old).intersection(keys))[:1]:
        raise ConfigError("a shard is in the old manifest already", value=key, remedy="Name the new ones alone.")
    return keys


def scan_shards(
    keys: Sequence[str], out: Path, progress: Progress | None = None, workers: int = 0,
    known: Mapping[str, ObjectStat] | None = None, skip_damaged: bool = False, filters: Filters | None = None,
    columns: Columns | None = None,
) -> ScanResults:  # fmt: skip
    """Scan the shards whose scans are not stored next to ``out`` yet. Finished scans are kept if an error is raised.

    Args:
        workers: most processes; below 2, this process scans.
        known: stats from a listing, which need no further request.
        columns: of parquet files, which the shards then are.
        skip_damaged: report damaged shards in the result instead of raising an error.

    Raises DamagedShards (for missing shards at once, for others after the last scan), PermissionDenied, StorageError;
    OSError if ``out`` is not writable; ConfigError if another process writes the manifest meanwhile.
    """
    folder = part_folder(out)
    shards, damaged = stat_shards(keys, known or {}, filters=None if columns else filters)
    if damaged and not skip_damaged:
        raise DamagedShards(damaged, len(keys), folder)
    scans = ScanJournal(folder, *_journal(filters, columns))
    todo = [shard for shard in shards if shard not in scans]
    total = sum(shard.stat.size for shard in shards)
    left = sum(shard.stat.size for shard in todo)
    done = total - left
    ended = len(shards) - len(todo)
    processes = min(workers, len(todo), 1 + left // _BYTES_PER_PROCESS)
    if processes == 1:
        processes = 0
    results = concurrency.map_in_processes(_scanner, (filters, columns), todo, processes, "index")
    progress = progress or (lambda done, total, text: None)
    try:
        if todo:
            scans.start()  # raises an error for a read-only folder now, not after hours of reading
        progress(done, total, f"{ended:,} of {len(shards):,} shards")
        for shard, result in results:
            refuse_existing(out)
            if isinstance(result, DataError):
                damaged[shard.key] = result
            else:
                scans.add(shard, result)
            done += shard.stat.size
            ended += 1
            progress(done, total, f"{ended:,} of {len(shards):,} shards")
    finally:
        results.close()
        (scans.remove if (out / MARK).exists() else scans.close)()
    damaged = dict(sorted(damaged.items()))
    if damaged and not skip_damaged:
        raise DamagedShards(damaged, len(keys), folder)
    return ScanResults(scans, [s for s in shards if s.key not in damaged], len(shards) - len(todo), left, damaged)


def stat_shards(
    keys: Sequence[str], known: Mapping[str, ObjectStat], progress: Progress | None = None,
    filters: Filters | None = None,
) -> tuple[list[Shard], dict[str, DataError]]:  # fmt: skip
    """The shards that exist, in order, with their stats, and the errors of the others.

    ``known``: stats of a listing. ``filters``: those for which the shards are scanned, perhaps with parquet files.
    Raises PermissionDenied, StorageError.
    """
    client = StorageClient()
    shards = list[Shard]()
    damaged = dict[str, DataError]()
    executor = DaemonExecutor(min(_THREADS, len(keys)), "stat")

    def stat(key: str) -> Shard:
        shard = Shard(key, known.get(key) or (client.stat(key) if is_remote(key) else file_stat(key)))
        if filters and (where := filters.parquet_file(key)):
            with suppress(DataError):  # missing: the scan reports it
                return shard._replace(parquet=known.get(where) or client.stat(where))
        return shard

    try:
        for number, (key, future) in enumerate([(key, executor.submit(stat, key)) for key in keys], 1):
            try:
                shards.append(future.result())
            except DataError as error:
                damaged[key] = error
            if progress:
                progress(number, len(keys), "")
    finally:
        executor.close()
    return shards, damaged


def _journal(filters: Filters | None, columns: Columns | None) -> tuple[list[str], Any]:
    """What scans depend on, as text, and their class."""
    names = list(filters.names) if filters else []
    if columns:
        return [*columns.names, *names], ParquetScan
    return names, Scan


def _scanner(
    filters: Filters | None, columns: Columns | None
) -> Callable[[Shard], tuple[Shard, Scan | ParquetScan | DataError]]:
    client = StorageClient()

    def scan(shard: Shard) -> tuple[Shard, Scan | ParquetScan | DataError]:
        try:
            if columns:
                return shard, scan_parquet(shard.key, shard.stat, client, columns, filters)
            return shard, scan_shard(shard.key, shard.stat, client, filters)
        except DataError as error:
            return shard, error

    return scan


def index(
    shards: Sequence[str], out: os.PathLike[str] | str, chunk: int = 0, progress: Progress | None = None,
    workers: int = 0, filters: Filters | None = None, settings: Mapping[str, Any] | None = None,
) -> Manifest:  # fmt: skip
    """Scan shards and write their manifest, sorted by name, to ``out``.

    ``chunk``: R; 0: ``default_chunk``. ``settings``: facts to store in the manifest.

    Raises what ``scan_shards`` and ``merge`` raise, and ConfigError for invalid shards or an existing manifest.
    """
    out = Path(out).absolute()
    keys = sorted_keys(shards)
    refuse_existing(out)
    scanned = scan_shards(keys, out, progress, workers, filters=filters)
    return merge(scanned, out, chunk, filters=filters, more=settings)


def refuse_filters(old: Manifest | None, filters: Filters | None) -> None:
    """Raise ConfigError if shards are added to a manifest and either is filtered."""
    if old and (filters or old.sample_filter or "filters" in old.settings):
        raise ConfigError("filters do not go with --add", remedy="Index all shards anew, with the filters.")


def merge(
    results: ScanResults, out: Path, chunk: int = 0, old: Manifest | None = None, progress: Progress | None = None,
    filters: Filters | None = None, complete: Completeness | None = None, more: Mapping[str, Any] | None = None,
    exceptions: Mapping[int, str] | None = None, columns: Columns | None = None,
) -> Manifest:  # fmt: skip
    """Write the manifest of scanned shards, and remove the scans.

    Args:
        old: a manifest whose shards come first, unread, with its R (not ``chunk``) and exceptions: ids do not change.
        progress: called with numbers of shards.
        complete: counts complete samples; if there are too few, it raises Incomplete and the scans are kept.
        more: settings to store in addition.
        exceptions: samples to exclude, without ``old``.
        columns: of parquet files, as for ``scan_shards``.

    Raises DataError without samples; ConfigError for an invalid chunk size, an existing manifest, or if no sample
    passes the filters.
    """
    samples = sum(map(results.scans.samples, results.shards))
    refuse_filters(old, filters)
    if not samples:
        raise _no_samples(results, filters, columns, out)
    if old:
        exceptions = old.exceptions
    chunk = _chunk_size(chunk, samples, old)
    merged: Any = MergedParquet(chunk, out, columns, filters) if columns else _MergedShards(chunk, old)
    for number, shard in enumerate(results.shards, 1):
        scan = _read_scan(results, shard, out)
        merged.add(shard, scan)
        if complete:
            complete.add(scan.census)
        if progress:
            progress(number, len(results.shards), "")
    if complete:
        complete.check(str(out))
    settings = _settings(results, merged, old)
    if filters and not columns:
        settings |= filters.settings(merged.dropped)
    table, checksums = merged.tables()
    if columns:
        settings |= merged.settings()
    settings |= more or {}
    manifest = manifests.write(out, table, checksums, exceptions, settings)
    results.scans.remove()
    return manifest


def _chunk_size(chunk: int, samples: int, old: Manifest | None) -> int:
    """R of the merged manifest: that of ``old``, ``chunk``, or the default. Raises ConfigError if it does not fit."""
    if old:
        return old.chunk
    chunk = chunk or default_chunk(samples)
    if not 0 < chunk <= samples:
        raise ConfigError(f"chunk must lie in 1 .. {samples}, the number of samples", value=chunk)
    return chunk


def _no_samples(results: ScanResults, filters: Filters | None, columns: Columns | None, out: Path) -> FlipError:
    """The error for shards without samples; it lists how many samples each filter dropped."""
    if not results.shards:
        return DamagedShards(results.damaged, len(results.damaged), results.scans.folder)
    if columns:
        merged = MergedParquet(1, out, columns, filters)
        for shard in results.shards:
            merged.dropped += np.bincount(_read_scan(results, shard, out).dropped, minlength=256)
        dropped = [f"{count:,} x {reason}" for reason, count in merged.settings()["dropped"].items()]
        remedy = "Are the names of the columns right? Paths need their files: flip shards make FILE --images FOLDER."
        return DataError(f"no row is left: {'; '.join(dropped) or 'there are no rows'}", str(out), remedy=remedy)
    if filters:
        codes = (np.bincount(_read_scan(results, shard, out).dropped, minlength=256) for shard in results.shards)
        counts = sum(codes, np.zeros(256, dtype=np.int64))
        dropped = [f"{count:,} x {reason}" for reason, count in filters.settings(counts)["dropped"].items()]
        if dropped:
            remedy = f"Dropped were {'; '.join(dropped)}. Choose others."
            return ConfigError("no sample passes the filters", "--filter", ", ".join(filters.names), remedy)
    return DataError("the shards hold no samples", str(out), remedy="Members must be named KEY.EXTENSION.")


def _read_scan(results: ScanResults, shard: Shard, out: Path) -> Any:
    try:
        return results.scans.read(shard)
    except DataError:
        refuse_existing(out)  # the process that wrote it has removed the scans
        raise


def _settings(results: ScanResults, merged: Any, old: Manifest | None) -> dict[str, Any]:
    """The settings of the old manifest, the shards that were left out, and the samples by label."""
    settings = dict(old.settings) if old else {}
    indexed = set(merged.keys)  # shards that were left out before may be repaired now
    left_out = [entry for entry in settings.pop("left_out", []) if entry["shard"] not in indexed]
    left_out += skipped_shards(results.damaged)
    if left_out:
        settings["left_out"] = left_out
    for name in ("labels", manifests.RECODED):  # facts of all shards of the old manifest, and of no others
        settings.pop(name, None)
    labels = merged.labels
    if labels.known and (labels.counts or labels.unusable):
        settings["labels"] = labels.json()
    return settings


class _MergedShards:
    """The tables of a manifest of ``chunk`` samples per chunk, shard by shard.

    ``old``: a manifest with that R whose shards come first. ``keys``: of all shards so far. ``labels``: their samples
    by label. ``dropped``: scanned samples by the code of the filter that drops them, 0 for those that stay.
    """

    def __init__(self, chunk: int, old: Manifest | None) -> None:
        self.keys: list[str] = []
        self.labels = LabelCounts()
        self.dropped = np.zeros(256, dtype=np.int64)
        self._chunk = chunk
        self._etags: list[str] = []
        self._rows: list[list[int]] = []
        self._chunks = ChunkTableBuilder(chunk, old)
        self._selection: SampleFilterBuilder | None = SampleFilterBuilder()
        if old:
            self.keys = list(old.keys)
            self.labels = LabelCounts.of_manifest(old)
            self._etags = list(old.etags)
            self._rows = old.shards.tolist()
            self._selection = None  # ``refuse_filters``: no sample of either part is dropped

    def add(self, shard: Shard, scan: Scan) -> None:
        """Add the next shard."""
        self._chunks.add(scan)
        if self._selection:
            self._selection.add(scan.dropped == 0, int(scan.head[0]))
        self.dropped += np.bincount(scan.dropped, minlength=256)
        self.labels.add(scan.census.labels)
        self.keys.append(shard.key)
        self._etags.append(shard.stat.etag)
        self._rows.append([len(scan.crcs), shard.stat.size, scan.end])

    def tables(self) -> tuple[ChunkTable, NDArray[np.uint32]]:
        """The chunks and their CRCs."""
        offsets, checksums = self._chunks.tables()
        selection = None
        if self._selection:
            selection = self._selection.build()
        rows = np.array(self._rows, dtype=np.int64)
        return ChunkTable(self.keys, rows, self._chunk, offsets, self._etags, selection), checksums


class ChunkTableBuilder:
    """Builds offsets and CRCs of chunks of ``chunk`` samples, shard by shard: two billion samples never are in memory.

    ``old``: a manifest with that R whose chunks come first; its last chunk is filled up with new samples.
    """

    def __init__(self, chunk: int, old: Manifest | None = None) -> None:
        self._chunk = chunk
        self._samples = old.samples if old else 0
        self._offsets: list[NDArray[np.uint32]]
        if old:
            self._offsets = [old.offsets]
        else:
            self._offsets = []
        self._checksums = array("I", old.checksums.tobytes() if old else b"")

    def add(self, scan: Scan) -> None:
        """Add the next shard."""
        starts = scan.starts[-self._samples % self._chunk :: self._chunk]
        self._offsets.append(starts.copy())  # a view would keep the start of every sample
        sizes = (scan.blocks.astype(np.int64) * BLOCK).tolist()
        for crc, size in zip(scan.crcs.tolist(), sizes, strict=True):
            if self._samples % self._chunk:
                self._checksums[-1] = crc32_combine(self._checksums[-1], crc, size)
            else:
                self._checksums.append(crc)
            self._samples += 1

    def tables(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Offsets (blocks) and CRCs of all chunks."""
        return np.concatenate(self._offsets), np.array(self._checksums, dtype=np.uint32)
