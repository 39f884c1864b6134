"""The texts and numbers of a parquet file's rows, as JSON lines: captions, and other columns that are chosen.

pyarrow decodes them row group by row group, after the sizes of all pages were compared with limits: it has none itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from flip.data.manifest.filters import Codes, Filter, Filters, column
from flip.data.parquet import headers
from flip.data.parquet.file_window import FileWindow
from flip.data.parquet.headers import HeaderError, RowGroup

GROUP_LIMIT = 256 << 20
"""Uncompressed bytes of the chosen columns in a row group."""
LINES_LIMIT = 256 << 20
"""Bytes of the lines of a file."""
MAKE = "Write the rows as tar shards: flip shards make FILE --out FOLDER"

_EXPANDING = {7: "DELTA_BYTE_ARRAY"}
"""Encodings whose pages can expand without limit."""
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


@dataclass(frozen=True)
class Columns:
    """Names of columns. ``others``: further ones for the lines; None: all with texts, numbers or truth values."""

    image: str
    captions: tuple[str, ...]
    others: tuple[str, ...] | None = None

    @property
    def names(self) -> list[str]:
        """The choice as text, equal for equal choices."""
        others = "all"
        if self.others is not None:
            others = ",".join(self.others)
        return [f"image {self.image}", f"caption {','.join(self.captions)}", f"columns {others}"]


class TextRefused(ValueError):
    """The texts cannot be read; ``remedy``: what to do."""

    def __init__(self, what: str, remedy: str = MAKE) -> None:
        super().__init__(what)
        self.remedy = remedy


class RowTexts:
    """The chosen columns of an open file.

    Args:
        file: the file, for pyarrow.
        window: the same, for the headers of pages.
        groups: its row groups.
        filters: of which those on columns and on the length of captions apply.

    Raises ConfigError for a missing column, TextRefused.
    """

    def __init__(
        self, file: BinaryIO, window: FileWindow, groups: Sequence[RowGroup], columns: Columns, filters: Filters | None,
        where: str,
    ) -> None:  # fmt: skip
        import pyarrow.parquet as pq

        self._window = window
        self._groups = groups
        self._where = where
        self._filters = filters
        schema = pq.ParquetFile(file).schema_arrow
        self._leaves = _leaves(file)
        self.captions = [column(name, schema.names, where) for name in columns.captions]
        self.lines = self._chosen(schema, columns)
        by_filter: Sequence[Filter] = ()
        if filters:
            by_filter = filters.columns
        self._filtered = [column(each.column, schema.names, where) for each in by_filter]
        read = sorted({*self.lines, *self._filtered})
        for name in read:
            if name not in self._leaves or not _is_plain(schema.field(name).type):
                kind = schema.field(name).type
                raise TextRefused(f"the column {name} holds {kind}, neither texts, numbers nor truth values")
        self._read = read
        texts = [name for name in read if _is_text(schema.field(name).type)]
        self._file = pq.ParquetFile(file, read_dictionary=texts, pre_buffer=False)
        self._bytes = 0

    def _chosen(self, schema: Any, columns: Columns) -> list[str]:
        if columns.others is not None:
            others = [column(name, schema.names, self._where) for name in columns.others]
            return list(dict.fromkeys([*self.captions, *others]))
        return [name for name in schema.names if name in self.captions or self._is_shown(schema, name)]

    def _is_shown(self, schema: Any, name: str) -> bool:
        return name in self._leaves and _is_plain(schema.field(name).type)

    def group(self, number: int, codes: Codes, first: int) -> tuple[Codes, list[bytes]]:
        """The lines of the rows of a row group that stay.

        Args:
            codes: of its rows; those above 0 are dropped already.
            first: the code of "no caption".

        Returns the codes with those of filters, and the lines of rows with code 0. Raises TextRefused, HeaderError,
        ConfigError, pyarrow's errors.
        """
        group = self._groups[number]
        self._check(group)
        if not self._read:
            return codes, [b"{}\n"] * int((codes == 0).sum())
        table = self._file.read_row_group(number, columns=self._read, use_threads=False)
        if table.num_rows != group.rows or table.num_rows != len(codes):
            raise HeaderError(f"{table.num_rows:,} rows in a row group of {group.rows:,}")
        arrays = {name: table[name].combine_chunks() for name in self._read}
        lists = {name: _as_list(arrays[name]) for name in self._read}
        codes = self._dropped(arrays, lists, codes, first)
        return codes, self._encoded(lists, codes)

    def _check(self, group: RowGroup) -> None:
        """Raise TextRefused or HeaderError for pages that may need more memory than the limit."""
        total = 0
        for name in self._read:
            chunk = group.chunks[self._leaves[name]]
            if chunk.encrypted or chunk.elsewhere:
                raise TextRefused(f"the column {name} is encrypted, or in another file")
            if chunk.values != group.rows:
                raise HeaderError(f"{chunk.values:,} values of {name} in {group.rows:,} rows")
            for page in headers.pages(self._window, chunk):
                if page.encoding in _EXPANDING:
                    raise TextRefused(f"the column {name} has encoding {_EXPANDING[page.encoding]}")
                if page.values > max(chunk.values, 1):
                    raise HeaderError(f"{page.values:,} values in a page of {name}")
                total += page.size
                if total > GROUP_LIMIT:
                    what = f"the columns {', '.join(self._read)} of a row group have more than {GROUP_LIMIT:,} bytes"
                    raise TextRefused(what, "Choose fewer with --columns, or write smaller row groups.")

    def _dropped(self, arrays: dict[str, Any], lists: dict[str, list[Any]], codes: Codes, first: int) -> Codes:
        """Codes with those of missing captions and of filters, in this order, where there is none yet."""
        found = []
        if self.captions:
            missing = [all(not lists[name][row] for name in self.captions) for row in range(len(codes))]
            found.append(np.array(missing, dtype=np.uint8) * np.uint8(first))
        if self._filters:
            found += self._filters.row_codes([arrays[name] for name in self._filtered], self._captions_of(lists))
        for each in found:
            codes = np.where(codes == 0, each, codes).astype(np.uint8)
        return codes

    def _captions_of(self, lists: dict[str, list[Any]]) -> list[str]:
        columns = [lists[name] for name in self.captions]
        return [next((str(text) for text in row if text), "") for row in zip(*columns, strict=True)]

    def _encoded(self, lists: dict[str, list[Any]], codes: Codes) -> list[bytes]:
        rows: NDArray[np.int64] = np.flatnonzero(codes == 0)
        lines = []
        columns = [lists[name] for name in self.lines]
        for row in rows.tolist():
            record = {name: values[row] for name, values in zip(self.lines, columns, strict=True)}
            line = _encode(record).encode() + b"\n"
            self._bytes += len(line)
            if self._bytes > LINES_LIMIT:
                what = f"the lines of the columns {', '.join(self.lines)} have more than {LINES_LIMIT:,} bytes"
                raise TextRefused(what, "Choose fewer with --columns.")
            lines.append(line)
        return lines


def _leaves(file: BinaryIO) -> dict[str, int]:
    """Path of each column that is a leaf of the schema -> its number; without names that stand twice."""
    import pyarrow.parquet as pq

    schema = pq.ParquetFile(file).schema
    paths = [schema.column(number).path for number in range(len(schema))]
    return {path: number for number, path in enumerate(paths) if paths.count(path) == 1}


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_plain(kind: Any) -> bool:
    import pyarrow as pa

    numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return bool(numbers or pa.types.is_null(kind) or _is_text(kind))


def _as_list(array: Any) -> list[Any]:
    """The values as JSON can hold them. A text of a dictionary is one object for all rows that have it."""
    import pyarrow as pa

    if pa.types.is_dictionary(array.type):
        entries = _texts(array.dictionary)
        indices = array.indices.to_pylist()
        if any(index is not None and not 0 <= index < len(entries) for index in indices):
            raise HeaderError("a value is not in the dictionary of its column")
        return [None if index is None else entries[index] for index in indices]
    if _is_text(array.type):
        return _texts(array)
    if pa.types.is_floating(array.type):
        return [value if value is not None and math.isfinite(value) else None for value in array.to_pylist()]
    return list(array.to_pylist())


def _texts(array: Any) -> list[str | None]:
    import pyarrow as pa

    kind = pa.large_binary() if pa.types.is_large_string(array.type) else pa.binary()
    return [None if value is None else value.decode("utf-8", "replace") for value in array.cast(kind).to_pylist()]
