"""The rows of a source of `shards make`: a folder of pictures, or a table."""

import csv
import hashlib
import io
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from flip.config.resolve import TABLES
from flip.data.decode import DecodeError
from flip.data.manifest.filters import column, listed
from flip.data.manifest.tar import EXTENSIONS
from flip.runs.errors import ConfigError, read_error
from tools.shards_commands import image_folders
from tools.shards_commands.image_folders import FILE_NAME
from tools.shards_commands.source_files import OUTSIDE, SourceFiles, encoding_of, text_of, texts_of

IMAGE = ("image", "image_path", "path", "filepath", "file_path", "file_name", "filename", "file")
"""Usual names of the column of pictures; case does not count."""
LABEL = ("label", "labels", "class", "classes", "class_name", "category", "cls", "target")
"""Usual names of the column of classes, for errors."""
CAPTION = ("caption", "captions", "text", "title")
JSON_LINES = (".jsonl", ".json", ".ndjson")
_DATASETS = b"huggingface"
"""Key of the schema's metadata under which ``datasets`` describes the columns of a parquet file, as JSON."""
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
        if not self.is_folder:
            return _of_table(self, survey)
        files = SourceFiles(self.folders)
        pictures = sorted(_pictures(Path(self.path), files))
        metadata = self._metadata(files, any(text for _, text, _ in pictures))
        if metadata is None:
            return _of_folder(self, pictures)
        return _of_metadata(self, metadata, pictures, files, survey)

    def _metadata(self, files: SourceFiles, has_texts: bool) -> Path | None:
        """The file with the captions of a folder in Hugging Face's imagefolder layout; None if it has another layout.

        Raises ConfigError.
        """
        root = Path(self.path)
        tables = []
        for path in image_folders.metadata_files(root):
            names = _column_names(str(path), files)
            is_of_pictures = FILE_NAME in names
            has_captions = self.caption or self.label or any(name.lower() in CAPTION for name in names)
            if is_of_pictures and has_captions:
                tables.append(path)
        if not tables:
            columns = [f"--{name}" for name in ("image", "caption", "label", "key") if getattr(self, name)]
            if columns:
                raise ConfigError("names a column of a table, but this is a folder", ", ".join(columns), self.path)
            return None
        image_folders.refuse_several_splits(root, tables)
        if has_texts:
            what = f"both {tables[0].name} and text files beside the pictures can hold the captions"
            remedy = f"Give {tables[0]} as the source, or move it away."
            raise ConfigError(what, self.path, remedy=remedy)
        return tables[0]


def _of_metadata(
    source: Source, metadata: Path, pictures: Sequence[tuple[Path, str, str]], files: SourceFiles, survey: bool
) -> Iterator[Row]:
    """The rows of a metadata file, then the pictures that it does not name, which are refused."""
    folder = metadata.parent.relative_to(source.path)
    named = set[str]()
    table = replace(source, path=str(metadata), image=source.image or FILE_NAME)
    for row in _of_table(table, survey, files):
        name = os.path.normpath(folder / row.file)
        named.add(name)
        if row.refused:
            yield row
        else:
            yield row._replace(image=name, file=name)
    for path, _, refused in pictures:
        if os.path.normpath(path.relative_to(source.path)) not in named:
            yield Row(str(path), refused=refused or f"no row of {metadata.name} names it")


def _of_folder(source: Source, pictures: list[tuple[Path, str, str]]) -> Iterator[Row]:
    """Pictures with a text file of the same name or, if there is none, in a folder per class, in random order."""
    root = Path(source.path)
    captioned = any(text for _, text, _ in pictures)
    depth = 0
    if not captioned:  # neighbours in a shard are read together, and should not be of one class
        depth = image_folders.class_depth(root, [path for path, _, refused in pictures if not refused])
        pictures.sort(key=lambda picture: hashlib.sha256(os.fsencode(picture[0].relative_to(root))).digest())
    for path, text, refused in pictures:
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


def _check_table(path: str) -> None:
    """Raise ConfigError if the source is an address, or a file in a form that is not read."""
    if "://" in path:
        remedy = "Download it, and name the file or the folder."
        raise ConfigError("a source is a folder or a table on this machine, not an address", "SOURCE", path, remedy)
    if Path(path).suffix.lower() not in (*TABLES, *JSON_LINES, ".txt", "") and os.path.exists(path):
        remedy = f"Save it as CSV, for example. Tables are: {', '.join(TABLES)}."
        raise ConfigError("tables of this form are not read", path, remedy=remedy)


def _column_names(path: str, files: SourceFiles | None) -> list[str]:
    records = _records(path, files)
    if Path(path).suffix.lower() not in JSON_LINES:  # of JSON lines, each may have other names
        records = islice(records, 1)
    return list(dict.fromkeys(name for record in records for name in record))


def _of_table(source: Source, survey: bool, files: SourceFiles | None = None) -> Iterator[Row]:
    """The rows of a table. ``files``: where the table itself must be, if its path is not the user's."""
    path = source.path
    _check_table(path)
    names = _column_names(path, files)
    if not names:
        raise ConfigError("the table has no rows", path, remedy="It needs a header, and a row per picture.")
    image = _column(source.image, names, IMAGE, "--image", path)
    caption = _column(source.caption, names, CAPTION, "" if source.label else "--caption", path)
    label, key = (column(name, names, path) if name else "" for name in (source.label, source.key))
    used = (image, caption, label, key)
    columns = None
    if survey and files is None:  # a metadata file holds no pictures, and names them
        columns = [name for name in (label, key) if name]
    classes = _class_names(path, label, files)
    for number, record in enumerate(_records(path, files, columns), 1):
        where = f"{path}, row {number}"
        picture = record.get(image)
        try:
            captions = texts_of(record.get(caption), "caption")
            of_class = _label_text(record.get(label), classes).replace("_", " ")
            name_of = text_of(record.get(key), "key")
        except DecodeError as error:
            yield Row(where, refused=str(error))
            continue
        rest = {name: value for name, value in record.items() if name not in used}
        yield Row(where, picture, captions, of_class, name_of, _file_name(picture), rest)


def _class_names(path: str, label: str, files: SourceFiles | None) -> list[str]:
    """The names of the classes of a label column: those that ``datasets`` writes into the schema of a parquet file.

    Empty if the column is no ClassLabel. Raises ConfigError.
    """
    if not label or Path(path).suffix.lower() != ".parquet":
        return []
    import pyarrow.parquet as pq

    with _table_errors(path), _open(path, files) as file:
        metadata = pq.read_schema(file).metadata or {}
    try:
        feature = json.loads(metadata.get(_DATASETS, b"{}"))["info"]["features"][label]
    except (ValueError, KeyError, TypeError, RecursionError):  # written by another program
        return []
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return []
    names = feature.get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        remedy = "Write the names as text into the column."
        raise ConfigError("the schema has no names of the classes of this column", path, label, remedy)
    return names


def _label_text(value: Any, classes: Sequence[str]) -> str:
    """A label as text; of a ClassLabel its name. Raises DecodeError."""
    if not classes or not isinstance(value, int):
        return text_of(value, "label")
    if value == -1:  # datasets: the label is unknown
        return ""
    if not 0 <= value < len(classes):
        raise DecodeError("its label is a number without a name in the schema")
    return classes[value]


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
    remedy = f"Name it with {option} COLUMN."
    classes = [name for name in names if name.lower() in LABEL]
    if option == "--caption" and classes:
        remedy = f"If {classes[0]} has classes: --label {shlex.quote(classes[0])}, of which captions are made. {remedy}"
    raise ConfigError(f"no column is called {', '.join(usual)}", path, listed(names), remedy)


def _records(
    path: str, files: SourceFiles | None = None, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of a CSV or TSV file with a header, JSON lines, or ``columns`` of a parquet file. Raises ConfigError.

    Bytes that are not UTF-8 become lone surrogates, by which ``text_of`` refuses their rows.
    """
    suffix = Path(path).suffix.lower()
    with _table_errors(path), _open(path, files) as file:
        if suffix == ".parquet":
            yield from _parquet(file, columns)
            return
        encoding = encoding_of(file.read(4))
        file.seek(0)
        if encoding == "utf-8-sig":
            errors = "surrogateescape"
        else:
            errors = "strict"
        lines = io.TextIOWrapper(file, encoding=encoding, errors=errors, newline="")
        if suffix in JSON_LINES:
            yield from _json_lines(lines)
        else:
            yield from _csv(lines, "\t" if suffix == ".tsv" else ",", path)


def _open(path: str, files: SourceFiles | None) -> BinaryIO:
    if files is None:
        return open(path, "rb")
    return files.open(path)


@contextmanager
def _table_errors(path: str) -> Iterator[None]:
    """Converts errors of reading a table to ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"the table cannot be read: {error.strerror or error}", path) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the table cannot be read: {error}", path) from error


def _parquet(file: BinaryIO, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
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
