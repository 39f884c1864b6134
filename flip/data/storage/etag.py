"""The ETag of an object from its bytes: their MD5 or, where it was uploaded in parts, that of the parts' MD5s."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

_md5 = partial(hashlib.md5, usedforsecurity=False)


class ETag:
    """Fed with an object's bytes in order. ``parts``: sizes of those that it was uploaded in; none: it was whole."""

    def __init__(self, parts: Sequence[int] = ()) -> None:
        self._missing, self._digests, self._now = list(parts), list[bytes](), _md5()

    def update(self, data: bytes) -> None:
        view = memoryview(data)
        while self._missing and len(view) >= self._missing[0]:
            size = self._missing.pop(0)
            self._now.update(view[:size])
            self._digests.append(self._now.digest())
            view, self._now = view[size:], _md5()
        self._now.update(view)
        if self._missing:
            self._missing[0] -= len(view)

    def text(self) -> str:
        """Of the bytes until now."""
        if not self._missing and not self._digests:
            return self._now.hexdigest()
        begun = [self._now.digest()] if self._missing else []
        return f"{_md5(b''.join(self._digests + begun)).hexdigest()}-{len(self._digests)}"
