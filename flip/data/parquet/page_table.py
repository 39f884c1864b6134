"""Where the chunks of parquet files are: the tables of a manifest of version 4.

A chunk is R consecutive kept rows, wherever pages and row groups end. It reads, of each file in which it has rows, the
streams from its first image to the end of its last one (``flip.data.parquet.streams``), then, of each file, the lines
of its rows. Images between them that were dropped are read, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flip.common import image_formats
from flip.data.parquet import streams
from flip.data.parquet.streams import Part

FILE = np.dtype([
    ("rows", "<i8"),
    ("streams", "<i8"),
    ("row", "<i8"),  # the first kept row, the stream of its image (of the file's), and the offset in its output
    ("stream", "<i8"),
    ("begin", "<i8"),
    ("last", "<i8"),  # the stream of the last kept image, and where it ends in its output
    ("end", "<i8"),
])  # fmt: skip
CHUNK = np.dtype([
    ("row", "<i8"),  # the first row in its file, the stream of its image, and the offset in its output
    ("stream", "<i8"),
    ("begin", "<i8"),
    ("last", "<i8"),  # the stream of the last image, in the file of that, and where it ends in its output
    ("end", "<i8"),
    ("line", "<i8"),  # the byte of the first row's line
])  # fmt: skip
LINE = "json"
"""The member that is a row's line."""


class Portion(NamedTuple):
    """The part of a chunk that lies in one file: ``rows`` kept rows from ``row`` on; the images, and the lines."""

    file: int
    rows: int
    row: int
    parts: list[Part]
    ranges: list[tuple[int, int]]
    lines: tuple[int, int]


@dataclass
class PageTable:
    """``files``: rows of ``FILE``; ``chunks``: of ``CHUNK``. ``kept``, ``stored``: a bit per row, as ``kept.bits``.

    ``first``: id of the first sample of each file, and N. ``line_bytes``: of the lines of each file.
    """

    chunk: int
    first: NDArray[np.int64]
    line_bytes: NDArray[np.int64]
    files: NDArray[Any]
    chunks: NDArray[Any]
    streams: NDArray[Any]
    marks: NDArray[np.uint64]
    kept: NDArray[np.uint8]
    stored: NDArray[np.uint8]

    def __post_init__(self) -> None:
        self._streams = np.concatenate([[0], np.cumsum(self.files["streams"])])
        self._bits = np.concatenate([[0], np.cumsum((self.files["rows"] + 7) // 8)])

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return int(self.files["rows"].sum())

    def fits(self) -> bool:
        """Whether the tables describe files: bits for all rows, and chunks inside the streams."""
        samples = int(self.first[-1])
        inside = len(self.streams) == self._streams[-1] and len(self.chunks) == -(-samples // self.chunk)
        bits = len(self.kept) == self._bits[-1] == len(self.stored) and not (self.kept & ~self.stored).any()
        marks = self.streams["mark"]
        marked = not len(marks) or (marks.min() >= streams.NO_MARKS and marks.max() < max(len(self.marks), 1))
        return bool(inside and bits and marked)

    def portions(self, j: int) -> Iterator[Portion]:
        """The parts of chunk j, file by file."""
        id = j * self.chunk
        stop = min(id + self.chunk, int(self.first[-1]))
        last = int(np.searchsorted(self.first, stop - 1, side="right")) - 1
        own = self.chunks[j]
        at = int(own["row"]), int(own["stream"]), int(own["begin"])
        line = int(own["line"])
        file = int(np.searchsorted(self.first, id, side="right")) - 1
        while id < stop:
            border = int(self.first[file + 1])
            count = min(border, stop) - id
            if count:
                end = self._end(j, file) if file == last else self._end_of_file(file)
                parts = self._parts(file, at[1:], end)
                lines = line, self._line_after(j, file, border)
                yield Portion(file, count, at[0], parts, streams.merged(parts), lines)
            id += count
            file += 1
            if id < stop:
                of_file = self.files[file]
                at = int(of_file["row"]), int(of_file["stream"]), int(of_file["begin"])
                line = 0

    def ranges(self, j: int) -> list[tuple[int, int, int, int]]:
        """As ``ChunkTable.chunk_ranges``. Lines of file i are in the file number ``len(files) + i``."""
        portions = list(self.portions(j))
        found = []
        for each in portions:
            counts = [each.rows] + [0] * len(each.ranges)
            found += [(each.file, *range_, count) for range_, count in zip(each.ranges, counts, strict=False)]
        return found + [(len(self.files) + each.file, *each.lines, 0) for each in portions]

    def samples(self, j: int, pieces: Sequence[memoryview]) -> list[dict[str, memoryview]]:
        """The samples of chunk j. ``pieces``: as ``ranges``. Raises ValueError if the bytes are others."""
        portions = list(self.portions(j))
        found = []
        at = 0
        for each, text in zip(portions, pieces[-len(portions) :], strict=True):
            own = pieces[at : at + len(each.ranges)]
            at += len(each.ranges)
            images = [image for part, body in _bodies(each, own) for image in streams.values(part, body)]
            lines = _lines(text)
            chosen = self._chosen(each, len(images))
            if len(chosen) != len(lines):
                raise ValueError(f"{len(chosen)} images and {len(lines)} lines")
            found += [{_member(images[i]): images[i], LINE: line} for i, line in zip(chosen, lines, strict=True)]
        return found

    def row(self, id: int) -> tuple[int, int]:
        """The file and the row of a sample."""
        file = int(np.searchsorted(self.first, id, side="right")) - 1
        j = id // self.chunk
        start = max(j * self.chunk, int(self.first[file]))
        row = self.chunks[j]["row"] if start == j * self.chunk else self.files[file]["row"]
        left = id - start
        for first, mask in self._masks(self.kept, file, int(row)):
            rows = np.flatnonzero(mask)
            if left < len(rows):
                return file, first + int(rows[left])
            left -= len(rows)
        raise IndexError(id)

    def _end(self, j: int, file: int) -> tuple[int, int]:
        return int(self.chunks[j]["last"]), int(self.chunks[j]["end"])

    def _end_of_file(self, file: int) -> tuple[int, int]:
        return int(self.files[file]["last"]), int(self.files[file]["end"])

    def _line_after(self, j: int, file: int, border: int) -> int:
        """The byte after the last line of chunk j in a file whose samples end at id ``border``."""
        if (j + 1) * self.chunk < border:
            return int(self.chunks[j + 1]["line"])
        return int(self.line_bytes[file])

    def _parts(self, file: int, begin: tuple[int, ...], end: tuple[int, int]) -> list[Part]:
        first = int(self._streams[file])
        parts = []
        for number in range(begin[0], end[0] + 1):
            stream = self.streams[first + number]
            low = begin[1] if number == begin[0] else int(stream["first"])
            high = end[1] if number == end[0] else int(stream["last"])
            parts.append(streams.part(stream, self.marks, low, high))
        return parts

    def _chosen(self, portion: Portion, images: int) -> list[int]:
        """Which of the images in a portion are of kept rows."""
        if images == portion.rows:
            return list(range(images))
        chosen: list[int] = []
        seen = 0
        kept = self._masks(self.kept, portion.file, portion.row)
        stored = self._masks(self.stored, portion.file, portion.row)
        for (_, keep), (_, has) in zip(kept, stored, strict=True):
            own = np.flatnonzero(keep[has])
            chosen += (seen + own).tolist()
            seen += int(has.sum())
            if seen >= images:
                break
        return [number for number in chosen if number < images]

    def _masks(self, bits: NDArray[np.uint8], file: int, row: int) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        """(first row, mask) of pieces of the rows of a file from ``row`` on; each is larger than the one before."""
        rows = int(self.files[file]["rows"])
        start = int(self._bits[file])
        count = max(2 * self.chunk, 64)
        while row < rows:
            stop = min(row + count, rows)
            low = start + row // 8
            high = start + (stop + 7) // 8
            mask = np.unpackbits(bits[low:high], bitorder="little")[row % 8 : row % 8 + stop - row]
            yield row, mask.astype(np.bool_)
            row = stop
            count *= 2


def _bodies(portion: Portion, pieces: Sequence[memoryview]) -> Iterator[tuple[Part, memoryview]]:
    """Each part of a portion, with its bytes in the ranges."""
    number = 0
    for part in portion.parts:
        while not portion.ranges[number][0] <= part.start <= part.stop <= portion.ranges[number][1]:
            number += 1
        base = portion.ranges[number][0]
        yield part, pieces[number][part.start - base : part.stop - base]


def _lines(text: memoryview) -> list[memoryview]:
    data = bytes(text)
    if not data.endswith(b"\n"):
        raise ValueError("the last line has no end")
    lines = []
    at = 0
    while at < len(data):
        end = data.index(b"\n", at)
        lines.append(text[at:end])
        at = end + 1
    return lines


def _member(image: memoryview) -> str:
    form = image_formats.by_start(image)
    if form is None:
        return "jpg"
    return form.member
