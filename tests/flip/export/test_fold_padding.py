"""Tests that a text tower with masked padding equals a wider tower without a mask."""

import pytest
import torch

from flip.config.schema import Augment
from flip.export import fold_padding
from flip.models import clip
from tests.flip.models.test_clip import captions, sized, tiny


def wider(pair):
    """The model with the text tower that ``fold_padding_mask`` returns."""
    config = sized("tiny", padding="mask")
    state, config.text, shrink = fold_padding.fold_padding_mask(pair.state_dict(), config.text)
    config.norm_eps *= shrink
    other = clip.CLIPModel(config, Augment(), "explicit")
    other.load_state_dict(state)
    assert not other.text.packed and config.text.width == 66
    return other


@pytest.mark.parametrize("noise", [0.0, 0.3])
@torch.no_grad()
def test_folded_tower_matches_masked_tower(noise):
    pair = tiny(padding="mask")
    generator = torch.Generator().manual_seed(1)
    for parameter in pair.text.parameters():
        parameter += noise * torch.randn(parameter.shape, generator=generator)
    other = wider(pair)
    tokens = captions()[1:]
    actual = other.encode_text(tokens)
    expected = pair.encode_text(tokens)
    assert torch.allclose(actual, expected, atol=3e-6)
    attended = tiny(padding="attend")
    attended.load_state_dict(pair.state_dict())
    assert not torch.allclose(attended.encode_text(tokens), expected, atol=1e-3)  # without the mask the features differ


@torch.no_grad()
def test_unfold_padding_mask_restores_equivalent_model():
    pair = tiny(padding="mask")
    again = tiny(padding="mask")
    tokens = captions()
    text = sized("tiny", padding="mask").text
    state, _, _ = fold_padding.fold_padding_mask(pair.state_dict(), text)
    back = fold_padding.unfold_padding_mask(state, text)
    again.load_state_dict(back)
    assert torch.allclose(again.encode_text(tokens), pair.encode_text(tokens), atol=3e-6)
    assert not torch.equal(back["text.tokens.weight"], pair.text.tokens.weight)
    assert torch.equal(back["image.patch.weight"], pair.image.patch.weight)


@torch.no_grad()
def test_folded_tower_in_bf16_is_as_accurate_as_masked_tower():
    pair = tiny(padding="mask")
    tokens = captions()[1:]
    expected = pair.encode_text(tokens)
    other = wider(pair)
    with torch.autocast("cpu", torch.bfloat16):
        masked = pair.encode_text(tokens)
        folded = other.encode_text(tokens)
    assert (folded - expected).norm() < 2 * (masked - expected).norm()
