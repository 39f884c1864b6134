"""Which samples of the tars a filtered manifest keeps: sample ids count these alone.

The others stay where they are. A read that spans some walks over them, and its CRC covers them too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flip.data.manifest.tar import BLOCK

PIECE = 1 << 24
"""Bytes whose bits are counted at once."""
_ONES = np.array([number.bit_count() for number in range(256)], dtype=np.uint8)


class Kept:
    """``tars``: per shard (samples in the tar, block of 512 bytes at which the first kept one starts), as uint32.

    ``bits``: a bit per sample of the tars, 1 for kept, from the lowest bit of a byte up; each shard begins a new byte.
    """

    def __init__(self, tars: NDArray[np.uint32], bits: NDArray[np.uint8]) -> None:
        self.tars, self.bits = tars, bits
        self._first = np.concatenate([[0], np.cumsum((tars[:, 0].astype(np.int64) + 7) // 8)])

    @property
    def seen(self) -> int:
        """Samples in the tars."""
        return int(self.tars[:, 0].sum(dtype=np.int64))

    def fits(self, samples: NDArray[np.int64]) -> bool:
        """Whether this is of shards of so many kept samples: that many bits are set in each."""
        if len(self.tars) != len(samples) or len(self.bits) != self._first[-1]:
            return False
        some = np.flatnonzero(self.tars[:, 0])  # of the others there is no byte
        first, found = self._first[some], np.zeros(len(samples), dtype=np.int64)
        for start in range(0, len(self.bits), PIECE):
            ones = _ONES[self.bits[start : start + PIECE]]
            low = np.searchsorted(first, start, side="right") - 1
            high = np.searchsorted(first, start + PIECE)
            found[some[low:high]] += np.add.reduceat(ones, np.maximum(first[low:high] - start, 0), dtype=np.int64)
        return bool((found == samples).all())

    def start(self, shard: int) -> int:
        """The byte at which a shard's first kept sample starts: nothing before it is read."""
        return int(self.tars[shard, 1]) * BLOCK

    def ordinals(self, shard: int) -> NDArray[np.int64]:
        """Places in the tar of a shard's kept samples, ascending. Reads a shard's bits: of 10,000 samples 1.25 kB."""
        bits = self.bits[self._first[shard] : self._first[shard + 1]]
        return np.flatnonzero(np.unpackbits(bits, count=int(self.tars[shard, 0]), bitorder="little"))

    def picks(self, shard: int, k: int, count: int) -> tuple[int, list[int]]:
        """Of a read from the start of a shard's kept sample k to that of k + count, or to the end of the shard: how
        many samples of the tar it holds, and which of them are kept."""
        ordinals = self.ordinals(shard)
        stop = ordinals[k + count] if k + count < len(ordinals) else self.tars[shard, 0]
        return int(stop) - int(ordinals[k]), (ordinals[k : k + count] - ordinals[k]).tolist()


class Keeping:
    """Puts a ``Kept`` together, a shard at a time: two billion marks need not be in memory."""

    def __init__(self) -> None:
        self._tars, self._bits, self._whole = list[tuple[int, int]](), list[NDArray[np.uint8]](), True

    def add(self, mask: NDArray[np.bool_], start: int) -> None:
        """The next shard: which of its samples are kept, and the block at which the first of them starts."""
        self._tars.append((len(mask), start))
        self._bits.append(np.packbits(mask, bitorder="little"))
        self._whole = self._whole and bool(mask.all())

    def kept(self) -> Kept | None:
        """None where every sample is kept."""
        return None if self._whole else Kept(np.array(self._tars, dtype=np.uint32), np.concatenate(self._bits))
