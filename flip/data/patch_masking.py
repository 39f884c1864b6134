"""Which patches of an image a mask hides: one class for each value of ``patch_masking`` of a stage.

A way ranks the patches of each sample. The K of lowest rank stay, ties by index, so that K is exact whatever the ranks
are. Ranks are a pure function of seed, epoch and sample id. A new way is a class here and a row of ``PATCH_MASKINGS``,
or a class in a user's file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flip.common import user_classes
from flip.rng import Keys, key
from flip.runs.errors import ConfigError

MASK = 3
BLOCK = 9
GRID = 10
"""Purposes of draws (docs/contracts.md, Randomness). A user's class takes one from 100 on."""

_LEVEL = 56
"""Bit of a rank from which on it is a level; the bits below are random."""


@dataclass(frozen=True)
class MaskedSamples:
    """Samples whose patches are ranked, and the counters of their draws."""

    seed: int
    epochs: NDArray[np.int64]
    """(n, 1)"""
    ids: NDArray[np.int64]
    """(n, 1)"""
    patches: int
    """P, row by row."""
    visible: int
    """K, patches that stay."""

    @property
    def grid(self) -> int:
        """Patches of a row."""
        return math.isqrt(self.patches)

    def keys(self, purpose: int, i: Any) -> Keys:
        """Draws i of each sample for a purpose: 64 random bits each, (n, number of i)."""
        return key(self.seed, self.epochs, self.ids, purpose, i)


@dataclass(frozen=True)
class PatchMasking:
    """Any patches: each subset of K has the same probability (FLIP, arXiv 2212.00794); and the base of the other
    ways."""

    def ranks(self, samples: MaskedSamples) -> NDArray[Any]:
        """(n, P): low ranks stay."""
        return samples.keys(MASK, np.arange(samples.patches))


@dataclass(frozen=True)
class BlockMasking(PatchMasking):
    """Rectangles are hidden one after the other, until P - K patches are (BEiT, arXiv 2106.08254, Algorithm 1; MAE's
    ablation, arXiv 2111.06377, Table 1f).

    The area of a rectangle is uniform from 8 % of the image to what is still to be hidden, its height uniform where
    height / width is about 0.3 to 3.3. Of the last one, its upper rows stay.
    """

    def ranks(self, samples: MaskedSamples) -> NDArray[Any]:
        grid = samples.grid
        patches = samples.patches
        least = max(1, 16 * patches // 196)
        ranks = samples.keys(MASK, np.arange(patches)) >> np.uint64(64 - _LEVEL)
        hidden = np.zeros((len(samples.ids), grid, grid), bool)
        rows = np.arange(grid)
        for block in range(_BLOCKS):
            left = patches - samples.visible - hidden.sum(axis=(1, 2))
            if (left <= 0).all():
                break
            draws = samples.keys(BLOCK, 4 * block + np.arange(4))
            area = _drawn(draws[:, 0], np.full_like(left, least), np.maximum(left, least))
            height = _drawn(draws[:, 1], _root(3 * area // 10), _root(10 * area // 3))
            height = np.clip(height, 1, grid)
            width = np.minimum(-(-area // height), grid)
            top = _drawn(draws[:, 2], np.zeros_like(left), grid - height)
            first = _drawn(draws[:, 3], np.zeros_like(left), grid - width)
            new = _within(rows, top, height)[:, :, None] & _within(rows, first, width)[:, None, :]
            new &= ~hidden & (left > 0)[:, None, None]
            level = np.uint64((_BLOCKS - block) << _LEVEL)
            ranks = np.where(new.reshape(-1, patches), level, ranks)
            hidden |= new
        return ranks


_BLOCKS = 127
"""Most rectangles of a sample; what they do not hide, the random bits do."""


@dataclass(frozen=True)
class GridMasking(PatchMasking):
    """A regular grid: of each square of four patches, the same ones stay (MAE's ablation, arXiv 2111.06377, Table 1f).

    A mask of 0.75 leaves one of four, of 0.5 two on a diagonal, and 0.25 three; another one adds any patches of the
    next kind. Which of the four come first is drawn.
    """

    def ranks(self, samples: MaskedSamples) -> NDArray[Any]:
        row, column = np.divmod(np.arange(samples.patches), samples.grid)
        start = samples.keys(GRID, 0) >> np.uint64(62)  # 0 .. 3
        place = (
            2 * ((row + (start >> np.uint64(1)).astype(int)) % 2) + (column + (start & np.uint64(1)).astype(int)) % 2
        )
        level = np.array([0, 2, 3, 1], np.uint64)[place]  # opposite corners first
        return (level << np.uint64(_LEVEL)) + (samples.keys(MASK, np.arange(samples.patches)) >> np.uint64(64 - _LEVEL))


def _drawn(keys: Keys, least: NDArray[np.int64], most: NDArray[np.int64]) -> NDArray[np.int64]:
    """Whole numbers (n,), each from ``least`` to ``most``."""
    return least + (keys % (most - least + 1).astype(np.uint64)).astype(np.int64)


def _root(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """The floor of the square roots of small whole numbers: exact in fp64."""
    return np.sqrt(numbers).astype(np.int64)


def _within(places: NDArray[np.int64], first: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(n, len(places)): which lie in first .. first + length - 1."""
    return (places >= first[:, None]) & (places < (first + length)[:, None])


#: ``patch_masking`` of a stage -> its object.
PATCH_MASKINGS: dict[str, PatchMasking] = {
    "uniform": PatchMasking(),
    "block": BlockMasking(),
    "grid": GridMasking(),
}
UNIFORM = PATCH_MASKINGS["uniform"]


def patch_masking(name: str) -> PatchMasking:
    """The way of ``patch_masking`` of a stage. Executes a user's file."""
    return user_classes.named(name, PATCH_MASKINGS, PatchMasking)


def patch_ranks(seed: int, epochs: Any, ids: Any, patches: int, count: int, way: PatchMasking) -> NDArray[Any]:
    """(n, P) ranks of the patches of samples; the ``count`` lowest stay. ``epochs``: (n,), or one for all; ``ids``:
    (n,). Raises ConfigError if a user's class returns another shape or no numbers."""
    ids = np.asarray(ids).reshape(-1, 1)
    epochs = np.broadcast_to(np.asarray(epochs).reshape(-1, 1), ids.shape)
    ranks = way.ranks(MaskedSamples(seed, epochs, ids, patches, count))
    if not isinstance(ranks, np.ndarray) or ranks.shape != (len(ids), patches) or ranks.dtype.kind not in "iuf":
        found = f"{getattr(ranks, 'dtype', type(ranks).__name__)} {getattr(ranks, 'shape', '')}".strip()
        what = f"ranks() needs an array of numbers of shape {(len(ids), patches)}: samples, patches"
        raise ConfigError(what, f"patch_masking, class {type(way).__name__}", found, "Correct the class.")
    return ranks
