"""``FileWindow``: bytes of a large file by their offsets, of which a piece is in memory at a time."""

import os

from flip.runs.errors import DataError

PIECE = 8 << 20
"""Bytes that are read at once."""


class FileWindow:
    """The bytes of an open file. An index gives a byte, as for ``bytes``; ``view`` gives a range.

    Args:
        file: a descriptor, which stays open for as long as the window is used.
        size: bytes of the file.
        where: its name, for errors.
    """

    def __init__(self, file: int, size: int, where: str) -> None:
        self._file = file
        self._size = size
        self._where = where
        self._start = 0
        self._piece = memoryview(b"")

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, at: int) -> int:
        index = at - self._start
        if not 0 <= index < len(self._piece):
            if not 0 <= at < self._size:
                raise IndexError(at)
            self.view(at, at + 1)
            index = at - self._start
            if not 0 <= index < len(self._piece):
                return self.view(at, at + 1)[0]
        return self._piece[index]

    def view(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop), which must lie in the file. Valid after later calls, too.

        Raises DataError if the file has become shorter, OSError.
        """
        if not 0 <= start <= stop <= self._size:
            raise ValueError(f"bytes {start} to {stop} of {self._size}")
        first = start - self._start
        if first >= 0 and stop - self._start <= len(self._piece):
            return self._piece[first : stop - self._start]
        if start < self._start:  # a look back: what follows is still needed
            return memoryview(self._read(start, stop))
        piece = memoryview(self._read(start, min(max(stop, start + PIECE), self._size)))
        self._start = start
        self._piece = piece
        return piece[: stop - start]

    def _read(self, start: int, stop: int) -> bytes:
        pieces = []
        at = start
        while at < stop:
            piece = os.pread(self._file, stop - at, at)
            if not piece:
                what = f"the file has become shorter: it ends at byte {at:,} of {self._size:,}"
                raise DataError(what, self._where, remedy="Restore it, then index again.")
            pieces.append(piece)
            at += len(piece)
        if len(pieces) == 1:
            return pieces[0]
        return b"".join(pieces)
