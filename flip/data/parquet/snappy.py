"""Where a snappy stream can be entered: after each ``BLOCK`` bytes of its output.

Compressors of snappy start anew every 64 KiB, so that no element crosses such a border and no copy reaches back over
it. That is a habit, not a part of the format, so ``marks`` checks each element. Then the blocks i to k - 1 of a stream,
behind the length of their output, are a stream themselves.
"""

BLOCK = 1 << 16
"""Bytes of output of a block; the last one may be shorter."""
_ELEMENTS = 256
"""Bytes of output per element, on average, below which a stream is not searched: it would take seconds per MB."""
_LEAST = 4096
"""Elements that are searched in any case."""


class SnappyError(ValueError):
    """The bytes are not a snappy stream."""


def length(data: memoryview) -> tuple[int, int]:
    """Bytes of the output that a stream states, and the offset of its first element. Raises SnappyError."""
    value = 0
    for at in range(min(5, len(data))):
        byte = data[at]
        value |= (byte & 127) << 7 * at
        if byte < 128:
            return value, at + 1
    raise SnappyError("the stream states no length")


def marks(data: memoryview) -> list[int] | None:
    """Offsets of the first element of each block, and the end of the stream; None if a block needs one before it.

    Raises SnappyError if the elements do not have the length that the stream states.
    """
    total, at = length(data)
    end = len(data)
    found = [at]
    out = 0
    low = 0
    left = _LEAST + total // _ELEMENTS
    while at < end:
        if out - low >= BLOCK:
            if out - low > BLOCK:
                return None
            low = out
            found.append(at)
        size, offset, step = _element(data, at, end)
        if offset is not None and not 0 < offset <= out - low:
            return None
        at += step
        out += size
        left -= 1
        if left < 0:
            return None
    if at != end or out != total:
        raise SnappyError("the elements do not fill the length that the stream states")
    found.append(end)
    return found


def stream(blocks: memoryview, size: int) -> bytes:
    """Blocks of a stream as a stream. ``size``: bytes of their output."""
    head = bytearray()
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    head.append(size)
    return bytes(head) + blocks


def _element(data: memoryview, at: int, end: int) -> tuple[int, int | None, int]:
    """Bytes of output of an element, how far it reaches back (None: a literal), and its own bytes."""
    tag = data[at]
    kind = tag & 3
    if kind == 0:
        size = (tag >> 2) + 1
        head = 1
        if size > 60:
            head += size - 60
            size = int.from_bytes(data[at + 1 : at + head], "little") + 1
        return size, None, head + size
    width = (0, 1, 2, 4)[kind]
    if at + 1 + width > end:
        raise SnappyError("an element runs past the end")
    if kind == 1:
        return (tag >> 2 & 7) + 4, (tag >> 5) << 8 | data[at + 1], 2
    return (tag >> 2) + 1, int.from_bytes(data[at + 1 : at + 1 + width], "little"), 1 + width
