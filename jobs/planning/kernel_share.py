"""Which share of a data set's images does the visible-patch kernel take? Asked of a sample of its shards.

Plans use the share: images that the kernel refuses (PNG, progressive, CMYK and others) are decoded as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

import numpy as np

from flip.config import schema
from flip.config.resolve import manifest_record, resolve_path
from flip.config.schema import Data
from flip.data import kernel
from flip.data.chunk_reader import ChunkReader, Sample
from flip.data.decode import DecodeError
from flip.data.decode_counts import reasons_text, share_text
from flip.data.manifest.manifest import Manifest
from flip.data.order import permute
from flip.data.prefetch import chunk_bytes
from flip.data.sample_members import encoded_image
from flip.runs.errors import FlipError

_T = TypeVar("_T")

IMAGES = 64
"""Images of a data set that are looked at."""
CHUNKS = 8
"""Chunks from which they are taken at least, if these are not larger than ``BYTES``."""
BYTES = 32 << 20
"""Bytes read at most, but for the first chunk."""
SECONDS = 10.0
"""Deadline of a read."""


@dataclass(frozen=True)
class KernelSample:
    """What the kernel answered for a sample of images."""

    taken: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Reason -> images."""

    @property
    def images(self) -> int:
        return self.taken + self.refused.total()

    @property
    def share(self) -> float:
        """Of the images that the kernel takes; 1 without images."""
        if not self.images:
            return 1.0
        return self.taken / self.images

    def __add__(self, other: KernelSample) -> KernelSample:
        return KernelSample(self.taken + other.taken, self.refused + other.refused)

    def summary(self) -> str:
        """As "it takes 20 of 64 images sampled (31.2 %); others: 44 PNG"."""
        text = f"it takes {self.taken} of {self.images} images sampled ({share_text(self.taken, self.images)})"
        if self.refused:
            text += f"; others: {reasons_text(self.refused)}"
        return text


def sample(manifest: str, exif: str) -> KernelSample:
    """The answers of this machine's kernel for images of a data set; empty if the set or the kernel is not here.

    ``exif``: ``data.exif``. Reads the data set once per process. Raises DataError, StorageError, PermissionDenied.
    """
    if manifest_record(manifest) is None or kernel.why_unavailable():
        return KernelSample()
    return _sample(resolve_path(manifest), exif)


def known_share(manifest: str, exif: str) -> float:
    """The share of images that the kernel takes; 1, as plans without data assume, if they cannot be read."""
    with suppress(FlipError):
        return sample(manifest, exif).share
    return 1.0


@lru_cache(maxsize=64)
def _sample(folder: str, exif: str) -> KernelSample:
    manifest = Manifest.load(folder)
    reader = ChunkReader(deadline=SECONDS)
    visible = kernel.VisiblePatches(Data(exif=exif), schema.Augment(), schema.ImageTower())
    chunks = _chunks(manifest)
    each = -(-IMAGES // max(1, len(chunks)))
    taken = 0
    refused = Counter[str]()
    for j in chunks:
        for member in _drawn(1 + j, _usable(manifest, j, reader), each):
            with suppress(DecodeError):  # a sample without an image
                reason = visible.why_refused(encoded_image(member))
                if reason:
                    refused[reason] += 1
                else:
                    taken += 1
    return KernelSample(taken, refused)


def _chunks(manifest: Manifest) -> list[int]:
    """Chunks of a data set, drawn at random, with at most ``BYTES`` together."""
    chosen = list[int]()
    size = 0
    for j in _drawn(0, range(manifest.chunks), max(CHUNKS, -(-IMAGES // manifest.chunk))):
        size += chunk_bytes(manifest, j)
        if chosen and size > BYTES:
            break
        chosen.append(j)
    return chosen


def _usable(manifest: Manifest, j: int, reader: ChunkReader) -> list[Sample]:
    ids = manifest.chunk_ids(j)
    if all(id in manifest.exceptions for id in ids):  # may be damaged
        return []
    members = reader.read_chunk(manifest, j)
    return [member for id, member in zip(ids, members, strict=True) if id not in manifest.exceptions]


def _drawn(number: int, items: Sequence[_T], count: int) -> list[_T]:
    """At most ``count`` different items, drawn at random, equal in every process. ``number``: of the draw."""
    length = len(items)
    if length <= count:
        return list(items)
    return [items[i] for i in permute(0, number, length, np.arange(count)).tolist()]
