"""Headers of a parquet file: its row groups, their column chunks, and the place and size of each page.

The only parser of these headers, because pyarrow does not show those of pages, neither their places nor their sizes.
It shows sizes that the footer states, but a file of 69 kB whose footer states 40 bytes takes 1 GiB. Nothing is
decompressed: a page costs the bytes of its header, and its body need not be in memory (a memory map will do).

Numbers in comments are those of fields in parquet.thrift.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flip.data.parquet.thrift import BINARY, FALSE, I32, I64, LIST, STRUCT, Fields, ThriftError, struct

DATA = 0
DICTIONARY = 2
DATA_V2 = 3
"""Kinds of pages."""
RLE = 3
"""Encoding of levels."""
_HEADERS = {DATA: (5, 2), DICTIONARY: (7, 2), DATA_V2: (8, 4)}
"""Kind -> (field of the page that has its header, field of that header that has the encoding)."""


class HeaderError(ValueError):
    """A header is damaged."""


@dataclass(frozen=True, slots=True)
class ColumnChunk:
    """The pages of a column in a row group.

    ``values``: their number with nulls. ``start``: offset of the first page. ``codec``: its number in parquet.thrift.
    ``elsewhere``: the pages are in another file. ``encrypted``: they cannot be read without a key.
    """

    values: int
    start: int
    codec: int = 0
    elsewhere: bool = False
    encrypted: bool = False


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows, and the chunk of each column in the order of the schema's leaves."""

    rows: int
    chunks: tuple[ColumnChunk, ...]


@dataclass(frozen=True, slots=True)
class PageHeader:
    """A page whose body is ``start`` to ``stop`` in the file.

    ``size``: bytes of the body without compression. ``values``: with nulls; of a dictionary its entries.

    In a page of version 2, the first ``levels`` bytes of the body are definition levels, never compressed, and the rest
    is compressed if ``compressed``. ``level_encoding``: of definition levels in a page of version 1. ``repeats``: the
    page has repetition levels.
    """

    kind: int
    encoding: int
    values: int
    start: int
    stop: int
    size: int
    level_encoding: int = RLE
    levels: int = 0
    repeats: bool = False
    compressed: bool = True


def row_groups(data: Any) -> list[RowGroup]:
    """The row groups of a file, from its footer. Raises HeaderError."""
    begin = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return footer_row_groups(data, begin)


def footer_row_groups(data: Any, begin: int) -> list[RowGroup]:
    """The row groups of the footer at offset ``begin``. Raises HeaderError."""
    try:
        footer, _ = struct(data, begin)
        return [_row_group(group) for group in footer[4, LIST]]
    except (KeyError, ThriftError) as error:
        raise HeaderError("its footer is damaged") from error


def _row_group(group: Fields) -> RowGroup:
    return RowGroup(group[3, I64], tuple(map(_column_chunk, group[1, LIST])))


def _column_chunk(column: Fields) -> ColumnChunk:
    """The first page is the dictionary, if there is one (11), else the first data page (9)."""
    encrypted = (8, STRUCT) in column
    if encrypted and (3, STRUCT) not in column:
        return ColumnChunk(0, 0, encrypted=True)
    metadata = column[3, STRUCT]
    start = metadata[9, I64]
    dictionary = metadata.get((11, I64), 0)
    if dictionary > 0:
        start = min(start, dictionary)
    return ColumnChunk(metadata[5, I64], start, metadata[4, I32], (1, BINARY) in column, encrypted)


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
        body = start, start + fields[3, I32], fields[2, I32]
        page = PageHeader(kind, header[encoding, I32], header[1, I32], *body, **_levels(kind, header))
    except (KeyError, ThriftError) as error:
        raise HeaderError("a page is damaged") from error
    if page.size < 0 or page.values < 0 or page.levels < 0 or not start <= page.stop <= len(data):
        raise HeaderError("a page is damaged")
    return page


def _levels(kind: int, header: Fields) -> dict[str, Any]:
    """Fields of a page about its levels. A page of version 2 is compressed unless its header denies it (7)."""
    if kind == DATA:
        return {"level_encoding": header[3, I32]}
    if kind == DATA_V2:
        repeats = header[6, I32] != 0
        return {"levels": header[5, I32], "repeats": repeats, "compressed": (7, FALSE) not in header}
    return {}
