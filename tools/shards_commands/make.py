"""`shards make`: writes pictures with captions or labels as shards, from a folder or a table, and indexes them.

Pictures are stored as they are. A row whose picture cannot be decoded, that has no text, or whose files lie outside of
the source is refused with a reason. Equal sources give equal bytes.
"""

import argparse
import errno
import hashlib
import io
import json
import os
import re
import signal
import sys
import tarfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from flip.concurrency import map_in_processes
from flip.config.host import cores
from flip.data import decode
from flip.data.decode import FILE_FIELD, DecodeError, noting_place
from flip.data.manifest import build
from flip.data.manifest.manifest import Manifest, refuse_existing
from flip.data.manifest.tar import split
from flip.evaluation.datasets.prompts import Prompts, check_prompts, fill_templates
from flip.files import deletion
from flip.files.creation import create_file, fsync_path, output_folder
from flip.runs.errors import ConfigError, DataError
from flip.runs.rundir import write_json
from jobs.common.terminal import ProgressBar
from tools.shards_commands.manifest import kind, manifest_facts
from tools.shards_commands.output import CLASSES, CommandResult, writing
from tools.shards_commands.source_files import NOT_UTF8, SourceFiles, is_unicode
from tools.shards_commands.source_rows import Row, Source

FEW = 2000
"""Rows that need no other process."""
EXAMPLES = 10
"""Refused rows in the report."""
TEST = "test"
"""Folder of the evaluation set of ``--split``, below OUT."""
_KEY = re.compile(r"[\w -]+(/[\w -]+)*")


@dataclass
class Written:
    """What became of the rows of one shard, or of all shards so far."""

    rows: int = 0
    refused: list[tuple[int, str, str]] = field(default_factory=list)
    """(number of the row in the set, its name, reason)."""
    transparent: int = 0
    """Pictures with transparent parts."""
    turned: int = 0
    """Pictures whose EXIF orientation turns them."""
    pictures: bytes = b""
    """A hash of 8 bytes of each picture, by which duplicates are counted."""

    def add(self, other: "Written") -> None:
        self.rows += other.rows
        self.refused += other.refused
        self.transparent += other.transparent
        self.turned += other.turned
        self.pictures += other.pictures

    def counts(self) -> dict[str, int]:
        """Numbers of pictures, as the manifest's settings have them."""
        hashes = np.frombuffer(self.pictures, "<u8")
        duplicates = len(hashes) - len(np.unique(hashes))
        return {"transparent": self.transparent, "turned": self.turned, "duplicates": duplicates}


def make(options: argparse.Namespace) -> CommandResult:
    """Write shards and manifest into a temporary folder, which gets its name when it is complete."""
    templates = [text.replace("{label}", "{}") for text in options.template or ["a photo of a {}"]]
    check_prompts(Prompts(["label"], templates), "--template")
    if options.images and not os.path.isdir(options.images):
        raise ConfigError("no such folder", "--images", options.images)
    columns = {name: getattr(options, name) or "" for name in ("images", "image", "caption", "label", "key")}
    source = Source(options.source, **columns)
    out = Path(options.out).absolute()
    rows = list(_labels_and_keys(source))
    _check_keys(source, rows)
    labels = _class_names(rows)
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    with writing(out), _sigterm_as_exit():
        refuse_existing(out)
        if out.exists() and any(out.iterdir()):
            raise _occupied(out)
        output_folder(folder, new=True)
        try:
            writer = SetWriter(source, len(rows), labels, templates, options)
            sets = _write_sets(writer, folder, options.split)
            _publish(folder, out)
        finally:
            for left in (folder, build.part_folder(folder)):
                deletion.discard_own_folder(left)
    report = manifest_facts(Manifest.load(out)) | sets[""]
    if TEST in sets:
        report[TEST] = manifest_facts(Manifest.load(out / TEST)) | sets[TEST]
    return CommandResult(report)


def _occupied(out: Path) -> ConfigError:
    return ConfigError("the folder is not empty", str(out), remedy="Choose another --out.")


def _publish(folder: Path, out: Path) -> None:
    """Give the complete folder its name. Raises ConfigError if another command was faster."""
    try:
        os.rename(folder, out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        refuse_existing(out)
        raise _occupied(out) from error
    fsync_path(out.parent)


def _check_keys(source: Source, rows: Sequence[tuple[str, str | None]]) -> None:
    """Raise ConfigError if there are no rows, or if two have the same key."""
    if not rows:
        remedy = "Name a folder with pictures, such as .jpg or .png, or a table with a row per picture."
        raise ConfigError("there are no pictures here", source.path, remedy=remedy)
    keys = Counter(key for _, key in rows if key is not None)
    if source.key and keys and (most := keys.most_common(1)[0])[1] > 1:
        raise ConfigError("two rows have the same key", "--key", most[0], "Name a column of unique keys.")


def _class_names(rows: Sequence[tuple[str, str | None]]) -> list[str]:
    """The labels, in the order of their numbers."""
    labels = sorted({label for label, _ in rows if label})
    if all(map(str.isdecimal, labels)):
        labels.sort(key=int)
    return labels


def _labels_and_keys(source: Source) -> Iterator[tuple[str, str | None]]:
    """Label and key of each row; the key of a refused row is None."""
    for row in source.rows(survey=True):
        yield row.label, None if row.refused else row.key


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """End the process on SIGTERM by SystemExit, which removes the temporary folder; by default nothing would."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_sets(writer: "SetWriter", folder: Path, share: float | None) -> dict[str, dict[str, Any]]:
    """Write the training set and, for a share, the evaluation set; returns their reports by folder."""
    if share is None:
        return {"": writer.write(writer.source.rows(), folder)[0]}
    output_folder(folder / TEST, new=True)
    sets = dict[str, dict[str, Any]]()
    pictures = dict[str, Any]()
    for name, wanted in (("", False), (TEST, True)):
        rows = (row for row in writer.source.rows() if is_test(row, share) == wanted)
        sets[name], pictures[name] = writer.write(rows, folder / name)
    common = len(np.intersect1d(pictures[""], pictures[TEST]))
    if common:
        sets[TEST]["pictures_of_the_training_set"] = common
    return sets


def is_test(row: Row, share: float) -> bool:
    """Whether a row belongs to the evaluation set: by a hash of its picture's name, key or content.

    Rows of one picture stay together, and rows that are added later move no others.
    """
    if row.refused:
        return False
    name = os.fsencode(row.file or row.key)
    if not name:
        name = _content(row.image) or b""
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") < share * 2**64


class SetWriter:
    """Writes sets of rows of a source.

    Args:
        count: rows of the source, for progress.
        labels: names of the classes.
    """

    def __init__(
        self, source: Source, count: int, labels: Sequence[str], templates: list[str], options: argparse.Namespace
    ) -> None:
        self.source = source
        self.options = options
        self._count = count
        self._labels = labels
        self._templates = templates
        self._workers = cores() if count > FEW else 0

    def write(self, rows: Iterator[Row], folder: Path) -> tuple[dict[str, Any], Any]:
        """Write shards, their manifest and classes.json; returns the report and the hashes of the pictures.

        Raises DataError if too few rows can be used.
        """
        written = self._write_shards(rows, folder)
        written.refused.sort()
        self._check_refused(written, folder)
        pictures = written.counts()
        report: dict[str, Any] = {"rows": written.rows, "refused": len(written.refused)}
        if self._labels:
            write_json(folder / CLASSES, {"names": self._labels, "templates": self._templates})
            report["classes"] = len(self._labels)
        report |= {f"{name}_pictures": count for name, count in pictures.items() if count}
        if advice := _advice(pictures):
            report["advice"] = advice
        if written.refused:
            reasons = Counter(kind(reason) for *_, reason in written.refused)
            report["refused_by_reason"] = dict(reasons.most_common())
            if self.options.json:
                shown = written.refused
            else:
                shown = written.refused[:EXAMPLES]
            report["refused_rows"] = [{"row": where, "reason": reason} for _, where, reason in shown]
        with ProgressBar("indexing", "B") as bar:
            shards = [str(path) for path in folder.glob("*.tar")]
            build.index(shards, folder, 0, bar, self._workers, settings={"pictures": pictures})
        return report, np.frombuffer(written.pictures, "<u8")

    def _write_shards(self, rows: Iterator[Row], folder: Path) -> Written:
        size = self.options.per_shard
        total = Written()
        parts = iter(lambda: list(islice(rows, size)), [])
        tasks = ((str(folder / f"{n:05d}.tar"), n * size, part) for n, part in enumerate(parts))
        arguments = (self._labels, self._templates, self.source.folders)
        results = map_in_processes(_writer, arguments, tasks, self._workers, "make")
        with ProgressBar("writing") as bar, closing(results):  # no process writes while the folder is removed
            for written in results:
                total.add(written)
                bar(total.rows, self._count)
        return total

    def _check_refused(self, written: Written, folder: Path) -> None:
        """Raise DataError if too few rows can be used."""
        rows = written.rows
        refused = written.refused
        if rows - len(refused) >= max(1, self.options.min_complete * rows):
            return
        if not rows:
            remedy = "Choose another --split, or make one set of all rows."
            raise DataError(f"no picture falls into the set {folder.name!r}", "--split", self.options.split, remedy)
        what = f"{len(refused):,} of {rows:,} pictures cannot be used; the first is {refused[0][1]}: {refused[0][2]}"
        remedy = "Correct the source, or accept fewer with --min-complete."
        if "does not exist" in refused[0][2] and not self.source.is_folder:
            remedy = f"Paths in the table are relative to {self.source.folders[0]}: name their folder with --images."
        if self.source.is_folder:
            remedy += " Each picture needs a .txt file of its name or, if none has one, a folder of its class."
        raise DataError(what, remedy=remedy)


def _advice(pictures: Mapping[str, int]) -> list[str]:
    """Settings that training needs for these pictures."""
    advice = []
    if pictures["transparent"]:
        advice.append("transparent pictures: set data.to_rgb: flatten, because recipe portable2 drops transparency")
    if pictures["turned"]:
        advice.append("turned pictures: set data.exif: apply, because by default training does not turn them")
    if pictures["duplicates"]:
        advice.append("duplicates: equal pictures of one batch count as each other's negatives")
    return advice


def _writer(labels: Sequence[str], templates: list[str], folders: Sequence[str]) -> Callable[[Any], Written]:
    """The function that writes one shard: (path, number of the first row, rows) -> what became of the rows."""
    classes = {label: number for number, label in enumerate(labels)}
    files = SourceFiles(folders)

    def write(task: tuple[str, int, list[Row]]) -> Written:
        path, first, rows = task
        written = Written(len(rows))
        with writing(path), create_file(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
            for number, row in enumerate(rows, first):
                try:
                    with noting_place(partial(str, row.where)):
                        image = _image(row, files)
                        members = _members(row, image, classes, templates, files)
                except DecodeError as error:
                    written.refused.append((number, row.where, str(error)))
                    continue
                _count_picture(image, written)
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{row.key or f'{number:09d}'}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        if len(written.refused) == len(rows):
            deletion.delete_file(path)
        else:
            fsync_path(path)
        return written

    return write


def _count_picture(image: bytes, written: Written) -> None:
    written.transparent += decode.is_transparent(image)
    written.turned += decode.is_turned(image)
    written.pictures += hashlib.blake2b(image, digest_size=8).digest()


def _content(image: Any) -> bytes | None:
    """The bytes of a picture of a parquet file; None if its row has a path instead."""
    # datasets.Image is a dict
    if isinstance(image, dict):
        content = image.get("bytes")
    else:
        content = image
    if isinstance(content, bytes):
        return content
    return None


def _image(row: Row, files: SourceFiles) -> bytes:
    """The bytes of a row's picture. Raises DecodeError if the row cannot be used, StorageError."""
    if row.refused:
        raise DecodeError(row.refused)
    if row.key and not _KEY.fullmatch(row.key):
        raise DecodeError(f"its key {row.key!r} has other characters than letters, digits, _, - and spaces")
    if row.key and split(f"{row.key}.txt") is None:
        raise DecodeError(f"its key {row.key!r} is in a folder __x__, of which webdataset reads no samples")
    content = _content(row.image)
    if content is not None:
        return content
    if isinstance(row.image, dict):
        path = row.image.get("path")
    else:
        path = row.image
    if path is None:
        raise DecodeError("it has no image")
    return files.read(str(path), "image")


def _members(
    row: Row, image: bytes, classes: Mapping[str, int], templates: list[str], files: SourceFiles
) -> dict[str, bytes]:
    """The members of a sample. Raises DecodeError if the row cannot be used, StorageError if a file is unavailable."""
    if classes and not row.label:
        raise DecodeError("it has no label")
    lines: Sequence[str] = row.captions
    if row.text:
        lines = re.split(r"[\r\n]", files.read_text(row.text))
    captions = [text for caption in lines if (text := " ".join(caption.split()))]
    if not captions and row.label:
        captions = fill_templates(row.label, templates)
    if not captions:
        raise DecodeError("it has no caption")
    decode.decode(image, "simplejpeg")
    form = decode.header(image)["format"].lower()
    members = {
        {"jpeg": "jpg", "mpo": "jpg"}.get(form, form): image,  # MPO: a JPEG file with further pictures at its end
        "txt": "\n".join(captions).encode(),
    }
    if row.label:
        members["cls"] = str(classes[row.label]).encode()
    fields = ({FILE_FIELD: row.file} if row.file else {}) | dict(row.fields)
    if fields:
        members["json"] = _json(fields)
    return members


def _json(fields: Mapping[str, Any]) -> bytes:
    """The json member. Raises DecodeError if a column has bytes that are not UTF-8; names of files may have some."""
    for name, value in fields.items():
        if name != FILE_FIELD and not is_unicode(json.dumps([name, value], default=str, ensure_ascii=False)):
            raise DecodeError(f"its column {name!r} {NOT_UTF8}")
    return json.dumps(fields, default=str).encode()
