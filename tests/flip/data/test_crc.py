"""The CRC of a chunk, put together from its samples', is that of its bytes."""

import zlib

import numpy as np
import pytest

from flip.data.crc import chunked


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_of_parts_is_of_the_whole(chunk):
    random = np.random.default_rng(0)
    blocks = random.integers(0, 70, 41, dtype=np.uint32)
    blocks[5] = 3000
    parts = [random.bytes(512 * int(n)) for n in blocks]
    crcs = np.array([zlib.crc32(part) for part in parts], dtype=np.uint32)
    whole = [zlib.crc32(b"".join(parts[at : at + chunk])) for at in range(0, len(parts), chunk)]
    assert chunked(crcs, blocks, chunk).tolist() == whole
