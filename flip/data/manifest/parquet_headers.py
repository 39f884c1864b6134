"""Headers of a parquet file: its row groups, their column chunks, and the place and size of each page.

The only parser of these headers, because pyarrow does not show those of pages, neither their places nor their sizes.
It shows sizes that the footer states, but a file of 69 kB whose footer states 40 bytes takes 1 GiB. Nothing is
decompressed: a page costs the bytes of its header, and its body need not be in memory (a memory map will do).

Numbers in comments are those of fields in parquet.thrift.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flip.data.manifest.thrift import I32, I64, LIST, STRUCT, Fields, ThriftError, struct

DATA = 0
DICTIONARY = 2
DATA_V2 = 3
"""Kinds of pages."""
_HEADERS = {DATA: (5, 2), DICTIONARY: (7, 2), DATA_V2: (8, 4)}
"""Kind -> (field of the page that has its header, field of that header that has the encoding)."""


class HeaderError(ValueError):
    """A header is damaged."""


@dataclass(frozen=True, slots=True)
class ColumnChunk:
    """The pages of a column in a row group: number of values with nulls, and the offset of the first page."""

    values: int
    start: int


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows, and the chunk of each column in the order of the schema's leaves."""

    rows: int
    chunks: tuple[ColumnChunk, ...]


@dataclass(frozen=True, slots=True)
class PageHeader:
    """A page whose body is ``start`` to ``stop`` in the file.

    ``size``: bytes of the body without compression. ``values``: with nulls; of a dictionary its entries.
    """

    kind: int
    encoding: int
    values: int
    start: int
    stop: int
    size: int


def row_groups(data: Any) -> list[RowGroup]:
    """The row groups of a file, from its footer. Raises HeaderError."""
    begin = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    try:
        footer, _ = struct(data, begin)
        return [_row_group(group) for group in footer[4, LIST]]
    except (KeyError, ThriftError) as error:
        raise HeaderError("its footer is damaged") from error


def _row_group(group: Fields) -> RowGroup:
    chunks = [_column_chunk(column[3, STRUCT]) for column in group[1, LIST]]
    return RowGroup(group[3, I64], tuple(chunks))


def _column_chunk(metadata: Fields) -> ColumnChunk:
    """The first page is the dictionary, if there is one (11), else the first data page (9)."""
    start = metadata[9, I64]
    dictionary = metadata.get((11, I64), 0)
    if dictionary > 0:
        start = min(start, dictionary)
    return ColumnChunk(metadata[5, I64], start)


def pages(data: Any, chunk: ColumnChunk) -> Iterator[PageHeader]:
    """The pages of a column chunk, until they have its number of values.

    Raises HeaderError, also if there are more pages than values, beside a dictionary: headers of empty pages would take
    seconds of a core for each MB.
    """
    at = chunk.start
    values = 0
    number = 0
    while values < chunk.values:
        number += 1
        if number > chunk.values + 1:
            raise HeaderError(f"more pages than its {chunk.values:,} values")
        page = _page(data, at)
        if page.kind != DICTIONARY:
            values += page.values
        at = page.stop
        yield page


def _page(data: Any, at: int) -> PageHeader:
    try:
        fields, start = struct(data, at)
        kind = fields[1, I32]
        place, encoding = _HEADERS[kind]
        header = fields[place, STRUCT]
        page = PageHeader(kind, header[encoding, I32], header[1, I32], start, start + fields[3, I32], fields[2, I32])
    except (KeyError, ThriftError) as error:
        raise HeaderError("a page is damaged") from error
    if page.size < 0 or not start <= page.stop <= len(data):
        raise HeaderError("a page is damaged")
    return page
