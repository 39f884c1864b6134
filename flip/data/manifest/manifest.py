"""The manifest: the immutable description of a data set, a folder of JSON and raw little-endian arrays.

    manifest.json      version, digest, samples, chunk (R), mean_bytes, settings, tool, files (name -> bytes, sha256)
                       (settings.left_out: shards that could not be indexed, and why; settings.recoded: how `shards
                       recode` made these shards, and whether their restart markers are verified; filters, seen, kept,
                       dropped by reason: of filtered samples; labels, if samples have a `cls` member: counts, of up to
                       65,536 labels, and unusable ones, which are no whole numbers; `shards exclude` drops labels;
                       images, if `shards make` wrote the shards: transparent, turned by EXIF, duplicates)
    keys.txt           one shard per line: a path relative to this folder if it is below it, an absolute one, or a URL
    etags.txt          per shard: the ETag of the object that was indexed; empty for files
    shards.i64         rows of (samples, bytes of the file, end of its last member), as int64
    offsets.u32        per chunk: start of its first sample in its shard, in blocks of 512 bytes, as uint32
    checksums.u32      per chunk: CRC32 over its bytes, as uint32
    exceptions.jsonl   samples known to be bad: {"id", "shard", "ordinal", "reason"}
    tars.u32           version 3 only, per shard: (samples in the tar, block of 512 bytes of its first kept sample), as
                       uint32, little endian
    kept.bits          version 3 only: a bit per sample of the tars, 1 if the filters kept it (``SampleFilter``), from
                       the lowest bit of a byte up; each shard starts a new byte

Version 4 is of parquet files that are read in place (`page_table`). keys.txt lists the files, then for each a file
rows/NNNNN.jsonl below this folder with a JSON line per sample: its caption and other columns. Its other files:

    tables.i64         per parquet file, as int64: `page_table.FILE`
    pages.i64          per stream of images, as int64: `streams.STREAM`
    marks.u64          places in the file, as uint64, at which snappy streams can be entered
    chunks.i64         per chunk, as int64: `page_table.CHUNK`
    shards.i64, checksums.u32, exceptions.jsonl, etags.txt    as above
    kept.bits          a bit per row of the files: 1 if it is a sample
    stored.bits        a bit per row of the files: 1 if it has an image of its own in a stream

A sample id is a position in the concatenation of all shards. If samples were filtered out, ids and all counts are of
the kept samples only. Chunk j holds ids jR .. (j+1)R - 1, the last chunk holds the rest; training skips a last chunk
that is not full. A chunk reads from the start of its first sample to the start of the next chunk, through the end of
each shard in between: a chunk that crosses a shard border is two reads, and both are exact. Reads include samples that
were filtered out, except those before the first kept sample of a shard. The digest excludes keys and ETags: a data set
that was moved or uploaded again is the same. Settings are not part of it either. A chunk's CRC32 covers all bytes that
it reads.

``Manifest.load`` opens a manifest and ``write`` writes one. ``ChunkTable`` computes where samples and chunks are.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flip.config.resolve import source_remedy
from flip.data.manifest.tar import BLOCK
from flip.data.manifest.trust import KEYS, require_trust
from flip.data.parquet.page_table import CHUNK, FILE, PageTable
from flip.data.parquet.streams import STREAM
from flip.data.storage.base import is_remote
from flip.files import deletion
from flip.files.creation import OUTPUT_MODE, fsync_path, open_regular, output_folder
from flip.runs import formats
from flip.runs.errors import ConfigError, DataError, PermissionDenied, read_error
from flip.runs.formats import FILTERED_MANIFEST_NUMBER, MANIFEST_NUMBER, PARQUET_MANIFEST_NUMBER, FormatError
from flip.runs.records import MANIFEST_LIMIT, parse
from flip.runs.rundir import to_json, write_new
from flip.version import __version__

TOOL = f"flip {__version__}"
MARK = "manifest.json"
"""The file that is written last: without it a folder holds no manifest."""
RECODED = "recoded"
"""Setting of a manifest whose shards `shards recode` has written. Manifests with further shards do not inherit it."""
LIMIT = 1 << 30
"""Largest file of a manifest in bytes: 350 million shards, or the bits of 8.6 billion samples. manifest.json:
MANIFEST_LIMIT."""
_ARRAYS = {"shards.i64": "<i8", "offsets.u32": "<u4", "checksums.u32": "<u4"}
"""File -> data type of its numbers."""
_FILTER_ARRAYS = {"tars.u32": "<u4", "kept.bits": "u1"}
"""The same for the files of a ``SampleFilter``."""
_PAGE_ARRAYS = {
    "shards.i64": "<i8", "tables.i64": "<i8", "pages.i64": "<i8", "marks.u64": "<u8", "chunks.i64": "<i8",
    "checksums.u32": "<u4", "kept.bits": "u1", "stored.bits": "u1",
}  # fmt: skip
"""The same for a manifest of parquet files."""
ROWS = "rows"
"""Folder of the lines of parquet files, in the manifest's."""
_ETAGS = "etags.txt"
_REMEDY = "Make one with: flip shards index SHARDS... --out FOLDER"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
"""Errors of link on file systems without hard links: FAT, some FUSE."""
PIECE = 1 << 24
"""Bytes of kept.bits whose set bits are counted at once."""
_ONES = np.array([number.bit_count() for number in range(256)], dtype=np.uint8)
"""Number of set bits of each byte."""


class SampleFilter:
    """The samples of the tars that a filtered manifest keeps; sample ids count these only.

    Reads that span other samples include them, and so do their CRCs.

    Args:
        tars: per shard (samples in the tar, block of 512 bytes at which the first kept one starts), as uint32.
        bits: a bit per sample of the tars, 1 if kept, from the lowest bit of a byte; each shard starts a new byte.
    """

    def __init__(self, tars: NDArray[np.uint32], bits: NDArray[np.uint8]) -> None:
        self.tars = tars
        self.bits = bits
        self._first = np.concatenate([[0], np.cumsum((tars[:, 0].astype(np.int64) + 7) // 8)])

    @property
    def total_samples_in_tars(self) -> int:
        return int(self.tars[:, 0].sum(dtype=np.int64))

    def fits(self, samples: NDArray[np.int64]) -> bool:
        """Whether each shard has as many set bits as kept samples (``samples``, by shard)."""
        if len(self.tars) != len(samples) or len(self.bits) != self._first[-1]:
            return False
        filled = np.flatnonzero(self.tars[:, 0])  # shards without samples have no byte
        first = self._first[filled]
        counts = np.zeros(len(samples), dtype=np.int64)
        for start in range(0, len(self.bits), PIECE):
            ones = _ONES[self.bits[start : start + PIECE]]
            low = np.searchsorted(first, start, side="right") - 1
            high = np.searchsorted(first, start + PIECE)
            counts[filled[low:high]] += np.add.reduceat(ones, np.maximum(first[low:high] - start, 0), dtype=np.int64)
        return bool((counts == samples).all())

    def start(self, shard: int) -> int:
        """The byte at which a shard's first kept sample starts; earlier bytes are not read."""
        return int(self.tars[shard, 1]) * BLOCK

    def ordinals(self, shard: int) -> NDArray[np.int64]:
        """Positions of a shard's kept samples in its tar, ascending."""
        bits = self.bits[self._first[shard] : self._first[shard + 1]]
        return np.flatnonzero(np.unpackbits(bits, count=int(self.tars[shard, 0]), bitorder="little"))

    def select(self, shard: int, k: int, count: int) -> tuple[int, list[int]]:
        """The samples in a read of ``count`` kept samples that starts at kept sample k.

        Returns how many samples of the tar it contains, and the positions of the kept ones among them. The read ends at
        the start of kept sample k + count, or at the end of the shard.
        """
        ordinals = self.ordinals(shard)
        if k + count < len(ordinals):
            stop = ordinals[k + count]
        else:
            stop = self.tars[shard, 0]
        return int(stop) - int(ordinals[k]), (ordinals[k : k + count] - ordinals[k]).tolist()


class SampleFilterBuilder:
    """Builds a ``SampleFilter`` shard by shard."""

    def __init__(self) -> None:
        self._tars = list[tuple[int, int]]()
        self._bits = list[NDArray[np.uint8]]()
        self._excludes_none = True

    def add(self, mask: NDArray[np.bool_], start: int) -> None:
        """Add the next shard: which of its samples are kept, and the block at which the first of them starts."""
        self._tars.append((len(mask), start))
        self._bits.append(np.packbits(mask, bitorder="little"))
        self._excludes_none = self._excludes_none and bool(mask.all())

    def build(self) -> SampleFilter | None:
        """The filter; None if every sample is kept."""
        if self._excludes_none:
            return None
        return SampleFilter(np.array(self._tars, dtype=np.uint32), np.concatenate(self._bits))


class ChunkTable:
    """The positions of samples and chunks. ``shards``: rows of (samples, bytes of the file, end of its last member)."""

    def __init__(
        self, keys: Sequence[str], shards: NDArray[np.int64], chunk: int, offsets: NDArray[np.uint32],
        etags: Sequence[str] = (), sample_filter: SampleFilter | None = None, pages: PageTable | None = None,
    ) -> None:  # fmt: skip
        self.keys = keys
        self.shards = shards
        self.chunk = chunk
        self.offsets = offsets
        self.sample_filter = sample_filter
        self.pages = pages
        """Of parquet files, which then are the first half of ``keys``; the other half are the files of their rows."""
        self.etags: Sequence[str] = etags or [""] * len(keys)
        """Per shard; ``""``: none, or unknown."""
        self.first = np.concatenate([[0], np.cumsum(shards[:, 0])])
        """First sample id of each shard, and N at the end."""
        self.samples = int(self.first[-1])
        """N."""

    @property
    def chunks(self) -> int:
        """Rows of the chunk table: ceil(N / R)."""
        if self.pages:
            return len(self.pages.chunks)
        return len(self.offsets)

    @property
    def tail(self) -> int:
        """Samples after the last full chunk; training skips them."""
        return self.samples % self.chunk

    @property
    def total_samples_in_tars(self) -> int:
        """Samples in the tars, or rows of the parquet files, including those that were filtered out."""
        if self.pages:
            return self.pages.rows
        if self.sample_filter:
            return self.sample_filter.total_samples_in_tars
        return self.samples

    @property
    def shard_count(self) -> int:
        """Tars or parquet files, without the files of rows."""
        if self.pages:
            return len(self.pages.files)
        return len(self.keys)

    @property
    def read_bytes(self) -> int:
        """Bytes that reading all chunks takes."""
        if self.pages:
            return sum(stop - start for j in range(self.chunks) for _, start, stop, _ in self.chunk_ranges(j))
        filled = np.flatnonzero(self.shards[:, 0])
        starts = 0
        if self.sample_filter:
            starts = self.sample_filter.tars[filled, 1].sum(dtype=np.int64) * BLOCK
        return int(self.shards[filled, 2].sum() - starts)

    def locate(self, id: int) -> tuple[str, int]:
        """Shard and ordinal (position in its tar, or row of its parquet file) of a sample."""
        if self.pages:
            file, row = self.pages.row(id)
            return self.keys[file], row
        shard = int(np.searchsorted(self.first, id, side="right")) - 1
        k = int(id - self.first[shard])
        return self.keys[shard], int(self.sample_filter.ordinals(shard)[k]) if self.sample_filter else k

    def chunk_ids(self, j: int) -> range:
        """Sample ids of chunk j."""
        return range(j * self.chunk, min((j + 1) * self.chunk, self.samples))

    def chunk_reads(self, j: int) -> list[tuple[str, int, int, int]]:
        """Reads of chunk j in order: (shard, first byte, byte after the last, samples)."""
        return [(self.keys[shard], start, stop, count) for shard, start, stop, count in self.chunk_ranges(j)]

    def chunk_ranges(self, j: int) -> list[tuple[int, int, int, int]]:
        """``chunk_reads`` with the number of the shard instead of its key."""
        if self.pages:
            return self.pages.ranges(j)
        id = self.chunk_ids(j).start
        stop = self.chunk_ids(j).stop
        shard = int(np.searchsorted(self.first, id, side="right")) - 1
        reads = []
        start = int(self.offsets[j]) * BLOCK
        while id < stop:
            border = int(self.first[shard + 1])
            if border <= stop:
                end = int(self.shards[shard, 2])
            else:
                end = int(self.offsets[j + 1]) * BLOCK
            count = min(border, stop) - id
            if count:
                reads.append((shard, start, end, count))
            id += count
            shard += 1
            start = 0
            if self.sample_filter and id < stop:
                start = self.sample_filter.start(shard)
        return reads

    def select(self, shard: int, id: int, count: int) -> tuple[int, Sequence[int]]:
        """``SampleFilter.select`` for a read from sample ``id`` of a shard; without a filter all samples are kept."""
        if self.sample_filter is None:
            return count, range(count)
        return self.sample_filter.select(shard, int(id - self.first[shard]), count)


class Manifest(ChunkTable):
    """A loaded manifest: a table with checksums, exceptions and a digest. ``facts``: the content of manifest.json."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], check: bool = True) -> None:
        if check:
            _check(folder, facts)
        arrays = {name: _map(folder / name, kind, facts) for name, kind in _arrays(facts).items()}
        shards = arrays["shards.i64"].reshape(-1, 3)
        below = os.path.join(folder, "")  # joined as text: a Path for each of 230,000 keys takes a second
        super().__init__(
            [line if is_remote(line) or os.path.isabs(line) else below + line for line in _lines(folder / KEYS)],
            shards,
            facts["chunk"],
            arrays.get("offsets.u32", np.empty(0, dtype=np.uint32)),
            _lines(folder / _ETAGS),
            SampleFilter(arrays["tars.u32"].reshape(-1, 2), arrays["kept.bits"]) if "tars.u32" in arrays else None,
            _page_table(facts["chunk"], shards, arrays) if "pages.i64" in arrays else None,
        )
        require_trust(folder, self.keys)
        self.folder = folder
        self.digest: str = facts["digest"]
        self.mean_bytes: float = facts["mean_bytes"]
        """Mean bytes that a sample takes in reads and in memory, including headers and dropped samples."""
        self.settings: dict[str, Any] = facts["settings"]
        self.checksums: NDArray[np.uint32] = arrays["checksums.u32"]
        records = map(json.loads, _read(folder / "exceptions.jsonl").decode("utf-8").splitlines())
        self.exceptions: dict[int, str] = {record["id"]: record["reason"] for record in records}
        """Sample id -> reason why it is bad."""
        self._validate(facts, check)

    @property
    def restart_markers_verified(self) -> bool:
        """Whether a reader may skip from one restart marker of a JPEG to the next, in every image that training reads.

        `shards recode` decodes all images and records it.
        """
        recoded = self.settings.get(RECODED)
        return isinstance(recoded, dict) and recoded.get("restart_markers_verified") is True

    def _validate(self, facts: Mapping[str, Any], check: bool) -> None:
        """Check that the files describe a data set, beyond their checksums. Raises ValueError."""
        shards = self.shards
        selection = self.sample_filter
        wrong = {
            "chunk": type(self.chunk) is not int or not 0 < self.chunk <= self.samples,
            "samples": self.samples != facts["samples"] or (shards < 0).any() or (shards[:, 2] > shards[:, 1]).any(),
            "digest": not isinstance(self.digest, str),
            "mean_bytes": type(self.mean_bytes) not in (int, float) or not 0 <= self.mean_bytes < float("inf"),
            "settings": not isinstance(self.settings, dict),
            KEYS: len(self.keys) != len(shards) or len(self.etags) != len(shards),
            "exceptions.jsonl": not all(
                type(id) is int and 0 <= id < self.samples and isinstance(why, str)
                for id, why in self.exceptions.items()
            ),
        }
        wrong["chunks"] = not any(wrong.values()) and not (
            self.chunks == len(self.checksums) == -(-self.samples // self.chunk)
        )
        if self.pages and not any(wrong.values()):
            wrong["pages.i64"] = len(self.keys) != 2 * len(self.pages.files) or not self.pages.fits()
        wrong["kept.bits"] = check and selection is not None and not selection.fits(shards[:, 0])
        if any(wrong.values()):
            raise ValueError(f"its parts do not fit each other: {', '.join(name for name in wrong if wrong[name])}")

    @classmethod
    def load(cls, folder: os.PathLike[str] | str, check: bool = True) -> Manifest:
        """Open a manifest, arrays memory-mapped. ``check``: verify every file's checksum and the digest.

        Raises FormatError if another version wrote it or a part of it, DataError if it is missing or damaged, or
        PermissionDenied.
        """
        folder = Path(folder).absolute()
        try:
            facts = parse(_read(folder / MARK))
            formats.check(formats.MANIFEST, facts, folder / MARK)
            _refuse_other_files(folder, facts)
            return cls(folder, facts, check)
        except FormatError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"the manifest is damaged: {error!r}", str(folder / MARK), remedy=_REMEDY) from error
        except OSError as error:
            raise read_error(error, "the manifest cannot be read", folder) from error


def write(
    folder: os.PathLike[str] | str,
    table: ChunkTable,
    checksums: NDArray[np.uint32],
    exceptions: Mapping[int, str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write a manifest, manifest.json last, and load it.

    Every file is written under a temporary name and then linked, never replaced: one of several concurrent writers
    succeeds. Files of an interrupted writer of the same manifest are used.

    Raises ConfigError if the folder holds a manifest, which never changes, or files of another writer, or if a file
    would be larger than those that are read.
    """
    folder = Path(folder).absolute()
    refuse_existing(folder)
    contents = _contents(folder, table, checksums, exceptions or {})
    facts: dict[str, Any] = {
        "version": _number(table),
        "samples": table.samples,
        "chunk": table.chunk,
        "mean_bytes": round(table.read_bytes / table.samples, 1),
        "settings": dict(settings or {}),
        "tool": TOOL,
        "files": {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in contents.items()},
    }
    facts["digest"] = _digest(facts)
    mark = to_json(facts).encode()
    for name, content in [*contents.items(), (MARK, mark)]:
        if len(content) > (most := _limit(name)):
            what = f"a file of {len(content):,} bytes, at most {most:,} are read"
            raise ConfigError(what, str(folder / name), remedy="Index fewer shards, or set a larger --chunk.")
    for name, content in contents.items():
        if not _create(folder / name, content) and _read(folder / name) != content:
            refuse_existing(folder)
            what = "another index writes a manifest here, or was stopped while it did"
            remedy = f"Wait for it. If it does not run, delete {', '.join(contents)} there, or name another folder."
            raise ConfigError(what, str(folder / name), remedy=remedy)
    if not _create(folder / MARK, mark):
        refuse_existing(folder)
    return Manifest.load(folder)


def refuse_existing(folder: Path) -> None:
    """Raise ConfigError if the folder holds a manifest."""
    if (folder / MARK).exists():
        remedy = "A manifest never changes: name another folder, or move this one away."
        raise ConfigError("there is a manifest already", str(folder), remedy=remedy)


def _number(table: ChunkTable) -> int:
    if table.pages:
        return PARQUET_MANIFEST_NUMBER
    if table.sample_filter:
        return FILTERED_MANIFEST_NUMBER
    return MANIFEST_NUMBER


def write_rows(folder: Path, number: int, text: bytes) -> str:
    """Write the lines of parquet file ``number`` into the folder of a manifest; returns their path.

    Raises ConfigError if another index writes there.
    """
    path = folder / ROWS / f"{number:05d}.jsonl"
    if not _create(path, text) and path.read_bytes() != text:
        raise ConfigError("another index writes a manifest here", str(path), remedy="Wait for it, or delete the file.")
    return str(path)


def with_rows(table: ChunkTable, folder: Path, shards: Sequence[str] = (), etags: Sequence[str] = ()) -> ChunkTable:
    """The table of another manifest of the same samples in ``folder``, into which the lines of rows are copied.

    ``shards``, ``etags``: of tars or parquet files, if they are elsewhere now. Raises OSError, ConfigError.
    """
    count = table.shard_count
    keys = [*(shards or table.keys[:count])]
    tags = [*(etags or table.etags[:count])]
    for number, key in enumerate(table.keys[count:]):
        keys.append(write_rows(folder, number, Path(key).read_bytes()))
        tags.append("")
    return ChunkTable(keys, table.shards, table.chunk, table.offsets, tags, table.sample_filter, table.pages)


def _page_table(chunk: int, shards: NDArray[np.int64], arrays: Mapping[str, NDArray[Any]]) -> PageTable:
    count = len(shards) // 2
    first = np.concatenate([[0], np.cumsum(shards[:count, 0])])
    files, chunks, pages = (
        np.asarray(arrays[name]).view(kind) if len(arrays[name]) else np.empty(0, kind)
        for name, kind in (("tables.i64", FILE), ("chunks.i64", CHUNK), ("pages.i64", STREAM))
    )
    bits = arrays["kept.bits"], arrays["stored.bits"]
    return PageTable(chunk, first, shards[count:, 1], files, chunks, pages, arrays["marks.u64"], *bits)


def _contents(
    folder: Path, table: ChunkTable, checksums: NDArray[np.uint32], exceptions: Mapping[int, str]
) -> dict[str, bytes]:
    """File name -> bytes of all files but manifest.json. Shards below ``folder`` are named relative to it."""
    lines = [os.path.relpath(key, folder) if Path(key).is_relative_to(folder) else key for key in table.keys]
    records = []
    for id, reason in sorted(exceptions.items()):
        shard, ordinal = table.locate(id)
        records.append({"id": id, "shard": os.path.basename(shard), "ordinal": ordinal, "reason": reason})
    contents = {
        KEYS: "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"),
        _ETAGS: "".join(f"{etag}\n" for etag in table.etags).encode(),
        "shards.i64": np.asarray(table.shards, "<i8").tobytes(),
        "checksums.u32": np.asarray(checksums, "<u4").tobytes(),
        "exceptions.jsonl": "".join(json.dumps(r, sort_keys=True) + "\n" for r in records).encode("utf-8"),
    }
    pages = table.pages
    if pages:
        contents |= {
            "tables.i64": pages.files.tobytes(),
            "pages.i64": pages.streams.tobytes(),
            "marks.u64": np.asarray(pages.marks, "<u8").tobytes(),
            "chunks.i64": pages.chunks.tobytes(),
            "kept.bits": np.asarray(pages.kept, "u1").tobytes(),
            "stored.bits": np.asarray(pages.stored, "u1").tobytes(),
        }
    else:
        contents["offsets.u32"] = np.asarray(table.offsets, "<u4").tobytes()
    if table.sample_filter:
        contents["tars.u32"] = np.asarray(table.sample_filter.tars, "<u4").tobytes()
        contents["kept.bits"] = np.asarray(table.sample_filter.bits, "u1").tobytes()
    return contents


def _digest(facts: Mapping[str, Any]) -> str:
    """The digest of a manifest, from the counts and checksums in manifest.json."""
    content = {name: facts["files"][name]["sha256"] for name in (*_arrays(facts), "exceptions.jsonl")}
    # 1 is the version of this recipe. It never changes: data sets keep their digests, and runs their config hash.
    text = json.dumps([1, facts["samples"], facts["chunk"], content], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _arrays(facts: Mapping[str, Any]) -> dict[str, str]:
    """File -> data type of its numbers."""
    if facts["version"] == PARQUET_MANIFEST_NUMBER:
        return _PAGE_ARRAYS
    if facts["version"] == FILTERED_MANIFEST_NUMBER:
        return _ARRAYS | _FILTER_ARRAYS
    return _ARRAYS


def _names(facts: Mapping[str, Any]) -> list[str]:
    """All files but manifest.json."""
    return [KEYS, *_arrays(facts), "exceptions.jsonl", _ETAGS]


def _refuse_other_files(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raise FormatError if manifest.json lists other files than its number stands for."""
    listed = facts.get("files")
    if not isinstance(listed, dict):
        raise formats.missing("files", folder / MARK, formats.MANIFEST.remedy)
    for name in sorted({*_names(facts)} ^ {*listed}):
        if name in listed:
            what = f"lists {name}, which is of another format than version {facts['version']}"
            raise FormatError(what, folder / MARK, remedy=formats.MANIFEST.remedy)
        raise formats.missing(f"files.{name}", folder / MARK, formats.MANIFEST.remedy)


def _check(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raise DataError unless every file has its checksum, and the manifest its digest."""
    for name in _names(facts):
        if _sha256(folder / name) != facts["files"][name]["sha256"]:
            raise DataError("the file does not have the checksum in manifest.json", str(folder / name), remedy=_REMEDY)
    if _digest(facts) != facts["digest"]:
        raise DataError("the manifest does not have its own digest", str(folder / MARK), facts["digest"], _REMEDY)


def _sha256(path: Path) -> str:
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> bytes:
    with _open(path) as file:
        return file.read()


def _open(path: Path) -> BufferedReader:
    """Open a regular file, which the caller closes."""
    try:
        file = open_regular(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        remedy = source_remedy(str(path.parent)) or _REMEDY
        raise DataError("there is no manifest here, or not all of it", str(path), remedy=remedy) from None
    except PermissionError:
        raise PermissionDenied("the manifest may not be read", str(path), remedy="Grant read access to it.") from None
    most = _limit(path.name)
    if (size := os.fstat(file.fileno()).st_size) > most:
        file.close()
        raise DataError(f"a file of {size:,} bytes, at most {most:,} are read", str(path), remedy=_REMEDY)
    return file


def _limit(name: str) -> int:
    """Bytes of the largest file of this name that is read."""
    if name == MARK:
        return min(LIMIT, MANIFEST_LIMIT)
    return LIMIT


def _lines(path: Path) -> list[str]:
    return _read(path).decode("utf-8", "surrogateescape").split("\n")[:-1]


def _map(path: Path, kind: str, facts: Mapping[str, Any]) -> NDArray[Any]:
    """Map an array into memory, read-only. Raises DataError if the file has another size than in ``facts``."""
    size = facts["files"][path.name]["bytes"]
    with _open(path) as file:
        actual = os.fstat(file.fileno()).st_size
        if actual != size:
            raise DataError(f"the file has {actual} bytes, {MARK} says {size}", str(path), remedy=_REMEDY)
        if size:
            return np.memmap(file, dtype=kind, mode="r")
        return np.empty(0, dtype=kind)


def _create(path: Path, content: bytes) -> bool:
    """Create a file with this content in one step. Returns False, and changes nothing, if it exists."""
    private: Path | None = None
    while private is None:
        output_folder(path.parent)
        with suppress(FileNotFoundError):  # another index has removed the folder, which was still empty
            private = write_new(path, content, OUTPUT_MODE)
    try:
        os.link(private, path)
    except FileExistsError:  # perhaps by this call: NFS can lose the answer
        return os.path.samefile(private, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            return False
        os.replace(private, path)  # without links, no operation creates a complete file exclusively
    finally:
        deletion.delete_file(private, missing_ok=True)
    fsync_path(path.parent)
    return True
