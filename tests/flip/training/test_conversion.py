"""Tests the conversion of weights to other patch sizes, grids and text lengths, against timm and open_clip."""

from types import SimpleNamespace

import pytest
import torch
from open_clip.model import resize_pos_embed
from timm.layers.patch_embed import resample_patch_embed as timm_resample

from flip.config import merge
from flip.config.derived import for_stage
from flip.export import weights
from flip.models import clip, image_encoder
from flip.training.conversion import convert, copy_weights, resample_patch_embed, resize_text_positions


def model(*settings, seed=3):
    config = merge.merge([("test", {"model": {"size": "tiny"}, "stages": [{"name": "a"}]})], settings)
    config = for_stage(config, config.stages[0])
    pair = clip.CLIPModel(config.model, config.augment, "sdpa")
    clip.init_weights(pair, seed)
    return pair


@torch.no_grad()
def test_resampled_patch_weights_give_same_output_for_enlarged_patch():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 192, generator=generator)
    patch = torch.randn(7, 3, 8, 8, generator=generator)
    enlarged = torch.nn.functional.interpolate(patch, (16, 16), mode="bicubic", antialias=True)
    rows = [image.permute(0, 2, 3, 1).flatten(1) for image in (patch, enlarged)]  # in the order row, column, channel
    assert torch.allclose(rows[1] @ resample_patch_embed(weight, 16).T, rows[0] @ weight.T, atol=1e-3)
    assert torch.equal(resample_patch_embed(weight, 8), weight)


@pytest.mark.parametrize("patch", [4, 14, 16])
def test_resampled_patch_weights_match_timm(patch):
    weight = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    own = weights.as_convolution(resample_patch_embed(weights.as_matrix(weight), patch))
    assert torch.allclose(own, timm_resample(weight, [patch, patch]), atol=1e-6)


@pytest.mark.parametrize("grid", [3, 8])
def test_resized_image_positions_match_open_clip(grid):
    positions = torch.randn(1 + 25, 6, generator=torch.Generator().manual_seed(1))
    state = {"visual.positional_embedding": positions.clone()}
    tower = SimpleNamespace(positional_embedding=torch.zeros(1 + grid**2, 6), grid_size=(grid, grid))
    resize_pos_embed(state, SimpleNamespace(visual=tower))
    expected = state["visual.positional_embedding"]
    assert torch.allclose(convert("image.positions", positions, expected.shape), expected, atol=1e-6)


def test_resize_text_positions_cuts_or_repeats_last_position():
    positions = torch.randn(8, 4)
    assert torch.equal(resize_text_positions(positions, 5), positions[:5])
    longer = resize_text_positions(positions, 11)
    assert torch.equal(longer[:8], positions) and torch.equal(longer[8:], positions[-1:].expand(3, -1))


def test_copy_weights_copies_same_shapes_and_converts_others():
    source = model()
    target = model("stages.a.image.patch=16", "stages.a.text.length=20", seed=4)
    copy_weights(source, target)
    values = dict(source.named_parameters())
    changed = [name for name, value in target.named_parameters() if value.shape != values[name].shape]
    assert changed == ["image.patch.weight", "text.positions"]
    for name, value in target.named_parameters():
        assert torch.equal(value, convert(name, values[name], value.shape) if name in changed else values[name]), name
    table = image_encoder.sincos(4, 64)
    assert torch.equal(target.image.positions, table), "positions belong to the grid of the new stage"


def test_convert_rejects_new_shape_of_unsupported_parameter():
    with pytest.raises(ValueError, match="image.norm.weight"):
        convert("image.norm.weight", torch.ones(4), torch.Size([8]))
