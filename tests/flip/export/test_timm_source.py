"""Tests runs whose image encoder starts from weights of timm: same features, and clear refusals of other models."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from flip.config.schema import Init
from flip.data.decode import patches
from flip.export import exporter, timm_source
from flip.export.load import load
from flip.models import clip
from flip.runs.errors import ConfigError, DataError
from flip.training import warm_start
from tests.flip.export.test_exporter import configured, loaded_of
from tests.synthetic import draw_image, make_tokenizer

pytestmark = pytest.mark.long

SETTINGS = {"portable": (), "clip": ("model.text.causal=false", "model.text.repair=true")}
"""Recipe -> settings with which it takes any tokenizer."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory):
    """Recipe -> its configuration, a model, and the folder of the model in timm."""
    result = {}
    for recipe, settings in SETTINGS.items():
        config = configured(recipe, tokenizer, "tiny", *settings)
        folder = tmp_path_factory.mktemp("export")
        loaded = loaded_of(config, folder)
        exporter.export(loaded, folder / "model")
        result[recipe] = config, loaded.model, folder / "model" / "timm"
    return result


def built(config):
    model = clip.CLIPModel(config.model, config.augment, "sdpa")
    clip.init_weights(model, 9)
    return model.eval()


def rows_of(size, patch):
    return torch.from_numpy(np.stack([patches(draw_image(i, size), patch) for i in range(3)]))


@torch.no_grad()
@pytest.mark.parametrize("recipe", SETTINGS)
@pytest.mark.parametrize("single", [False, True])
def test_image_encoder_starts_with_the_features_of_timm(models, tmp_path, recipe, single):
    config, exported, folder = models[recipe]
    source = folder
    if single:
        source = shutil.copy(folder / "model.safetensors", tmp_path / "weights.safetensors")
    model = built(config)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    assert warm_start.load_converted(model, config, source) == {}
    for name, value in model.state_dict().items():
        of_encoder = name.startswith("image.") and not name.startswith("image.projection")
        if of_encoder:
            expected = exported.state_dict()[name]
        else:
            expected = fresh[name]
        assert torch.equal(value, expected), name
    image = config.model.image
    encoder = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    images = np.stack([draw_image(i, image.size) for i in range(3)])
    mean = np.float32(config.augment.mean)
    std = np.float32(config.augment.std)
    pixels = torch.from_numpy(((images / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))
    features = encoder(pixels) @ model.image.projection.weight.T
    assert torch.allclose(model.image(rows_of(image.size, image.patch)), features, atol=1e-5)


TOWERS = {
    "registers": ("registers=2", "qk_norm=true", "positions=learned"),
    "attention": ("pool=attention", "registers=3"),
}
"""What is special -> settings of ``model.image``."""


@torch.no_grad()
@pytest.mark.parametrize("special", TOWERS)
def test_tower_of_timm_is_exported_loaded_and_a_source(tokenizer, tmp_path, special):
    """Its export has the features of timm's model, ``flip.load`` reads it, and a run starts from either."""
    settings = ["tower=timm", *TOWERS[special]]
    config = configured("portable", tokenizer, "tiny", *(f"model.image.{setting}" for setting in settings))
    loaded = loaded_of(config, tmp_path)
    record = exporter.export(loaded, tmp_path / "model")
    assert record["variant"] == "timm-tower"
    image = config.model.image
    rows = rows_of(image.size, image.patch)
    expected = loaded.model.image(rows)
    images = np.stack([draw_image(i, image.size) for i in range(3)]) / np.float32(255)
    pixels = (images - np.float32(config.augment.mean)) / np.float32(config.augment.std)
    other = open_clip.create_model(f"local-dir:{tmp_path / 'model'}").eval()
    features = other.encode_image(torch.from_numpy(pixels.transpose(0, 3, 1, 2)), normalize=True)
    assert torch.allclose(features, loaded.model.encode_image(rows), atol=1e-5)
    again = load(tmp_path / "model")
    assert torch.allclose(again.model.image(rows), expected, atol=1e-6)
    for source in (tmp_path / "model", tmp_path / "model" / "timm"):
        model = built(config)
        assert warm_start.load_converted(model, config, source) == {}
        model.image.projection.weight.copy_(loaded.model.image.projection.weight)
        assert torch.allclose(model.image(rows), expected, atol=1e-6)
    plain = configured("portable", tokenizer, "tiny", "model.image.positions=learned")
    with pytest.raises(ConfigError, match="for which the tower flip has no parameter.*model.image.tower: timm"):
        warm_start.load_converted(built(plain), plain, tmp_path / "model" / "timm")


def test_larger_image_is_converted_and_named(models, tokenizer):
    config = configured("clip", tokenizer, "tiny", *SETTINGS["clip"], "model.image.size=128")
    assert list(warm_start.load_converted(built(config), config, models["clip"][2])) == ["model.image.size"]


@torch.no_grad()
def test_positions_without_the_class_token_fit_learned_ones(models, tokenizer):
    """timm's ``no_embed_class``: the class token has no position, which is the same as a position of zero."""
    _, exported, folder = models["portable"]
    config = configured("portable", tokenizer, "tiny", "model.image.positions=learned")
    model = built(config)
    warm_start.load_converted(model, config, folder)
    image = config.model.image
    model.image.projection.weight.copy_(exported.image.projection.weight)
    rows = rows_of(image.size, image.patch)
    assert torch.allclose(model.image(rows), exported.image(rows), atol=1e-5)


def test_resolve_init_identifies_the_weights_and_the_plan_names_what_is_fresh(models, tmp_path):
    config, _, folder = models["portable"]
    config.init = Init(export=str(folder))
    try:
        resolved = warm_start.resolve_init(config, [tmp_path])
    finally:
        config.init = Init()
    assert warm_start.open_export(resolved) == folder and len(resolved.commit) == 16
    assert timm_source.FRESH in timm_source.note(resolved.export)
    assert timm_source.note(str(folder.parent)) == "", "an export has all weights"
    with pytest.raises(DataError, match="no longer exists"):
        warm_start.open_export(Init(export=str(folder), commit="0" * 16))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("cls_token", None, "it has no cls_token"),
        ("blocks.1.attn.qkv.bias", None, r"it has no blocks\.1\.attn\.qkv\.bias"),
        ("blocks.0.ls1.gamma", (64,), r"it has blocks\.0\.ls1\.gamma, for which"),
        ("reg_token", (1, 4, 64), "it has reg_token"),
        ("blocks.0.mlp.fc1.weight", (100, 64), "not 4 times as wide"),
        ("pos_embed", (1, 17, 64), "the run has fixed positions"),
        ("pos_embed", (1, 16, 64), "its positions are learned"),
        ("pos_embed", (1, 16, 32), r"pos_embed has the shape \(1, 16, 32\)"),
        ("patch_embed.proj.bias", None, "has a bias here exactly if"),
    ],
)
def test_parts_that_the_toolkit_lacks_are_refused_by_name(models, tmp_path, name, change, message):
    config, _, folder = models["portable"]
    tensors = load_file(folder / "model.safetensors")
    if change is None:
        del tensors[name]
    else:
        tensors[name] = torch.ones(change)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(ConfigError, match=f"cannot start from this model of timm, because .*{message}"):
        timm_source.source_config(tmp_path, config)


def test_other_architectures_are_refused_with_the_field(models, tmp_path):
    config, _, folder = models["portable"]
    with pytest.raises(ConfigError, match=r"model\.image\.layers: cannot start from"):
        warm_start.load_converted(built(config), config, described(folder, tmp_path / "layers", cut=True))
    with pytest.raises(ConfigError, match=r"model\.image\.heads: cannot start from"):
        warm_start.load_converted(built(config), config, described(folder, tmp_path / "heads", num_heads=1))
    with pytest.raises(ConfigError, match="global_pool is map"):
        timm_source.source_config(described(folder, tmp_path / "pool", global_pool="map"), config)


def described(folder, into, cut=False, **arguments):
    """A copy of the folder with other arguments, or without its last block."""
    shutil.copytree(folder, into)
    record = json.loads((into / "config.json").read_text())
    record["model_args"] |= arguments
    (into / "config.json").write_text(json.dumps(record))
    if cut:
        tensors = load_file(into / "model.safetensors")
        last = max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
        encoder = {name: value for name, value in tensors.items() if not name.startswith(f"blocks.{last}.")}
        save_file(encoder, into / "model.safetensors")
    return into
