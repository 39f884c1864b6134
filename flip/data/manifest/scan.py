"""Scans shards: one pass over a shard finds its samples and the CRC32 of each. ``ScanJournal`` stores scans on disk.

Headers are parsed piece by piece by the code that training uses: a process holds one piece and the sample cut by its
end, not the shard. Shards with a sample larger than ``tar.SAMPLE_LIMIT`` are refused.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import stat as modes
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flip.data.manifest import tar
from flip.data.manifest.census import Census, Counting
from flip.data.manifest.manifest import BLOCK
from flip.data.storage.base import ObjectStat, is_remote
from flip.data.storage.checksums import ETag, crc32
from flip.data.storage.client import StorageClient
from flip.runs.errors import DataError, PermissionDenied, StorageError

if TYPE_CHECKING:
    from flip.data.manifest.filters import Filters

PIECE = 16 << 20
"""Bytes of one request: half of what the allocator keeps for the next one."""

_SMALLER = "Write its files into smaller samples, or leave the shard out (--skip-damaged)."
REMEDY = "Fetch or make the shard again, or leave it out (--skip-damaged)."

_UNPACK = "Unpack it ({}), or leave it out (--skip-damaged)."
_TARS_ALONE = "Name only the .tar files, as 'FOLDER/*.tar'."
_FORMATS = (
    (b"\x1f\x8b", "compressed with gzip", _UNPACK.format("gunzip")),
    (b"BZh", "compressed with bzip2", _UNPACK.format("bunzip2")),
    (b"\xfd7zXZ\0", "compressed with xz", _UNPACK.format("unxz")),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", _UNPACK.format("unzstd")),
    (b"PK\3\4", "a zip archive", "Write its files to a .tar, or leave it out (--skip-damaged)."),
    (b"PAR1", "a Parquet file", _TARS_ALONE),
)
"""First bytes of files that are given for shards, what they are, and the remedy."""


SamplePredicate = Callable[[Sequence[tar.Sample], memoryview], NDArray[np.uint8]]
"""Of samples of a tar, walked in the bytes: 0 where one is kept, else why not."""


class Scan(NamedTuple):
    """What one pass over a shard finds: arrays of an entry per sample that is kept, but for the last three. The first
    sample starts at 0, whatever stands before it."""

    blocks: NDArray[np.uint32]
    """How many blocks there are from its start to the next one's, or to the end of the last one's members ..."""
    crcs: NDArray[np.uint32]
    """... and the CRC32 of those."""
    head: NDArray[np.uint32]
    """One number: the block at which the first kept sample starts."""
    dropped: NDArray[np.uint8]
    """Per sample of the tar: 0 where it is kept, else why not (``Filters.reasons``)."""
    census: Census
    """The members of the kept samples."""

    @property
    def starts(self) -> NDArray[np.uint32]:
        """Per sample: the block at which it starts."""
        return np.cumsum(self.blocks, dtype=np.uint32) - self.blocks + self.head[0]

    @property
    def end(self) -> int:
        """The byte at which its members end."""
        return int(self.head[0] + self.blocks.sum(dtype=np.int64)) * BLOCK


def scan_shard(key: str, stat: ObjectStat, reader: StorageClient, filters: Filters | None = None) -> Scan:
    """Read a shard once and walk it. Raises DataError naming shard and byte; what ``StorageClient.read`` does, and
    ``Filters.judge``.

    A byte that was spoiled on its way here would be the truth from now on, so an object is checked by its ETag or,
    where that follows from no MD5 (encrypted, of parts that the server does not tell), by reading it once more.
    """
    if not stat.size:
        raise DataError("the shard is empty", key, remedy=REMEDY)
    parts = reader.parts(key, stat) if is_remote(key) and "-" in stat.etag else []

    def read() -> tuple[Scan | tar.InvalidTar, str]:
        return _read(key, stat, parts, reader, filters.predicate(key, reader) if filters else _all)

    found, etag = read()
    if is_remote(key) and etag != stat.etag and read()[1] != etag:
        raise StorageError("two readings of the shard differ", key, remedy="Look at the network, then index again.")
    if isinstance(found, tar.TooLarge):
        raise DataError(str(found), key, remedy=_SMALLER) from found
    if isinstance(found, tar.InvalidTar):
        remedy = next((remedy for _, what, remedy in _FORMATS if found.reason.startswith(what)), REMEDY)
        raise DataError(f"not a whole tar: {found}", key, remedy=remedy) from found
    return found


def _all(samples: Sequence[tar.Sample], _: memoryview) -> NDArray[np.uint8]:
    return np.zeros(len(samples), dtype=np.uint8)


def scan_tar(pieces: Iterable[bytes], judge: SamplePredicate = _all) -> Scan:
    """The scan of a tar that comes in pieces. Raises tar.InvalidTar."""
    pieces, blocks, crcs, head, dropped = iter(pieces), list[int](), list[int](), 0, list[NDArray[np.uint8]]()
    buffer, base, broken, counting = bytearray(), 0, tar.InvalidTar(0, "an empty archive"), Counting()
    for piece in pieces:
        buffer += piece
        view = memoryview(buffer)
        samples, skipped, found = _samples(view)
        # It begins with the shard or with its first sample: in either case that one's start is 0.
        borders = [0, *(one.start for one in samples[1:]), *([] if found or not samples else [samples[-1].end])]
        dropped.append(judge(samples[: len(borders) - 1], view))
        for (start, stop), why_not in zip(pairwise(borders), dropped[-1].tolist(), strict=True):
            if not why_not:
                blocks.append((stop - start) // BLOCK)
                crcs.append(crc32(view[start:stop]))
            elif blocks:  # read over, with the kept one before it
                blocks[-1] += (stop - start) // BLOCK
                crcs[-1] = crc32(view[start:stop], crcs[-1])
            else:
                head += (stop - start) // BLOCK
        counting.add(one for one, why_not in zip(samples, dropped[-1].tolist(), strict=False) if not why_not)
        counting.census.skipped.update(reason for at, reason in skipped if found is None or at < borders[-1])
        if found is None:
            _check_rest(pieces, base + len(view))
            if not (base or any(view[:BLOCK])):
                raise tar.InvalidTar(0, "zeros alone, without a single member")
            sizes, sums, first = (np.array(one, dtype=np.uint32) for one in (blocks, crcs, [head]))
            return Scan(sizes, sums, first, np.concatenate(dropped), counting.census)
        broken = (tar.TooLarge if isinstance(found, tar.TooLarge) else tar.InvalidTar)(
            base + found.offset, found.reason
        )
        if base + found.offset == 0 and not isinstance(found, tar.TooLarge):
            known = (what for magic, what, _ in _FORMATS if view[: len(magic)] == magic)
            broken = tar.InvalidTar(0, next((f"{what}, no tar header" for what in known), found.reason))
        if not isinstance(found, tar.TruncatedTar):
            break
        view.release()
        del buffer[: borders[-1]]  # the last sample's end is not certain yet
        base += borders[-1]
        if len(buffer) > tar.SAMPLE_LIMIT:
            what = f"a sample of more than {tar.SAMPLE_LIMIT:,} bytes, the most that are read; it begins"
            raise tar.TooLarge(base, what)
    raise broken


def _samples(view: memoryview) -> tuple[list[tar.Sample], tar.Skipped, tar.InvalidTar | None]:
    """The samples, the members that belong to none, and what ended the walk before the archive's end."""
    samples, skipped = list[tar.Sample](), tar.Skipped()
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
    key: str, stat: ObjectStat, parts: Sequence[int], reader: StorageClient, judge: SamplePredicate
) -> tuple[Scan | tar.InvalidTar, str]:
    """What one reading found, and the ETag that an object's bytes have as far as they were read."""
    etag = ETag(parts)

    def pieces() -> Iterator[bytes]:
        for at in range(0, stat.size, PIECE):
            piece = reader.read(key, at, min(at + PIECE, stat.size), stat.etag)
            if is_remote(key):
                etag.update(piece)
            yield piece

    try:
        return scan_tar(pieces(), judge), etag.text()
    except tar.InvalidTar as error:
        return error, etag.text()


def file_stat(key: str) -> ObjectStat:
    """Of a shard that is a file and may be read. Raises as ``scan`` does."""
    try:
        file = os.open(key, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a FIFO would wait for a writer
        try:
            found = os.fstat(file)
        finally:
            os.close(file)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError("the shard is missing", key, remedy="Check the path, its pattern or its braces.") from None
    except PermissionError:
        raise PermissionDenied("the shard may not be read", key, remedy="Grant read access to it.") from None
    except OSError as error:
        if error.errno != errno.ENXIO:  # a socket
            raise StorageError(f"the shard cannot be read: {error.strerror}", key) from error
        found = os.stat(key)
    if modes.S_ISDIR(found.st_mode):
        raise DataError("a folder is no shard", key, remedy=f"Name its files: '{key}/*.tar'")
    if not modes.S_ISREG(found.st_mode):
        what = "a FIFO" if modes.S_ISFIFO(found.st_mode) else "a device or a socket"
        raise DataError(f"{what} is no shard: a shard is read at any place, again and again", key, remedy=_TARS_ALONE)
    return ObjectStat(found.st_size, "", found.st_mtime_ns)


class Shard(NamedTuple):
    """A shard as it was when it was asked for: what is kept of another one under its key is not used."""

    key: str
    stat: ObjectStat


class _Place(NamedTuple):
    path: Path
    start: int
    bytes: int
    samples: int


class ScanJournal:
    """The scans in ``folder``, so that an index that was stopped or split over machines need not start again.

    Each process appends to a file of its own, a line per shard: the CRC32 of what follows in eight hexadecimal digits,
    then JSON: the shard as it was (key, size, ETag, time of change), its samples, the filters, the census, and the
    arrays of ``Scan`` as [dtype, base64]. Damaged lines and scans with other filters are ignored. ``folder`` need not
    exist. Raises OSError if files cannot be read or written.
    """

    def __init__(self, folder: Path, filters: Sequence[str] = ()) -> None:
        self.folder, self._filters = folder, list(filters)
        self._places: dict[Shard, _Place] = {}
        self._file: BinaryIO | None = None
        for path in sorted(folder.glob("*.jsonl")):
            with suppress(FileNotFoundError), open(path, "rb") as file:  # by now another process may have removed it
                start = 0
                for line in file:
                    found = _unpacked(line)
                    if found is not None and self._fits(found):
                        self._places[_shard(found)] = _Place(path, start, len(line), found["samples"])
                    start += len(line)

    def __contains__(self, shard: Shard) -> bool:
        return shard in self._places

    def _fits(self, found: dict[str, Any]) -> bool:
        fields = {*found["arrays"], "census"} if "census" in found else set()
        return fields == set(Scan._fields) and found["filters"] == self._filters

    def samples(self, shard: Shard) -> int:
        return self._places[shard].samples

    def start(self) -> None:
        """Open a file of this process's own."""
        while self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another process that had nothing to do took the empty folder with it
                self._file = open(self.folder / f"{uuid.uuid4().hex}.jsonl", "xb")  # noqa: SIM115  (by close)

    def add(self, shard: Shard, scan: Scan) -> None:
        """Append one. A process that is killed loses nothing; a machine may: its last lines, which are not synced."""
        assert self._file is not None
        line, start = _packed(shard, scan, self._filters), self._file.tell()
        self._file.write(line)
        self._file.flush()
        self._places[shard] = _Place(Path(self._file.name), start, len(line), len(scan.crcs))

    def read(self, shard: Shard) -> Scan:
        """One of those that there are. Raises DataError where the file is no longer what it was."""
        place, found = self._places[shard], None
        with suppress(FileNotFoundError), open(place.path, "rb") as file:
            file.seek(place.start)
            found = _unpacked(file.read(place.bytes))
        if found is None or _shard(found) != shard:
            what = "it was changed or removed meanwhile"
            raise DataError(what, str(place.path), remedy="Give the same command again.")
        arrays = {name: np.frombuffer(base64.b64decode(text), kind) for name, (kind, text) in found["arrays"].items()}
        return Scan(**arrays, census=Census.of_json(found["census"]))

    def close(self) -> None:
        """End adding. A file without a scan goes, and a folder without a file."""
        if self._file is not None:
            if not self._file.tell():
                Path(self._file.name).unlink(missing_ok=True)
            self._file.close()
            self._file = None
        with suppress(OSError):  # not there, or not empty
            self.folder.rmdir()

    def remove(self) -> None:
        """Delete all files of scans."""
        for path in self.folder.glob("*.jsonl"):
            path.unlink(missing_ok=True)
        self.close()


def _packed(shard: Shard, scan: Scan, filters: Sequence[str]) -> bytes:
    fields = scan._asdict()
    census: Census = fields.pop("census")
    arrays = {name: [a.dtype.str, base64.b64encode(a.tobytes()).decode()] for name, a in fields.items()}
    facts = {
        "shard": [shard.key, *shard.stat],
        "samples": len(scan.crcs),
        "filters": filters,
        "census": census.json(),
        "arrays": arrays,
    }
    text = json.dumps(facts).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _unpacked(line: bytes) -> dict[str, Any] | None:
    text = line[9:-1]
    return json.loads(text) if line == b"%08x %s\n" % (zlib.crc32(text), text) else None


def _shard(facts: dict[str, Any]) -> Shard:
    key, *stat = facts["shard"]
    return Shard(key, ObjectStat(*stat))
