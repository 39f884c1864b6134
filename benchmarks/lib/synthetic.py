"""The tables of a data set of LAION-2B's size: consistent numbers, but no shards."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flip.data.manifest.manifest import BLOCK, ChunkTable
from flip.data.order import SampleOrder

SHARDS = 230_000
MEAN = 8_333
SIGMA = 534
CHUNK = 256
"""Samples per shard of a download of LAION-2B: 10,000 links, five in six of them alive."""
SAMPLE_BLOCKS = 94
"""Blocks of 512 bytes of a sample inside its shard: 48 kB, headers included."""


def table(shards: int = SHARDS, seed: int = 0, mean: float = MEAN) -> ChunkTable:
    """Shards of ``mean`` +- 534 samples by a seeded draw, all samples of one length; R is 256, less for few shards."""
    rng = np.random.default_rng(seed)
    counts = np.maximum(1, np.rint(rng.normal(mean, SIGMA, shards))).astype(np.int64)
    first = np.concatenate([[0], np.cumsum(counts)])
    chunk = CHUNK
    while chunk > 1 and first[-1] < 4096 * chunk:
        chunk //= 2
    starts = np.arange(0, first[-1], chunk)
    ordinals = starts - first[np.searchsorted(first, starts, side="right") - 1]
    ends = counts * SAMPLE_BLOCKS * BLOCK
    rows = np.stack([counts, ends + 2 * BLOCK, ends], axis=1)
    keys = [f"/data/part-{shard // 1000:05d}/{shard % 1000:05d}.tar" for shard in range(shards)]
    return ChunkTable(keys, rows, chunk, (ordinals * SAMPLE_BLOCKS).astype(np.uint32))


def checksums(of: ChunkTable, seed: int = 0) -> NDArray[np.uint32]:
    """Arbitrary values: nothing is read."""
    return np.random.default_rng(seed).integers(0, 2**32, of.chunks, dtype=np.uint32)


def held_bytes(order: SampleOrder, world: int) -> int:
    """Bytes that the order holds for a rank in the middle of a stream: ids and epochs of cached blocks."""
    count = order.block_samples // 2 + 1
    for step in range(4):
        order.positions(range(order.lanes // world), step * count, count)
    return sum(field.nbytes for block in order._block_cache.values() for field in block)
