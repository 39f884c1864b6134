"""The CRC of a chunk, put together from its samples', is that of its bytes."""

import zlib

import numpy as np

from flip.data.storage.checksums import crc32, crc32_combine


def test_it_is_the_one_of_zip_and_png():
    """Manifests of before were made with zlib's: the published check value, and equal to it piece by piece."""
    assert crc32(b"123456789") == 0xCBF43926
    text = np.random.default_rng(1).bytes(100_003)
    for cut in (0, 1, 15, 512, 65_537):
        assert crc32(memoryview(text)[cut:], crc32(text[:cut])) == zlib.crc32(text)


def test_of_parts_is_of_the_whole():
    random = np.random.default_rng(0)
    parts = [random.bytes(512 * int(n)) for n in (*random.integers(0, 70, 41), 3000)]
    combined = 0
    for part in parts:
        combined = crc32_combine(combined, zlib.crc32(part), len(part))
    assert combined == zlib.crc32(b"".join(parts))
