"""The rows of a folder of images, or of a table of text, for `shards make`."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from flip.common.image_formats import is_image_name
from flip.data.decode import DecodeError
from flip.runs.errors import ConfigError, read_error
from tools.shards_commands import image_folders, other_formats, parquet_files
from tools.shards_commands.image_folders import FILE_NAME
from tools.shards_commands.parquet_files import is_parquet, open_table, table_errors
from tools.shards_commands.source_files import OUTSIDE, SourceFiles, encoding_of, text_of
from tools.shards_commands.source_row import CAPTION, Row, Wanted, choose_columns, rows_of

JSON_LINES = (".jsonl", ".json", ".ndjson")
TABLES = (".csv", ".tsv", *JSON_LINES, *parquet_files.SUFFIXES)
"""Names of tables."""
_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons"}


@dataclass(frozen=True)
class Source:
    """A folder or a table of text, and the folder of its images that an option names."""

    path: str
    images: str
    wanted: Wanted

    @property
    def is_folder(self) -> bool:
        return os.path.isdir(self.path)

    @property
    def folders(self) -> list[str]:
        """Folders that contain the files; paths in a table are relative to the first one."""
        if self.is_folder:
            own = self.path
        else:
            own = os.path.dirname(self.path) or "."
        others = []
        if self.images:
            others = [self.images]
        if self.is_folder:
            return [own, *others]
        return [*others, own]

    def rows(self) -> Iterator[Row]:
        """The rows, in the order of the shards. Raises ConfigError, StorageError."""
        if not self.is_folder:
            return _of_table(self.path, self.wanted)
        files = SourceFiles(self.folders)
        images = sorted(_images(Path(self.path), files))
        metadata = self._metadata(files, any(text for _, text, _ in images))
        if metadata is None:
            return _of_folder(self, images)
        return _of_metadata(self, metadata, images, files)

    def _metadata(self, files: SourceFiles, has_texts: bool) -> Path | None:
        """The file with the captions of a folder in Hugging Face's imagefolder layout; None if it has another layout.

        Raises ConfigError.
        """
        root = Path(self.path)
        tables = []
        for path in image_folders.metadata_files(root):
            names = _column_names(str(path), files)
            is_of_images = FILE_NAME in names
            wanted = self.wanted
            has_captions = wanted.caption or wanted.label or any(name.lower() in CAPTION for name in names)
            if is_of_images and has_captions:
                tables.append(path)
        if not tables:
            options = {**self.wanted._asdict(), "columns": self.wanted.fields}
            columns = [f"--{name}" for name in ("image", "caption", "label", "key", "columns") if options[name]]
            if columns:
                raise ConfigError("names a column of a table, but this is a folder", ", ".join(columns), self.path)
            return None
        image_folders.refuse_several_splits(root, tables)
        if has_texts:
            what = f"both {tables[0].name} and text files beside the images can hold the captions"
            remedy = f"Give {tables[0]} as the source, or move it away."
            raise ConfigError(what, self.path, remedy=remedy)
        return tables[0]


def _of_metadata(
    source: Source, metadata: Path, images: Sequence[tuple[Path, str, str]], files: SourceFiles
) -> Iterator[Row]:
    """The rows of a metadata file, then the images that it does not name, which are refused."""
    folder = metadata.parent.relative_to(source.path)
    named = set[str]()
    wanted = source.wanted._replace(image=source.wanted.image or FILE_NAME)
    for row in _of_table(str(metadata), wanted, files):
        name = os.path.normpath(folder / row.file)
        named.add(name)
        if row.refused:
            yield row
        else:
            yield row._replace(image=name, file=name)
    for path, _, refused in images:
        if os.path.normpath(path.relative_to(source.path)) not in named:
            yield Row(str(path), refused=refused or f"no row of {metadata.name} names it")


def _of_folder(source: Source, images: list[tuple[Path, str, str]]) -> Iterator[Row]:
    """Images with a text file of the same name or, if there is none, in a folder per class, in random order."""
    root = Path(source.path)
    captioned = any(text for _, text, _ in images)
    depth = 0
    if not captioned:  # neighbours in a shard are read together, and should not be of one class
        depth = image_folders.class_depth(root, [path for path, _, refused in images if not refused])
        images.sort(key=lambda image: hashlib.sha256(os.fsencode(image[0].relative_to(root))).digest())
    for path, text, refused in images:
        name = path.relative_to(root)
        if refused:
            yield Row(str(path), refused=refused)
            continue
        try:
            label = ""
            if not captioned and len(name.parts) > depth + 1:
                label = text_of(name.parts[depth].replace("_", " "), "folder's name")
        except DecodeError as error:
            yield Row(str(path), refused=str(error))
            continue
        yield Row(str(path), str(path.absolute()), (), label, "", str(name), {}, text and os.path.abspath(text))


def _images(folder: Path, files: SourceFiles, above: frozenset[Path] = frozenset()) -> Iterator[tuple[Path, str, str]]:
    """The images below a folder, the text file of each, if any, and why it is refused.

    A folder may be a link to another one below ``files``. Hidden files and folders are left out. Raises ConfigError,
    StorageError.
    """
    real = folder.resolve()
    if real in above:  # a link to a folder around it
        return
    if not files.contains(str(folder)):
        yield folder, "", f"the folder {OUTSIDE}"
        return
    try:
        with os.scandir(folder) as entries:
            paths = [(Path(entry), entry.is_dir()) for entry in entries if entry.name[0] != "."]
    except OSError as error:
        raise read_error(error, "the folder cannot be read", error.filename or str(folder)) from error
    names = {path for path, is_folder in paths if not is_folder}
    for path, is_folder in paths:
        if is_folder:
            yield from _images(path, files, above | {real})
        elif is_image_name(path):
            text = path.with_suffix(".txt")
            yield path, str(text) if text in names else "", ""


def _column_names(path: str, files: SourceFiles | None) -> list[str]:
    records = _records(path, files)
    if not path.lower().endswith(JSON_LINES):  # of JSON lines, each may have other names
        records = islice(records, 1)
    return list(dict.fromkeys(name for record in records for name in record))


def _of_table(path: str, wanted: Wanted, files: SourceFiles | None = None) -> Iterator[Row]:
    """The rows of a table. ``files``: where the table itself must be, if its path is not the user's."""
    names = _column_names(path, files)
    if not names:
        raise ConfigError("the table has no rows", path, remedy="It needs a header, and a row per image.")
    columns = choose_columns(wanted, names, path)
    if is_parquet(path):
        classes = parquet_files.class_names(parquet_files.facts(path, files), columns.label)
        columns = columns._replace(classes=classes)
    yield from rows_of(_records(path, files), columns, path)


def _refuse_other_delimiter(header: Sequence[str], delimiter: str, path: str) -> None:
    """Raise ConfigError if a header is one column only because its delimiter is another one."""
    for mark, name in _DELIMITERS.items():
        if len(header) == 1 and mark != delimiter and mark in header[0]:
            wanted = _DELIMITERS[delimiter]
            raise ConfigError(
                f"its columns are separated by {name}, not by {wanted}", path, header[0], f"Save it with {wanted}."
            )


def _records(path: str, files: SourceFiles | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a CSV or TSV file with a header, JSON lines, or a parquet file. Raises ConfigError, StorageError.

    Bytes that are not UTF-8 become lone surrogates, by which ``text_of`` refuses their rows.
    """
    if is_parquet(path):
        with parquet_files.open_parquet(path, files) as table:
            yield from parquet_files.records(table)
        return
    suffix = Path(path).suffix.lower()
    with table_errors(path), open_table(path, files) as file:
        head = file.read(other_formats.HEAD)
        other_formats.refuse_file(Path(path), head, TABLES)
        encoding = encoding_of(head)
        file.seek(0)
        if encoding == "utf-8-sig":
            errors = "surrogateescape"
        else:
            errors = "strict"
        lines = io.TextIOWrapper(file, encoding=encoding, errors=errors, newline="")
        if suffix in JSON_LINES:
            other_formats.refuse_json(path, lines.read(other_formats.JSON_HEAD))
            lines.seek(0)
            yield from _json_lines(lines)
        else:
            yield from _csv(lines, "\t" if suffix == ".tsv" else ",", path)


def _json_lines(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines. Raises ValueError with the number of the line."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:  # it says "line 1": of the text of this line
            raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"line {number}: a line is no JSON object; write one object per line")
        yield record


def _csv(lines: Iterator[str], delimiter: str, path: str) -> Iterator[dict[str, Any]]:
    """The rows of a table with a header. Raises ConfigError, ValueError."""
    line = 1
    try:
        # strict: a stray quote would silently join the rows up to the next one
        table = csv.DictReader(lines, delimiter=delimiter, strict=True)
        _refuse_other_delimiter(table.fieldnames or (), delimiter, path)
        for record in table:
            if None in record:
                raise ValueError(f"line {table.line_num} has more fields than the header; quote texts with commas")
            yield record
            line = table.line_num
    except csv.Error as error:
        remedy = 'Put a text that holds a quote into quotes, and write the quote twice: "a ""big"" cat".'
        raise ConfigError(f"the table cannot be read after line {line}: {error}", path, remedy=remedy) from error
