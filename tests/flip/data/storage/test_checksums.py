"""Tests CRC32, that the CRCs of samples combine to that of their chunk, and ETags."""

import hashlib
import zlib

import numpy as np

from flip.data.storage.checksums import ETag, crc32, crc32_combine


def test_crc32_equals_zlib_and_published_check_value():
    """Existing manifests hold CRCs of zlib, so all values must stay equal, also if computed piece by piece."""
    assert crc32(b"123456789") == 0xCBF43926
    text = np.random.default_rng(1).bytes(100_003)
    for cut in (0, 1, 15, 512, 65_537):
        assert crc32(memoryview(text)[cut:], crc32(text[:cut])) == zlib.crc32(text)


def test_crc32_combine_of_parts_equals_crc_of_concatenation():
    random = np.random.default_rng(0)
    parts = [random.bytes(512 * int(n)) for n in (*random.integers(0, 70, 41), 3000)]
    combined = 0
    for part in parts:
        combined = crc32_combine(combined, zlib.crc32(part), len(part))
    assert combined == zlib.crc32(b"".join(parts))


def test_etag_of_one_request_is_the_md5_and_of_parts_ends_with_their_number():
    whole = ETag()
    whole.update(b"abc")
    assert whole.value() == hashlib.md5(b"abc").hexdigest()
    parts = ETag([2, 2])
    parts.update(b"ab")
    assert parts.value().endswith("-1")
    parts.update(b"cd")
    digests = hashlib.md5(b"ab").digest() + hashlib.md5(b"cd").digest()
    assert parts.value() == f"{hashlib.md5(digests).hexdigest()}-2"
