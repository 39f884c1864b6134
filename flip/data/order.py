"""The order of samples (docs/contracts.md; versioned): global batch at S as a pure function of seed, N, R, Q, L and S.

Letters: N samples, R samples per chunk, Q chunks per block, L lanes, S samples seen so far, C = N div R chunks per
epoch. Only the current blocks of the lanes are held, so that the first batch costs the same at any S. A run with
several data sets (``flip.data.sources``) gives each of them lanes and an order of its own. ``flip.data.weighted_order``
is version 2, with weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flip.rng import key

IDS = 1 << 48
"""Sample ids of data set s start at s times this."""

Ints = NDArray[np.int64]

_CHUNKS = 1 << 63
SHUFFLE = _CHUNKS + 1
"""Purpose of the keys that shuffle a block."""
_SETS = _CHUNKS + 2
_U = np.uint64
ROUNDS = 4
"""Rounds of the Feistel network of ``permute``."""
_SEARCHED = 1 << 20
"""Chunks that ``block_within`` computes at once: 8 MB of each array."""


def permute(seed: int, epoch: Any, chunks: int, c: Any, inverse: bool = False) -> Ints:
    """pi(seed, epoch, C, c): position of chunk number c in an epoch, a bijection of 0 .. C-1 for each epoch.

    A Feistel network of four rounds on two halves of w bits, repeated until the value is below C. ``epoch`` and ``c``
    broadcast; the result has their shape, int64. Below C = 4096 it is a fixed scramble, not uniform. ``inverse``: the
    number at which an epoch reads the chunk ``c``.
    """
    width = max(1, ((chunks - 1).bit_length() + 1) // 2)
    low = _U((1 << width) - 1)
    shift = _U(width)
    epochs, values = np.broadcast_arrays(np.asarray(epoch, dtype=np.uint64), np.asarray(c, dtype=np.uint64))
    shape = values.shape
    epochs = epochs.ravel()
    values = values.ravel().copy()
    remaining = np.arange(values.size)
    turns = list(range(ROUNDS))
    if inverse:
        turns.reverse()
    while remaining.size:
        left = values[remaining] >> shift
        right = values[remaining] & low
        for turn in turns:
            if inverse:
                left, right = right ^ (key(seed, _CHUNKS, epochs[remaining], turn, left) & low), left
            else:
                left, right = right, left ^ (key(seed, _CHUNKS, epochs[remaining], turn, right) & low)
        values[remaining] = (left << shift) | right
        remaining = remaining[values[remaining] >= _U(chunks)]
    return values.astype(np.int64).reshape(shape)


class SampleOrder:
    """The endless order of one data set. Raises ValueError if a size is below 1 or there is no full chunk."""

    def __init__(self, seed: int, samples: int, chunk: int, block: int, lanes: int) -> None:
        if min(samples, chunk, block, lanes) < 1 or samples < chunk:
            raise ValueError(f"no order for N={samples}, R={chunk}, Q={block}, L={lanes}: all at least 1, R at most N")
        self.seed = seed
        self.samples = samples
        self.chunk = chunk
        self.block = block
        self.lanes = lanes
        self.chunks = samples // chunk
        self.block_samples = block * chunk
        """Samples of one lane's block, Q * R."""
        self._block_cache: dict[int, tuple[Ints, Ints]] = {}
        self._cached_lanes = range(0)

    @classmethod
    def of_set(cls, number: int, seed: int, samples: int, chunk: int, block: int, lanes: int) -> SampleOrder:
        """The order of data set ``number`` in a run with this ``seed``; N, R and lanes are those of the set."""
        return cls(int(key(seed, _SETS, number)) if number else seed, samples, chunk, block, lanes)

    def blocks(self, lanes: range, numbers: range) -> tuple[Ints, Ints]:
        """Ids and epochs of some lanes' blocks in reading order, each of shape (blocks, lanes, Q*R)."""
        lane = np.array(lanes, dtype=np.int64)[None, :, None]
        k = np.array(numbers, dtype=np.int64)[:, None, None]
        c = lane + self.lanes * (k * self.block + np.arange(self.block))
        epochs = c // self.chunks
        chunks = permute(self.seed, c // self.chunks, self.chunks, c % self.chunks)
        keys = key(self.seed, SHUFFLE, lane, k, np.arange(self.block_samples))
        order = np.argsort(keys, axis=-1, kind="stable")
        ids = np.take_along_axis(chunks, order // self.chunk, axis=-1) * self.chunk + order % self.chunk
        return ids, np.take_along_axis(epochs, order // self.chunk, axis=-1)

    def block_within(self, chunks: Ints, start: int, stop: int) -> tuple[int, int] | None:
        """(lane, block) of the first block that consists of these chunks alone and is read at positions ``start`` ..
        ``stop`` - 1 of its lane; None if there is none.

        Costs one inverse permutation per epoch and element of ``chunks``.
        """
        size = self.block * self.lanes  # chunk numbers of one block of all lanes
        first = start // self.block_samples * size
        last = -(-stop // self.block_samples) * size
        epochs = range(first // self.chunks, -(-last // self.chunks))
        blocks = np.empty(0, dtype=np.int64)
        step = max(1, _SEARCHED // max(1, len(chunks)))
        if not len(chunks):
            epochs = range(0)
        for e in epochs[::step]:
            epoch = np.arange(e, min(e + step, epochs.stop))[:, None]
            c = (epoch * self.chunks + permute(self.seed, epoch, self.chunks, chunks, inverse=True)).ravel()
            c = c[(first <= c) & (c < last)]
            blocks = np.concatenate([blocks, c // size * self.lanes + c % self.lanes])
            numbers, counts = np.unique(blocks, return_counts=True)
            if (full := numbers[counts == self.block]).size:
                return int(full[0] % self.lanes), int(full[0] // self.lanes)
            incomplete = (epoch[-1, 0] + 1) * self.chunks // size * self.lanes
            blocks = blocks[blocks >= incomplete]
        return None

    def cached_block(self, lanes: range, k: int, ahead: int = 0) -> tuple[Ints, Ints]:
        """Ids and epochs of block k of the lanes, (lanes, Q*R) each. If it is not cached, k .. k+ahead are computed."""
        if lanes != self._cached_lanes:
            self._block_cache = {}
            self._cached_lanes = lanes
        if k not in self._block_cache:
            numbers = range(k, k + ahead + 1)
            self._block_cache.update(zip(numbers, zip(*self.blocks(lanes, numbers), strict=True), strict=True))
        return self._block_cache[k]

    def positions(self, lanes: range, start: int, count: int) -> tuple[Ints, Ints]:
        """Ids and epochs at positions start .. start+count-1 of each lane, shape (lanes, count).

        The blocks of these positions and the next one stay cached, all others are dropped.
        """
        first = start // self.block_samples
        last = (start + max(count, 1) - 1) // self.block_samples
        self._block_cache = {k: block for k, block in self._block_cache.items() if first <= k <= last + 1}
        pieces = []
        for k in range(first, last + 1):
            offset = k * self.block_samples
            index = slice(max(start - offset, 0), min(start + count - offset, self.block_samples))
            pieces.append([field[:, index] for field in self.cached_block(lanes, k, last - k)])
        ids, epochs = (np.concatenate(field, axis=1) for field in zip(*pieces, strict=True))
        return ids, epochs

    def replacements(self, ids: Sequence[int] | Ints, n: int, count: int) -> Iterator[int]:
        """Places of a block whose sample may take place n, in the order in which they are tried, n itself first.

        ``ids``: of the block. ``count``: samples that a batch takes of a lane.
        """
        return chain(range(n, len(ids)), range(n))

    def replacement_epoch(self, epochs: Ints, n: int, m: int) -> int:
        """Epoch of the sample that takes place n of a block with these epochs, if it is that of place m."""
        return int(epochs[m])

    def batch(self, start: int, batch: int, lanes: range | None = None) -> tuple[Ints, Ints]:
        """Ids and epochs of the global batch at S = start, or some lanes' share of it; lanes in order, shape (n,).

        Raises ValueError if S or B is not a multiple of L.
        """
        if start % self.lanes or batch % self.lanes:
            raise ValueError(f"S={start} and B={batch} must be multiples of the {self.lanes} lanes")
        lanes = range(self.lanes) if lanes is None else lanes
        ids, epochs = self.positions(lanes, start // self.lanes, batch // self.lanes)
        return ids.reshape(-1), epochs.reshape(-1)
