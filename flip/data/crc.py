"""CRC32 of concatenations from the CRCs of their parts: shards are read once, before it is known how they are chunked.

crc(A + B) is crc(A), carried on over len(B) zero bytes, xor crc(B). Carrying on over zeros is linear in the 32 bits:
one matrix per power of two of the length.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from flip.data.manifest import BLOCK

_BITS = np.arange(32, dtype=np.uint32)


def chunked(crcs: NDArray[np.uint32], blocks: NDArray[np.uint32], chunk: int) -> NDArray[np.uint32]:
    """CRC of every ``chunk`` neighbouring parts (the last ones: of what is left), from each part's CRC and length."""
    fill = -len(crcs) % chunk  # empty parts change nothing
    parts = np.pad(crcs, (0, fill)).reshape(-1, chunk)
    lengths = np.pad(blocks, (0, fill)).reshape(-1, chunk)
    whole = parts[:, 0].copy()
    for n in range(1, chunk):
        whole = _carried(whole, lengths[:, n]) ^ parts[:, n]
    return whole


def _carried(crcs: NDArray[np.uint32], blocks: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The CRCs after as many blocks of zeros more."""
    crcs, matrix, power = crcs.copy(), _block(), 0
    while np.any(blocks >> power):
        chosen = (blocks >> power & 1).astype(bool)
        crcs[chosen] = _times(matrix, crcs[chosen])
        matrix, power = _times(matrix, matrix), power + 1
    return crcs


def _block() -> NDArray[np.uint32]:
    """Where each bit of a CRC goes over one block of zeros; the constant part of CRC32 is taken off."""
    zeros = bytes(BLOCK)
    constant = zlib.crc32(zeros, 0)
    return np.array([zlib.crc32(zeros, 1 << bit) ^ constant for bit in range(32)], dtype=np.uint32)


def _times(matrix: NDArray[np.uint32], vectors: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The product over GF(2) with each vector: the xor of the columns that its bits choose."""
    product = np.zeros_like(vectors)
    for bit in _BITS:
        product ^= matrix[bit] * (vectors >> bit & 1)
    return product
