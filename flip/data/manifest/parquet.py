"""Reads columns of a small, untrusted parquet file.

A parquet file of some kilobytes can expand to gigabytes: pages compress without limit, a dictionary stores a long text
once for all rows, and the footer can state other sizes than the pages. pyarrow has no limit on any of them. Sizes are
therefore read from the headers of pages before pyarrow decompresses anything, and text stays dictionary-encoded.
"""

from collections.abc import Callable, Sequence
from typing import Any

from flip.runs.errors import DataError

FILE_LIMIT = 128 << 20
"""Bytes of a file."""
FOOTER_LIMIT = 1 << 19
"""Bytes of its footer; pyarrow's objects are many times as large."""
ROWS_LIMIT = 1 << 20
"""Rows of a file. img2dataset writes 10,000 by default."""
COLUMNS_LIMIT = 128 << 20
"""Uncompressed bytes of all pages of the columns that are read."""

_ENCODINGS = {
    0: "PLAIN", 2: "PLAIN_DICTIONARY", 3: "RLE", 5: "DELTA_BINARY_PACKED", 8: "RLE_DICTIONARY", 9: "BYTE_STREAM_SPLIT",
}  # fmt: skip
"""Encodings whose decoded size follows from the page's size and the number of rows. The others, DELTA_BYTE_ARRAY and
DELTA_LENGTH_BYTE_ARRAY, can expand a page without limit."""
_REMEDY = "Use the file that img2dataset wrote next to the shard: it has a row per link, and numbers or short texts."

# Types of fields in Thrift's compact protocol.
_TRUE = 1
_FALSE = 2
_BYTE = 3
_I16 = 4
_I32 = 5
_I64 = 6
_DOUBLE = 7
_BINARY = 8
_LIST = 9
_STRUCT = 12

_DAMAGE = (IndexError, KeyError, TypeError, RecursionError)
"""Errors of reading damaged structs."""
_Fields = dict[tuple[int, int], Any]
"""(number, type) -> value; a reader ignores a field that has the number but another type."""


def read(data: bytes, where: str, choose: Callable[[Any], Sequence[str]]) -> list[Any]:
    """Return columns of a parquet file as pyarrow arrays; text is dictionary-encoded.

    Args:
        data: the file.
        where: its name, for errors.
        choose: takes the pyarrow schema and returns the names of the columns to read; may raise an error of its own.

    Raises DataError if the file is damaged or exceeds a limit.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if data.endswith(b"PAR1"):
            _refuse_more(int.from_bytes(data[-8:-4], "little"), FOOTER_LIMIT, "a footer of {} bytes", where)
        source = pa.BufferReader(data)
        chosen = choose(pq.ParquetFile(source).schema_arrow)
        file = pq.ParquetFile(source, read_dictionary=chosen, pre_buffer=False)
        _check(file, data, chosen, where)
        table = file.read(sorted(set(chosen)), use_threads=False)
        for part in (part for values in table.columns for part in values.chunks):
            _check_indices(part, where)
        return [table[name].combine_chunks() for name in chosen]
    except pa.ArrowMemoryError:
        raise  # the file is not at fault
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise damaged(where, str(error) or repr(error)) from error


def damaged(where: str, why: str) -> DataError:
    what = f"not a parquet file that can be read: {why.splitlines()[0]}"
    return DataError(what, where, remedy="Fetch or make it again.")


def check_size(size: int, where: str) -> None:
    """Raises DataError if a file is too large to be read."""
    _refuse_more(size, FILE_LIMIT, "a parquet file of {} bytes", where)


def _refuse_more(number: int, limit: int, what: str, where: str) -> None:
    """Raises DataError if ``number`` exceeds ``limit``. ``what``: a phrase with a placeholder for the number."""
    if number > limit:
        raise DataError(f"{what.format(f'{number:,}')}, at most {limit:,} are read", where, remedy=_REMEDY)


def _check(file: Any, data: bytes, chosen: Sequence[str], where: str) -> None:
    """Raises DataError if the chosen columns of a file are larger than the limits, or are not plain values."""
    from pyarrow.types import is_dictionary

    try:
        groups = _row_groups(data)
    except _DAMAGE as error:
        raise damaged(where, "its footer is damaged") from error
    _refuse_more(sum(abs(rows) for rows, _ in groups), ROWS_LIMIT, "{} rows", where)
    plain = "BOOLEAN", "INT32", "INT64", "FLOAT", "DOUBLE"
    total = 0
    leaves = {file.schema.column(i).path: i for i in range(len(file.schema))}
    for name in sorted(set(chosen)):
        kind = file.schema_arrow.field(name).type
        leaf = None
        if name in leaves:
            leaf = file.schema.column(leaves[name])
        bounded = leaf is not None and (leaf.physical_type in plain or str(kind) == "halffloat" or is_dictionary(kind))
        if leaf is None or leaf.max_repetition_level or not bounded:
            raise DataError(f"the column {name} holds {kind}, neither numbers nor text", where, remedy=_REMEDY)
        for rows, chunks in groups:
            if leaves[name] < len(chunks):
                values, start = chunks[leaves[name]]
            else:
                values = -1
                start = 0
            if values != rows:
                raise damaged(where, f"{values} values of {name} in {rows} rows")
            total += _pages_bytes(data, start, values, name, where)
            _refuse_more(total, COLUMNS_LIMIT, f"{{}} bytes in the columns {', '.join(sorted(set(chosen)))}", where)


def _check_indices(values: Any, where: str) -> None:
    """Raises DataError if an index of a dictionary-encoded array is out of range: pyarrow does not check it."""
    import pyarrow.compute as pc
    from pyarrow.types import is_dictionary

    if is_dictionary(values.type) and values.null_count < len(values):
        ends = pc.min_max(values.indices).as_py()
        if ends["min"] < 0 or ends["max"] >= len(values.dictionary):
            raise damaged(where, "a value is not in the dictionary of its column")


def _pages_bytes(data: bytes, at: int, rows: int, name: str, where: str) -> int:
    """Uncompressed bytes of the pages of a column chunk, from their headers.

    Raises DataError if they are damaged, or have an encoding without a size limit.
    """
    total = values = 0
    while values < rows:
        try:
            page, at = _struct(data, at)
            # The kind of a page selects the field of its header: 0 is a data page, 3 a data page of version 2.
            part, number = {0: (5, 2), 3: (8, 4)}.get(page[1, _I32], (0, 0))
            if part:
                about = page[part, _STRUCT]
            else:
                about = {(1, _I32): 0, (0, _I32): 0}
            count = about[1, _I32]
            encoding = about[number, _I32]
            size = page[2, _I32]
            end = at + page[3, _I32]
            if size < 0 or not at <= end <= len(data):
                raise IndexError("a page runs past the end")
        except _DAMAGE as error:
            raise damaged(where, f"a page of the column {name} is damaged") from error
        if encoding not in _ENCODINGS:
            what = f"the column {name} has encoding {encoding}, which does not tell its size"
            raise DataError(what, where, remedy=f"Write it again as one of: {', '.join(_ENCODINGS.values())}.")
        total += size
        values += count
        at = end
    return total


# -- headers: structs of Thrift's compact protocol ---------------------------------------------------------------------
#
# pyarrow does not show the headers of pages. It shows the sizes that the footer states, but a file of 69 kB whose
# footer states 40 bytes takes 1 GiB.


def _row_groups(data: bytes) -> list[tuple[int, list[tuple[int, int]]]]:
    """(rows, [(values, first byte) of each column]) of each row group of a file. Raises ``_DAMAGE``."""
    footer, _ = _struct(data, len(data) - 8 - int.from_bytes(data[-8:-4], "little"))
    return [(group[3, _I64], [_chunk(column[3, _STRUCT]) for column in group[1, _LIST]]) for group in footer[4, _LIST]]


def _chunk(meta: _Fields) -> tuple[int, int]:
    values = meta[5, _I64]
    first = meta[9, _I64]
    dictionary = meta.get((11, _I64), 0)
    return values, min(first, dictionary) if dictionary > 0 else first


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        shift += 7
        if byte < 128:
            return value, at
    raise IndexError("a number of more than 64 bits")


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at


def _struct(data: bytes, at: int) -> tuple[_Fields, int]:
    """The fields of a struct and its end. Raises IndexError or TypeError if it is damaged."""
    if at < 0:
        raise IndexError("a place before the file")
    fields = _Fields()
    number = 0
    while head := data[at]:
        if head >> 4:
            number += head >> 4
            at += 1
        else:
            number, at = _zigzag(data, at + 1)
        if (number, head & 15) in fields:
            raise TypeError("a field stands twice")  # readers disagree on its value
        fields[number, head & 15], at = _value(data, at, head & 15)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    """A value and its end; texts and fractions are skipped, and lists of them are empty."""
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE, at
    if kind in (_I16, _I32, _I64):
        return _zigzag(data, at)
    if kind in (_BYTE, _DOUBLE):
        return None, at + (1 if kind == _BYTE else 8)
    if kind == _BINARY:
        size, at = _varint(data, at)
        return None, at + size
    if kind == _STRUCT:
        return _struct(data, at)
    if kind == _LIST:
        head = data[at]
        at += 1
        if head >> 4 < 15:
            count = head >> 4
            at = at
        else:
            count, at = _varint(data, at)
        items = []
        for _ in range(count):
            item, at = _value(data, at, _BYTE if head & 15 in (_TRUE, _FALSE) else head & 15)
            if at > len(data):
                raise IndexError("a list runs past the end")
            if head & 15 == _STRUCT:
                items.append(item)
        return items, at
    raise TypeError(f"no header has a field of type {kind}")
