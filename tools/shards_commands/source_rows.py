"""The rows of a source of `shards make`: a folder of pictures, or a table."""

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from flip.data.decode import DecodeError
from flip.data.manifest.filters import column
from flip.data.manifest.tar import EXTENSIONS
from flip.runs.errors import ConfigError, read_error
from tools.shards_commands.source_files import OUTSIDE, SourceFiles, encoding_of, text_of, texts_of

IMAGE = ("image", "image_path", "path", "filepath", "file_path", "file_name", "filename", "file")
"""Usual names of the column of pictures; case does not count."""
CAPTION = ("caption", "captions", "text", "title")
JSON_LINES = (".jsonl", ".json", ".ndjson")
_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons"}


class Row(NamedTuple):
    """A row of the source: its name in messages, the picture (path or bytes), and its texts."""

    where: str
    image: Any = None
    captions: Sequence[str] = ()
    label: str = ""
    key: str = ""
    file: str = ""
    """The name of the picture in the source; empty if it has none."""
    fields: Mapping[str, Any] = {}
    """Other columns; they become the json member."""
    text: str = ""
    """A file with a caption per line, in place of ``captions``."""
    refused: str = ""
    """Why the row cannot be used, if that is known before its files are read."""


@dataclass(frozen=True)
class Source:
    """A folder or a table, the folders that its files must be in, and the columns that options name."""

    path: str
    images: str = ""
    image: str = ""
    caption: str = ""
    label: str = ""
    key: str = ""

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

    def rows(self, survey: bool = False) -> Iterator[Row]:
        """The rows, in the order of the shards. ``survey``: labels and keys only, without pictures of a parquet file.

        Raises ConfigError, StorageError.
        """
        if self.is_folder:
            return _of_folder(self)
        return _of_table(self, survey)


def _of_folder(source: Source) -> Iterator[Row]:
    """Pictures with a text file of the same name or, if there is none, in a folder per class, in random order."""
    root = Path(source.path)
    files = SourceFiles(source.folders)
    pictures = sorted(_pictures(root, files))
    captioned = any(text for _, text, _ in pictures)
    if not captioned:  # neighbours in a shard are read together, and should not be of one class
        pictures.sort(key=lambda picture: hashlib.sha256(os.fsencode(picture[0].relative_to(root))).digest())
    for path, text, refused in pictures:
        name = path.relative_to(root)
        if refused:
            yield Row(str(path), refused=refused)
            continue
        try:
            label = ""
            if not captioned and len(name.parts) > 1:
                label = text_of(name.parts[0].replace("_", " "), "folder's name")
        except DecodeError as error:
            yield Row(str(path), refused=str(error))
            continue
        yield Row(str(path), str(path.absolute()), (), label, "", str(name), {}, text and os.path.abspath(text))


def _pictures(
    folder: Path, files: SourceFiles, above: frozenset[Path] = frozenset()
) -> Iterator[tuple[Path, str, str]]:
    """The pictures below a folder, the text file of each, if any, and why it is refused.

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
            yield from _pictures(path, files, above | {real})
        elif path.suffix[1:].lower() in EXTENSIONS:
            text = path.with_suffix(".txt")
            yield path, str(text) if text in names else "", ""


def _of_table(source: Source, survey: bool) -> Iterator[Row]:
    path = source.path
    records = _records(path)
    if Path(path).suffix.lower() not in JSON_LINES:  # of JSON lines, each may have other names
        records = islice(records, 1)
    names = list(dict.fromkeys(name for record in records for name in record))
    if not names:
        raise ConfigError("the table has no rows", path)
    image = _column(source.image, names, IMAGE, "--image", path)
    caption = _column(source.caption, names, CAPTION, "" if source.label else "--caption", path)
    label, key = (column(name, names, path) if name else "" for name in (source.label, source.key))
    used = (image, caption, label, key)
    columns = None
    if survey:
        columns = [name for name in (label, key) if name]
    for number, record in enumerate(_records(path, columns), 1):
        where = f"{path}, row {number}"
        picture = record.get(image)
        try:
            captions = texts_of(record.get(caption), "caption")
            of_class = text_of(record.get(label), "label").replace("_", " ")
            name_of = text_of(record.get(key), "key")
        except DecodeError as error:
            yield Row(where, refused=str(error))
            continue
        rest = {name: value for name, value in record.items() if name not in used}
        yield Row(where, picture, captions, of_class, name_of, _file_name(picture), rest)


def _file_name(picture: Any) -> str:
    """The name that a table gives a picture: its path, or that of Hugging Face's ``{bytes, path}``."""
    if isinstance(picture, dict):  # datasets.Image
        picture = picture.get("path")
    if isinstance(picture, str):
        return picture
    return ""


def _refuse_other_delimiter(header: Sequence[str], delimiter: str, path: str) -> None:
    """Raise ConfigError if a header is one column only because its delimiter is another one."""
    for mark, name in _DELIMITERS.items():
        if len(header) == 1 and mark != delimiter and mark in header[0]:
            wanted = _DELIMITERS[delimiter]
            raise ConfigError(
                f"its columns are separated by {name}, not by {wanted}", path, header[0], f"Save it with {wanted}."
            )


def _column(given: str, names: Sequence[str], usual: Sequence[str], option: str, path: str) -> str:
    """The column that is given, or else the first usual one; "" if there is none and no ``option`` to name it.

    Raises ConfigError.
    """
    if given:
        return column(given, names, path)
    lower = {name.lower(): name for name in reversed(names)}
    for name in usual:
        if name in lower:
            return lower[name]
    if not option:
        return ""
    raise ConfigError(f"no column is called {', '.join(usual)}", path, ", ".join(names), f"Name it with {option}.")


def _records(path: str, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a CSV or TSV file with a header, JSON lines, or ``columns`` of a parquet file. Raises ConfigError.

    Bytes that are not UTF-8 become lone surrogates, by which ``text_of`` refuses their rows.
    """
    suffix = Path(path).suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet(path, columns)
            return
        with open(path, "rb") as file:
            encoding = encoding_of(file.read(4))
        if encoding == "utf-8-sig":
            errors = "surrogateescape"
        else:
            errors = "strict"
        with open(path, encoding=encoding, errors=errors, newline="") as lines:
            if suffix in JSON_LINES:
                yield from _json_lines(lines)
            else:
                yield from _csv(lines, "\t" if suffix == ".tsv" else ",", path)
    except OSError as error:
        raise ConfigError(f"the table cannot be read: {error.strerror or error}", path) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the table cannot be read: {error}", path) from error


def _parquet(path: str, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as table:
        for batch in table.iter_batches(100, columns=columns):
            yield from batch.to_pylist() if batch.num_columns else [{}] * batch.num_rows


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
