"""Parses tars in memory: ustar, pax (x, g), GNU long names (L, K), base-256 sizes.

Python's tarfile and webdataset treat an invalid or missing header as the end of the archive and silently lose the rest.
Here an archive that is not valid to its last byte raises ``InvalidTar``.
"""

import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flip.data.storage.checksums import BLOCK

SAMPLE_LIMIT = 256 << 20
"""Bytes of a sample, or of members between two samples, in an indexed shard. A reader holds a complete sample."""
EXTENSION_LIMIT = 1 << 20
"""Bytes of the extension headers of one member."""
_ZERO = bytes(BLOCK)
_HEADER = struct.Struct("100s24x12s20xc100x6s82x155s12x").unpack_from
"""Name, size, type, magic, prefix."""
_CHECKED_FIELDS = struct.Struct("100x24s12x12s181x16s").unpack_from
"""Fields that are only checked: mode with owner and group, time of change, device numbers."""
_NUMERIC_FIELD = re.compile(rb"(?s:[\x80\xff].*| *[0-7]* *(?:\0.*)?)")
"""A number in base 256, or octal digits with spaces around them, or nothing."""
_EXTENSION_TYPES = frozenset((b"x", b"g", b"L", b"K"))
"""Types of headers that extend the next one."""
_PLAIN_HEADER = np.dtype({
    "names": ["name", "size", "terminator", "kind", "magic", "prefix"],
    "formats": ["S100", "11u1", "u1", "u1", "<u4", "u1"],
    "offsets": [0, 124, 135, 156, 257, 345],
    "itemsize": BLOCK,
})  # fmt: skip
"""Of a POSIX header: the first byte of its prefix, and four bytes of its magic."""
_USTAR = int.from_bytes(b"usta", "little")
_OCTAL = 8 ** np.arange(10, -1, -1)
_PLAIN_PAX = 100
"""The longest content of a pax header that is plain, bytes: its block is read as a header, by the field of the name."""
_DATA_TYPES = b"0\x007"
"""Types of regular files."""
_BARE_TYPES = b"123456"
"""Types of members without data: links, devices, folders, FIFOs."""
_FOLDER = b"5"
_RESERVED = frozenset(("__key__", "__url__"))
"""Names that webdataset puts into a sample itself; it raises an error if a member has one."""
_BAD = "__bad__"
"""Name of a member with which webdataset drops the sample, unless it is empty."""
Skipped = list[tuple[int, str]]
"""Members without a sample: byte of the header, and reason."""


class InvalidTar(Exception):
    """Not a valid tar: ``reason`` at byte ``offset`` of the buffer."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"{reason} at byte {offset}")
        self.offset = offset
        self.reason = reason


class TruncatedTar(InvalidTar):
    """The buffer ends before the archive does, which is no error if more bytes follow."""


class TooLarge(InvalidTar):
    """A header states more bytes than SAMPLE_LIMIT or EXTENSION_LIMIT."""


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


SamplePredicate = Callable[[Sequence[Sample], memoryview], NDArray[np.uint8]]
"""Code of each sample in the bytes of a tar: 0 if it is kept, else the reason (``Filters.reasons``)."""


class _Extensions(NamedTuple):
    """Name and size of a member from the extension headers before it; None: not given there.

    ``start``: the byte of the first extension header, or of the member if there is none.
    """

    start: int
    name: str | None = None
    size: int | None = None


def members(buffer: memoryview, strict: bool = False, skipped: Skipped | None = None) -> Iterator[Member]:
    """The regular files of a tar, or of a part of one that starts and ends between members.

    Args:
        strict: check header checksums, extensions and sizes, refuse what other readers parse differently, and require
            the zero block at the end. Not needed for bytes with a known CRC.
        skipped: a list to which links and devices are added.

    Raises InvalidTar; TruncatedTar if the buffer ends inside a member or, with ``strict``, without the zero block;
    TooLarge with ``strict``.
    """
    offset = 0
    end = len(buffer)
    extensions: _Extensions | None = None
    while offset < end:
        if end - offset < BLOCK:
            raise TruncatedTar(offset, "header cut off")
        path_field, size_field, kind, magic, prefix = _HEADER(buffer, offset)
        if not path_field[0] and buffer[offset : offset + BLOCK] == _ZERO:
            if extensions:
                raise InvalidTar(offset, "an extension header without its member")
            return check_rest(buffer, offset)
        if strict:
            _check_header(buffer, offset, magic, prefix)
        length = _number(size_field, offset)
        at = offset
        if kind in _EXTENSION_TYPES:
            extensions, offset = _extended(buffer, at, length, kind, extensions or _Extensions(at), strict)
            continue
        start, name, size = extensions or _Extensions(at)
        if name is None:
            path = _name(path_field, magic, prefix)
        else:
            path = name
        if kind == b"\0" and _text(path_field).endswith("/"):
            kind = _FOLDER  # old archives, from before type 5, mark a folder by a slash
        if kind in _DATA_TYPES:
            length = length if size is None else size
        elif kind in _BARE_TYPES:
            length = 0
            if skipped is not None and kind != _FOLDER:
                skipped.append((start, "links and devices"))
        else:
            raise _refused_kind(at, path, kind)
        if strict and length > SAMPLE_LIMIT:
            raise TooLarge(at, f"a member of {length:,} bytes, at most {SAMPLE_LIMIT:,} are read; its header is")
        offset = _end_of_member(buffer, at, length)
        if kind in _DATA_TYPES and not path.endswith("/"):
            yield Member(path, start, at + BLOCK, length)
        extensions = None
    if extensions:
        raise TruncatedTar(offset, "an extension header without its member")
    if strict:
        raise TruncatedTar(offset, "no end mark: the archive is cut off")


def _refused_kind(offset: int, path: str, kind: bytes) -> InvalidTar:
    if kind == b"S":
        what = "a sparse file"
    else:
        what = f"of type {kind!r}, which shards do not hold"
    return InvalidTar(offset, f"member {path} is {what}; its header is")


def split(name: str) -> tuple[str, str] | None:
    """Key and extension of a name, as in webdataset; None if it has none, or if its first part is ``__meta__``.

    webdataset's regular expressions take quadratic time in the length of a name, which a pax header does not limit.
    """
    if name.startswith("__"):
        first = name.partition("/")[0]
        if len(first) > 3 and first.endswith("__"):
            return None
    last = name.rfind("/") + 1
    dot = name.find(".", last)
    if dot < 1 or (dot == last and "." in name[name.rfind("/", 0, last - 1) + 1 : last]):
        return None
    return name[:dot], name[dot + 1 :]


def samples(buffer: memoryview, strict: bool = False, skipped: Skipped | None = None) -> Iterator[Sample]:
    """Members grouped into samples. ``skipped``: a list to which members without a sample are added.

    Raises InvalidTar, also if a sample has an extension twice.
    """
    sample = None
    stem = ""
    for member in members(buffer, strict, skipped):
        name = member.name
        extension = member.name[len(stem) :]
        if strict and "\n" in name:
            raise InvalidTar(member.start, "a line break in the name of a member")
        # Most members belong to the current sample; this check is cheaper than splitting the name.
        if sample is None or not name.startswith(stem) or "/" in extension or "__" in extension:
            parts = split(name)
            if parts is None:
                if skipped is not None:
                    skipped.append((member.start, _skip_reason(name)))
                continue
            key, extension = parts
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = Sample(key, member.start, {})
                stem = key + "."
        extension = extension.lower()
        if extension in sample.members:
            raise InvalidTar(member.start, f"sample {sample.key} holds two members {extension}")
        if strict and extension in _RESERVED:
            raise InvalidTar(
                member.start, f"sample {sample.key} holds a member {extension}, a name that webdataset sets itself"
            )
        if strict and extension == _BAD and member.size:
            raise InvalidTar(
                member.start, f"sample {sample.key} is marked as bad ({_BAD}), so that webdataset drops it"
            )
        sample.members[extension] = (member.data, member.size)
    if sample is not None:
        yield sample


def indexed(buffer: memoryview, count: int) -> list[Sample]:
    """The ``count`` indexed samples of the buffer. Raises InvalidTar."""
    plain = _plain_samples(buffer)
    if plain is not None and len(plain) == count:
        return plain
    parsed = list(samples(buffer))
    if len(parsed) != count:
        raise InvalidTar(0, f"{len(parsed)} samples where {count} were indexed,")
    return parsed


def check_rest(buffer: memoryview, offset: int = 0) -> None:
    """Check that only zeros follow the end mark. Raises InvalidTar."""
    for at in range(offset, len(buffer), 1 << 20):
        piece = bytes(buffer[at : at + (1 << 20)])
        if piece.strip(b"\0"):
            raise InvalidTar(at + len(piece) - len(piece.lstrip(b"\0")), "data after a zeroed header")


def _plain_samples(buffer: memoryview) -> list[Sample] | None:
    """What ``samples`` finds, in less time; None for headers that usual writers do not make.

    Plain are POSIX headers of files with octal sizes and names of up to 100 bytes, and pax headers of up to
    ``_PLAIN_PAX`` bytes without name and size. All of them are parsed together: blocks with the magic of a header are
    headers if each begins where the member before it ends.
    """
    if len(buffer) < BLOCK:
        return None
    blocks = np.frombuffer(buffer, _PLAIN_HEADER, len(buffer) // BLOCK)
    at = np.flatnonzero(blocks["magic"] == _USTAR)
    headers = blocks[at]
    sizes = _plain_sizes(headers)
    if sizes is None:
        return None
    ends = BLOCK * (at + 1) + sizes + -sizes % BLOCK
    starts = BLOCK * at
    is_file = headers["kind"] == ord("0")
    if (
        not np.array_equal(starts, [0, *ends[:-1]])
        or ends[-1] != len(buffer)
        or headers["prefix"].any()
        or not is_file[-1]
        or not _are_plain_pax(blocks, at[~is_file], headers["kind"][~is_file], sizes[~is_file])
    ):
        return None
    first = [0, *ends[is_file][:-1].tolist()]  # a sample begins with the pax header of its first member
    fields = headers["name"][is_file], np.array(first), (starts + BLOCK)[is_file], sizes[is_file]
    return _grouped(zip(*(field.tolist() for field in fields), strict=True))


def _plain_sizes(headers: NDArray[np.void]) -> NDArray[np.int64] | None:
    """The sizes in headers; None if there is no header, or a size is not written as eleven octal digits."""
    digits = headers["size"].astype(np.int64) - ord("0")
    if not len(headers) or headers["terminator"].any() or digits.min() < 0 or digits.max() > 7:
        return None
    return digits @ _OCTAL


def _are_plain_pax(
    blocks: NDArray[np.void], at: NDArray[np.int64], kinds: NDArray[np.uint8], sizes: NDArray[np.int64]
) -> bool:
    """Whether the headers in the blocks ``at`` are short pax headers that give neither a name nor a size."""
    if not len(at):
        return True
    if (kinds != ord("x")).any() or sizes.max() > _PLAIN_PAX:
        return False
    content = blocks["name"][at + 1].tobytes()
    return b"path=" not in content and b"size=" not in content


def _grouped(members: Iterable[tuple[bytes, int, int, int]]) -> list[Sample] | None:
    """Samples of (name, first header, data, size); None where only ``samples`` can say what they are."""
    grouped = list[Sample]()
    own: dict[str, tuple[int, int]] = {}
    stem = "\0"  # no name begins with it
    for field, start, data, size in members:
        name = field.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        if name[-1:] in ("", "/"):
            return None
        extension = name[len(stem) :]
        if not name.startswith(stem) or "/" in extension or "__" in extension:
            parts = split(name)
            if parts is None:
                return None
            if parts[0] + "." != stem:
                stem = parts[0] + "."
                own = {}
                grouped.append(Sample(parts[0], start, own))
            extension = parts[1]
        extension = extension.lower()
        if extension in own:
            return None
        own[extension] = (data, size)
    return grouped


def _extended(
    buffer: memoryview, at: int, length: int, kind: bytes, extensions: _Extensions, strict: bool
) -> tuple[_Extensions, int]:
    """Parse the extension header at ``at``.

    Returns ``extensions`` updated by it, and the offset of the next header.
    """
    total = at + length - extensions.start
    if strict and total > EXTENSION_LIMIT:
        what = f"extension headers of {total:,} bytes, at most {EXTENSION_LIMIT:,} are read; they begin"
        raise TooLarge(extensions.start, what)
    behind = _end_of_member(buffer, at, length)
    data = bytes(buffer[at + BLOCK : at + BLOCK + length])
    if strict:
        _check_extension(kind, data, at, extensions.name is not None)
    if kind == b"L":
        extensions = extensions._replace(name=_text(data))
    elif kind == b"x" and (strict or b"path=" in data or b"size=" in data):
        name, size = _pax(data, behind, extensions.name, extensions.size)
        extensions = extensions._replace(name=name, size=size)
    return extensions, behind


def _skip_reason(name: str) -> str:
    """Why a member with this name belongs to no sample."""
    if name.startswith("__"):
        return "meta files of webdataset"
    if name.startswith("._"):
        return "AppleDouble files"
    return "names without key and extension"


def _check_header(buffer: memoryview, offset: int, magic: bytes, prefix: bytes) -> None:
    """Raise InvalidTar if tarfile, and with it webdataset, would end the archive here or read another name."""
    if not _checksum_holds(bytes(buffer[offset : offset + BLOCK])):
        raise InvalidTar(offset, "not a tar header")
    if prefix[0] and magic != b"ustar\0":
        raise InvalidTar(offset, "a header of an incremental archive of GNU tar")
    owner, time, device = _CHECKED_FIELDS(buffer, offset)
    if not (_are_numbers(owner, 8) and _are_numbers(time, 12) and _are_numbers(device, 8)):
        raise InvalidTar(offset, "a header field that is not a number")


@lru_cache(4096)
def _are_numbers(fields: bytes, width: int) -> bool:
    """Whether fields of ``width`` bytes each are numbers. Cached, because most headers of a shard have equal fields."""
    return all(_NUMERIC_FIELD.fullmatch(fields[at : at + width]) for at in range(0, len(fields), width))


def _check_extension(kind: bytes, data: bytes, offset: int, named: bool) -> None:
    """Raise InvalidTar for extension headers that readers parse differently."""
    if kind in b"xg" and b"GNU.sparse." in data:
        raise InvalidTar(offset, "a member is a sparse file (GNU.sparse); its header is")
    if kind == b"g" and _pax(data, offset, None, None) != (None, None):
        raise InvalidTar(offset, "a global header that names all members after it or gives their size")
    if named and (kind == b"L" or (kind == b"x" and _pax(data, offset, None, None)[0] is not None)):
        raise InvalidTar(offset, "two extension headers that name one member")


def _checksum_holds(header: bytes) -> bool:
    stored = header[148:156].strip(b" \0")
    try:
        return int(stored or b"0", 8) == sum(header) - sum(header[148:156]) + 8 * 32
    except ValueError:
        return False


def _number(field: bytes, offset: int) -> int:
    """The size in a header at ``offset``. Raises InvalidTar."""
    if field[0] in (0x80, 0xFF):  # GNU base-256: sizes that eleven octal digits do not hold
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    digits = field.strip(b" \0") or b"0"
    try:
        if digits.isdigit():  # int() accepts signs; a negative size would cause an endless loop
            return int(digits, 8)
    except ValueError:
        pass
    raise InvalidTar(offset, "a size that is not a number")


def _length(text: bytes, offset: int) -> int:
    """A number of a pax header, with no more digits than 2^64."""
    if not (text.isdigit() and len(text) <= 20):
        raise InvalidTar(offset, "a size that is not a number")
    return int(text)


def _padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK


def _end_of_member(buffer: memoryview, offset: int, size: int) -> int:
    """The offset after the header at ``offset`` and its ``size`` bytes of data, padded to blocks."""
    stop = offset + BLOCK + _padded(size)
    if stop > len(buffer):
        raise TruncatedTar(offset, f"member of {size} bytes runs past the end; its header is")
    return stop


def _pax(data: bytes, offset: int, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """Name and size of the next member from the records of a pax header; ``name`` and ``size`` if it has none."""
    at = 0
    stop = len(data.rstrip(b"\0"))
    while at < stop:
        first = data.find(b" ", at, at + 21) + 1
        digits = data[at : first - 1] if first else b""
        length = int(digits) if digits.isdigit() else 0
        if not (first and first - at < length <= len(data) - at):
            raise InvalidTar(offset, "a damaged pax header")
        field, _, value = data[first : at + length - 1].partition(b"=")
        if field == b"path":
            name = value.decode("utf-8", "surrogateescape").rstrip("/")
        elif field == b"size":
            size = _length(value, offset)
        at += length
    return name, size


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _name(field: bytes, magic: bytes, prefix: bytes) -> str:
    """The name of a member; ustar headers store the beginning of a long name in ``prefix``."""
    name = _text(field)
    if prefix[0] and magic == b"ustar\0":
        return f"{_text(prefix)}/{name}"
    return name
