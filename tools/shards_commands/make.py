"""`shards make`: writes pictures with captions or labels as shards, from a folder or a table, and indexes them.

Pictures are stored as they are. A row whose picture cannot be decoded, or without text, is refused with a reason. Equal
sources give equal bytes.
"""

import argparse
import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tarfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from flip.concurrency import map_in_processes
from flip.config.host import cores
from flip.data import decode
from flip.data.decode import DecodeError
from flip.data.manifest import build
from flip.data.manifest.filters import column
from flip.data.manifest.manifest import Manifest, refuse_existing
from flip.data.manifest.tar import EXTENSIONS, SAMPLE_LIMIT, split
from flip.evaluation.prompts import Prompts, check_prompts, fill_templates
from flip.runs.errors import STORAGE_ERRNOS, ConfigError, DataError, StorageError, read_error
from flip.runs.files import create_file, fsync_path, output_folder, read_regular
from flip.runs.rundir import write_json
from jobs.common.terminal import ProgressBar
from tools.shards_commands.manifest import facts, kind
from tools.shards_commands.output import CommandResult, writing

IMAGE = ("image", "image_path", "path", "filepath", "file_path", "file_name", "filename")
"""Usual names of the column of pictures; case does not count."""
CAPTION = ("caption", "captions", "text", "title")
JSON_LINES = (".jsonl", ".json", ".ndjson")
FEW = 2000
"""Rows that need no other process."""
EXAMPLES = 10
"""Refused rows in the report."""
_NOT_OF_THE_FILE = (*STORAGE_ERRNOS, errno.EMFILE, errno.ENFILE)
"""Errors of the storage or the machine, for which no row is refused."""
_KEY = re.compile(r"[\w -]+(/[\w -]+)*")


class Row(NamedTuple):
    """A row of the source: its name in messages, the picture (path or bytes), and its texts."""

    where: str
    image: Any
    captions: Sequence[str] = ()
    label: str = ""
    key: str = ""
    fields: Mapping[str, Any] = {}
    """Other columns; they become the json member."""
    text: str = ""
    """A file with a caption per line, in place of ``captions``."""


def make(options: argparse.Namespace) -> CommandResult:
    """Write shards and manifest into a temporary folder, which gets its name when it is complete."""
    if options.per_shard < 1:
        raise ConfigError("must be at least 1", "--per-shard", options.per_shard)
    if not 0 <= options.min_complete <= 1:
        raise ConfigError("a share lies in 0 .. 1", "--min-complete", options.min_complete)
    templates = [text.replace("{label}", "{}") for text in options.template or ["a photo of a {}"]]
    check_prompts(Prompts(["label"], templates), "--template")
    rows, out = partial(_folder if os.path.isdir(options.source) else _table, options), Path(options.out).absolute()
    head = [(row.label, row.key) for row in rows(survey=True)]
    if not head:
        raise ConfigError("there are no pictures here", options.source)
    if options.key and len({key for _, key in head}) < len(head):
        twice = Counter(key for _, key in head).most_common(1)[0][0]
        raise ConfigError("two rows have the same key", "--key", twice, "Name a column of unique keys.")
    labels = sorted({label for label, _ in head if label})
    if all(map(str.isdecimal, labels)):
        labels.sort(key=int)
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    with writing(out), _sigterm_as_exit():
        refuse_existing(out)
        if out.exists() and any(out.iterdir()):
            raise ConfigError("the folder is not empty", str(out), remedy="Choose another --out.")
        output_folder(folder, new=True)
        try:
            report = _write(rows(), len(head), folder, labels, templates, options)
            os.rename(folder, out)
            fsync_path(out.parent)
        finally:
            for left in (folder, build.part_folder(folder)):
                shutil.rmtree(left, ignore_errors=True)
    return CommandResult(facts(Manifest.load(out)) | report)


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """End the process on SIGTERM by SystemExit, which removes the temporary folder; by default nothing would."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write(
    rows: Iterator[Row], count: int, folder: Path, labels: Sequence[str], templates: list[str],
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Write shards, their manifest and classes.json. Raises DataError if too few rows can be used."""
    size, workers, done, refused = options.per_shard, cores() if count > FEW else 0, 0, list[tuple[int, str, str]]()
    parts = iter(lambda: list(islice(rows, size)), [])
    tasks = ((str(folder / f"{n:05d}.tar"), n * size, part) for n, part in enumerate(parts))
    images = options.images or (options.source if os.path.isdir(options.source) else os.path.dirname(options.source))
    results = map_in_processes(_writer, (labels, templates, images), tasks, workers, "make")
    with ProgressBar("writing") as bar, closing(results):  # no process writes while the folder is removed
        for written, wrong in results:
            done += written
            refused += wrong
            bar(done, count)
    refused.sort()
    if count - len(refused) < max(1, options.min_complete * count):
        what = f"{len(refused):,} of {count:,} pictures cannot be used; the first is {refused[0][1]}: {refused[0][2]}"
        remedy = "Correct the source, or accept fewer with --min-complete."
        if os.path.isdir(options.source):
            remedy += " Each picture needs a .txt file of its name or, if none has one, a folder of its class."
        raise DataError(what, remedy=remedy)
    report: dict[str, Any] = {"rows": count, "refused": len(refused)}
    if labels:
        write_json(folder / "classes.json", {"names": labels, "templates": templates})
        report["classes"] = len(labels)
    if refused:
        report["refused_by_reason"] = dict(Counter(kind(reason) for *_, reason in refused).most_common())
        shown = refused if options.json else refused[:EXAMPLES]
        report["refused_rows"] = [{"row": where, "reason": reason} for _, where, reason in shown]
    with ProgressBar("indexing", "B") as bar:
        build.index([str(path) for path in folder.glob("*.tar")], folder, 0, bar, workers)
    return report


def _writer(labels: Sequence[str], templates: list[str], images: str) -> Callable[[Any], Any]:
    """The function that writes one shard: (path, number of the first row, rows) -> (rows, refused rows)."""
    classes = {label: number for number, label in enumerate(labels)}

    def write(task: tuple[str, int, list[Row]]) -> tuple[int, list[tuple[int, str, str]]]:
        path, first, rows = task
        refused = []
        with writing(path), create_file(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
            for number, row in enumerate(rows, first):
                try:
                    members = _members(row, classes, templates, images)
                except DecodeError as error:
                    refused.append((number, row.where, str(error)))
                    continue
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{row.key or f'{number:09d}'}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        if len(refused) == len(rows):
            os.unlink(path)
        else:
            fsync_path(path)
        return len(rows), refused

    return write


def _members(row: Row, classes: Mapping[str, int], templates: list[str], images: str) -> dict[str, bytes]:
    """The members of a sample. Raises DecodeError if the row cannot be used, StorageError if a file is unavailable."""
    if row.key and not _KEY.fullmatch(row.key):
        raise DecodeError(f"its key {row.key!r} has other characters than letters, digits, _, - and spaces")
    if row.key and split(f"{row.key}.txt") is None:
        raise DecodeError(f"its key {row.key!r} is in a folder __x__, of which webdataset reads no samples")
    if classes and not row.label:
        raise DecodeError("it has no label")
    lines = re.split(r"[\r\n]", _read(row.text, "text file").decode("utf-8", "replace")) if row.text else row.captions
    captions = [text for caption in lines if (text := " ".join(caption.split()))]
    captions = captions or (fill_templates(row.label, templates) if row.label else [])
    if not captions:
        raise DecodeError("it has no caption")
    image = row.image  # datasets.Image is a dict
    image = (image.get("bytes") or image.get("path")) if isinstance(image, dict) else image
    image = image if isinstance(image, bytes) else _read(os.path.join(images, str(image)), "image")
    decode.decode(image, "simplejpeg")
    form = decode.header(image)["format"].lower()
    members = {
        {"jpeg": "jpg", "mpo": "jpg"}.get(form, form): image,  # MPO: a JPEG file with further pictures at its end
        "txt": "\n".join(captions).encode("utf-8", "replace"),  # JSON and names of folders may be no UTF-8
    }
    if row.label:
        members["cls"] = str(classes[row.label]).encode()
    return members | ({"json": json.dumps(row.fields, default=str).encode()} if row.fields else {})


def _read(path: str, name: str) -> bytes:
    """The content of a picture or text file. Raises as ``_members``."""
    try:
        return read_regular(path, SAMPLE_LIMIT)
    except FileNotFoundError:
        what = "is a URL: download it first, for example with img2dataset" if "://" in path else "does not exist"
        raise DecodeError(f"the {name} {what}") from None
    except (OSError, ValueError) as error:  # ValueError: not a regular file, or too large for a sample
        what = f"the {name} cannot be read: {getattr(error, 'strerror', None) or error}"
        if isinstance(error, OSError) and error.errno in _NOT_OF_THE_FILE:
            raise StorageError(what, path, remedy="Give the same command again when it can be read.") from error
        raise DecodeError(what) from error


def _folder(options: argparse.Namespace, survey: bool = False) -> Iterator[Row]:
    """Pictures with a text file of the same name or, if there is none, in a folder per class, in random order."""
    root = Path(options.source)
    pictures = sorted(_pictures(root))
    captioned = any(text for _, text in pictures)
    if not captioned:  # neighbours in a shard are read together, and should not be of one class
        pictures.sort(key=lambda picture: hashlib.sha256(os.fsencode(picture[0].relative_to(root))).digest())
    for path, text in pictures:
        name = path.relative_to(root)
        label = name.parts[0].replace("_", " ") if not captioned and len(name.parts) > 1 else ""
        yield Row(str(path), str(name), (), label, "", {"file": str(name)}, text)


def _pictures(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[tuple[Path, str]]:
    """The pictures below a folder, and the text file of each, if any. Folders may be links; hidden files and folders
    are left out. Raises ConfigError, StorageError.
    """
    real = folder.resolve()
    if real in above:  # a link to a folder around it
        return
    try:
        with os.scandir(folder) as entries:
            paths = [(Path(entry), entry.is_dir()) for entry in entries if entry.name[0] != "."]
    except OSError as error:
        raise read_error(error, "the folder cannot be read", error.filename or str(folder)) from error
    files = {path for path, is_folder in paths if not is_folder}
    for path, is_folder in paths:
        if is_folder:
            yield from _pictures(path, above | {real})
        elif path.suffix[1:].lower() in EXTENSIONS:
            text = path.with_suffix(".txt")
            yield path, str(text) if text in files else ""


def _table(options: argparse.Namespace, survey: bool = False) -> Iterator[Row]:
    """The rows of a table. ``survey``: labels and keys alone, without reading pictures of a parquet file."""
    path = options.source
    records = _records(path)
    if Path(path).suffix.lower() not in JSON_LINES:  # of JSON lines, each may have other names
        records = islice(records, 1)
    names = list(dict.fromkeys(name for record in records for name in record))
    if not names:
        raise ConfigError("the table has no rows", path)
    image = _column(options.image, names, IMAGE, "--image", path)
    caption = _column(options.caption, names, CAPTION, "" if options.label else "--caption", path)
    label, key = (column(name, names, path) if name else "" for name in (options.label, options.key))
    used = (image, caption, label, key)
    for number, record in enumerate(_records(path, [name for name in (label, key) if name] if survey else None), 1):
        texts = record.get(caption)
        captions = texts if isinstance(texts, list) else [texts]
        text = [str(value) for value in captions if value is not None]
        of_class, name_of = ("" if record.get(name) is None else str(record[name]) for name in (label, key))
        rest = {name: value for name, value in record.items() if name not in used}
        yield Row(f"{path}, row {number}", record.get(image), text, of_class.replace("_", " "), name_of, rest)


def _column(given: str | None, names: Sequence[str], usual: Sequence[str], option: str, path: str) -> str:
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
    """The rows of a CSV or TSV file with a header, JSON lines, or ``columns`` of a parquet file. Raises ConfigError."""
    suffix, line = Path(path).suffix.lower(), 1
    try:
        if suffix == ".parquet":
            import pyarrow.parquet as pq

            with pq.ParquetFile(path) as table:
                for batch in table.iter_batches(100, columns=columns):
                    yield from batch.to_pylist() if batch.num_columns else [{}] * batch.num_rows
            return
        with open(path, encoding="utf-8-sig", newline="") as file:  # Excel's "CSV UTF-8" starts with a byte order mark
            # strict: a stray quote would silently join the rows up to the next one
            table = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
            for record in map(json.loads, file) if suffix in JSON_LINES else table:
                if not isinstance(record, dict):
                    raise ValueError("a line is no JSON object")
                if None in record:
                    raise ValueError(f"line {table.line_num} has more fields than the header; quote texts with commas")
                yield record
                line = table.line_num
    except OSError as error:
        raise ConfigError(f"the table cannot be read: {error.strerror or error}", path) from error
    except csv.Error as error:
        remedy = 'Put a text that holds a quote into quotes, and write the quote twice: "a ""big"" cat".'
        raise ConfigError(f"the table cannot be read after line {line}: {error}", path, remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the table cannot be read: {error}", path) from error
