"""What the loaders of a rank hold in memory, by arithmetic, before they hold it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flip.data.mixture import Source
from flip.data.prefetch import LEAD, MOST, THREADS

Shapes = list[tuple[tuple[int, ...], str]]


@dataclass(frozen=True)
class Memory:
    """Bytes. Those of samples are by the mean of their data set; Python and its modules are not in it."""

    lanes: int
    mean: int
    """Raw samples on average over time: of each lane 1.5 blocks, and what the lead adds."""
    most: int
    """Raw samples at the end of a block, which all lanes reach in the same step: two blocks of each."""
    flight: int
    """One more chunk for each read at once: its pieces are there beside the whole."""
    parts: int
    """Parts of batches that workers have ready, in shared memory."""

    def __str__(self) -> str:
        return (
            f"of {self.lanes} lanes the loader holds {_size(self.mean)} of raw samples on average, {_size(self.most)} "
            f"at the end of a block, up to {_size(self.flight)} more while it reads, and {_size(self.parts)} of ready "
            f"parts; it reads {LEAD:g} s ahead, or {MOST:.0%} of a block where that is less"
        )


def memory(sources: Sequence[Source], lanes: range, block: int, workers: int, parts: int) -> Memory:
    """Of a rank that holds ``lanes`` of the run with blocks of ``block`` chunks. ``parts``: bytes of ready parts."""
    raw = flight = 0.0
    for source in sources:
        part, chunk = source.part(lanes), source.manifest.chunk * source.manifest.mean_bytes
        raw += len(part) * block * chunk
        flight += min(max(1, workers), len(part)) * THREADS * chunk
    return Memory(len(lanes), math.ceil((1.5 + MOST / 2) * raw), math.ceil(2 * raw), math.ceil(flight), parts)


def part_bytes(shapes: Shapes) -> int:
    """Of one part of a batch."""
    return sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in shapes)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
