"""A row of a source of `shards make`, and the columns of a table that it is read from."""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flip.data.decode import DecodeError
from flip.data.manifest.filters import column, listed
from flip.runs.errors import ConfigError
from tools.shards_commands import other_formats
from tools.shards_commands.source_files import text_of, texts_of

IMAGE = ("image", "image_path", "path", "filepath", "file_path", "file_name", "filename", "file", "img", "jpg")
"""Usual names of the column of images; case does not count."""
LABEL = ("label", "labels", "class", "classes", "class_name", "category", "cls", "target")
"""Usual names of the column of classes, for errors."""
CAPTION = ("caption", "captions", "text", "title")


class Row(NamedTuple):
    """A row of the source: its name in messages, the image (path or bytes), and its texts."""

    where: str
    image: Any = None
    captions: Sequence[str] = ()
    label: str = ""
    key: str = ""
    file: str = ""
    """The name of the image in the source; empty if it has none."""
    fields: Mapping[str, Any] = {}
    """Other columns; they become the json member."""
    text: str = ""
    """A file with a caption per line, in place of ``captions``."""
    refused: str = ""
    """Why the row cannot be used, if that is known before its files are read."""


class Wanted(NamedTuple):
    """The columns that options name; "" if an option is not given."""

    image: str = ""
    caption: str = ""
    label: str = ""
    key: str = ""
    fields: Sequence[str] = ()
    """Columns of the json member; empty: the default."""


class SourceColumns(NamedTuple):
    """The columns of a table; "" for each that it does not have."""

    image: str
    caption: str
    label: str
    key: str
    fields: Sequence[str] | None = None
    """Columns of the json member; None: all others."""
    classes: Sequence[str] = ()
    """Names of the classes that numbers of the label column stand for."""

    @property
    def used(self) -> tuple[str, ...]:
        """The columns that are read, but for those of the json member."""
        return tuple(filter(None, self[:4]))


def choose_columns(wanted: Wanted, names: Sequence[str], path: str) -> SourceColumns:
    """The columns of a table with these names: those that options name, or else the usual ones.

    Raises ConfigError if a column does not exist.
    """
    if not wanted.image and not _usual(names, IMAGE):
        other_formats.refuse_addresses(names, path)
    image = _column(wanted.image, names, IMAGE, "--image", path)
    caption = _column(wanted.caption, names, CAPTION, "" if wanted.label else "--caption", path)
    label, key = (column(name, names, path) if name else "" for name in (wanted.label, wanted.key))
    fields = None
    if wanted.fields:
        fields = [column(name, names, path) for name in wanted.fields]
    return SourceColumns(image, caption, label, key, fields)


def rows_of(records: Iterable[Mapping[str, Any]], columns: SourceColumns, path: str, first: int = 1) -> Iterator[Row]:
    """The rows of records of a table, of which the first one has the number ``first`` in messages."""
    used = set(columns.used)
    fields = columns.fields
    for number, record in enumerate(records, first):
        where = f"{path}, row {number}"
        image = record.get(columns.image)
        try:
            captions = texts_of(record.get(columns.caption), "caption")
            label = _label_text(record.get(columns.label), columns.classes).replace("_", " ")
            key = text_of(record.get(columns.key), "key")
        except DecodeError as error:
            yield Row(where, refused=str(error))
            continue
        if isinstance(image, list):
            yield Row(where, refused="its image is a list: write a row for each image")
            continue
        if fields is None:
            rest = {name: value for name, value in record.items() if name not in used}
        else:
            rest = {name: record[name] for name in fields if name in record}
        yield Row(where, image, captions, label, key, _file_name(image), rest)


def _label_text(value: Any, classes: Sequence[str]) -> str:
    """A label as text; of a ClassLabel its name. Raises DecodeError."""
    if not classes or not isinstance(value, int):
        return text_of(value, "label")
    if value == -1:  # datasets: the label is unknown
        return ""
    if not 0 <= value < len(classes):
        raise DecodeError("its label is a number without a name in the schema")
    return classes[value]


def _file_name(image: Any) -> str:
    """The name that a table gives an image: its path, or that of Hugging Face's ``{bytes, path}``."""
    if isinstance(image, dict):  # datasets.Image
        image = image.get("path")
    if isinstance(image, str):
        return image
    return ""


def _usual(names: Sequence[str], usual: Sequence[str]) -> str:
    """The first usual name among the columns; "" if there is none."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in usual if name in lower), "")


def _column(given: str, names: Sequence[str], usual: Sequence[str], option: str, path: str) -> str:
    """The column that is given, or else the first usual one; "" if there is none and no ``option`` to name it.

    Raises ConfigError.
    """
    if given:
        return column(given, names, path)
    name = _usual(names, usual)
    if not name and option:
        remedy = f"Name it with {option} COLUMN."
        classes = [name for name in names if name.lower() in LABEL]
        if option == "--caption" and classes:
            label = shlex.quote(classes[0])
            remedy = f"If {classes[0]} has classes: --label {label}, of which captions are made. {remedy}"
        raise ConfigError(f"no column is called {', '.join(usual)}", path, listed(names), remedy)
    return name
