"""Tests recipe clip against CLIPModel of transformers and stock open_clip: same weights, same features."""

import math
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers

from flip import model_costs
from flip.config import merge as configuration
from flip.config.schema import MODEL_PRESETS, Augment
from flip.data.masking import visible_patches
from flip.export import format, weights
from flip.models import clip

RECIPES = Path(__file__).resolve().parents[3] / "sweeps" / "recipes"
END = 99


def recipe(*settings):
    """The configuration of recipe clip with a small model."""
    names = ("paper", "portable", "portable2", "clip")
    layers = [("recipe", configuration.read_yaml(RECIPES / f"{name}.yaml")) for name in names]
    for _, values in layers:
        values.pop("base", None)
    small = ["model.size=tiny", "model.text.length=16", f"model.text.vocabulary={END + 1}"]
    return configuration.merge(layers, [*small, *settings])


def drawn(config, attention="sdpa", trained=True):
    """A model of this configuration. ``trained``: no bias is 0 and no gain is 1."""
    pair = clip.CLIPModel(config.model, config.augment, attention)
    clip.init_weights(pair, 3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in pair.parameters() if trained else ():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return pair.eval()


def inputs(config, b=6):
    """Patches (b, P, p*p*3), the same images as normalised pixels (b, 3, H, W), and captions of all lengths (b, T)."""
    size = config.model.image.size
    patch = config.model.image.patch
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (b, 3, size, size), generator=generator, dtype=torch.uint8)
    grid = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # (b, 3, rows, columns, p, p)
    patches = grid.permute(0, 2, 3, 4, 5, 1).reshape(b, -1, 3 * patch**2)
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.augment.mean, config.augment.std))
    tokens = torch.zeros(b, config.model.text.length, dtype=torch.int32)
    for i, row in enumerate(tokens):
        length = (0, 1, 3, 7, 13, 14)[i % 6]  # a caption of 14 tokens has no padding
        row[0] = END - 1
        row[length + 1] = END
        row[1 : length + 1] = torch.randint(0, END - 1, (length,), generator=generator)
    return patches.contiguous(), (pixels / 255 - mean) / std, tokens


def to_transformers(pair, config):
    """Returns a CLIPModel of transformers with the weights of ``pair``."""
    model = config.model
    towers = {}
    for name, tower, more in (
        ("vision", model.image, {"image_size": model.image.size, "patch_size": model.image.patch}),
        (
            "text",
            model.text,
            {"vocab_size": END + 1, "max_position_embeddings": model.text.length, "eos_token_id": END},
        ),
    ):
        towers[f"{name}_config"] = more | {
            "hidden_size": tower.width, "intermediate_size": 4 * tower.width, "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads, "hidden_act": model.activation, "layer_norm_eps": model.norm_eps,
        }  # fmt: skip
    other = transformers.CLIPModel(transformers.CLIPConfig(projection_dim=model.embed, **towers))
    source = pair.state_dict()
    state = {
        "logit_scale": source["logit_scale"][0],
        "visual_projection.weight": source["image.projection.weight"],
        "text_projection.weight": source["text.projection.weight"],
        "vision_model.embeddings.class_embedding": source["image.class_token"],
        "vision_model.embeddings.patch_embedding.weight": weights.as_convolution(source["image.patch.weight"]),
        "vision_model.embeddings.position_embedding.weight": source["image.positions"],
        "text_model.embeddings.token_embedding.weight": source["text.tokens.weight"],
        "text_model.embeddings.position_embedding.weight": source["text.positions"],
    }
    for part in ("weight", "bias"):
        state[f"vision_model.pre_layrnorm.{part}"] = source[f"image.norm_pre.{part}"]
        state[f"vision_model.post_layernorm.{part}"] = source[f"image.norm.{part}"]
        state[f"text_model.final_layer_norm.{part}"] = source[f"text.norm.{part}"]
        for name, tower, layers in (("vision", "image", model.image.layers), ("text", "text", model.text.layers)):
            for i in range(layers):
                block = f"{tower}.blocks.{i}"
                layer = f"{name}_model.encoder.layers.{i}"
                for old, new in (
                    ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"),
                    ("attn.proj", "self_attn.out_proj"),
                ):  # fmt: skip
                    state[f"{layer}.{new}.{part}"] = source[f"{block}.{old}.{part}"]
                for row, value in zip("qkv", source[f"{block}.attn.qkv.{part}"].chunk(3), strict=True):
                    state[f"{layer}.self_attn.{row}_proj.{part}"] = value
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("position_ids") for name in missing)
    return other.eval()


def built_by_open_clip(config):
    model = format.open_clip_config(config.model, config.augment, "native", Path(), config.model.norm_eps)["model_cfg"]
    del model["text_cfg"]["hf_tokenizer_name"]
    return open_clip.CLIP(**model).eval()


def named_by_open_clip(pair):
    image = weights.image_to_native(pair.state_dict(), pair.image.positions.detach())
    return image | weights.text_to_open_clip(pair.state_dict(), pair.max_logit_scale)


def near(actual, expected):
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_recipe_clip_matches_transformers_and_open_clip(attention, activation):
    config = recipe(f"model.activation={activation}")
    pair = drawn(config, attention)
    patches, pixels, tokens = inputs(config)
    image = pair.image(patches)
    text = pair.text(tokens)
    other = to_transformers(pair, config)
    assert near(image, other.get_image_features(pixels).pooler_output)
    assert near(text, other.get_text_features(tokens.long()).pooler_output)
    stock = built_by_open_clip(config)
    stock.load_state_dict(named_by_open_clip(pair))
    assert near(image, stock.encode_image(pixels)) and near(text, stock.encode_text(tokens))
    assert math.exp(float(stock.logit_scale)) == pytest.approx(float(pair(patches, None, tokens)[2]), rel=1e-6)


@torch.no_grad()
def test_image_tower_handles_masked_patches_by_position():
    """With all patches visible a mask changes nothing. A masked image keeps its class token and positions."""
    config = recipe()
    pair = drawn(config)
    (patches, *_) = inputs(config)
    everything = torch.arange(64, dtype=torch.int16).expand(len(patches), -1)
    assert torch.equal(pair.image(patches, everything), pair.image(patches))
    keep = torch.from_numpy(visible_patches(0, np.zeros(6, np.int64), np.arange(6), 64, 20)).long()
    visible = patches.gather(1, keep[..., None].expand(-1, -1, patches.shape[-1]))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(pair.image(visible, keep), pair.image(visible[:, order], keep[:, order]), atol=2e-6)
    assert not torch.allclose(pair.image(visible, keep), pair.image(visible, keep.flip(1)), atol=1e-3)


@torch.no_grad()
def test_text_features_ignore_padding_and_neighbours():
    config = recipe()
    pair = drawn(config)
    _, _, tokens = inputs(config)
    text = pair.text(tokens)
    padded = torch.where(torch.arange(16) > tokens.argmax(1, keepdim=True), END, tokens)  # as transformers pads
    assert torch.equal(pair.text(padded), text) and torch.allclose(pair.text(tokens[3:4]), text[3:4], atol=2e-6)
    positions = torch.arange(9).expand(4, -1)
    assert torch.allclose(pair.text(tokens[:4, :9], positions), text[:4], atol=2e-6)
    assert len(pair.text.token_indices(tokens)) == sum((2, 3, 5, 9, 15, 16))
    pair.text.packed = False
    assert torch.allclose(pair.text(tokens), text, atol=2e-6)
    assert len(pair.text.token_indices(tokens)) == tokens.numel()


@pytest.mark.parametrize("size, patch, millions", [("B/32", 32, 151.3), ("B/16", 16, 149.6), ("L/14", 14, 427.6)])
def test_parameter_counts_match_published_models(size, patch, millions):
    """Counts equal those of open_clip for the models of Radford et al."""
    model = recipe(f"model.size={size}", "model.text.length=77", "model.text.vocabulary=49408").model
    assert model.image.patch == patch == MODEL_PRESETS[size]["image"]["patch"]
    with torch.device("meta"):
        pair = clip.CLIPModel(model, Augment(), "sdpa")
        stock = open_clip.CLIP(**open_clip.get_model_config(f"ViT-{size.replace('/', '-')}"))
    counted = {tower: sum(p.numel() for p in getattr(pair, tower).parameters()) for tower in ("image", "text")}
    total = sum(p.numel() for p in stock.parameters())
    assert model_costs.parameters(model) == counted | {"total": total}
    assert total / 1e6 == pytest.approx(millions, abs=0.05)


def test_initial_weights_are_distributed_as_in_open_clip():
    """open_clip uses the initialisation of the published code."""
    config = recipe("model.image.width=256", "model.text.width=256", "model.image.heads=4", "model.text.heads=4")
    actual = named_by_open_clip(drawn(config, trained=False))
    torch.manual_seed(0)
    for name, expected in built_by_open_clip(config).named_parameters():
        value = actual[name].double()
        expected = expected.detach().double()
        if expected.numel() == 1 or not expected.std() > 0:
            assert torch.equal(value, expected), name
        else:
            tolerance = 0.2 if value.ndim == 1 else 0.05
            assert float(value.std()) == pytest.approx(float(expected.std()), rel=tolerance), name
            assert float(value.abs().max()) == pytest.approx(float(expected.abs().max()), rel=0.3), name
