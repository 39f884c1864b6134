"""Finds the images of a parquet file: its streams, the place of each value, and the rows that have none of their own.

Nothing that a header states is believed: sizes are compared with limits and with the file before anything is read, and
each value must end where the next one starts. Pages are read once, in the order of the file, for their CRC32.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flip.data.parquet import headers, snappy, streams
from flip.data.parquet.file_window import FileWindow
from flip.data.parquet.headers import DATA, DATA_V2, DICTIONARY, ColumnChunk, HeaderError, PageHeader
from flip.data.parquet.levels import LevelsError, hybrid
from flip.data.parquet.streams import GAP, NO_MARKS, PREFIX, SNAPPY, STREAM
from flip.data.storage.checksums import crc32

PAGE_LIMIT = 256 << 20
"""Bytes of a page that has to be decompressed, before and after."""
PADDING = 8
"""Zeros after the last value of a page."""
STORED = 0
NULL = 1
PATH_ONLY = 2
REPEATED = 3
"""Codes of rows: with an image, and why there is none."""
REASONS = (
    "the image is null",
    "the bytes are null: the file holds a path",
    "the image of an earlier row",
)
"""Of the codes from 1 on."""

_PLAIN = 0
_OF_DICTIONARY = (2, 8)
_ENCODINGS = {5: "DELTA_BINARY_PACKED", 6: "DELTA_LENGTH_BYTE_ARRAY", 7: "DELTA_BYTE_ARRAY", 9: "BYTE_STREAM_SPLIT"}


class Refused(ValueError):
    """The images cannot be read in place; the file is not at fault."""


@dataclass(frozen=True)
class ImageLeaf:
    """The column of images. ``max_level``: definition level of a value; ``in_struct``: it is a field ``bytes``."""

    index: int
    max_level: int
    in_struct: bool = False


@dataclass
class ImageScan:
    """The images of a file, collected by ``add``.

    ``limit``: most bytes of an image. ``rows``: the code of each row. ``begins`` and ``ends``: of each value in the
    output of its stream (``owners``).
    ``atoms``: parts of the file with their CRC32, (start, stop, crc): ranges of chunks begin and end at their borders.
    """

    window: FileWindow
    leaf: ImageLeaf
    limit: int
    streams: list[tuple[int, ...]] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    rows: list[NDArray[np.uint8]] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    atoms: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, chunk: ColumnChunk, rows: int) -> None:
        """Add the images of a row group. Raises Refused, HeaderError, LevelsError, ValueError, DataError, OSError."""
        if chunk.encrypted:
            raise Refused("the images are encrypted")
        if chunk.elsewhere:
            raise Refused("the images are in another file")
        if chunk.codec not in streams.CODECS:
            raise Refused(f"the images are compressed with codec {chunk.codec} of parquet, which has no reader here")
        if chunk.values != rows:
            raise HeaderError(f"{chunk.values:,} images in {rows:,} rows")
        group = _RowGroup(self, chunk.codec)
        values = 0
        for page in headers.pages(self.window, chunk):
            if page.kind != DICTIONARY:
                values += page.values
                if values > rows:
                    raise HeaderError(f"more than {rows:,} images in the pages of a row group")
            group.add(page)
        group.end()

    def table(self) -> NDArray[Any]:
        """Rows of ``STREAM``."""
        return np.array(self.streams, dtype=STREAM)

    def add_stream(self, body: "_Body", count: int) -> None:
        """Add ``count`` PLAIN values, which must fill the body. Raises Refused, ValueError."""
        if not count:
            if body.first != body.size:
                raise HeaderError("bytes without a value in a page")
            return
        if body.first + count * PREFIX.size > body.size:
            raise HeaderError(f"{count:,} images in a page of {body.size:,} bytes")
        mark = NO_MARKS
        places = None
        if body.codec == SNAPPY:
            places = snappy.marks(self.window.view(body.start, body.stop))
        if places is not None:
            mark = len(self.marks)
            self.marks += [body.start + place for place in places]
        self._add_gap(body.start + (body.first if body.codec == 0 else 0))
        if body.codec == 0:
            last = self._walk_file(body, count)
        else:
            last = self._walk(body, count)
            self._add_atoms(body, places)
        self.streams.append((count, body.start, body.stop, body.size, body.first, last, body.codec, mark))

    def _add_gap(self, start: int) -> None:
        """Cover the bytes between the last stream and the next, if one request would read both."""
        if not self.atoms:
            return
        stop = self.atoms[-1][1]
        if 0 < start - stop <= GAP:
            self.atoms.append((stop, start, crc32(self.window.view(stop, start))))

    def _add_atoms(self, body: "_Body", places: list[int] | None) -> None:
        borders = [body.start, body.stop]
        if places is not None:
            borders = [body.start + place for place in places]
            if places[0]:
                head = body.start, borders[0], crc32(self.window.view(body.start, borders[0]))
                self.atoms.append(head)
        for start, stop in zip(borders[:-1], borders[1:], strict=True):
            self.atoms.append((start, stop, crc32(self.window.view(start, stop))))

    def _walk_file(self, body: "_Body", count: int) -> int:
        """Find values that are not compressed, with one of them in memory. Returns where the last one ends."""
        number = len(self.streams)
        view = self.window.view
        at = body.start + body.first
        for _ in range(count):
            if at + PREFIX.size > body.stop:
                raise HeaderError("a page ends before its last image")
            size = PREFIX.unpack(view(at, at + PREFIX.size))[0]
            end = at + PREFIX.size + size
            if end > body.stop:
                raise HeaderError("an image runs past the end of its page")
            self._refuse_large(size)
            self.atoms.append((at, end, crc32(view(at, end))))
            self.owners.append(number)
            self.begins.append(at - body.start)
            self.ends.append(end - body.start)
            at = end
        _refuse_rest(view(at, min(body.stop, at + PADDING + 1)))
        return at - body.start

    def _walk(self, body: "_Body", count: int) -> int:
        """As ``_walk_file``, in the output of a compressed page."""
        assert body.output is not None
        number = len(self.streams)
        at = body.first
        for _ in range(count):
            if at + PREFIX.size > body.size:
                raise HeaderError("a page ends before its last image")
            size = PREFIX.unpack_from(body.output, at)[0]
            end = at + PREFIX.size + size
            if end > body.size:
                raise HeaderError("an image runs past the end of its page")
            self._refuse_large(size)
            self.owners.append(number)
            self.begins.append(at)
            self.ends.append(end)
            at = end
        _refuse_rest(body.output[at : at + PADDING + 1])
        return at

    def _refuse_large(self, size: int) -> None:
        if size > self.limit:
            raise Refused(f"an image of {size:,} bytes, at most {self.limit:,} are read")


@dataclass
class _Body:
    """The body of a page: its place in the file, bytes of output, and the offset of the values in the output.

    ``output``: None if the file holds it as it is.
    """

    start: int
    stop: int
    size: int
    codec: int
    first: int = 0
    output: memoryview | None = None


class _RowGroup:
    """The pages of a row group, one after the other."""

    def __init__(self, images: ImageScan, codec: int) -> None:
        self._images = images
        self._codec = codec
        self._entries = 0
        """Entries of the dictionary."""
        self._next = 0
        """The entry that no row has used yet."""
        self._plain = False
        """Whether a page with PLAIN values has come."""

    def add(self, page: PageHeader) -> None:
        if page.kind == DICTIONARY:
            if self._entries or self._plain or page.encoding not in (_PLAIN, _OF_DICTIONARY[0]):
                raise HeaderError("a dictionary that is not the first page, or not PLAIN")
            self._entries = page.values
            self._images.add_stream(self._body(page), page.values)
            return
        if page.kind == DATA:
            body, levels = self._version_1(page)
        else:
            body, levels = self._version_2(page)
        codes = self._codes(levels)
        stored = int((codes == STORED).sum())
        if page.encoding == _PLAIN:
            self._plain = True
            self._images.add_stream(body, stored)
        elif page.encoding in _OF_DICTIONARY:
            codes[codes == STORED] = self._of_dictionary(body, stored)
        else:
            name = _ENCODINGS.get(page.encoding, page.encoding)
            raise Refused(f"the images have encoding {name}")
        self._images.rows.append(codes)

    def end(self) -> None:
        """Check that rows use all entries of the dictionary: others would shift the values."""
        if self._next != self._entries:
            what = f"{self._entries - self._next:,} images of a dictionary belong to no row, or are not in their order"
            raise Refused(what)

    def _codes(self, levels: NDArray[np.uint32]) -> NDArray[np.uint8]:
        """The code of each row by its definition level."""
        most = self._images.leaf.max_level
        if (levels > most).any():
            raise LevelsError(f"a definition level above {most}")
        codes = np.where(levels == most, STORED, NULL).astype(np.uint8)
        if self._images.leaf.in_struct:
            codes[levels == most - 1] = PATH_ONLY
        return codes

    def _of_dictionary(self, body: _Body, count: int) -> NDArray[np.uint8]:
        """Codes of ``count`` rows that have an entry of the dictionary each.

        Raises Refused unless each entry is used first in the order of the rows.
        """
        if self._plain:
            raise Refused("pages of a dictionary follow pages without")
        if not count:
            return np.empty(0, dtype=np.uint8)
        view = self._output(body)[body.first :]
        if not len(view):
            raise LevelsError("a page without the width of its indices")
        indices = hybrid(view[1:], view[0], count).astype(np.int64)
        if indices.max() >= self._entries:
            raise LevelsError("an index beyond the dictionary")
        before = np.maximum.accumulate(np.concatenate([[self._next - 1], indices]))
        new = indices > before[:-1]
        expected = self._next + np.arange(int(new.sum()))
        if not np.array_equal(indices[new], expected):
            raise Refused("the images of a dictionary are not in the order of the rows")
        self._next += len(expected)
        return np.where(new, STORED, REPEATED).astype(np.uint8)

    def _output(self, body: _Body) -> memoryview:
        if body.output is not None:
            return body.output
        return self._images.window.view(body.start, body.stop)

    def _body(self, page: PageHeader, skipped: int = 0, compressed: bool = True) -> _Body:
        """The body of a page behind ``skipped`` bytes, decompressed if it is compressed. Raises Refused, ValueError."""
        start = page.start + skipped
        size = page.size - skipped
        if not self._codec or not compressed:
            if page.stop - start != size:
                raise HeaderError("a page without compression states two sizes")
            return _Body(start, page.stop, size, 0)
        if max(page.stop - start, size) > PAGE_LIMIT:
            what = f"a compressed page of {max(page.stop - start, size):,} bytes, at most {PAGE_LIMIT:,} are read"
            raise Refused(what)
        data = self._images.window.view(start, page.stop)
        if not size:
            return _Body(start, page.stop, 0, self._codec, 0, memoryview(b""))
        if self._codec == SNAPPY and snappy.length(data)[0] != size:
            raise HeaderError("a snappy page states two sizes")
        return _Body(start, page.stop, size, self._codec, 0, streams.decompress(self._codec, data, size))

    def _version_1(self, page: PageHeader) -> tuple[_Body, NDArray[np.uint32]]:
        """The body of a page with levels before its values."""
        body = self._body(page)
        most = self._images.leaf.max_level
        if not most:
            return body, np.zeros(page.values, dtype=np.uint32)
        if page.level_encoding != headers.RLE:
            raise Refused(f"definition levels have encoding {page.level_encoding}")
        if body.size < 4:
            raise LevelsError("a page without definition levels")
        if body.output is None:
            head = self._images.window.view(body.start, body.start + 4)
        else:
            head = body.output[:4]
        length = int.from_bytes(head, "little")
        if 4 + length > min(body.size, PAGE_LIMIT):
            raise LevelsError("definition levels run past the end of their page")
        if body.output is None:
            data = self._images.window.view(body.start + 4, body.start + 4 + length)
        else:
            data = body.output[4 : 4 + length]
        body.first = 4 + length
        return body, hybrid(data, most.bit_length(), page.values)

    def _version_2(self, page: PageHeader) -> tuple[_Body, NDArray[np.uint32]]:
        """The body of a page whose levels are apart, and not compressed."""
        assert page.kind == DATA_V2
        if page.repeats:
            raise Refused("the images are in lists")
        if page.levels > min(page.stop - page.start, page.size, PAGE_LIMIT):
            raise LevelsError("definition levels run past the end of their page")
        body = self._body(page, page.levels, page.compressed)
        most = self._images.leaf.max_level
        if not most:
            return body, np.zeros(page.values, dtype=np.uint32)
        data = self._images.window.view(page.start, page.start + page.levels)
        return body, hybrid(data, most.bit_length(), page.values)


def _refuse_rest(rest: memoryview) -> None:
    """Raise HeaderError for bytes after the last image of a page, but for zeros with which fastparquet pads it."""
    if len(rest) > PADDING or any(rest):
        raise HeaderError("bytes after the last image of a page")
