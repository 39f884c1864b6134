"""Tests of flip/models/timm_vit.py: the tower is timm's VisionTransformer on visible patches, and the plan knows it."""

import itertools
import math

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from flip import model_costs
from flip.config.derived import visible_patch_count
from flip.config.merge import merge
from flip.config.schema import Augment, Config, Model
from flip.config.validate import _check_towers
from flip.export import format, weights
from flip.export.exporter import choose_format
from flip.models import clip
from flip.runs.errors import ConfigError
from flip.training.parameter_groups import uses_weight_decay
from tests.flip.models.test_clip import inputs, sized, tiny, visible

CASES = [
    {"registers": 0, "qk_norm": False, "pool": "patches", "positions": "sincos"},
    {"registers": 3, "qk_norm": True, "pool": "patches", "positions": "sincos"},
    {"registers": 2, "qk_norm": False, "pool": "all", "positions": "learned"},
    {"registers": 1, "qk_norm": True, "pool": "class", "positions": "learned", "norm_pre": True},
    {"registers": 0, "qk_norm": False, "pool": "attention", "positions": "learned"},
    {"registers": 2, "qk_norm": True, "pool": "attention", "positions": "sincos"},
]


def shaped(fields):
    model = sized("tiny")
    for name, value in {"tower": "timm", **fields}.items():
        setattr(model.image, name, value)
    return model


def built(fields, attention="explicit"):
    """The model and its configuration; no bias is 0 and no gain is 1."""
    model = shaped(fields)
    pair = clip.CLIPModel(model, Augment(), attention)
    clip.init_weights(pair, 3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in pair.named_parameters():
            if name not in pair.first_values:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return pair, model


@pytest.mark.parametrize("fields", CASES)
def test_tower_equals_timm_and_its_export(fields):
    """All patches, by timm's own model from the exported weights and its configuration."""
    pair, model = built(fields)
    state = {name: value.detach() for name, value in pair.state_dict().items()}
    tower = weights.to_timm(state, pair.image.positions.detach())
    described = format.timm_config(model, Augment())
    other = timm.create_model(described["architecture"], num_classes=0, **described["model_args"]).eval()
    other.load_state_dict(tower)
    patches, _, _ = inputs()
    pixels = (patches * pair.image.pixel_scale + pair.image.pixel_offset).view(3, 8, 8, 8, 8, 3)
    images = pixels.permute(0, 5, 1, 3, 2, 4).reshape(3, 3, 64, 64)
    with torch.no_grad():
        expected = other(images)
        _, pooled = pair.image(patches, with_pooled=True)
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=2e-6)
    back = weights.from_timm(tower, fields["positions"] == "learned")
    loaded = clip.CLIPModel(model, Augment(), "sdpa")
    loaded.load_state_dict({**state, **back})
    with torch.no_grad():
        torch.testing.assert_close(loaded.image(patches), pair.image(patches), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("fields", CASES)
def test_visible_patches_alone_are_computed_and_keep_their_positions(fields):
    pair, _ = built(fields)
    patches, keep, _ = inputs()
    with torch.no_grad():
        full = pair.image(patches)
        in_order = pair.image(patches, torch.arange(64).expand(3, -1))
        masked = pair.image(visible(patches, keep), keep)
        shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(1))
        again = pair.image(visible(patches, keep[:, shuffled]), keep[:, shuffled])
    assert torch.equal(full, in_order)
    assert not torch.allclose(full, masked, atol=1e-3)
    torch.testing.assert_close(masked, again, rtol=1e-4, atol=1e-5)


def test_tower_without_features_is_the_same_function_with_the_same_weights():
    """So that an export of one is an export of the other: names and first values are equal."""
    pair, _ = built(CASES[0])
    own = tiny()
    assert pair.state_dict().keys() == own.state_dict().keys()
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in pair.state_dict().items())
    patches, keep, _ = inputs()
    with torch.no_grad():
        expected = own.image(visible(patches, keep), keep)
        torch.testing.assert_close(pair.image(visible(patches, keep), keep), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fields", CASES)
def test_plan_knows_parameters_and_flops(fields):
    pair, model = built(fields)
    counted = sum(parameter.numel() for parameter in pair.image.parameters())
    assert model_costs.parameters(model)["image"] == counted
    assert model_costs.parameters(model)["total"] == sum(parameter.numel() for parameter in pair.parameters())
    patches, keep, _ = inputs(count=20)
    mask = str(1 - 20 / 64)
    assert visible_patch_count(model.image, mask) == 20
    with FlopCounterMode(display=False) as counter:
        pair.image(visible(patches, keep), keep)
    assert counter.get_total_flops() == 3 * model_costs.forward_flops(model, mask)["image"]


def test_first_values_follow_seed_and_name():
    """Also those of modules of timm, which draws its own when they are made."""
    one, _ = built(CASES[5])
    torch.manual_seed(9)
    with torch.device("meta"):
        other = clip.CLIPModel(shaped(CASES[5]), Augment(), "sdpa", "selective")
    other.to_empty(device="cpu")
    clip.init_weights(other, 3)
    again = clip.CLIPModel(shaped(CASES[5]), Augment(), "explicit")
    clip.init_weights(again, 3)
    values = dict(other.named_parameters())
    assert all(torch.equal(value, values[name]) for name, value in again.named_parameters())
    assert math.isclose(float(values["image.registers"].detach().std()), 0.02, rel_tol=0.3)
    assert bool((values["image.blocks.0.attn.q_norm.weight"] == 1).all())
    assert not uses_weight_decay("image.blocks.0.attn.q_norm.weight", True)
    assert one.image.attn_pool.latent.shape == (1, 1, 64)


@pytest.mark.parametrize("recompute", ["selective", "block"])
def test_recomputed_gradients_are_the_same_bits(recompute):
    patches, keep, tokens = inputs()
    gradients = []
    for how in ("no", recompute):
        pair, _ = built(CASES[5])
        pair.set_recompute(how)
        pair.image(visible(patches, keep), keep).square().sum().backward()
        gradients.append([parameter.grad for parameter in pair.image.parameters()])
    assert all(map(torch.equal, *gradients))


def test_flip_refuses_settings_of_timm_by_name():
    for fields in ({"registers": 4}, {"qk_norm": True}, {"pool": "attention"}):
        ((key, _),) = fields.items()
        config = merge([("test", {"model.image": fields})])
        with pytest.raises(ConfigError, match=rf"model\.image\.{key}: no setting of this tower.*tower: timm"):
            _check_towers(config)
        _check_towers(merge([("test", {"model.image": {**fields, "tower": "timm"}})]))


def test_export_refuses_what_a_form_cannot_hold_by_name():
    model = Model()
    model.image.tower = "timm"
    assert choose_format(model, "open_clip") == "native"
    features = {"registers": (4, 0), "qk_norm": (True, False), "pool": ("attention", "patches")}
    for (key, (value, off)), form in itertools.product(features.items(), ("transformers", "onnx", "open_clip")):
        setattr(model.image, key, value)
        if form == "open_clip":
            assert choose_format(model, form) == "timm-tower"
            with pytest.raises(ConfigError, match=rf"native of open_clip cannot hold .*model\.image\.{key}.*"):
                choose_format(model, form, "native")
        else:
            with pytest.raises(ConfigError, match=rf"{form} cannot hold .*model\.image\.{key}"):
                choose_format(model, form)
        setattr(model.image, key, off)


def test_new_settings_at_their_default_are_left_out_of_the_hash():
    from flip.config.identity import identity

    hashed = identity(Config(), "")["config"]["model"].get("image", {})
    assert not {"tower", "registers", "qk_norm"} & hashed.keys()
