"""CRC32 of bytes, and of concatenations from the CRCs of their parts: shards are read once, before it is known how they
are chunked.

crc(A + B) is crc(A), carried on over len(B) zero bytes, xor crc(B). Carrying on over zeros is linear in the 32 bits:
one matrix per power of two of the length.
"""

from __future__ import annotations

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

__all__ = ["BLOCK", "chunked", "crc32"]

BLOCK = 512
"""Bytes of a block of a tar, in which the lengths of parts are counted."""

Tables = list[NDArray[np.uint32]]
"""Per power of two of blocks: where a CRC goes over that many blocks of zeros, by its bytes, (4, 256)."""


def chunked(crcs: NDArray[np.uint32], blocks: NDArray[np.uint32], chunk: int) -> NDArray[np.uint32]:
    """CRC of every ``chunk`` neighbouring parts (the last ones: of what is left), from each part's CRC and length."""
    fill = -len(crcs) % chunk  # empty parts change nothing
    parts = np.pad(crcs, (0, fill)).reshape(-1, chunk)
    lengths = np.pad(blocks, (0, fill)).reshape(-1, chunk)
    tables = _tables(int(lengths.max(initial=0)).bit_length())
    whole = parts[:, 0].copy()
    for n in range(1, chunk):
        whole = _carried(whole, lengths[:, n], tables) ^ parts[:, n]
    return whole


def _carried(crcs: NDArray[np.uint32], blocks: NDArray[np.uint32], tables: Tables) -> NDArray[np.uint32]:
    """The CRCs after as many blocks of zeros more."""
    crcs = crcs.copy()
    for power, table in enumerate(tables):
        chosen = (blocks >> power & 1).astype(bool)
        crcs[chosen] = _times(table, crcs[chosen])
    return crcs


def _tables(powers: int) -> Tables:
    tables, matrix = Tables(), _block()
    for _ in range(powers):
        tables.append(_by_bytes(matrix))
        matrix = _times(tables[-1], matrix)
    return tables


def _block() -> NDArray[np.uint32]:
    """Where each bit of a CRC goes over one block of zeros; the constant part of CRC32 is taken off."""
    zeros = bytes(BLOCK)
    constant = crc32(zeros, 0)
    return np.array([crc32(zeros, 1 << bit) ^ constant for bit in range(32)], dtype=np.uint32)


def _by_bytes(matrix: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A matrix over GF(2), 32 columns, as the products with each byte at each of its four places."""
    table, byte = np.zeros((4, 256), dtype=np.uint32), np.arange(256, dtype=np.uint32)
    for bit in range(32):
        table[bit // 8] ^= matrix[bit] * (byte >> bit % 8 & 1)
    return table


def _times(table: NDArray[np.uint32], vectors: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The product with each vector."""
    first, second, third, fourth = (table[place][vectors >> 8 * place & 255] for place in range(4))
    return first ^ second ^ third ^ fourth
