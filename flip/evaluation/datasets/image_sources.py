"""Images with labels or captions in a fixed order, for evaluation: from the shards of a manifest, or single files.

No image is ever replaced or skipped: a position in 0 .. count - 1 is the same image on every rank. ``digest`` is equal
for equal data, wherever they are stored; ``cache_key`` changes whenever a content may have changed. ``locate`` names an
image in messages, and ``remedy`` says what to do if it cannot be decoded.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flip.common.host import cores
from flip.data.chunk_reader import ChunkReader, Sample
from flip.data.decode import DecodeError, noting_place, open_image
from flip.data.manifest.manifest import Manifest
from flip.data.manifest.tar import SAMPLE_LIMIT
from flip.data.sample_members import encoded_image
from flip.data.storage.base import ObjectStat
from flip.data.storage.retry import DEFAULT_POLICY, RetryPolicy
from flip.runs.errors import ConfigError, DataError

DECODER_THREADS = min(8, cores())
"""Pillow releases the GIL while it decodes."""
READER_THREADS = 8
"""Requests of a batch at a time: storage answers each only after a while."""


class PreparedImage(NamedTuple):
    """One image as input of an encoder, with its label or captions."""

    id: int
    view: NDArray[Any]
    label: Any


class Shards:
    """All samples of a manifest but its exceptions, including the last ones, which training leaves out."""

    def __init__(self, manifest: Manifest | os.PathLike[str] | str, retry_policy: RetryPolicy = DEFAULT_POLICY) -> None:
        if isinstance(manifest, Manifest):
            self.manifest = manifest
        else:
            self.manifest = Manifest.load(manifest)
        if self.manifest.pages:
            what = "an evaluation set is of tars, and this manifest is of parquet files"
            remedy = "Write tars, with a label: flip shards make FILE --label COLUMN --out FOLDER"
            raise ConfigError(what, str(self.manifest.folder), remedy=remedy)
        self.where = self.root = str(self.manifest.folder)
        self.digest = self.manifest.digest
        self.cache_key = self.digest
        self.count = self.manifest.samples - len(self.manifest.exceptions)
        self._reader = ChunkReader(retry_policy=retry_policy)

    @cached_property
    def _ids(self) -> NDArray[np.int64]:
        exceptions = np.array(sorted(self.manifest.exceptions), dtype=np.int64)
        return np.setdiff1d(np.arange(self.manifest.samples), exceptions, assume_unique=True)

    def samples(self, positions: range) -> Iterator[tuple[int, Sample]]:
        """(id, members) at these positions, in order. Raises DataError, PermissionDenied or StorageError.

        All are held in memory, so that several can be read at a time: ask for one batch.
        """
        if self.manifest.exceptions:
            ids = self._ids[positions.start : positions.stop].tolist()
        else:
            ids = positions
        size = self.manifest.chunk
        by_chunk = {number: list(of_chunk) for number, of_chunk in groupby(ids, lambda id: id // size)}
        with ThreadPoolExecutor(READER_THREADS) as pool:
            chunks = pool.map(partial(self._reader.read_chunk, self.manifest), by_chunk)
            for of_chunk, chunk in zip(by_chunk.values(), chunks, strict=True):
                yield from ((id, chunk[id % size]) for id in of_chunk)

    def names(self, ids: Iterable[int]) -> Sequence[int | str]:
        """The images as a file of predictions names them: ids in the manifest ``where``."""
        return list(ids)

    def locate(self, id: int) -> str:
        shard, ordinal = self.manifest.locate(id)
        return f"{shard}, sample {ordinal}"

    def remedy(self, id: int) -> str:
        return f"Leave it out: flip shards exclude {shlex.quote(self.where)} --ids {id} --out NEW_FOLDER"


class File(NamedTuple):
    """One image file: a path or s3:// key, its class or its captions."""

    key: str
    label: int | None = None
    captions: tuple[str, ...] = ()


class ImageFiles:
    """Single image files, local or in object storage. The digest contains their names relative to ``root``."""

    def __init__(
        self, files: Sequence[File], root: str, where: str = "", retry_policy: RetryPolicy = DEFAULT_POLICY
    ) -> None:
        if not files:
            raise ConfigError("there are no images here", where or root)
        self.files = files
        self.root = root
        self.where = where or root
        self.count = len(files)
        self._reader = ChunkReader(retry_policy=retry_policy)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, sizes, labels and captions, in order; contents are not read."""
        return self._hash(lambda stat: stat.size)

    @cached_property
    def cache_key(self) -> str:
        return self._hash(list)

    def _hash(self, fields: Callable[[ObjectStat], Any]) -> str:
        text = hashlib.sha256()
        for file, stat in zip(self.files, self._stats, strict=True):
            row = [self._name(file), fields(stat), file.label, file.captions]
            text.update(json.dumps(row).encode("utf-8", "surrogatepass") + b"\n")
        return text.hexdigest()

    @cached_property
    def _stats(self) -> list[ObjectStat]:
        with ThreadPoolExecutor(READER_THREADS) as pool:
            return list(pool.map(self._stat, range(len(self.files))))

    def _stat(self, id: int) -> ObjectStat:
        key = self.files[id].key
        try:
            return self._reader.stat(key)
        except DataError as error:  # it speaks of a shard
            raise DataError("the image is missing, or the storage refuses it", key, remedy=self.remedy(id)) from error

    def _name(self, file: File) -> str:
        if "://" not in file.key:
            return os.path.relpath(file.key, self.root)
        return file.key.removeprefix(self.root)

    def names(self, ids: Iterable[int]) -> Sequence[int | str]:
        """The images as a file of predictions names them: paths below ``root``."""
        return [self._name(self.files[id]) for id in ids]

    def samples(self, positions: range) -> Iterator[tuple[int, Sample]]:
        """As ``Shards.samples``."""
        with ThreadPoolExecutor(READER_THREADS) as pool:
            yield from zip(positions, pool.map(self._sample, positions), strict=True)

    def _sample(self, id: int) -> Sample:
        file = self.files[id]
        size = self._stat(id).size
        if size > SAMPLE_LIMIT:
            what = f"an image file of {size:,} bytes, at most {SAMPLE_LIMIT:,} are read"
            raise DataError(what, file.key, remedy=self.remedy(id))
        members = {"jpg": self._reader.read(file.key, 0, size)}
        if file.label is not None:
            members["cls"] = str(file.label).encode()
        if file.captions:
            # a caption per line; the tokenizer collapses white space in the same way
            members["txt"] = "\n".join(" ".join(text.split()) for text in file.captions).encode()
        return {name: memoryview(data) for name, data in members.items()}

    def locate(self, id: int) -> str:
        return self.files[id].key

    def remedy(self, id: int) -> str:
        return f"Restore or repair the file, or take it out of {self.where}."


Images = Shards | ImageFiles


def prepare(
    images: Images, positions: range, view: Callable[[Image.Image], NDArray[Any]], read_label: Callable[[Sample], Any]
) -> list[PreparedImage]:
    """Read and decode the images at these positions, in several threads. Raises DataError if one cannot be decoded."""

    def decode(item: tuple[int, Sample]) -> PreparedImage:
        id, sample = item
        try:
            with noting_place(lambda: images.locate(id)):
                return PreparedImage(id, view(open_image(encoded_image(sample))), read_label(sample))
        except DecodeError as error:
            raise DataError(str(error), images.locate(id), remedy=images.remedy(id)) from error

    with ThreadPoolExecutor(DECODER_THREADS) as pool:
        return list(pool.map(decode, images.samples(positions)))


def prefetch(
    images: Images, parts: Sequence[range], view: Callable[[Image.Image], NDArray[Any]],
    read_label: Callable[[Sample], Any],
) -> Iterator[list[PreparedImage]]:  # fmt: skip
    """``prepare`` for each part in turn; the next part is prepared in a thread meanwhile."""
    with ThreadPoolExecutor(1) as reader:
        pending = None
        for part in parts:
            ready = pending
            pending = reader.submit(prepare, images, part, view, read_label)
            if ready is not None:
                yield ready.result()
        if pending is not None:
            yield pending.result()
