"""Random draws of a sample, and its visible patches and tokens: pure functions of seed, epoch and sample id.

Draw i of a sample for one purpose is ``key(seed, epoch, id, purpose, i)``, so that it does not depend on which process
decodes the sample, in which batch, or how often.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flip.data.patch_masking import MASK as MASK
from flip.data.patch_masking import UNIFORM, PatchMasking, patch_ranks
from flip.data.text_masking import Captions, TextMasking
from flip.rng import key, uniform

CROP = 1
FLIP = 2
TEXT = 4
CAPTION = 5
AUGMENT = 6
"""Purposes of draws. 3, 9 and 10 are in ``flip.data.patch_masking``, 7 in ``flip.data.text_masking``."""


class MaskSpec(NamedTuple):
    """What the masks of a stage leave of each sample."""

    patches: int
    """K, visible patches."""
    tokens: int
    """Visible positions of a caption."""
    text_masking: TextMasking = TextMasking()
    """Which positions stay."""
    causal: bool = False
    """Whether the end token, which has the highest id, is pooled, and padding follows it."""
    targets: int = 0
    """Most tokens of a caption that are classified, of all of it; 0: none."""
    patch_masking: PatchMasking = UNIFORM
    """Which patches stay."""


def draw(seed: int, epochs: Any, ids: Any, purpose: int, i: Any) -> NDArray[np.float64]:
    """Draws ``i`` of the samples for a purpose: uniform in [0, 1), of the shape to which the arguments broadcast."""
    return uniform(key(seed, epochs, ids, purpose, i))


def visible_patches(
    seed: int, epochs: Any, ids: Any, patches: int, count: int, way: PatchMasking = UNIFORM
) -> NDArray[np.int16]:
    """Indices of the visible patches, ascending, (n, count): those that ``way`` ranks lowest, ties by index.

    ``epochs`` and ``ids``: (n,). ``patches``: P. ``count``: K.
    """
    ids = np.asarray(ids).reshape(-1)
    if count == patches:
        return np.tile(np.arange(patches, dtype=np.int16), (len(ids), 1))
    return argsmallest(patch_ranks(seed, epochs, ids, patches, count, way), count)


def visible_tokens(seed: int, epochs: Any, ids: Any, tokens: NDArray[np.int32], masks: MaskSpec) -> NDArray[np.int16]:
    """Visible positions of captions (n, T), ascending, (n, masks.tokens).

    Position 0, or the end token, which is pooled, is always visible; of the others those with the smallest keys, ties
    by position, after those that ``masks.text_masking`` ranks lower. Padding is id 0, or what follows the end token.
    """
    length = tokens.shape[1]
    if masks.tokens == length:
        return np.tile(np.arange(length, dtype=np.int16), (len(tokens), 1))
    epochs = np.asarray(epochs).reshape(-1, 1)
    ids = np.asarray(ids).reshape(-1, 1)
    keys = key(seed, epochs, ids, TEXT, np.arange(length))
    if masks.causal:
        pooled = tokens.argmax(axis=1)[:, None]
        padding = np.arange(length) > pooled
    else:
        pooled = np.zeros((len(tokens), 1), np.int64)
        padding = tokens == 0
    ranks = masks.text_masking.ranks(Captions(seed, epochs, ids, tokens, padding)).copy()
    np.put_along_axis(ranks, pooled, -1, axis=1)
    order = np.lexsort((keys, ranks), axis=-1)[:, : masks.tokens]
    return np.sort(order, axis=1).astype(np.int16)


def argsmallest(keys: NDArray[Any], count: int) -> NDArray[np.int16]:
    """Columns (n, count) of the smallest ``keys`` (n, P) of each row, ascending; of equal keys the first ones."""
    chosen = keys <= np.partition(keys, count - 1, axis=1)[:, count - 1 : count]
    columns = np.nonzero(chosen)[1]
    if columns.size != len(keys) * count:  # a tie at the limit, once in about 2^50 rows
        columns = np.sort(np.argsort(keys, axis=1, kind="stable")[:, :count], axis=1)
    return columns.reshape(len(keys), count).astype(np.int16)
