"""Lists of uids, which select samples of shards: the ``.npy`` files of DataComp's subsets.

A uid is 32 hexadecimal digits in the ``json`` member of a sample (field ``uid``). A list has a row per uid: two uint64
(dtype "u8,u8", the first and the last 16 digits), or the digits as text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flip.data.manifest import npy_header
from flip.data.manifest.tar import Sample
from flip.files.creation import open_regular
from flip.runs.errors import ConfigError

MEMBER = "json"
JSON_LIMIT = 1 << 20
"""Bytes of a JSON member; a longer one has no uid."""
_PAIR = [np.dtype("<u8")] * 2
_PIECE = 1 << 20
"""Rows that are compared at once."""
_REMEDY = "A list is a .npy file with a row per uid: two uint64 (dtype u8,u8), or 32 hexadecimal digits as text."


@dataclass(frozen=True)
class UidList:
    """A list of uids. Processes map a sorted file of numbers into memory; other lists are copied, 16 bytes per uid."""

    path: str
    count: int
    digest: str
    """SHA-256 of the file."""
    is_sorted: bool

    @classmethod
    def open(cls, path: str) -> UidList:
        """Raises ConfigError if the file is missing, or is no list of uids."""
        path = os.path.abspath(path)
        pairs = _read(path)
        if not len(pairs):
            raise ConfigError("the list has no uids", "--uids", path, _REMEDY)
        pieces = (pairs[start : start + _PIECE + 1] for start in range(0, len(pairs), _PIECE))
        is_sorted = not any(_less(piece[1:], piece[:-1]).any() for piece in pieces)
        with open(path, "rb") as file:
            return cls(path, len(pairs), hashlib.file_digest(file, "sha256").hexdigest(), is_sorted)

    def __str__(self) -> str:
        return f"uid in {os.path.basename(self.path)} (sha256 {self.digest[:12]})"

    def codes(self, samples: Sequence[Sample], view: memoryview, code: int) -> NDArray[np.uint8]:
        """``code`` for a sample whose uid is not in the list, ``code`` + 1 for one without a uid, else 0."""
        digits = [_uid(sample, view) for sample in samples]
        uids = np.frombuffer(b"".join(uid or bytes(16) for uid in digits), ">u8").reshape(-1, 2).astype("<u8")
        absent = np.array([uid is None for uid in digits], dtype=np.bool_)
        return np.where(absent, code + 1, np.where(self._contains(uids), 0, code)).astype(np.uint8)

    def _contains(self, uids: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of ``uids`` (n, 2) are listed: a binary search of all at once, which reads few pages of the file."""
        pairs = _sorted(self)
        low = np.zeros(len(uids), np.int64)
        high = np.full(len(uids), len(pairs) - 1)
        while (low < high).any():
            middle = (low + high) // 2
            less = _less(pairs[middle], uids)
            low = np.where(less & (low < high), middle + 1, low)
            high = np.where(less, high, middle)
        return (pairs[low] == uids).all(axis=1)


def _uid(sample: Sample, view: memoryview) -> bytes | None:
    at, size = sample.members.get(MEMBER, (0, 0))
    return parse_uid(view[at : at + size])


def parse_uid(member: memoryview) -> bytes | None:
    """The 16 bytes of the uid in a JSON member; None if it has none."""
    if not 0 < len(member) <= JSON_LIMIT:
        return None
    try:
        uid = bytes.fromhex(json.loads(bytes(member))["uid"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return uid if len(uid) == 16 else None


@cache
def _sorted(uids: UidList) -> NDArray[np.uint64]:
    """The uids (n, 2), ascending; loaded once per process."""
    pairs = _read(uids.path)
    if uids.is_sorted:
        return pairs
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _less(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.bool_]:
    less: NDArray[np.bool_] = (a[:, 0] < b[:, 0]) | ((a[:, 0] == b[:, 0]) & (a[:, 1] < b[:, 1]))
    return less


def _read(path: str) -> NDArray[np.uint64]:
    """The rows of a list as (n, 2), mapped into memory if they are numbers. Raises ConfigError."""
    try:
        with open_regular(path) as file:
            npy_header.check_header(file, os.fstat(file.fileno()).st_size)
        rows: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(rows, np.ndarray) and rows.ndim == 1:
            if rows.dtype in ("S32", "U32"):
                digits = bytes.fromhex(rows.astype("S32").tobytes().decode("ascii"))
                if len(digits) == 16 * len(rows):
                    return np.frombuffer(digits, ">u8").reshape(-1, 2).astype("<u8")
            elif rows.dtype.itemsize == 16 and [kind for kind, *_ in (rows.dtype.fields or {}).values()] == _PAIR:
                return rows.view("<u8").reshape(-1, 2)
    except OSError as error:
        raise ConfigError(f"the list cannot be read: {error.strerror}", "--uids", path) from error
    except (ValueError, EOFError) as error:  # no .npy file, cut off, pickled objects, or text that is no number
        raise ConfigError(f"no list of uids: {error}", "--uids", path, _REMEDY) from error
    raise ConfigError("no list of uids", "--uids", path, _REMEDY)
