import numpy as np
import pytest

from flip.data import masking


@pytest.mark.parametrize(
    "patches, mask, kept", [(196, "0.5", 98), (10, "0.9", 1), (10, 0.9, 1), (256, "0.75", 64), (36, "0", 36)]
)
def test_kept_is_exact(patches, mask, kept):
    assert masking.kept(patches, mask) == kept


def test_keep_is_ascending_and_belongs_to_the_sample():
    ids, visits = np.arange(500), np.arange(500) % 3
    keep = masking.keep(9, visits, ids, 36, 18)
    assert keep.dtype == np.int16 and (np.diff(keep, axis=1) > 0).all()
    assert (masking.keep(9, visits[77:78], ids[77:78], 36, 18) == keep[77]).all()
    assert np.bincount(keep.ravel(), minlength=36).min() > 200
    assert (masking.keep(9, visits, ids, 36, 36) == np.arange(36)).all()


def test_equal_keys_go_by_position():
    keys = np.array([[5, 1, 5, 5, 0], [9, 8, 7, 6, 5]], dtype=np.uint64)
    assert masking.smallest(keys, 3).tolist() == [[0, 1, 4], [2, 3, 4]]


def test_draws_are_uniform():
    values = masking.draw(2**64 - 1, 0, np.arange(20000), masking.CROP, 0)
    assert abs(values.mean() - 0.5) < 0.01 and values.min() >= 0 and values.max() < 1
