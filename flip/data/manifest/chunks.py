"""Offsets and CRCs of chunks from the scans of shards, one at a time: two billion samples need not be in memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flip.data.manifest.manifest import Manifest
from flip.data.manifest.scan import Scan
from flip.data.storage import checksums

_GROUP = 1 << 22
"""Samples whose CRCs are put together at once: enough for numpy, 32 MB."""


class Chunks:
    """Chunks of ``chunk`` samples. ``old``: they go on where those of a manifest with that R end, whose last one, if it
    is not full, takes in the first samples that are added."""

    def __init__(self, chunk: int, old: Manifest | None = None) -> None:
        self._chunk, self._samples = chunk, old.samples if old else 0
        self._offsets: list[NDArray[np.uint32]] = [old.offsets] if old else []
        full = self._samples // chunk
        self._checksums: list[NDArray[np.uint32]] = [old.checksums[:full]] if old else []
        crcs, blocks = np.zeros((2, self._samples % chunk), dtype=np.uint32)
        if old and len(crcs):
            crcs[0] = old.checksums[full]  # of all of them, the others are empty; how long the first is does not matter
        self._crcs, self._blocks, self._waiting = [crcs], [blocks], len(crcs)

    def add(self, scan: Scan) -> None:
        """The next shard."""
        self._offsets.append(scan.starts[-self._samples % self._chunk :: self._chunk])
        self._crcs.append(scan.crcs)
        self._blocks.append(scan.blocks)
        self._samples += len(scan.crcs)
        self._waiting += len(scan.crcs)
        if self._waiting >= max(_GROUP, self._chunk):
            self._put_together(self._waiting // self._chunk * self._chunk)

    def tables(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Offsets (blocks) and CRCs, per chunk, when all are added."""
        self._put_together(self._waiting)
        return np.concatenate(self._offsets), np.concatenate(self._checksums)

    def _put_together(self, count: int) -> None:
        crcs, blocks = np.concatenate(self._crcs), np.concatenate(self._blocks)
        self._checksums.append(checksums.combine(crcs[:count], blocks[:count], self._chunk))
        self._crcs, self._blocks, self._waiting = [crcs[count:]], [blocks[count:]], self._waiting - count
