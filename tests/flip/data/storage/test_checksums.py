"""The CRC of a chunk, put together from its samples', is that of its bytes."""

import zlib

import numpy as np
import pytest

from flip.data.storage.checksums import combine, crc32


def test_it_is_the_one_of_zip_and_png():
    """Manifests of before were made with zlib's: the published check value, and equal to it piece by piece."""
    assert crc32(b"123456789") == 0xCBF43926
    text = np.random.default_rng(1).bytes(100_003)
    for cut in (0, 1, 15, 512, 65_537):
        assert crc32(memoryview(text)[cut:], crc32(text[:cut])) == zlib.crc32(text)


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_of_parts_is_of_the_whole(chunk):
    random = np.random.default_rng(0)
    blocks = random.integers(0, 70, 41, dtype=np.uint32)
    blocks[5] = 3000
    parts = [random.bytes(512 * int(n)) for n in blocks]
    crcs = np.array([zlib.crc32(part) for part in parts], dtype=np.uint32)
    whole = [zlib.crc32(b"".join(parts[at : at + chunk])) for at in range(0, len(parts), chunk)]
    assert combine(crcs, blocks, chunk).tolist() == whole
