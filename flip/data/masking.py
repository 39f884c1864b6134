"""Random draws of a sample, and the patches that it keeps: a pure function of seed, visit and sample id.

Draw i of a sample for one purpose is ``key(seed, visit, id, purpose, i)`` (flip.data.order), so what a sample gets does
not depend on who decodes it, with whom, or how often it is done again.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flip.rng import Keys, key, uniform

CROP, FLIP, MASK, TEXT, CAPTION, AUGMENT = 1, 2, 3, 4, 5, 6


def draw(seed: int, visits: Any, ids: Any, purpose: int, i: Any) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1); the arguments broadcast."""
    return uniform(key(seed, visits, ids, purpose, i))


def kept(patches: int, mask: str | float) -> int:
    """K = floor(P * (1 - mask)), the mask read as a decimal fraction: of 10 patches 0.9 keeps exactly one."""
    return math.floor(patches * (1 - Fraction(str(mask))))


def keep(seed: int, visits: Any, ids: Any, patches: int, kept: int) -> NDArray[np.int16]:
    """Positions of the visible patches, ascending, (n, K) int16: those with the K smallest keys, ties by position."""
    ids = np.asarray(ids).reshape(-1, 1)
    if kept == patches:
        return np.tile(np.arange(patches, dtype=np.int16), (len(ids), 1))
    return smallest(key(seed, np.asarray(visits).reshape(-1, 1), ids, MASK, np.arange(patches)), kept)


class Kept(NamedTuple):
    """What masks leave of a sample in one stage."""

    patches: int
    """K."""
    tokens: int
    """Positions of a caption."""
    prioritised: bool = False
    """Whether padding is dropped before tokens."""


def places(seed: int, visits: Any, ids: Any, tokens: NDArray[np.int32], kept: Kept) -> NDArray[np.int16]:
    """Positions of captions (n, T) that a text mask leaves, ascending, (n, kept.tokens) int16.

    The first one, which is pooled, stays; of the others those with the smallest keys, ties by position, where
    ``prioritised`` all tokens before padding (id 0).
    """
    length = tokens.shape[1]
    if kept.tokens == length:
        return np.tile(np.arange(length, dtype=np.int16), (len(tokens), 1))
    keys = key(seed, np.asarray(visits).reshape(-1, 1), np.asarray(ids).reshape(-1, 1), TEXT, np.arange(length))
    later = (tokens == 0) & kept.prioritised
    keys[:, 0], later[:, 0] = 0, False
    order = np.lexsort((keys, later), axis=-1)[:, : kept.tokens]
    return np.sort(order, axis=1).astype(np.int16)


def smallest(keys: Keys, count: int) -> NDArray[np.int16]:
    """Columns of the ``count`` smallest keys of each row, ascending; of equal keys the first counts."""
    chosen = keys <= np.partition(keys, count - 1, axis=1)[:, count - 1 : count]
    columns = np.nonzero(chosen)[1]
    if columns.size != len(keys) * count:  # a tie at the border, once in about 2^50 rows
        columns = np.sort(np.argsort(keys, axis=1, kind="stable")[:, :count], axis=1)
    return columns.reshape(len(keys), count).astype(np.int16)
