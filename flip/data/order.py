"""The order of samples (docs/contracts.md; versioned): global batch at S as a pure function of seed, N, R, Q, L and S.

Letters: N samples, R samples per chunk, Q chunks per block, L lanes, S samples seen so far, C = N div R chunks per
pass. All arithmetic is unsigned 64-bit and wraps. Nothing here is as long as the data set: a lane's present block is
all that is held, so the first batch costs the same at any S.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flip.rng import Keys, key

VERSION = 1
"""Stands in checkpoints beside S. Another order needs another number."""

Ints = NDArray[np.int64]

_CHUNKS = 1 << 63
_SHUFFLE = _CHUNKS + 1
_U = np.uint64
_SEARCHED = 1 << 20
"""Places of chunks that ``block_within`` computes at once: 8 MB of each array."""


def permute(seed: int, visit: Any, chunks: int, c: Any) -> Ints:
    """pi(seed, visit, C, c): where chunk number c of a pass lies, a bijection of 0 .. C-1 for each visit.

    A Feistel network of four rounds on two halves of w bits, walked until the value falls below C. ``visit`` and ``c``
    broadcast; the result has their shape, int64. Below C = 4096 it is a fixed scramble, not uniform.
    """

    def rounds(visits: Keys, left: Keys, right: Keys, low: np.uint64) -> tuple[Keys, Keys]:
        for turn in range(4):
            left, right = right, left ^ (key(seed, _CHUNKS, visits, turn, right) & low)
        return left, right

    return _walked(rounds, visit, chunks, c)


def unpermute(seed: int, visit: Any, chunks: int, chunk: Any) -> Ints:
    """The inverse of ``permute``: the number c at which a visit reads a chunk."""

    def rounds(visits: Keys, left: Keys, right: Keys, low: np.uint64) -> tuple[Keys, Keys]:
        for turn in reversed(range(4)):
            left, right = right ^ (key(seed, _CHUNKS, visits, turn, left) & low), left
        return left, right

    return _walked(rounds, visit, chunks, chunk)


def _walked(
    rounds: Callable[[Keys, Keys, Keys, np.uint64], tuple[Keys, Keys]], visit: Any, chunks: int, at: Any
) -> Ints:
    width = max(1, ((chunks - 1).bit_length() + 1) // 2)
    low, shift = _U((1 << width) - 1), _U(width)
    visits, values = np.broadcast_arrays(np.asarray(visit, dtype=np.uint64), np.asarray(at, dtype=np.uint64))
    shape, visits, values = values.shape, visits.ravel(), values.ravel().copy()
    walking = np.arange(values.size)
    while walking.size:
        left, right = rounds(visits[walking], values[walking] >> shift, values[walking] & low, low)
        values[walking] = (left << shift) | right
        walking = walking[values[walking] >= _U(chunks)]
    return values.astype(np.int64).reshape(shape)


class Order:
    """The endless stream of one data set.

    ValueError where the numbers admit no stream: no whole chunk, or a size below one.
    """

    def __init__(self, seed: int, samples: int, chunk: int, block: int, lanes: int) -> None:
        if min(samples, chunk, block, lanes) < 1 or samples < chunk:
            raise ValueError(f"no order for N={samples}, R={chunk}, Q={block}, L={lanes}: all at least 1, R at most N")
        self.seed, self.samples, self.chunk, self.block, self.lanes = seed, samples, chunk, block, lanes
        self.chunks = samples // chunk
        self.span = block * chunk
        """Samples of one lane's block, Q * R."""
        self._held: dict[int, tuple[Ints, Ints]] = {}
        self._held_lanes = range(0)

    def blocks(self, lanes: range, numbers: range) -> tuple[Ints, Ints]:
        """Ids and visits of some lanes' blocks in reading order, each of shape (blocks, lanes, Q*R)."""
        lane = np.array(lanes, dtype=np.int64)[None, :, None]
        k = np.array(numbers, dtype=np.int64)[:, None, None]
        c = lane + self.lanes * (k * self.block + np.arange(self.block))
        visits, chunks = c // self.chunks, permute(self.seed, c // self.chunks, self.chunks, c % self.chunks)
        keys = key(self.seed, _SHUFFLE, lane, k, np.arange(self.span))
        order = np.argsort(keys, axis=-1, kind="stable")
        ids = np.take_along_axis(chunks, order // self.chunk, axis=-1) * self.chunk + order % self.chunk
        return ids, np.take_along_axis(visits, order // self.chunk, axis=-1)

    def block_within(self, chunks: Ints, start: int, stop: int) -> tuple[int, int] | None:
        """(lane, block) of the first block that holds none but these chunks and is read at positions ``start`` ..
        ``stop`` - 1 of its lane; None where there is none.

        Costs an inverse permutation for each of ``chunks`` and visit: the other chunks are not looked at.
        """
        size = self.block * self.lanes
        """Chunk numbers of one block of all lanes."""
        first, last = start // self.span * size, -(-stop // self.span) * size
        visits, found = range(first // self.chunks, -(-last // self.chunks)), np.empty(0, dtype=np.int64)
        step = max(1, _SEARCHED // max(1, len(chunks)))
        for v in visits[::step] if len(chunks) else ():
            visit = np.arange(v, min(v + step, visits.stop))[:, None]
            c = (visit * self.chunks + unpermute(self.seed, visit, self.chunks, chunks)).ravel()
            c = c[(first <= c) & (c < last)]
            found = np.concatenate([found, c // size * self.lanes + c % self.lanes])
            blocks, counts = np.unique(found, return_counts=True)
            if (whole := blocks[counts == self.block]).size:
                return int(whole[0] % self.lanes), int(whole[0] // self.lanes)
            found = found[found >= (visit[-1, 0] + 1) * self.chunks // size * self.lanes]  # of a block not all seen yet
        return None

    def held(self, lanes: range, k: int, ahead: int = 0) -> tuple[Ints, Ints]:
        """Block k of the lanes, (lanes, Q*R) each. If it is not held yet, k .. k+ahead are computed at once."""
        if lanes != self._held_lanes:
            self._held, self._held_lanes = {}, lanes
        if k not in self._held:
            numbers = range(k, k + ahead + 1)
            self._held.update(zip(numbers, zip(*self.blocks(lanes, numbers), strict=True), strict=True))
        return self._held[k]

    def part(self, lanes: range, start: int, count: int) -> tuple[Ints, Ints]:
        """Ids and visits at positions start .. start+count-1 of each lane, shape (lanes, count).

        Of the blocks held, those touched here and the one after them stay.
        """
        first, last = start // self.span, (start + max(count, 1) - 1) // self.span
        self._held = {k: block for k, block in self._held.items() if first <= k <= last + 1}
        pieces = []
        for k in range(first, last + 1):
            at = slice(max(start - k * self.span, 0), min(start + count - k * self.span, self.span))
            pieces.append([field[:, at] for field in self.held(lanes, k, last - k)])
        ids, visits = (np.concatenate(field, axis=1) for field in zip(*pieces, strict=True))
        return ids, visits

    def lane(self, lane: int, start: int, count: int) -> tuple[Ints, Ints]:
        """Ids and visits at positions start .. start+count-1 of one lane, shape (count,)."""
        ids, visits = self.part(range(lane, lane + 1), start, count)
        return ids[0], visits[0]

    def batch(self, start: int, batch: int, lanes: range | None = None) -> tuple[Ints, Ints]:
        """Ids and visits of the global batch at S = start, or some lanes' share of it; lanes in order, shape (n,)."""
        if start % self.lanes or batch % self.lanes:
            raise ValueError(f"S={start} and B={batch} must be multiples of the {self.lanes} lanes")
        lanes = range(self.lanes) if lanes is None else lanes
        ids, visits = self.part(lanes, start // self.lanes, batch // self.lanes)
        return ids.reshape(-1), visits.reshape(-1)
