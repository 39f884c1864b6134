"""Tar headers walked in memory: ustar, pax (x, g), GNU long names (L, K), base-256 sizes.

Python's tarfile and webdataset take a bad or missing header for the end of the archive and lose the rest without a
word; here everything that is not an archive to its last byte is ``Broken``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
_ZERO = bytes(BLOCK)
_HEADER = struct.Struct("100s24x12s20xc100x6s82x155s12x").unpack_from
"""Name, size, type, magic, prefix."""
_EXTENSIONS = frozenset((b"x", b"g", b"L", b"K"))
_DATA_TYPES = b"0\x007"
_BARE_TYPES = b"123456"


class Broken(Exception):
    """Not a whole tar: ``reason`` at byte ``offset`` of the buffer."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"{reason} at byte {offset}")
        self.offset, self.reason = offset, reason


class Cut(Broken):
    """The buffer ends before the archive does: nothing wrong where there are more bytes to come."""


class Member(NamedTuple):
    """A regular file: its name, its first header (extensions included), and its data [data, data + size)."""

    name: str
    start: int
    data: int
    size: int


class Sample(NamedTuple):
    """Neighbouring members with one key (webdataset's rule: the name up to the first dot of its last part)."""

    key: str
    start: int
    members: dict[str, tuple[int, int]]
    """Extension, lower case -> (offset of the data, size)."""

    @property
    def end(self) -> int:
        """The byte after its last member, padded."""
        return max(at + _padded(size) for at, size in self.members.values())


def members(buffer: memoryview, whole: bool = False) -> Iterator[Member]:
    """Regular files of a tar, or of a part of one that begins and ends between members.

    ``whole``: header checksums and extensions are checked and the zero block at the end is demanded; without it the
    bytes are known by their CRC. Raises Broken, and Cut where the buffer ends inside a member or, ``whole``, without
    that block.
    """
    offset, end, start, name, size = 0, len(buffer), -1, None, None
    while offset < end:
        if end - offset < BLOCK:
            raise Cut(offset, "header cut off")
        path_field, size_field, kind, magic, prefix = _HEADER(buffer, offset)
        if not path_field[0] and buffer[offset : offset + BLOCK] == _ZERO:
            if start >= 0:
                raise Broken(offset, "an extension header without its member")
            return check_rest(buffer, offset)
        if whole and not _checksum_holds(bytes(buffer[offset : offset + BLOCK])):
            raise Broken(offset, "not a tar header")
        length, at = _number(size_field, offset), offset
        if start < 0:
            start = offset
        if kind in _EXTENSIONS:
            offset = _after(buffer, at, length)
            data = bytes(buffer[at + BLOCK : at + BLOCK + length])
            if kind == b"L":
                name = _text(data)
            elif kind == b"x" and (whole or b"path=" in data or b"size=" in data):
                name, size = _pax(data, offset, name, size)
            continue
        path = _name(path_field, magic, prefix) if name is None else name
        if kind in _DATA_TYPES:
            length = length if size is None else size
        elif kind in _BARE_TYPES:
            length = 0
        else:
            raise Broken(at, f"member {path} of type {kind!r}, which shards do not hold")
        offset = _after(buffer, at, length)
        if kind in _DATA_TYPES and not path.endswith("/"):
            yield Member(path, start, at + BLOCK, length)
        start, name, size = -1, None, None
    if start >= 0:
        raise Cut(offset, "an extension header without its member")
    if whole:
        raise Cut(offset, "no end mark: the archive is cut off")


def samples(buffer: memoryview, whole: bool = False) -> Iterator[Sample]:
    """Members grouped into samples; names without an extension and webdataset's ``__meta__`` files are passed over.

    Raises Broken, also where a sample holds one extension twice.
    """
    sample, stem = None, ""
    for member in members(buffer, whole):
        name, extension = member.name, member.name[len(stem) :]
        # Most members are one more of the present sample, which is seen sooner than a name is split.
        if sample is None or not name.startswith(stem) or "/" in extension or "__" in extension:
            parts = split(name)
            if parts is None:
                continue
            key, extension = parts
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample, stem = Sample(key, member.start, {}), key + "."
        extension = extension.lower()
        if extension in sample.members:
            raise Broken(member.start, f"sample {sample.key} holds two members {extension}")
        sample.members[extension] = (member.data, member.size)
    if sample is not None:
        yield sample


def split(name: str) -> tuple[str, str] | None:
    """Key and extension of a name, as webdataset divides them; None where it has none, or a folder of it or its last
    part is ``__meta__``.

    Its expressions take the square of a name's length, which a pax header does not limit.
    """
    if "__" in name and any(part.endswith("__") and "__" in part[:-2] for part in name.split("/")):
        return None
    last = name.rfind("/") + 1
    dot = name.find(".", last)
    if dot < 1 or (dot == last and "." in name[name.rfind("/", 0, last - 1) + 1 : last]):
        return None
    return name[:dot], name[dot + 1 :]


def check_rest(buffer: memoryview, offset: int = 0) -> None:
    """After the end mark, or a part of it, there are zeros alone. Raises Broken."""
    for at in range(offset, len(buffer), 1 << 20):
        piece = bytes(buffer[at : at + (1 << 20)])
        if piece.strip(b"\0"):
            raise Broken(at + len(piece) - len(piece.lstrip(b"\0")), "data after a zeroed header")


def _checksum_holds(header: bytes) -> bool:
    stored = header[148:156].strip(b" \0")
    try:
        return int(stored or b"0", 8) == sum(header) - sum(header[148:156]) + 8 * 32
    except ValueError:
        return False


def _number(field: bytes, offset: int) -> int:
    if field[0] & 0x80:  # GNU base-256: sizes that eleven octal digits do not hold
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    digits = field.strip(b" \0") or b"0"
    try:
        if digits.isdigit():  # int() takes signs as well: with a negative size the walk would not get on
            return int(digits, 8)
    except ValueError:
        pass
    raise Broken(offset, "a size that is not a number")


def _length(text: bytes, offset: int) -> int:
    """A number of a pax header. None has more digits than 2^64."""
    if not (text.isdigit() and len(text) <= 20):
        raise Broken(offset, "a size that is not a number")
    return int(text)


def _padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK


def _after(buffer: memoryview, offset: int, size: int) -> int:
    stop = offset + BLOCK + _padded(size)
    if stop > len(buffer):
        raise Cut(offset, f"member of {size} bytes runs past the end; its header is")
    return stop


def _pax(data: bytes, offset: int, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """Name and size of the next member, where an extended header gives them, else those that were."""
    at, stop = 0, len(data.rstrip(b"\0"))
    while at < stop:
        first = data.find(b" ", at, at + 21) + 1
        digits = data[at : first - 1] if first else b""
        length = int(digits) if digits.isdigit() else 0
        if not first - at < length <= len(data) - at:
            raise Broken(offset, "a damaged pax header")
        field, _, value = data[first : at + length - 1].partition(b"=")
        if field == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif field == b"size":
            size = _length(value, offset)
        at += length
    return name, size


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _name(field: bytes, magic: bytes, prefix: bytes) -> str:
    name = _text(field)
    return f"{_text(prefix)}/{name}" if prefix[0] and magic == b"ustar\0" else name
