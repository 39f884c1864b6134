"""Tests masked inference and the ensemble of complementary masks (paper, Table 1d)."""

import numpy as np
import pytest
import torch

from flip.data import masking
from flip.evaluation.encoding.encoders import masks
from flip.runs.errors import ConfigError
from tests.flip.evaluation.conftest import encoder_of
from tests.synthetic import draw_image

IDS = np.array([3, 0, 41])


@pytest.mark.parametrize("count, kept", [(64, 32), (64, 16), (64, 25), (9, 4), (10, 1)])
def test_ensemble_masks_cover_every_patch(count, kept):
    views = masks(IDS, count, kept, every=True)
    assert len(views) == -(-count // kept) and all(view.shape == (3, kept) for view in views)
    for row in range(3):
        seen = np.concatenate([view[row] for view in views])
        assert set(seen.tolist()) == set(range(count))
        assert len(seen) - count < kept  # patches repeat only to fill the last view
        assert all((np.diff(view[row]) > 0).all() for view in views)
    assert np.array_equal(views[0], masking.visible_patches(0, 0, IDS, count, kept))
    assert np.array_equal(views[0], masks(IDS, count, kept, every=False)[0])


@torch.no_grad()
@pytest.mark.parametrize("mask", ["0.5", "0.75"])
def test_encoder_uses_first_mask_and_ensemble_averages_all_masks(model, data, mask):
    ids = torch.from_numpy(IDS)
    full = encoder_of(model, data)
    views = torch.from_numpy(np.stack([full.view(draw_image(i)) for i in range(3)]))
    visible = {"0.5": 32, "0.75": 16}[mask]
    rows = []
    for keep in masks(IDS, 64, visible, every=True):
        chosen = torch.stack([views[i, keep[i].astype(np.int64)] for i in range(3)])
        rows.append(model.encode_image(chosen, torch.from_numpy(keep)))
    masked, ensemble = (encoder_of(model, data, mask=mask, ensemble=every).image(views, ids) for every in (False, True))
    assert torch.allclose(masked, rows[0], atol=1e-6)
    assert torch.allclose(ensemble, torch.nn.functional.normalize(sum(rows), dim=1), atol=1e-6)
    assert not torch.allclose(masked, full.image(views, ids), atol=1e-3)
    view_ids = {
        variant.view_id
        for variant in (full, encoder_of(model, data, mask=mask), encoder_of(model, data, mask=mask, ensemble=True))
    }
    assert len(view_ids) == 3  # each view has its own cached features


@torch.no_grad()
def test_encoder_uses_all_patches_for_mask_0_and_rejects_mask_of_all(model, data):
    full = encoder_of(model, data)
    unmasked = encoder_of(model, data, mask="0", ensemble=True)
    views = torch.from_numpy(full.view(draw_image(0))[None])
    assert torch.equal(full.image(views, torch.tensor([0])), unmasked.image(views, torch.tensor([0])))
    with pytest.raises(ConfigError, match="leaves no patch"):
        encoder_of(model, data, mask="0.99")
