"""Scans shards: one pass over a shard finds its samples and their CRC32. ``ScanJournal`` stores scans on disk.

Headers are parsed piece by piece by the code that training uses: a process holds one piece and the sample cut by its
end, not the shard. Shards with a sample larger than ``tar.SAMPLE_LIMIT`` are refused.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import re
import stat as modes
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flip.config.resolve import source_remedy
from flip.data.manifest import tar
from flip.data.manifest.census import Census, Counting
from flip.data.manifest.manifest import BLOCK
from flip.data.storage.base import ObjectStat, is_remote
from flip.data.storage.checksums import ETag, crc32
from flip.data.storage.client import StorageClient
from flip.files import deletion
from flip.files.creation import create_file, output_folder
from flip.runs.errors import DataError, PermissionDenied, StorageError

if TYPE_CHECKING:  # runs load this module, and filter nothing
    from flip.data.manifest.filters import Filters

PIECE = 16 << 20
"""Bytes of one request: half of what the allocator keeps for the next one."""

_SMALLER = "Write its files into smaller samples, or leave the shard out (--skip-damaged)."
REMEDY = "Fetch or make the shard again, or leave it out (--skip-damaged)."
_UNPACK = "Unpack it ({}), or leave it out (--skip-damaged)."
_TARS_ALONE = "Name only the .tar files, as 'FOLDER/*.tar'."
_COLUMNS = "If it holds images, name their columns: --image COLUMN --caption COLUMN. Or name only the .tar files."
_FORMATS = (
    (b"\x1f\x8b", "compressed with gzip", _UNPACK.format("gunzip")),
    (b"BZh", "compressed with bzip2", _UNPACK.format("bunzip2")),
    (b"\xfd7zXZ\0", "compressed with xz", _UNPACK.format("unxz")),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", _UNPACK.format("unzstd")),
    (b"PK\3\4", "a zip archive", "Write its files to a .tar, or leave it out (--skip-damaged)."),
    (b"PAR1", "a Parquet file", _COLUMNS),
)
"""First bytes of other formats, their names, and the remedies."""
_OWN_NAME = re.compile(r"[0-9a-f]{32}\.jsonl")
"""The name of a file of a process."""


class Scan(NamedTuple):
    """What one pass over a shard finds: one array entry per kept sample, except in the last three fields.

    The first sample starts at byte 0, whatever precedes it.
    """

    blocks: NDArray[np.uint32]
    """Blocks from the sample's start to the start of the next one, or to the end of the last member."""
    crcs: NDArray[np.uint32]
    """CRC32 of these blocks."""
    head: NDArray[np.uint32]
    """One number: the block at which the first kept sample starts."""
    dropped: NDArray[np.uint8]
    """Code of each sample of the tar, as from ``tar.SamplePredicate``."""
    census: Census
    """The members of the kept samples."""

    @property
    def starts(self) -> NDArray[np.uint32]:
        """Per sample: the block at which it starts."""
        return np.cumsum(self.blocks, dtype=np.uint32) - self.blocks + self.head[0]

    @property
    def samples(self) -> int:
        return len(self.crcs)

    @property
    def end(self) -> int:
        """The byte at which the last member ends."""
        return int(self.head[0] + self.blocks.sum(dtype=np.int64)) * BLOCK


def scan_shard(key: str, stat: ObjectStat, reader: StorageClient, filters: Filters | None = None) -> Scan:
    """Read a shard once and find its samples.

    A byte that changed in transit would be recorded as correct. An object is therefore checked by its ETag or, if that
    is no MD5 (encrypted objects, unknown parts), by a second reading.

    Raises DataError with shard and byte, and what ``StorageClient.read`` and ``Filters.predicate`` raise.
    """
    if not stat.size:
        raise DataError("the shard is empty", key, remedy=REMEDY)
    parts: Sequence[int] = []
    if is_remote(key) and "-" in stat.etag:
        parts = reader.parts(key, stat)

    def read() -> tuple[Scan | tar.InvalidTar, str]:
        return _read(key, stat, parts, reader, filters.predicate(key, reader) if filters else _keep_all)

    result, etag = read()
    if is_remote(key) and etag != stat.etag and read()[1] != etag:
        raise StorageError("two readings of the shard differ", key, remedy="Look at the network, then index again.")
    if isinstance(result, tar.TooLarge):
        raise DataError(str(result), key, remedy=_SMALLER) from result
    if isinstance(result, tar.InvalidTar):
        remedy = next((remedy for _, what, remedy in _FORMATS if result.reason.startswith(what)), REMEDY)
        raise DataError(f"not a whole tar: {result}", key, remedy=remedy) from result
    if filters:
        filters.check_count(key, len(result.dropped))
    return result


def _keep_all(samples: Sequence[tar.Sample], _: memoryview) -> NDArray[np.uint8]:
    return np.zeros(len(samples), dtype=np.uint8)


def scan_tar(pieces: Iterable[bytes], predicate: tar.SamplePredicate = _keep_all) -> Scan:
    """Scan a tar that arrives in pieces. Raises tar.InvalidTar."""
    pieces = iter(pieces)
    blocks = list[int]()
    crcs = list[int]()
    head = 0
    dropped = list[NDArray[np.uint8]]()
    buffer = bytearray()
    base = 0
    failure = tar.InvalidTar(0, "an empty archive")
    counting = Counting()
    for piece in pieces:
        buffer += piece
        view = memoryview(buffer)
        samples, skipped, error = _samples(view)
        # The buffer starts with the shard or with its first sample: in both cases that sample starts at 0.
        borders = [0, *(sample.start for sample in samples[1:]), *([] if error or not samples else [samples[-1].end])]
        codes = predicate(samples[: len(borders) - 1], view)
        dropped.append(codes)
        for (start, stop), code in zip(pairwise(borders), codes.tolist(), strict=True):
            if not code:
                blocks.append((stop - start) // BLOCK)
                crcs.append(crc32(view[start:stop]))
            elif blocks:  # read together with the kept sample before it
                blocks[-1] += (stop - start) // BLOCK
                crcs[-1] = crc32(view[start:stop], crcs[-1])
            else:
                head += (stop - start) // BLOCK
        accepted = (sample for sample, code in zip(samples, codes.tolist(), strict=False) if not code)
        counting.add(accepted, view)
        counting.census.skipped.update(reason for at, reason in skipped if error is None or at < borders[-1])
        if error is None:
            _check_rest(pieces, base + len(view))
            if not (base or any(view[:BLOCK])):
                raise tar.InvalidTar(0, "zeros alone, without a single member")
            sizes, sums, first = (np.array(values, dtype=np.uint32) for values in (blocks, crcs, [head]))
            return Scan(sizes, sums, first, np.concatenate(dropped), counting.census)
        failure = _failure(error, base, view)
        if not isinstance(error, tar.TruncatedTar):
            break
        view.release()
        del buffer[: borders[-1]]  # the end of the last sample is not known yet
        base += borders[-1]
        if len(buffer) > tar.SAMPLE_LIMIT:
            what = f"a sample of more than {tar.SAMPLE_LIMIT:,} bytes, the most that are read; it begins"
            raise tar.TooLarge(base, what)
    raise failure


def _failure(error: tar.InvalidTar, base: int, view: memoryview) -> tar.InvalidTar:
    """The error of a buffer as that of its shard, which names other formats by their first bytes."""
    if isinstance(error, tar.TooLarge):
        return tar.TooLarge(base + error.offset, error.reason)
    if base + error.offset == 0:
        formats = (what for magic, what, _ in _FORMATS if view[: len(magic)] == magic)
        return tar.InvalidTar(0, next((f"{what}, no tar header" for what in formats), error.reason))
    return tar.InvalidTar(base + error.offset, error.reason)


def _samples(view: memoryview) -> tuple[list[tar.Sample], tar.Skipped, tar.InvalidTar | None]:
    """The samples, the members without a sample, and the error that ended the search before the archive's end."""
    samples = list[tar.Sample]()
    skipped = tar.Skipped()
    try:
        for sample in tar.samples(view, True, skipped):
            samples.append(sample)
    except tar.InvalidTar as error:
        return samples, skipped, error
    return samples, skipped, None


def _check_rest(pieces: Iterator[bytes], at: int) -> None:
    for piece in pieces:
        try:
            tar.check_rest(memoryview(piece))
        except tar.InvalidTar as error:
            raise tar.InvalidTar(at + error.offset, error.reason) from None
        at += len(piece)


def _read(
    key: str, stat: ObjectStat, parts: Sequence[int], reader: StorageClient, predicate: tar.SamplePredicate
) -> tuple[Scan | tar.InvalidTar, str]:
    """The result of one reading, and the ETag of an object's bytes as far as they were read."""
    etag = ETag(parts)

    def pieces() -> Iterator[bytes]:
        for at in range(0, stat.size, PIECE):
            piece = reader.read(key, at, min(at + PIECE, stat.size), stat.etag)
            if is_remote(key):
                etag.update(piece)
            yield piece

    try:
        return scan_tar(pieces(), predicate), etag.value()
    except tar.InvalidTar as error:
        return error, etag.value()


def file_stat(key: str) -> ObjectStat:
    """The stat of a shard that is a readable file. Raises as ``scan_shard`` does."""
    try:
        file = os.open(key, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a FIFO would wait for a writer
        try:
            info = os.fstat(file)
        finally:
            os.close(file)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError("the shard is missing", key, remedy="Check the path, its pattern or its braces.") from None
    except PermissionError:
        raise PermissionDenied("the shard may not be read", key, remedy="Grant read access to it.") from None
    except OSError as error:
        if error.errno != errno.ENXIO:  # a socket
            raise StorageError(f"the shard cannot be read: {error.strerror}", key) from error
        info = os.stat(key)
    if modes.S_ISDIR(info.st_mode):
        remedy = source_remedy(key) or f"Name its files: '{key}/*.tar'"
        raise DataError("a folder is no shard", key, remedy=remedy)
    if not modes.S_ISREG(info.st_mode):
        if modes.S_ISFIFO(info.st_mode):
            what = "a FIFO"
        else:
            what = "a device or a socket"
        raise DataError(f"{what} is no shard: a shard is read at any place, again and again", key, remedy=_TARS_ALONE)
    return ObjectStat(info.st_size, "", info.st_mtime_ns)


class Shard(NamedTuple):
    """A shard with its stat: scans of an object or file that has changed since are not used."""

    key: str
    stat: ObjectStat
    parquet: ObjectStat | None = None
    """Of the parquet file that filters on columns read; None without such filters, or if it is missing."""


class _Line(NamedTuple):
    """Position of a scan in the journal."""

    path: Path
    start: int
    bytes: int
    samples: int


class ScanJournal:
    """The scans in ``folder``, so that an index that was stopped or split over machines need not start again.

    Each process appends to a file of its own, a line per shard: the CRC32 of what follows in eight hexadecimal digits,
    then JSON: the shard as it was (key, size, ETag, time of change), the same of its parquet file, its samples, the
    filters, the census, and the arrays of ``Scan`` as [dtype, base64]. Damaged lines and scans with other filters are
    ignored. ``folder`` need not exist. ``kind``: the class of the scans; others are ignored, too.
    Raises OSError if files cannot be read or written.
    """

    def __init__(self, folder: Path, filters: Sequence[str] = (), kind: Any = Scan) -> None:
        self.folder = folder
        self._kind = kind
        self._filters = list(filters)
        self._lines: dict[Shard, _Line] = {}
        self._file: BinaryIO | None = None
        for path in sorted(folder.glob("*.jsonl")):
            with suppress(FileNotFoundError), open(path, "rb") as file:  # another process may have removed it
                start = 0
                for line in file:
                    record = _parse(line)
                    if record is not None and self._fits(record):
                        self._lines[_shard(record)] = _Line(path, start, len(line), record["samples"])
                    start += len(line)

    def __contains__(self, shard: Shard) -> bool:
        return shard in self._lines

    def _fits(self, record: dict[str, Any]) -> bool:
        fields = {*record["arrays"], "census"}
        return fields == set(self._kind._fields) and record["filters"] == self._filters

    def samples(self, shard: Shard) -> int:
        return self._lines[shard].samples

    def start(self) -> None:
        """Create the file of this process."""
        while self._file is None:
            output_folder(self.folder)
            with suppress(FileNotFoundError):  # another process has removed the empty folder
                self._file = create_file(self.folder / f"{uuid.uuid4().hex}.jsonl")

    def add(self, shard: Shard, scan: Any) -> None:
        """Append a scan. It is not synced: it survives the end of the process, not always that of the machine."""
        assert self._file is not None
        line = _format(shard, scan, self._filters)
        start = self._file.tell()
        self._file.write(line)
        self._file.flush()
        self._lines[shard] = _Line(Path(self._file.name), start, len(line), scan.samples)

    def read(self, shard: Shard) -> Any:
        """The scan of a shard in the journal. Raises DataError if the file has changed."""
        line = self._lines[shard]
        record = None
        with suppress(FileNotFoundError), open(line.path, "rb") as file:
            file.seek(line.start)
            record = _parse(file.read(line.bytes))
        if record is None or _shard(record) != shard:
            what = "it was changed or removed meanwhile"
            raise DataError(what, str(line.path), remedy="Give the same command again.")
        arrays = {name: np.frombuffer(base64.b64decode(text), kind) for name, (kind, text) in record["arrays"].items()}
        return self._kind(**arrays, census=Census.of_json(record["census"]))

    def close(self) -> None:
        """Close the file of this process. An empty file is deleted, and so is an empty folder."""
        if self._file is not None:
            if not self._file.tell():
                deletion.delete_file(self._file.name, missing_ok=True)
            self._file.close()
            self._file = None
        with suppress(OSError):  # missing, or not empty
            deletion.delete_empty_folder(self.folder)

    def remove(self) -> None:
        """Delete all scans."""
        for path in self.folder.glob("*.jsonl"):
            if _OWN_NAME.fullmatch(path.name):
                deletion.delete_file(path, missing_ok=True)
        self.close()


def _format(shard: Shard, scan: Any, filters: Sequence[str]) -> bytes:
    fields = scan._asdict()
    census: Census = fields.pop("census")
    arrays = {name: [a.dtype.str, base64.b64encode(a.tobytes()).decode()] for name, a in fields.items()}
    record = {"shard": [shard.key, *shard.stat], "samples": scan.samples, "filters": filters}
    if shard.parquet is not None:
        record["parquet"] = [*shard.parquet]
    text = json.dumps(record | {"census": census.json(), "arrays": arrays}).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> dict[str, Any] | None:
    text = line[9:-1]
    if line == b"%08x %s\n" % (zlib.crc32(text), text):
        return json.loads(text)
    return None


def _shard(record: dict[str, Any]) -> Shard:
    key, *stat = record["shard"]
    return Shard(key, ObjectStat(*stat), ObjectStat(*record["parquet"]) if "parquet" in record else None)
