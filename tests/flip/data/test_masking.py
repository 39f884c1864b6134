"""Tests the draws and masks of image patches and of text tokens."""

import numpy as np
import pytest

from flip.data import masking
from flip.data.text_masking import TEXT_MASKINGS, PrioritisedMasking


def test_visible_patches_are_ascending_and_independent_of_batch():
    ids = np.arange(500)
    epochs = np.arange(500) % 3
    keep = masking.visible_patches(9, epochs, ids, 36, 18)
    assert keep.dtype == np.int16 and (np.diff(keep, axis=1) > 0).all()
    assert (masking.visible_patches(9, epochs[77:78], ids[77:78], 36, 18) == keep[77]).all()
    assert np.bincount(keep.ravel(), minlength=36).min() > 200
    assert (masking.visible_patches(9, epochs, ids, 36, 36) == np.arange(36)).all()


def test_argsmallest_breaks_ties_by_position():
    keys = np.array([[5, 1, 5, 5, 0], [9, 8, 7, 6, 5]], dtype=np.uint64)
    assert masking.argsmallest(keys, 3).tolist() == [[0, 1, 4], [2, 3, 4]]


def test_draw_is_uniform_in_unit_interval():
    values = masking.draw(2**64 - 1, 0, np.arange(20000), masking.CROP, 0)
    assert abs(values.mean() - 0.5) < 0.01 and values.min() >= 0 and values.max() < 1


# -- text -------------------------------------------------------------------------------------------------------------

LENGTHS = [0, 1, 3, 8, 16]
"""Tokens per caption, of at most 16."""
IDS = [0, 1, 2**48 + 5, 41, 10**9]
RANDOM = [[0, 3, 9, 11, 12, 13], [0, 1, 2, 3, 6, 9], [0, 3, 4, 5, 13, 14], [0, 4, 6, 7, 9, 13], [0, 2, 6, 8, 10, 15]]
PRIORITISED = [
    [0, 3, 9, 11, 12, 13],
    [0, 1, 2, 3, 6, 9],
    [0, 1, 2, 3, 13, 14],
    [0, 1, 3, 4, 6, 7],
    [0, 2, 6, 8, 10, 15],
]


def tokens():
    return np.array([[7] * n + [0] * (16 - n) for n in LENGTHS], dtype=np.int32)


@pytest.mark.parametrize("way", ["random", "prioritised"])
def test_visible_tokens_keep_first_position_and_are_independent_of_batch(way):
    ids = np.arange(400)
    epochs = np.arange(400) % 3
    masks = masking.MaskSpec(1, 6, TEXT_MASKINGS[way]())
    many = np.tile(tokens(), (80, 1))
    places = masking.visible_tokens(9, epochs, ids, many, masks)
    assert places.shape == (400, 6) and places.dtype == np.int16
    assert (places[:, 0] == 0).all() and (np.diff(places, axis=1) > 0).all()
    alone = masking.visible_tokens(9, epochs[77:78], ids[77:78], many[77:78], masks)
    assert (alone == places[77]).all()
    visible = masking.visible_tokens(9, epochs, ids, many, masking.MaskSpec(1, 16, TEXT_MASKINGS[way]()))
    assert (visible == np.arange(16)).all()
    unpadded = places[4::5]  # captions without padding: both ways select the same positions
    assert (unpadded == masking.visible_tokens(9, epochs, ids, many, masking.MaskSpec(1, 6))[4::5]).all()
    assert np.bincount(unpadded.ravel(), minlength=16)[1:].min() > 10


def test_prioritised_masking_drops_padding_first():
    places = masking.visible_tokens(9, 0, np.arange(5), tokens(), masking.MaskSpec(1, 6, PrioritisedMasking()))
    held = [(row < max(n, 1)).sum() for row, n in zip(places, LENGTHS, strict=True)]
    assert held == [1, 1, 3, 6, 6]
    ids = np.arange(1000)
    three = np.tile(tokens()[2], (1000, 1))
    random = masking.visible_tokens(9, 0, ids, three, masking.MaskSpec(1, 6))
    assert (random < 3).sum() / 1000 == pytest.approx(1 + 2 * 5 / 15, abs=0.1)


def test_causal_masking_keeps_end_token_and_treats_rest_as_padding():
    """Id 0 is a token, and the first occurrence of the highest id is the end token, whatever follows it."""
    rows = np.array([[8, *([0] * n), 9, *([9] * (14 - n))] for n in range(15)], dtype=np.int32)
    for way in ("random", "prioritised"):
        spec = masking.MaskSpec(1, 6, TEXT_MASKINGS[way](), causal=True)
        places = masking.visible_tokens(9, 0, np.arange(15), rows, spec)
        assert all(n + 1 in row for n, row in enumerate(places)) and (np.diff(places, axis=1) > 0).all()
        inside = [(row <= n + 1).sum() for n, row in enumerate(places)]
        assert (inside == [min(n + 2, 6) for n in range(15)]) == (way == "prioritised")
        shortened = np.take_along_axis(rows, places.astype(np.int64), axis=1)
        assert (shortened.max(axis=1) == 9).all()


def test_visible_tokens_equal_pinned_positions():
    """Other positions would change the results of every run."""
    for way, golden in (("random", RANDOM), ("prioritised", PRIORITISED)):
        result = masking.visible_tokens(
            2**64 - 1, 3, np.array(IDS), tokens(), masking.MaskSpec(1, 6, TEXT_MASKINGS[way]())
        )
        assert result.tolist() == golden


@pytest.mark.parametrize("way", ["random", "prioritised"])
def test_visible_tokens_match_reference_of_contract(way):
    """The reference follows docs/contracts.md, Randomness, with Python integers only."""

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    def key(*values):
        h = 0
        for value in values:
            h = mix((h + 0x9E3779B97F4A7C15 + value) % 2**64)
        return h

    for id, row in zip(IDS, tokens(), strict=True):
        order = sorted(range(1, 16), key=lambda t: (way == "prioritised" and row[t] == 0, key(5, 3, id, 4, t)))
        result = masking.visible_tokens(5, 3, [id], row[None], masking.MaskSpec(1, 6, TEXT_MASKINGS[way]()))
        assert result.tolist() == [sorted([0, *order[:5]])]
