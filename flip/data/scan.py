"""One pass over a shard: where its samples lie, and the CRC32 of each.

The headers are walked in memory with the same walker that training uses.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import zlib
from itertools import pairwise
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flip.data import tar
from flip.data.manifest import BLOCK
from flip.data.reader import Reader
from flip.data.storage import Stat, is_remote
from flip.exitcodes import DataError, PermissionDenied, StorageError


class Scan(NamedTuple):
    """What one pass over a shard finds. The first sample starts at 0, whatever stands before it."""

    starts: NDArray[np.uint32]
    """Per sample: the block at which it starts ..."""
    blocks: NDArray[np.uint32]
    """... how many blocks there are to the next one's start or the end ..."""
    crcs: NDArray[np.uint32]
    """... and the CRC32 of those."""
    end: int
    """The byte at which its members end."""


def scan(key: str, stat: Stat, reader: Reader) -> Scan:
    """Walk a shard: a file in a memory map, an object in memory, read once. Raises DataError naming shard and byte."""
    if not stat.size:
        raise DataError("the shard is empty", key, remedy=_REMEDY)
    if is_remote(key):
        return _scan(key, memoryview(_fetched(key, stat, reader)))
    with _open(key) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole, memoryview(whole) as view:
        return _scan(key, view)


def _scan(key: str, view: memoryview) -> Scan:
    try:
        found = [(sample.start, sample.end) for sample in tar.samples(view, whole=True)]
    except tar.Broken as error:
        raise DataError(f"not a whole tar: {error}", key, remedy=_REMEDY) from error
    end = found[-1][1] if found else 0
    borders = [0, *(start for start, _ in found[1:]), end] if found else []
    crcs = []
    for start, stop in pairwise(borders):
        with view[start:stop] as piece:
            crcs.append(zlib.crc32(piece))
    places = np.array(borders, dtype=np.int64) // BLOCK
    return Scan(places[:-1].astype(np.uint32), np.diff(places).astype(np.uint32), np.array(crcs, dtype=np.uint32), end)


def _fetched(key: str, stat: Stat, reader: Reader) -> bytearray:
    """All of an object. A byte that was spoiled on its way here would be the truth from now on, so the whole is checked
    by the object's ETag or, where that is no MD5 (uploaded in parts, encrypted), by reading it once more."""
    whole, digest = _read(key, stat, reader)
    if digest != stat.etag and _read(key, stat, reader)[1] != digest:
        raise StorageError("two readings of the shard differ", key, remedy="Look at the network, then index again.")
    return whole


def _read(key: str, stat: Stat, reader: Reader) -> tuple[bytearray, str]:
    whole = bytearray()
    for at in range(0, stat.size, _PIECE):
        whole += reader.read(key, at, min(at + _PIECE, stat.size), stat.etag)
    return whole, hashlib.md5(whole, usedforsecurity=False).hexdigest()


_PIECE = 32 << 20
"""Bytes of one request."""

_REMEDY = "Fetch or make the shard again, or leave it out."


def file_size(key: str) -> int:
    """Bytes of a shard that is a file. Raises as ``scan`` does."""
    with _open(key) as file:
        return os.fstat(file.fileno()).st_size


def _open(key: str) -> BinaryIO:
    try:
        return open(key, "rb")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError("the shard is missing", key, remedy="Check the path and the braces.") from None
    except IsADirectoryError:
        raise DataError("a folder is no shard", key, remedy=f"Name its files: '{key}/*.tar'") from None
    except PermissionError:
        raise PermissionDenied("the shard may not be read", key, remedy="Grant read access to it.") from None
    except OSError as error:
        raise StorageError(f"the shard cannot be read: {error.strerror}", key) from error
