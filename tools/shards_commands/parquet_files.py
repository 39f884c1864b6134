"""Reads the rows of parquet files for `shards make`, with memory that does not depend on the number of rows.

A file is read from its start to its end in batches of a few MiB: pyarrow reads a page at a time, not a row group.
"""

import errno
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from flip.runs.errors import STORAGE_ERRNOS, ConfigError, StorageError
from tools.shards_commands import other_formats
from tools.shards_commands.source_files import SourceFiles

SUFFIXES = (".parquet", ".pq")
IMAGE_LISTS = "a list of images"
_MARK = b"PAR1"
_BUFFER = 1 << 20
"""Bytes of a column that are read at once."""
_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 256
"""A batch has at most this many rows, or about this many bytes."""
_DATASETS = b"huggingface"
"""Key of the schema's metadata under which ``datasets`` describes the columns of a parquet file, as JSON."""
_BYTES = "bytes"
_IMAGES = "images"
_VECTORS = "vectors"
_UNKNOWN = "no value"


class ParquetFacts(NamedTuple):
    """What the footer of a parquet file states."""

    path: str
    rows: int
    largest_group: int
    """Rows of its largest row group."""
    kinds: dict[str, str]
    """Column -> the kind of its values, such as "text"; equal for types that differ in their encoding only."""
    classes: dict[str, Any]
    """Column -> the names of the classes of a ClassLabel, not yet checked."""

    def is_payload(self, name: str) -> bool:
        """Whether a column holds bytes, images or vectors, which belong into the json member only if named."""
        return any(word in self.kinds[name].split() for word in (_BYTES, _IMAGES, _VECTORS))


def is_parquet(path: str) -> bool:
    return Path(path).suffix.lower() in SUFFIXES


@contextmanager
def table_errors(path: str) -> Iterator[None]:
    """Converts errors of reading a table to ConfigError, or StorageError if the storage failed."""
    try:
        yield
    except OSError as error:
        what = f"the table cannot be read: {error.strerror or error}"
        if error.errno in STORAGE_ERRNOS:
            raise StorageError(what, path, remedy="Give the same command again when it can be read.") from error
        remedy = "Give the path of a table, or of a folder of images." if error.errno == errno.ENOENT else ""
        raise ConfigError(what, path, remedy=remedy) from error
    except (ValueError, RecursionError, NotImplementedError) as error:
        raise ConfigError(f"the table cannot be read: {error}", path) from error


def open_table(path: str, files: SourceFiles | None) -> BinaryIO:
    """Open a table: below the folders of ``files``, or, if the user named its path, anywhere."""
    if files is None:
        return open(path, "rb")
    return files.open(path)


def facts(path: str, files: SourceFiles | None) -> ParquetFacts:
    """The facts of a parquet file. Raises ConfigError, StorageError."""
    with open_parquet(path, files) as table:
        metadata = table.metadata
        groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        kinds = {field.name: kind_of(field.type) for field in table.schema_arrow}
        classes = _class_labels(table.schema_arrow.metadata or {})
    return ParquetFacts(path, sum(groups), max(groups, default=0), kinds, classes)


@contextmanager
def open_parquet(path: str, files: SourceFiles | None) -> Iterator[Any]:
    """Open a parquet file. Raises ConfigError if it is not one or cannot be read, StorageError."""
    import pyarrow.parquet as pq

    with table_errors(path), open_table(path, files) as file:
        _check_marks(path, file)
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER) as table:
            yield table


def records(
    table: Any, names: Sequence[str] | None = None, start: int = 0, stop: int | None = None
) -> Iterator[dict[str, Any]]:
    """The rows ``start`` to ``stop`` of an open parquet file, each with the columns ``names`` (None: all)."""
    metadata = table.metadata
    if stop is None:
        stop = metadata.num_rows
    groups, skip = _groups(metadata, start, stop)
    left = stop - start
    for batch in table.iter_batches(_batch_rows(metadata), row_groups=groups, columns=names, use_threads=False):
        size = batch.num_rows
        if skip < size and left:
            batch = batch.slice(skip, left)
            left -= batch.num_rows
            yield from _records_of(batch)
        skip = max(0, skip - size)


def class_names(facts: ParquetFacts, label: str) -> list[str]:
    """The names of the classes of a label column: those that ``datasets`` writes into the schema of a parquet file.

    Empty if the column is no ClassLabel. Raises ConfigError.
    """
    if label not in facts.classes:
        return []
    names = facts.classes[label]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        remedy = "Write the names as text into the column."
        raise ConfigError("the schema has no names of the classes of this column", facts.path, label, remedy)
    return names


def kind_of(type_: Any) -> str:
    """The kind of the values of a type of pyarrow: text, number, bytes, ..., "list of KIND", "object of KIND KIND"."""
    import pyarrow as pa
    import pyarrow.types as types

    if isinstance(type_, pa.BaseExtensionType):
        return kind_of(type_.storage_type)
    if types.is_dictionary(type_):
        return kind_of(type_.value_type)
    if types.is_null(type_):
        return _UNKNOWN
    if types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_):
        return "text"
    if types.is_binary(type_) or types.is_large_binary(type_) or types.is_binary_view(type_):
        return _BYTES
    if types.is_fixed_size_binary(type_):
        return _BYTES
    if types.is_integer(type_) or types.is_floating(type_) or types.is_decimal(type_):
        return "number"
    if types.is_struct(type_):
        return _object_kind(type_)
    if types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_):
        return _list_kind(kind_of(type_.value_type))
    if types.is_map(type_):
        return f"map of {kind_of(type_.item_type)}"
    return str(type_)


def is_unknown(kind: str) -> bool:
    """Whether a column has no value in a file, so that its kind is not known."""
    return kind == _UNKNOWN


def _list_kind(kind: str) -> str:
    if kind in ("number", _VECTORS):
        return _VECTORS
    if kind in (_BYTES, _IMAGES):
        return IMAGE_LISTS
    return f"list of {kind}"


def _object_kind(type_: Any) -> str:
    names = {type_.field(number).name for number in range(type_.num_fields)}
    if "bytes" in names and names <= {"bytes", "path"}:  # datasets.Image
        return _IMAGES
    inner = sorted({kind_of(type_.field(number).type) for number in range(type_.num_fields)})
    return " ".join(["object of", *inner])


def _check_marks(path: str, file: BinaryIO) -> None:
    """Raise ConfigError if a file does not begin and end as a parquet file."""
    head = file.read(other_formats.HEAD)
    other_formats.refuse_file(Path(path), head, SUFFIXES)
    file.seek(-len(_MARK), 2)
    end = file.read()
    if end != _MARK:
        remedy = "Download or copy it again: its end is missing."
        raise ConfigError("the table cannot be read: a parquet file without a footer", path, end, remedy)
    file.seek(0)


def _groups(metadata: Any, start: int, stop: int) -> tuple[list[int], int]:
    """The row groups that hold rows ``start`` to ``stop``, and the rows of the first one before ``start``."""
    groups = list[int]()
    skip = 0
    first = 0
    for number in range(metadata.num_row_groups):
        rows = metadata.row_group(number).num_rows
        if first < stop and start < first + rows:
            if not groups:
                skip = start - first
            groups.append(number)
        first += rows
    return groups, skip


def _batch_rows(metadata: Any) -> int:
    """Rows of a batch, by the size of the rows: images may have kilobytes or many megabytes."""
    size = 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size = max(size, group.total_byte_size // max(1, group.num_rows))
    return int(min(_BATCH_ROWS, max(1, _BATCH_BYTES // size)))


def _records_of(batch: Any) -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    if not names:
        return iter([{} for _ in range(batch.num_rows)])
    columns = [column.to_pylist() for column in batch.columns]
    return (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))


def _class_labels(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    """The columns that are a ClassLabel of ``datasets``, with their names; empty if another program wrote the file."""
    try:
        features = json.loads(metadata.get(_DATASETS, b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    if not isinstance(features, dict):
        return {}
    return {
        name: feature.get("names")
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }
