"""CRC32 of bytes and of concatenations, and ETags of objects."""

import hashlib
from collections.abc import Sequence
from functools import partial

from isal.isal_zlib import crc32, crc32_combine

__all__ = ["BLOCK", "ETag", "crc32", "crc32_combine", "etag_of_parts"]

BLOCK = 512
"""Bytes of a block of a tar; the lengths of samples are counted in blocks."""

_md5 = partial(hashlib.md5, usedforsecurity=False)


class ETag:
    """The ETag of an object, from its bytes: their MD5 or, after an upload in parts, the MD5 of the parts' MD5s.

    Args:
        parts: sizes of the parts; empty if the object was uploaded in one request.
    """

    def __init__(self, parts: Sequence[int] = ()) -> None:
        self._sizes = list(parts)
        self._digests = list[bytes]()
        self._current = _md5()

    def update(self, data: bytes) -> None:
        """Add the next bytes of the object."""
        view = memoryview(data)
        while self._sizes and len(view) >= self._sizes[0]:
            size = self._sizes.pop(0)
            self._current.update(view[:size])
            self._digests.append(self._current.digest())
            view = view[size:]
            self._current = _md5()
        self._current.update(view)
        if self._sizes:
            self._sizes[0] -= len(view)

    def value(self) -> str:
        """The ETag of the bytes so far."""
        if not self._sizes and not self._digests:
            return self._current.hexdigest()
        rest = [self._current.digest()] if self._sizes else []
        return f"{_md5(b''.join(self._digests + rest)).hexdigest()}-{len(self._digests)}"


def etag_of_parts(digests: Sequence[bytes]) -> str:
    """The ETag of an upload in parts with these MD5 digests: the MD5 of them, as on all S3 servers."""
    return f"{_md5(b''.join(digests)).hexdigest()}-{len(digests)}"
