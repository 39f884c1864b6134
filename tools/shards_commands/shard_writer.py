"""Writes the shards of one part of a source of `shards make`: the work of one process at a time.

Images are stored as they are. A row whose image cannot be used, that has no text, or whose files lie outside of
the source is refused with a reason. A part has numbers of rows and shards of its own, so that the shards do not depend
on the process that writes them.
"""

import base64
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from flip.data.decode import DecodeError, noting_place
from flip.data.manifest.tar import split
from flip.data.sample_members import FILE_FIELD
from flip.evaluation.datasets.prompts import fill_templates
from flip.files.creation import create_file, fsync_path
from tools.shards_commands.output import writing
from tools.shards_commands.source_files import NOT_UTF8, SourceFiles, is_unicode
from tools.shards_commands.source_images import image_facts
from tools.shards_commands.source_row import Row

TEST = "test"
"""Folder of the evaluation set of ``--split``, below OUT."""
_KEY = re.compile(r"[\w -]+(/[\w -]+)*")
_BLOCK = 512
_HASH_BYTES = 8
"""Of the SHA-1 of an image. Processors have instructions for it: it is three times as fast as BLAKE2b."""
_NAME_BYTES = 100
"""Longest name in a plain header of a tar."""
_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_HEADER_SUM = sum(_HEADER[:124]) + sum(_HEADER[135:148]) + 8 * ord(" ") + sum(_HEADER[156:])
"""The sum of a header, for its checksum, without its name and size; the checksum itself counts as spaces."""


class ShardPart(Protocol):
    """Consecutive rows of a source, which one process reads and writes."""

    @property
    def number(self) -> int:
        """Number of the first row in the source."""

    @property
    def shard(self) -> int:
        """Number of the first shard."""

    @property
    def folders(self) -> Sequence[str]:
        """Folders that contain the files; relative names are relative to the first one."""

    def read(self) -> Iterator[Row]:
        """The rows. Raises ConfigError, StorageError."""


class Writing(NamedTuple):
    """How all parts are written."""

    folder: str
    """The new folder of shards; the evaluation set has a folder ``TEST`` below it."""
    per_shard: int
    share: float | None
    """Share of the evaluation set; None: there is none."""
    check: str
    """How images are checked: ``source_images.CHECKS``."""
    labels: Sequence[str]
    templates: list[str]


@dataclass
class Written:
    """What became of the rows of one set, or of a part of it."""

    rows: int = 0
    refused: list[tuple[int, str, str]] = field(default_factory=list)
    """(number of the row in the source, its name, reason)."""
    transparent: int = 0
    """Images with transparent parts."""
    turned: int = 0
    """Images whose EXIF orientation turns them."""
    images: bytes = b""
    """A hash of 8 bytes of each image, by which duplicates are counted."""

    def add(self, other: "Written") -> None:
        self.rows += other.rows
        self.refused += other.refused
        self.transparent += other.transparent
        self.turned += other.turned
        self.images += other.images

    def counts(self) -> dict[str, int]:
        """Numbers of images, as the manifest's settings have them."""
        hashes = np.frombuffer(self.images, "<u8")
        duplicates = len(hashes) - len(np.unique(hashes))
        return {"transparent": self.transparent, "turned": self.turned, "duplicates": duplicates}


def part_writer(how: Writing) -> Callable[[ShardPart], dict[str, Written]]:
    """The function that writes the shards of one part, and returns what became of its rows by set: "" or ``TEST``."""
    classes = {label: number for number, label in enumerate(how.labels)}

    def write(part: ShardPart) -> dict[str, Written]:
        files = SourceFiles(part.folders)
        sets = {"": ShardWriter(how, classes, files, "", part.shard)}
        if how.share is not None:
            sets[TEST] = ShardWriter(how, classes, files, TEST, part.shard)
        rows = part.read()
        with closing(sets[""]), closing(sets.get(TEST, sets[""])):
            for number, row in enumerate(rows, part.number):
                name = ""
                if how.share is not None and is_test(row, how.share):
                    name = TEST
                sets[name].add(number, row)
        return {name: writer.written for name, writer in sets.items()}

    return write


def is_test(row: Row, share: float) -> bool:
    """Whether a row belongs to the evaluation set: by a hash of its image's name, key or content.

    Rows of one image stay together, and rows that are added later move no others.
    """
    if row.refused:
        return False
    name = os.fsencode(row.file or row.key)
    if not name:
        name = _content(row.image) or b""
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") < share * 2**64


class ShardWriter:
    """Writes rows of one set into shards. A shard without a sample is not created.

    Args:
        classes: label -> its number.
        name: the set's folder below that of all shards.
        shard: number of the first shard.
    """

    def __init__(self, how: Writing, classes: Mapping[str, int], files: SourceFiles, name: str, shard: int) -> None:
        self.written = Written()
        self._how = how
        self._classes = classes
        self._files = files
        self._folder = Path(how.folder) / name
        self._shard = shard
        self._path = self._folder / f"{shard:05d}.tar"
        self._tar: TarWriter | None = None
        self._hashes = list[bytes]()

    def add(self, number: int, row: Row) -> None:
        """Write a row, or note why it is refused. Raises StorageError, and what ``writing`` raises."""
        written = self.written
        if written.rows and written.rows % self._how.per_shard == 0:
            self._end_shard()
        written.rows += 1
        try:
            with noting_place(partial(str, row.where)):
                image = _image(row, self._files)
                members = self._members(row, image)
        except DecodeError as error:
            written.refused.append((number, row.where, str(error)))
            return
        self._hashes.append(hashlib.sha1(image, usedforsecurity=False).digest()[:_HASH_BYTES])
        with writing(self._path):
            if self._tar is None:
                self._tar = TarWriter(create_file(self._path))
            key = row.key or f"{number:09d}"
            self._tar.add((f"{key}.{extension}", data) for extension, data in members.items())

    def close(self) -> None:
        """Complete the last shard."""
        self._end_shard()
        self.written.images = b"".join(self._hashes)

    def _end_shard(self) -> None:
        if self._tar is not None:
            with writing(self._path):
                self._tar.close()
                fsync_path(self._path)
        self._tar = None
        self._shard += 1
        self._path = self._folder / f"{self._shard:05d}.tar"

    def _members(self, row: Row, image: bytes) -> dict[str, bytes]:
        """The members of a sample; counts its image. Raises DecodeError if the row cannot be used, StorageError."""
        if self._classes and not row.label:
            raise DecodeError("it has no label")
        lines: Sequence[str] = row.captions
        if row.text:
            lines = re.split(r"[\r\n]", self._files.read_text(row.text))
        captions = [text for caption in lines if (text := " ".join(caption.split()))]
        if not captions and row.label:
            captions = fill_templates(row.label, self._how.templates)
        if not captions:
            raise DecodeError("it has no caption")
        facts = image_facts(image, self._how.check)
        members = {facts.extension: image, "txt": "\n".join(captions).encode()}
        if row.label:
            members["cls"] = str(self._classes[row.label]).encode()
        fields = dict(row.fields)
        if row.file:
            fields = {FILE_FIELD: row.file} | fields
        if fields:
            members["json"] = _json(fields)
        self.written.transparent += facts.transparent
        self.written.turned += facts.turned
        return members


class TarWriter:
    """Writes files into a tar, byte for byte as ``tarfile`` does, in less time."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = 0

    def add(self, files: Iterable[tuple[str, bytes]]) -> None:
        """Write files, (name, content), by one request of the system."""
        pieces = list[bytes]()
        for name, data in files:
            pieces += (_tar_header(name, len(data)), data, bytes(-len(data) % _BLOCK))
        members = b"".join(pieces)
        self._file.write(members)
        self._size += len(members)

    def close(self) -> None:
        """Write the end marker, and close the file."""
        size = self._size + 2 * _BLOCK
        self._file.write(bytes(2 * _BLOCK + -size % tarfile.RECORDSIZE))
        self._file.close()


def _tar_header(name: str, size: int) -> bytes:
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > _NAME_BYTES or not name.isascii() or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf()
    digits = b"%011o" % size
    checksum = b"%06o\0 " % (_HEADER_SUM + sum(encoded) + sum(digits))
    return b"".join(
        (encoded.ljust(_NAME_BYTES, b"\0"), _HEADER[100:124], digits, _HEADER[135:148], checksum, _HEADER[156:])
    )


def _content(image: Any) -> bytes | None:
    """The bytes of an image of a parquet file; None if its row has a path instead."""
    # datasets.Image is a dict
    if isinstance(image, dict):
        content = image.get("bytes")
    else:
        content = image
    if isinstance(content, bytes):
        return content
    return None


def _image(row: Row, files: SourceFiles) -> bytes:
    """The bytes of a row's image. Raises DecodeError if the row cannot be used, StorageError."""
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


def _json(fields: Mapping[str, Any]) -> bytes:
    """The json member. Raises DecodeError if a column has bytes that are not UTF-8; names of files may have some."""
    text = _encode(fields)
    if "\\ud" in text:  # a lone surrogate, or a character beyond U+FFFF
        for name, value in fields.items():
            if name != FILE_FIELD and not is_unicode(json.dumps([name, value], default=_as_text, ensure_ascii=False)):
                raise DecodeError(f"its column {name!r} {NOT_UTF8}")
    return text.encode()


def _as_text(value: Any) -> str:
    """A value that JSON does not have, as text: bytes in base64."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value)


_encode = json.JSONEncoder(default=_as_text).encode
