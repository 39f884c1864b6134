"""Builds the manifest of parquet files from their scans: chunks with their places and CRC32s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flip.data.manifest.filters import Filters
from flip.data.manifest.labels import LabelCounts
from flip.data.manifest.manifest import ChunkTable, write_rows
from flip.data.manifest.row_texts import Columns
from flip.data.manifest.scan import Shard
from flip.data.manifest.scan_parquet import ParquetScan, reasons, table_of
from flip.data.parquet import streams
from flip.data.parquet.page_table import CHUNK, FILE, PageTable
from flip.data.parquet.streams import NO_MARKS, STREAM, Part
from flip.data.storage.checksums import crc32_combine

PARQUET = "parquet"
"""Setting of a manifest of parquet files: names of columns, and bytes read per byte used at R."""


class MergedParquet:
    """The tables of a manifest of parquet files of ``chunk`` samples per chunk, file by file.

    Writes the lines of their rows into the folder of the manifest. ``keys``: of all files so far. ``dropped``: rows by
    the code of ``scan_parquet.reasons``, 0 for those that stay.
    """

    def __init__(self, chunk: int, out: Path, columns: Columns, filters: Filters | None) -> None:
        self.keys: list[str] = []
        self.labels = LabelCounts()
        self.dropped = np.zeros(256, dtype=np.int64)
        self._out = out
        self._columns = columns
        self._filters = filters
        self._builder = PageTableBuilder(chunk)
        self._chunk = chunk
        self._etags: list[str] = []
        self._files: list[list[int]] = []
        self._rows: list[list[int]] = []
        self._row_keys: list[str] = []

    def add(self, shard: Shard, scan: ParquetScan) -> None:
        """Add the next file. Raises OSError, ConfigError."""
        self._builder.add(scan)
        self.dropped += np.bincount(scan.dropped, minlength=256)
        text = scan.text.tobytes()
        self._row_keys.append(write_rows(self._out, len(self.keys), text))
        self.keys.append(shard.key)
        self._etags.append(shard.stat.etag)
        self._files.append([scan.samples, shard.stat.size, shard.stat.size])
        self._rows.append([0, len(text), len(text)])

    def tables(self) -> tuple[ChunkTable, NDArray[np.uint32]]:
        """The chunks and their CRCs."""
        pages, checksums = self._builder.tables()
        shards = np.array([*self._files, *self._rows], dtype=np.int64)
        keys = [*self.keys, *self._row_keys]
        etags = [*self._etags, *[""] * len(self._row_keys)]
        none = np.empty(0, dtype=np.uint32)
        return ChunkTable(keys, shards, self._chunk, none, etags, pages=pages), checksums

    def settings(self) -> dict[str, Any]:
        """Columns, rows seen and kept, dropped rows by reason, and bytes that are read per byte of the images."""
        named = zip(reasons(self._filters), self.dropped[1:].tolist(), strict=False)
        facts: dict[str, Any] = {"image": self._columns.image, "captions": list(self._columns.captions)}
        if self._builder.used:
            facts["read_per_used"] = round(self._builder.ratio, 3)
            rows = self._builder.rows_that_do()
            if rows:
                facts["chunk_that_does"] = rows
        found: dict[str, Any] = {
            PARQUET: facts,
            "seen": int(self.dropped.sum()),
            "kept": int(self.dropped[0]),
            "dropped": {reason: count for reason, count in named if count},
        }
        found["filters"] = self._filters.names if self._filters else []
        return found


class PageTableBuilder:
    """Builds a ``PageTable`` of ``chunk`` rows per chunk, and the CRCs, file by file.

    ``used``, ``read``: bytes of the images that are kept, and bytes of the ranges that hold them.
    """

    def __init__(self, chunk: int) -> None:
        self._chunk = chunk
        self._samples = 0
        self._first = [0]
        self._line_bytes: list[int] = []
        self._files: list[tuple[int, ...]] = []
        self._streams: list[NDArray[Any]] = []
        self._marks: list[NDArray[np.uint64]] = []
        self._mark_count = 0
        self._kept: list[NDArray[np.uint8]] = []
        self._stored: list[NDArray[np.uint8]] = []
        self._chunks: list[list[int]] = []
        self._checksums: list[int] = []
        self._images = (0, 0)
        self._lines = (0, 0)
        """(CRC32, bytes) of the current chunk so far."""
        self.used = 0
        self.read = 0

    def add(self, scan: ParquetScan) -> None:
        """Add the next file."""
        table = table_of(scan).copy()
        kept = np.flatnonzero(scan.dropped == 0)
        self._kept.append(np.packbits(scan.dropped == 0, bitorder="little"))
        self._stored.append(np.packbits(scan.stored, bitorder="little"))
        edges = [0, 0, 0, 0, 0]
        if scan.samples:
            edges = [int(kept[0]), *_begin(scan, 0), *_end(scan, scan.samples - 1)]
        self._files.append((len(scan.dropped), len(table), *edges))
        self._add_chunks(scan, kept, _Parts(table, scan))
        self.used += int((scan.ends - scan.begins).sum())
        marked = table["mark"] != NO_MARKS
        table["mark"][marked] += self._mark_count
        self._mark_count += len(scan.marks)
        self._streams.append(table)
        self._marks.append(scan.marks)
        self._samples += scan.samples
        self._first.append(self._samples)
        self._line_bytes.append(len(scan.text))

    @property
    def ratio(self) -> float:
        """Bytes read per byte of the images."""
        return self.read / max(self.used, 1)

    def rows_that_do(self) -> int:
        """R at which about twice the used bytes are read; 0 if they are now, or whole pages are not the cause."""
        table = np.concatenate([*self._streams, np.empty(0, STREAM)])
        whole = table[(table["codec"] != 0) & (table["mark"] == NO_MARKS)]
        if self.ratio <= 2 or not len(whole):
            return 0
        counts = whole["values"].astype(np.float64)
        per_page = float((counts**2).sum() / counts.sum())
        return 1 << int(np.ceil(np.log2(max(per_page, 1.0))))

    def tables(self) -> tuple[PageTable, NDArray[np.uint32]]:
        """The table and the CRCs of the chunks."""
        self._finish()
        table = PageTable(
            self._chunk,
            np.array(self._first, dtype=np.int64),
            np.array(self._line_bytes, dtype=np.int64),
            np.array(self._files, dtype=FILE),
            np.array([tuple(row) for row in self._chunks], dtype=CHUNK),
            np.concatenate([*self._streams, np.empty(0, STREAM)]),
            np.concatenate([*self._marks, np.empty(0, np.uint64)]),
            np.concatenate(self._kept),
            np.concatenate(self._stored),
        )
        return table, np.array(self._checksums, dtype=np.uint32)

    def _add_chunks(self, scan: ParquetScan, rows: NDArray[np.int64], parts: _Parts) -> None:
        lines = np.concatenate([[0], np.cumsum(scan.lines, dtype=np.int64)])
        at = 0
        while at < scan.samples:
            filled = (self._samples + at) % self._chunk
            if not filled:
                self._finish()
                self._chunks.append([int(rows[at]), *_begin(scan, at), 0, 0, int(lines[at])])
            stop = min(scan.samples, at + self._chunk - filled)
            self._chunks[-1][3:5] = _end(scan, stop - 1)
            crc, size = parts.crc(_begin(scan, at), _end(scan, stop - 1))
            self._images = crc32_combine(self._images[0], crc, size), self._images[1] + size
            self.read += size
            for crc, size in zip(scan.line_crcs[at:stop].tolist(), scan.lines[at:stop].tolist(), strict=True):
                self._lines = crc32_combine(self._lines[0], crc, size), self._lines[1] + size
            at = stop

    def _finish(self) -> None:
        """Record the CRC of the chunk that has ended."""
        if len(self._checksums) < len(self._chunks):
            self._checksums.append(crc32_combine(self._images[0], *self._lines))
            self._images = (0, 0)
            self._lines = (0, 0)


class _Parts:
    """CRCs of the ranges of a file, from those of its atoms."""

    def __init__(self, table: NDArray[Any], scan: ParquetScan) -> None:
        order = np.argsort(scan.atom_starts, kind="stable")
        self._starts = scan.atom_starts[order]
        self._stops = scan.atom_stops[order]
        self._crcs = scan.atom_crcs[order]
        self._table = table
        self._marks = scan.marks

    def crc(self, begin: tuple[int, int], end: tuple[int, int]) -> tuple[int, int]:
        """CRC32 and bytes of the ranges that hold the images from ``begin`` to ``end``, (stream, offset)."""
        parts: list[Part] = []
        for number in range(begin[0], end[0] + 1):
            stream = self._table[number]
            low = begin[1] if number == begin[0] else int(stream["first"])
            high = end[1] if number == end[0] else int(stream["last"])
            parts.append(streams.part(stream, self._marks, low, high))
        crc = 0
        size = 0
        for start, stop in streams.merged(parts):
            low = int(np.searchsorted(self._starts, start))
            high = int(np.searchsorted(self._starts, stop))
            if self._starts[low] != start or self._stops[high - 1] != stop:
                raise AssertionError(f"no CRC of the bytes {start} to {stop}")
            sizes = (self._stops[low:high] - self._starts[low:high]).tolist()
            for each, length in zip(self._crcs[low:high].tolist(), sizes, strict=True):
                crc = crc32_combine(crc, each, length)
            size += stop - start
        return crc, size


def _begin(scan: ParquetScan, sample: int) -> tuple[int, int]:
    return int(scan.owners[sample]), int(scan.begins[sample])


def _end(scan: ParquetScan, sample: int) -> tuple[int, int]:
    return int(scan.owners[sample]), int(scan.ends[sample])
