"""Reads columns of a small, untrusted parquet file.

A parquet file of some kilobytes can expand to gigabytes: pages compress without limit, a dictionary stores a long text
once for all rows, and the footer can state other sizes than the pages. pyarrow has no limit on any of them. Sizes are
therefore read from the headers of pages before pyarrow decompresses anything, and text stays dictionary-encoded.
"""

from collections.abc import Callable, Sequence
from typing import Any

from flip.data.parquet.headers import ColumnChunk, HeaderError, pages, row_groups
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
        groups = row_groups(data)
    except HeaderError as error:
        raise damaged(where, str(error)) from error
    _refuse_more(sum(abs(group.rows) for group in groups), ROWS_LIMIT, "{} rows", where)
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
        for group in groups:
            if leaves[name] >= len(group.chunks):
                raise damaged(where, f"a row group without the column {name}")
            chunk = group.chunks[leaves[name]]
            if chunk.values != group.rows:
                raise damaged(where, f"{chunk.values} values of {name} in {group.rows} rows")
            total += _pages_bytes(data, chunk, name, where)
            _refuse_more(total, COLUMNS_LIMIT, f"{{}} bytes in the columns {', '.join(sorted(set(chosen)))}", where)


def _check_indices(values: Any, where: str) -> None:
    """Raises DataError if an index of a dictionary-encoded array is out of range: pyarrow does not check it."""
    import pyarrow.compute as pc
    from pyarrow.types import is_dictionary

    if is_dictionary(values.type) and values.null_count < len(values):
        ends = pc.min_max(values.indices).as_py()
        if ends["min"] < 0 or ends["max"] >= len(values.dictionary):
            raise damaged(where, "a value is not in the dictionary of its column")


def _pages_bytes(data: bytes, chunk: ColumnChunk, name: str, where: str) -> int:
    """Uncompressed bytes of the pages of a column chunk, from their headers.

    Raises DataError if they are damaged, or have an encoding without a size limit.
    """
    total = 0
    try:
        for page in pages(data, chunk):
            if page.encoding not in _ENCODINGS:
                what = f"the column {name} has encoding {page.encoding}, which does not state its size"
                raise DataError(what, where, remedy=f"Write it again as one of: {', '.join(_ENCODINGS.values())}.")
            total += page.size
    except HeaderError as error:
        raise damaged(where, f"the column {name}: {error}") from error
    return total
