"""Streams: the parts of a parquet file that hold images one after the other, each behind four bytes with its length.

A stream is the body of a data page with PLAIN values, or a dictionary whose entries are the values of the rows in their
order. ``STREAM`` describes one; it says which bytes of the file hold which part of the stream's output:

    no codec             the same bytes
    snappy with marks    whole blocks of ``snappy.BLOCK`` bytes of output (``flip.data.parquet.snappy``)
    other codecs         the whole body
"""

import struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flip.data.parquet import snappy

CODECS = {0: "", 1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
"""Number of a codec in parquet.thrift -> its name in pyarrow."""
SNAPPY = 1
NO_MARKS = -1
GAP = 1 << 16
"""Unused bytes between two parts of a file that are still read in one request."""
STREAM = np.dtype([
    ("values", "<i8"),  # images, without nulls
    ("start", "<i8"),  # first byte of the body in the file
    ("stop", "<i8"),
    ("size", "<i8"),  # bytes of output
    ("first", "<i8"),  # offset of the first value in the output, behind levels
    ("last", "<i8"),  # where the last value ends in the output
    ("codec", "<i8"),
    ("mark", "<i8"),  # its first mark among those of all streams, or NO_MARKS
])  # fmt: skip
PREFIX = struct.Struct("<I")
"""The length before each value."""


class Part(NamedTuple):
    """Output bytes [``first``, ``last``) of a stream, which the bytes [``start``, ``stop``) of its file hold.

    ``base``: offset in the output of the first byte that these decompress to; ``size``: bytes that they decompress to.
    """

    first: int
    last: int
    start: int
    stop: int
    base: int
    size: int
    codec: int
    blocks: bool
    """Whether they are blocks of a snappy stream, without its length."""


def part(stream: Any, marks: NDArray[np.uint64], first: int, last: int) -> Part:
    """The part of a stream (a row of ``STREAM``) with output bytes [first, last)."""
    _, start, stop, size, _, _, codec, mark = stream.item()
    if codec == 0:
        return Part(first, last, start + first, start + last, first, last - first, codec, False)
    if mark == NO_MARKS:
        return Part(first, last, start, stop, 0, size, codec, False)
    low = first // snappy.BLOCK
    high = -(-last // snappy.BLOCK)
    base = low * snappy.BLOCK
    size = min(high * snappy.BLOCK, size) - base
    return Part(first, last, int(marks[mark + low]), int(marks[mark + high]), base, size, codec, True)


def merged(parts: list[Part]) -> list[tuple[int, int]]:
    """The ranges of a file that hold parts of its streams, in their order; near ones are one range."""
    ranges: list[tuple[int, int]] = []
    for each in parts:
        if ranges and 0 <= each.start - ranges[-1][1] <= GAP:
            ranges[-1] = ranges[-1][0], each.stop
        else:
            ranges.append((each.start, each.stop))
    return ranges


def values(each: Part, body: memoryview) -> list[memoryview]:
    """The values in a part. ``body``: the bytes of the part in the file. Raises ValueError if they are damaged."""
    if each.codec:
        output = decompressed(each, body)
    else:
        output = body
    at = each.first - each.base
    stop = each.last - each.base
    if each.size > 2 * (stop - at):  # a chunk is held for a while, and needs only this part
        output = memoryview(bytes(output[at:stop]))
        stop -= at
        at = 0
    found = []
    while at < stop:
        end = at + PREFIX.size
        if end > stop:
            raise ValueError("the length of an image is cut off")
        end += PREFIX.unpack_from(output, at)[0]
        if end > stop:
            raise ValueError("an image runs past the end")
        found.append(output[at + PREFIX.size : end])
        at = end
    return found


def decompressed(each: Part, body: memoryview) -> memoryview:
    """The output of a part. Raises ValueError if the bytes are no stream of its codec, or of another length."""
    data: Any = body
    if each.blocks:
        data = snappy.stream(body, each.size)
    return decompress(each.codec, data, each.size)


def decompress(codec: int, data: Any, size: int) -> memoryview:
    """``size`` bytes of output of a whole stream. Raises ValueError."""
    import pyarrow as pa

    try:
        output = pa.Codec(CODECS[codec]).decompress(data, size)
    except pa.ArrowMemoryError:
        raise  # the bytes are not at fault
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"no {CODECS[codec]} stream of {size:,} bytes: {error}") from error
    view = memoryview(output).cast("B")  # pyarrow's own format is "b", which image decoders refuse
    if len(view) != size:
        raise ValueError(f"{len(view):,} bytes of output, stated are {size:,}")
    return view
