"""Images with a label or captions in a fixed order, for evaluation: shards of a manifest, or single files.

Nothing here is replaced or left out by itself: position 0 .. count - 1 names the same image on every rank.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flip.data.chunk_reader import ChunkReader, Sample
from flip.data.decode import DecodeError, encoded_image, open_image
from flip.data.manifest.manifest import Manifest
from flip.data.manifest.tar import SAMPLE_LIMIT
from flip.data.storage.base import ObjectStat
from flip.data.storage.retry import RetryPolicy
from flip.runs.errors import ConfigError, DataError

DECODERS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Threads that decode: Pillow lets go of Python while it works."""


class Viewed(NamedTuple):
    """One image as a model takes it. ``more``: what else was read of its sample."""

    id: int
    view: NDArray[Any]
    more: Any


class Images(Protocol):
    """What a data set in any form can do."""

    where: str
    """Its folder or file, for messages."""

    @property
    def count(self) -> int:
        """How many images there are to score."""

    @property
    def digest(self) -> str:
        """Equal for equal data, wherever it lies."""

    @property
    def stamp(self) -> str:
        """Another one wherever a content may be: what may be kept of the images is kept under it."""

    def samples(self, positions: range) -> Iterator[tuple[int, Sample]]:
        """(id, members) of these positions in order. Raises DataError, PermissionDenied or StorageError."""

    def locate(self, id: int) -> str:
        """What a person calls this image."""

    def remedy(self, id: int) -> str:
        """What to do about this image where it cannot be decoded."""


class Shards:
    """The samples of a manifest, those that it excepts left out; the tail that training leaves out included."""

    def __init__(self, manifest: Manifest | os.PathLike[str] | str, patience: RetryPolicy | None = None) -> None:
        self.manifest = manifest if isinstance(manifest, Manifest) else Manifest.load(manifest)
        self.where, self.digest = str(self.manifest.folder), self.manifest.digest
        self.stamp = self.digest
        self.count = self.manifest.samples - len(self.manifest.exceptions)
        self._reader = ChunkReader(retry_policy=patience)

    @cached_property
    def _good(self) -> NDArray[np.int64]:
        bad = np.array(sorted(self.manifest.exceptions), dtype=np.int64)
        return np.setdiff1d(np.arange(self.manifest.samples), bad, assume_unique=True)

    def samples(self, positions: range) -> Iterator[tuple[int, Sample]]:
        ids = self._good[positions.start : positions.stop].tolist() if self.manifest.exceptions else positions
        held, chunk = -1, list[Sample]()
        for id in ids:
            j, place = divmod(id, self.manifest.chunk)
            if j != held:
                held, chunk = j, self._reader.read_chunk(self.manifest, j)
            yield id, chunk[place]

    def locate(self, id: int) -> str:
        shard, ordinal = self.manifest.locate(id)
        return f"{shard}, sample {ordinal}"

    def remedy(self, id: int) -> str:
        return f"Leave it out: python tools/shards.py exclude {self.where} --ids {id} --out NEW_FOLDER"


class File(NamedTuple):
    """One image file: a path or s3:// key, its class or its captions."""

    key: str
    label: int | None = None
    captions: tuple[str, ...] = ()


class Files:
    """Single image files, local or in object storage. ``root``: their names in the digest are relative to it."""

    def __init__(self, files: Sequence[File], root: str, where: str = "", patience: RetryPolicy | None = None) -> None:
        if not files:
            raise ConfigError("there are no images here", where or root)
        self.files, self.root, self.where, self.count = files, root, where or root, len(files)
        self._reader = ChunkReader(retry_policy=patience)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, sizes, labels and captions, in order: contents are not read for it."""
        return self._hash(lambda stat: stat.size)

    @cached_property
    def stamp(self) -> str:
        return self._hash(list)

    def _hash(self, of: Callable[[ObjectStat], Any]) -> str:
        text = hashlib.sha256()
        for file in self.files:
            name = os.path.relpath(file.key, self.root) if "://" not in file.key else file.key.removeprefix(self.root)
            row = [name, of(self._reader.stat(file.key)), file.label, file.captions]
            text.update(json.dumps(row).encode("utf-8", "surrogatepass") + b"\n")
        return text.hexdigest()

    def samples(self, positions: range) -> Iterator[tuple[int, Sample]]:
        for id in positions:
            file = self.files[id]
            size = self._reader.stat(file.key).size
            if size > SAMPLE_LIMIT:
                what = f"an image file of {size:,} bytes, at most {SAMPLE_LIMIT:,} are read"
                raise DataError(what, file.key, remedy=self.remedy(id))
            members = {"jpg": self._reader.read(file.key, 0, size)}
            if file.label is not None:
                members["cls"] = str(file.label).encode()
            if file.captions:
                # one line each, as the tokenizer would make of it: a line is a caption
                members["txt"] = "\n".join(" ".join(text.split()) for text in file.captions).encode()
            yield id, {name: memoryview(data) for name, data in members.items()}

    def locate(self, id: int) -> str:
        return self.files[id].key

    def remedy(self, id: int) -> str:
        return f"Mend the file, or take it out of {self.where}."


def viewed(
    images: Images, positions: range, view: Callable[[Image.Image], NDArray[Any]], of: Callable[[Sample], Any]
) -> list[Viewed]:
    """These positions, decoded by several threads. Raises DataError where one cannot be decoded."""

    def one(id: int, sample: Sample) -> Viewed:
        try:
            return Viewed(id, view(open_image(encoded_image(sample))), of(sample))
        except DecodeError as error:
            raise DataError(str(error), images.locate(id), remedy=images.remedy(id)) from error

    with ThreadPoolExecutor(DECODERS) as pool:
        return list(pool.map(lambda pair: one(*pair), images.samples(positions)))


def ahead(
    images: Images, parts: Sequence[range], view: Callable[[Image.Image], NDArray[Any]], of: Callable[[Sample], Any]
) -> Iterator[list[Viewed]]:
    """``viewed`` of each part in turn, the next one read and decoded while the caller is at work on the last."""
    with ThreadPoolExecutor(1) as reader:
        waiting = None
        for part in parts:
            found, waiting = waiting, reader.submit(viewed, images, part, view, of)
            if found is not None:
                yield found.result()
        if waiting is not None:
            yield waiting.result()
