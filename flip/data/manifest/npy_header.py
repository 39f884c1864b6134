"""Checks the header of a ``.npy`` file, before memory is taken by the sizes that it states."""

import math
from typing import BinaryIO

from numpy.lib import format as npy

MAGIC_BYTES = 8
HEADER_LIMIT = 1 << 14
"""Largest header, bytes; numpy itself evaluates at most 10,000."""
MAX_DIMENSIONS = 64


def check_header(file: BinaryIO, size: int) -> None:
    """Check that ``file``, of ``size`` bytes, is a .npy file whose array is inside it. Moves the position to the start.

    Raises ValueError, also for a file with Python objects, and OSError if it cannot be read.
    """
    file.seek(0)
    try:
        version = npy.read_magic(file)
        length = int.from_bytes(file.read(2 if version == (1, 0) else 4), "little")
        if length > HEADER_LIMIT:
            raise ValueError(f"a header of {length:,} bytes, at most {HEADER_LIMIT:,} are read")
        file.seek(MAGIC_BYTES)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(file)
    except (SyntaxError, TypeError, KeyError, OverflowError, RecursionError, MemoryError) as error:
        # MemoryError: of Python's parser, at brackets that are nested too deeply
        raise ValueError(f"its header is invalid: {type(error).__name__}") from error
    if dtype.hasobject:
        raise ValueError("it has Python objects")
    if len(shape) > MAX_DIMENSIONS or any(length < 0 for length in shape):
        raise ValueError("its shape is invalid")
    needed = file.tell() + math.prod(shape) * dtype.itemsize
    if needed > size or max(shape, default=0) > size:
        raise ValueError(f"its array ends at byte {needed:,} of {size:,}")
    file.seek(0)
