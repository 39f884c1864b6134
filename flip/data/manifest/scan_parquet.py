"""Scans a parquet file that holds images: its streams, the place of each image, the lines of its rows, and CRC32s.

An object is first copied into an unnamed file, in which it is checked by its ETag, as a tar is while it is read.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flip.data.manifest.census import Census, SampleKind
from flip.data.manifest.filters import Filters, column
from flip.data.manifest.row_texts import MAKE, Columns, RowTexts, TextRefused
from flip.data.manifest.tar import SAMPLE_LIMIT
from flip.data.parquet import headers
from flip.data.parquet.file_window import FileWindow
from flip.data.parquet.headers import HeaderError, RowGroup
from flip.data.parquet.image_pages import REASONS, REPEATED, STORED, ImageLeaf, ImageScan, Refused
from flip.data.parquet.streams import STREAM
from flip.data.storage.base import ObjectStat, is_remote
from flip.data.storage.checksums import ETag, crc32
from flip.data.storage.client import StorageClient
from flip.runs.errors import DataError, StorageError

FOOTER_LIMIT = 4 << 20
"""Bytes of a footer; pyarrow's objects are many times as large."""
ROWS_LIMIT = 1 << 24
"""Rows of a file."""
REPEATED_SHARE = 0.01
"""Share of repeated images above which a file is refused: it has a row per caption."""
NO_CAPTION = "the caption is null or empty"
PIECE = 16 << 20
"""Bytes of one request."""
MEMBERS = ("jpg", "json")
"""What a sample has; the image has the name of its own format."""

_AGAIN = "Fetch or make it again, or leave it out (--skip-damaged)."


class ParquetScan(NamedTuple):
    """What a pass over a parquet file finds. ``owners`` to ``line_crcs`` have an entry per kept row."""

    streams: NDArray[np.uint8]
    """Rows of ``streams.STREAM``, as bytes."""
    marks: NDArray[np.uint64]
    owners: NDArray[np.uint32]
    """Number of the stream of an image."""
    begins: NDArray[np.int64]
    """Offset in its output, of the length before the image."""
    ends: NDArray[np.int64]
    lines: NDArray[np.uint32]
    """Bytes of the row's line."""
    line_crcs: NDArray[np.uint32]
    text: NDArray[np.uint8]
    """All lines."""
    atom_starts: NDArray[np.int64]
    """Parts of the file at whose borders ranges begin and end."""
    atom_stops: NDArray[np.int64]
    atom_crcs: NDArray[np.uint32]
    dropped: NDArray[np.uint8]
    """Code of each row, as in ``reasons``."""
    stored: NDArray[np.uint8]
    """Whether a row has an image of its own in a stream."""
    census: Census

    @property
    def samples(self) -> int:
        return len(self.owners)


def reasons(filters: Filters | None) -> list[str]:
    """Reasons for dropping a row; code c stands for entry c - 1."""
    first = []
    if filters:
        first = filters.reasons
    return [*first, *REASONS, NO_CAPTION]


def scan_parquet(
    key: str, stat: ObjectStat, reader: StorageClient, columns: Columns, filters: Filters | None = None
) -> ParquetScan:
    """Read a parquet file once. Raises DataError, ConfigError for a missing column, StorageError, PermissionDenied."""
    import pyarrow as pa

    with _opened(key, stat, reader) as file:
        try:
            return _Scan(file, stat.size, key, columns, filters).run()
        except (Refused, TextRefused) as error:
            remedy = getattr(error, "remedy", MAKE)
            raise DataError(f"not read in place: {error}", key, remedy=remedy) from error
        except pa.ArrowMemoryError:
            raise  # the file is not at fault
        except (ValueError, pa.ArrowException) as error:  # also HeaderError, LevelsError
            raise _damaged(key, error) from error
        except OSError as error:
            if error.errno is None:  # pyarrow's, for damaged files
                raise _damaged(key, error) from error
            raise StorageError(f"the file cannot be read: {error.strerror}", key) from error


def _damaged(key: str, error: Exception) -> DataError:
    lines = str(error).splitlines() or [repr(error)]
    return DataError(f"not a parquet file that can be read: {lines[0]}", key, remedy=_AGAIN)


@contextmanager
def _opened(key: str, stat: ObjectStat, reader: StorageClient) -> Iterator[BinaryIO]:
    """The file, or a copy of the object, checked by its ETag or by a second reading."""
    if not is_remote(key):
        with open(key, "rb") as file:
            yield file
        return
    parts = reader.parts(key, stat) if "-" in stat.etag else ()
    with tempfile.TemporaryFile() as copy:
        etag = ETag(parts)
        crc = 0
        for piece in _pieces(key, stat, reader):
            etag.update(piece)
            crc = crc32(piece, crc)
            copy.write(piece)
        if etag.value() != stat.etag:
            again = 0
            for piece in _pieces(key, stat, reader):
                again = crc32(piece, again)
            if again != crc:
                raise StorageError("two readings differ", key, remedy="Look at the network, then index again.")
        copy.flush()
        yield copy


def _pieces(key: str, stat: ObjectStat, reader: StorageClient) -> Iterator[bytes]:
    for at in range(0, stat.size, PIECE):
        yield reader.read(key, at, min(at + PIECE, stat.size), stat.etag)


class _Scan:
    def __init__(self, file: BinaryIO, size: int, key: str, columns: Columns, filters: Filters | None) -> None:
        self._file = file
        self._key = key
        self._columns = columns
        self._filters = filters
        self._window = FileWindow(file.fileno(), size, key)

    def run(self) -> ParquetScan:
        groups = self._row_groups()
        leaf = self._leaf()
        images = ImageScan(self._window, leaf, SAMPLE_LIMIT)
        for group in groups:
            if leaf.index >= len(group.chunks):
                raise HeaderError("a row group without the column of images")
            images.add(group.chunks[leaf.index], group.rows)
        texts = RowTexts(self._file, self._window, groups, self._columns, self._filters, self._key)
        rows = np.concatenate([*images.rows, np.empty(0, np.uint8)])
        first = len(reasons(self._filters)) - len(REASONS)
        codes = np.where(rows == STORED, 0, rows + (first - 1)).astype(np.uint8)
        lines = []
        at = 0
        for number, group in enumerate(groups):
            of_group, more = texts.group(number, codes[at : at + group.rows], first + len(REASONS))
            codes[at : at + group.rows] = of_group
            lines += more
            at += group.rows
        self._refuse_repeated(rows)
        return _result(images, rows == STORED, codes, lines)

    def _row_groups(self) -> list[RowGroup]:
        size = len(self._window)
        if size < 12:
            raise HeaderError("it ends before its footer")
        end = bytes(self._window.view(size - 8, size))
        if end[4:] == b"PARE" or bytes(self._window.view(0, 4)) == b"PARE":
            raise Refused("the file is encrypted")
        length = int.from_bytes(end[:4], "little")
        if end[4:] != b"PAR1" or length > size - 12:
            raise HeaderError("it has no footer")
        if length > FOOTER_LIMIT:
            raise Refused(f"a footer of {length:,} bytes, at most {FOOTER_LIMIT:,} are read")
        footer = bytes(self._window.view(size - 8 - length, size - 8))
        groups = headers.footer_row_groups(footer, 0)
        if any(group.rows < 0 for group in groups):
            raise HeaderError("a row group has a negative number of rows")
        rows = sum(group.rows for group in groups)
        if rows > ROWS_LIMIT:
            raise Refused(f"{rows:,} rows, at most {ROWS_LIMIT:,} are read")
        return groups

    def _leaf(self) -> ImageLeaf:
        """The column of images. Raises ConfigError, Refused."""
        import pyarrow.parquet as pq

        file = pq.ParquetFile(self._file)
        name = column(self._columns.image, file.schema_arrow.names, self._key)
        paths = [file.schema.column(number).path for number in range(len(file.schema))]
        fields = [number for number, path in enumerate(paths) if path in (name, f"{name}.bytes")]
        if len(fields) != 1:
            raise Refused(f"the column {name} holds {file.schema_arrow.field(name).type}, not images")
        leaf = file.schema.column(fields[0])
        if leaf.max_repetition_level:
            raise Refused(f"the column {name} holds lists of images")
        if leaf.physical_type != "BYTE_ARRAY":
            raise Refused(f"the column {name} holds {leaf.physical_type}, not bytes of any length")
        return ImageLeaf(fields[0], leaf.max_definition_level, paths[fields[0]] != name)

    def _refuse_repeated(self, rows: NDArray[np.uint8]) -> None:
        repeated = int((rows == REPEATED).sum())
        if repeated > REPEATED_SHARE * len(rows):
            what = f"{repeated:,} of {len(rows):,} rows have the image of an earlier row: a row per caption?"
            raise Refused(what)


def _result(images: ImageScan, stored: NDArray[np.bool_], codes: NDArray[np.uint8], lines: list[bytes]) -> ParquetScan:
    kept = codes[stored] == 0
    atoms = np.array(images.atoms, dtype=np.int64).reshape(-1, 3)
    kinds = Counter[SampleKind]()
    if lines:
        kinds[SampleKind(MEMBERS)] = len(lines)
    return ParquetScan(
        images.table().view(np.uint8) if images.streams else np.empty(0, np.uint8),
        np.array(images.marks, dtype=np.uint64),
        np.array(images.owners, dtype=np.uint32)[kept],
        np.array(images.begins, dtype=np.int64)[kept],
        np.array(images.ends, dtype=np.int64)[kept],
        np.array(list(map(len, lines)), dtype=np.uint32),
        np.array(list(map(crc32, lines)), dtype=np.uint32),
        np.frombuffer(b"".join(lines), dtype=np.uint8),
        atoms[:, 0].copy(),
        atoms[:, 1].copy(),
        atoms[:, 2].astype(np.uint32),
        codes,
        stored.astype(np.uint8),
        Census(kinds),
    )


def table_of(scan: ParquetScan) -> NDArray[Any]:
    """The streams of a scan."""
    return scan.streams.view(STREAM)
