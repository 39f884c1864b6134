"""Order version 2: the order of samples with a weight each (docs/weights.md defines it and the letters).

A visit takes r samples of a chunk, in proportion to their weights; heavier chunks have more visits. As in version 1 the
global batch at S is a pure function, and the position is one integer. Sums of chunks and weights are mapped from the
file of weights, and only the pages of the chunks that are read come into memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from flip.config.weights import REMEDY, WeightFacts, read_header
from flip.data.order import SHUFFLE, Ints, SampleOrder, permute
from flip.files.creation import open_regular
from flip.rng import key
from flip.runs.errors import DataError

VIEWS = 1 << 32
"""The epoch of a view is e = v + this * h: view h of a sample in epoch v has draws of its own."""

_OFFSETS = (1 << 63) + 3
_PLACES = (1 << 63) + 4
_QUARTERS = np.array([0, 1, 3, 2])
"""Residues of a section's quarters. The first and the last differ by 2, so that an epoch does not start with the chunks
with which the last one has ended."""
_HASHED = 1 << 22
"""Weights whose digest is computed at once."""
_U = np.uint64


class Weights:
    """A file of weights, mapped into memory. Raises as ``read_header``."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.facts, first, header = read_header(path)
        kinds = {"weights": "<u4", "sums": "<u8"}
        arrays = {}
        for name, kind in kinds.items():
            start, stop = header[name]["data_offsets"]
            count = (stop - start) // np.dtype(kind).itemsize
            with open_regular(path) as file:
                arrays[name] = np.memmap(file, kind, "r", first + start, (count,))
        self.weights: NDArray[np.uint32] = arrays["weights"]
        self.sums: NDArray[np.uint64] = arrays["sums"]


def check_content(path: str) -> None:
    """Raise DataError unless the weights have the digest that their file states. Reads all of it."""
    weights = Weights(path)
    content = hashlib.sha256()
    for start in range(0, len(weights.weights), _HASHED):
        content.update(weights.weights[start : start + _HASHED].tobytes())
    if content.hexdigest() != weights.facts.digest:
        raise DataError("data.weights: the weights do not have the digest that is stored", path, remedy=REMEDY)


class WeightedOrder(SampleOrder):
    """The endless order of one data set with weights. ``facts``, ``weights`` and ``sums``: of its file."""

    def __init__(
        self, seed: int, facts: WeightFacts, weights: NDArray[np.uint32], sums: NDArray[np.uint64], block: int,
        lanes: int,
    ) -> None:  # fmt: skip
        super().__init__(seed, facts.samples, facts.chunk, block, lanes)
        if facts.turns < 1:
            raise ValueError("no order: an epoch has less than four visits of each section")
        self.weights = weights
        self.sums = sums
        self.places = facts.places
        self.visits = facts.visits
        self.block_samples = block * facts.places
        self._sections = facts.sections
        self._turns = facts.turns
        self._total = facts.total

    def blocks(self, lanes: range, numbers: range) -> tuple[Ints, Ints]:
        """Ids and epochs of views of some lanes' blocks in reading order, each of shape (blocks, lanes, Q*r)."""
        shape = len(numbers), len(lanes), self.block_samples
        lane = np.array(lanes, dtype=np.int64)[None, :, None]
        k = np.array(numbers, dtype=np.int64)[:, None, None]
        c = (lane + self.lanes * (k * self.block + np.arange(self.block))).ravel()
        chunk, epoch, section = self.chunk_of(c)
        ordinals = self._samples_of(c, chunk)
        ids = (chunk[:, None] * self.chunk + ordinals).reshape(shape)
        n = np.arange(self.block_samples)
        is_first = np.ones(ids.shape, dtype=np.bool_)
        is_first[..., 1:] = (ids[..., 1:] != ids[..., :-1]) | (n[1:] % self.places == 0)
        first = np.maximum.accumulate(np.where(is_first, n, 0), axis=-1)
        h = np.repeat(section, self.places).reshape(shape) * self.places + (n - first)
        epochs = np.repeat(epoch, self.places).reshape(shape) + VIEWS * h
        order = np.argsort(key(self.seed, SHUFFLE, lane, k, first), axis=-1, kind="stable")
        most = (n - first).max(axis=-1, keepdims=True) + 1
        if most.max(initial=1) > 1:
            order = np.take_along_axis(order, np.argsort(n % most, axis=-1, kind="stable"), axis=-1)
        return np.take_along_axis(ids, order, axis=-1), np.take_along_axis(epochs, order, axis=-1)

    def chunk_of(self, c: Ints) -> tuple[Ints, Ints, Ints]:
        """Chunk, epoch and section of visits ``c``."""
        epoch, x = np.divmod(c, self.visits)
        section, x = np.divmod(x, 4 * self._turns)
        quarter, x = np.divmod(x, self._turns)
        y = 4 * permute(self.seed, epoch, self._turns, x) + _QUARTERS[quarter]
        m = (self._sections * y + section).astype(np.uint64)
        step, rest = divmod(self._total, self.visits)
        offset = key(self.seed, _OFFSETS, epoch) % _U(self._total)
        point = m * _U(step) + (m * _U(rest) + offset) // _U(self.visits)
        return np.searchsorted(self.sums, point, side="right") - 1, epoch, section

    def replacements(self, ids: Sequence[int] | Ints, n: int, count: int) -> Iterator[int]:
        """First the places whose sample has no view within ``count`` of place n, then all others in reading order."""
        yield n
        size = self.block_samples
        ids = np.asarray(ids)
        step = next(each for each in range(min(count, size), size + 1) if size % each == 0)
        tried = {n}
        for m in ((n + i * step) % size for i in range(1, size // step)):
            views = np.flatnonzero(ids == ids[m])
            if views[0] == m and np.abs(views - n).min() >= count:
                tried.add(m)
                yield m
        yield from (m for m in chain(range(n + 1, size), range(n)) if m not in tried)

    def replacement_epoch(self, epochs: Ints, n: int, m: int) -> int:
        """Epoch of the view that takes place n, if the sample of place m replaces it: a view of its own."""
        epoch = int(epochs[m])
        if m == n:
            return epoch
        h, v = divmod(epoch, VIEWS)
        return v + VIEWS * (self._sections * self.places + h // self.places * self.block_samples + n)

    def _samples_of(self, c: Ints, chunk: Ints) -> Ints:
        """The samples of visits ``c``, as positions in their chunks, ascending: shape (visits, r)."""
        rows = self.weights[chunk[:, None] * self.chunk + np.arange(self.chunk)].astype(np.uint64)
        sums = np.cumsum(rows.ravel())  # over all visits: their ranges of points follow each other
        totals = self.sums[chunk + 1] - self.sums[chunk]
        if not np.array_equal(rows.sum(axis=1), totals):
            raise DataError("data.weights: the weights of a chunk do not have the sum that is stored", remedy=REMEDY)
        offset = key(self.seed, _PLACES, c) % totals
        points = (np.arange(self.places, dtype=np.uint64) * totals[:, None] + offset[:, None]) // _U(self.places)
        before = np.cumsum(totals) - totals
        found = np.searchsorted(sums, (points + before[:, None]).ravel(), side="right").reshape(points.shape)
        return found - np.arange(len(c))[:, None] * self.chunk
