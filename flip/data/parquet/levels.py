"""Definition levels and dictionary indices of parquet pages: numbers in the hybrid of runs and packed bits.

Memory grows with the count that the caller has checked, whatever the bytes state.
"""

import numpy as np
from numpy.typing import NDArray

_SLICE = 1 << 16
"""Packed numbers that are unpacked at once."""
WIDTH_LIMIT = 32
"""Bits of a number."""


class LevelsError(ValueError):
    """The bytes are not that many numbers."""


def hybrid(data: memoryview, width: int, count: int) -> NDArray[np.uint32]:
    """The first ``count`` numbers of ``width`` bits each. Raises LevelsError if there are fewer."""
    if not 0 <= width <= WIDTH_LIMIT:
        raise LevelsError(f"numbers of {width} bits")
    out = np.zeros(count, dtype=np.uint32)
    filled = 0
    at = 0
    while filled < count:
        header, at = _varint(data, at)
        left = count - filled
        if header & 1:
            length = (header >> 1) * width
            taken = min((header >> 1) * 8, left)
            if length > len(data) - at:
                raise LevelsError("packed numbers run past the end")
            _unpack(data[at : at + length], width, out[filled : filled + taken])
        else:
            length = (width + 7) // 8
            taken = min(header >> 1, left)
            if length > len(data) - at:
                raise LevelsError("a run has no number")
            value = int.from_bytes(data[at : at + length], "little")
            if value >> width:
                raise LevelsError(f"a number of more than {width} bits")
            out[filled : filled + taken] = value
        filled += taken
        at += length
    return out


def _unpack(data: memoryview, width: int, out: NDArray[np.uint32]) -> None:
    if width == 0:
        return  # zeros
    weights = np.uint32(1) << np.arange(width, dtype=np.uint32)
    for start in range(0, len(out), _SLICE):
        part = out[start : start + _SLICE]
        first = start * width // 8
        last = first + (len(part) * width + 7) // 8
        packed = np.frombuffer(data[first:last], dtype=np.uint8)
        bits = np.unpackbits(packed, count=len(part) * width, bitorder="little").reshape(-1, width)
        part[:] = bits.astype(np.uint32) @ weights


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 35, 7):
        if at >= len(data):
            break
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise LevelsError("a run has no length")
