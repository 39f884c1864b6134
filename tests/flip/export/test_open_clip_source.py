"""Tests runs that start from a model folder of open_clip: same features, and clear refusals of other models."""

import json

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from flip.config.schema import Init
from flip.data.decode import patches
from flip.export.open_clip_source import source_config
from flip.models import clip
from flip.runs.errors import ConfigError, DataError
from flip.training import warm_start
from tests.flip.evaluation.encoding.test_encoders import MODEL, make_folder
from tests.flip.export.test_exporter import configured
from tests.flip.test_byte_pairs import PUBLISHED
from tests.synthetic import draw_image, make_tokenizer

pytestmark = pytest.mark.long

FIELDS = (
    "model.embed=24", "model.image.size=32", "model.image.patch=8", "model.image.width=32", "model.image.layers=2",
    "model.image.heads=2", "model.text.length=16", "model.text.vocabulary=49408", "model.text.width=32",
    "model.text.layers=2", "model.text.heads=2", "model.activation=gelu",
)  # fmt: skip
"""The model of ``make_folder`` in recipe clip."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models") / "published")


def run_config(*settings, tokenizer=PUBLISHED, recipe="clip"):
    return configured(recipe, tokenizer, "tiny", *FIELDS, *settings)


def built(config):
    model = clip.CLIPModel(config.model, config.augment, "sdpa")
    clip.init_weights(model, 9)
    return model.eval()


@torch.no_grad()
def test_run_starts_with_the_features_of_open_clip(folder):
    config = run_config()
    model = built(config)
    assert warm_start.load_converted(model, config, folder) == {}
    published = open_clip.create_model(f"local-dir:{folder}").eval()
    images = np.stack([draw_image(i, 32) for i in range(3)])
    mean = np.float32(config.augment.mean)
    std = np.float32(config.augment.std)
    pixels = torch.from_numpy(((images / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))
    rows = torch.from_numpy(np.stack([patches(image, 8) for image in images]))
    assert torch.allclose(model.image(rows), published.encode_image(pixels), atol=1e-5)
    tokens = open_clip.SimpleTokenizer(context_length=16)(["a red square", ""])
    assert torch.allclose(model.text(tokens.int()), published.encode_text(tokens), atol=1e-5)


def test_larger_image_is_converted_and_named(folder):
    config = run_config("model.image.size=64")
    assert warm_start.load_converted(built(config), config, folder) == {"model.image.size": [32, 64]}


def test_resolve_init_identifies_the_folder_by_its_files(folder, tmp_path):
    config = run_config()
    config.init = Init(export=str(folder))
    resolved = warm_start.resolve_init(config, [tmp_path])
    assert warm_start.open_export(resolved) == folder
    with pytest.raises(DataError, match="no longer exists"):
        warm_start.open_export(Init(export=str(folder), commit="0" * 16))


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("vision_cfg", "timm_model_name", "vit_base_patch16_224"),
        ("vision_cfg", "attentional_pool", True),
        ("vision_cfg", "ls_init_value", 0.1),
        ("vision_cfg", "pool_type", "map"),
        ("vision_cfg", "mlp_ratio", 3.7),
        ("text_cfg", "pool_type", "last"),
        ("text_cfg", "norm_kwargs", {"eps": 1e-6}),
        ("text_cfg", "embed_cls", True),
    ],
)
def test_parts_that_the_toolkit_lacks_are_refused_by_name(folder, tmp_path, section, key, value):
    described = {"model_cfg": json.loads(json.dumps(MODEL)), "preprocess_cfg": {}}
    described["model_cfg"][section][key] = value
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    weights = (folder / "open_clip_model.safetensors").read_bytes()
    (tmp_path / "open_clip_model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match=f"cannot start from this model.*{key}"):
        source_config(tmp_path, run_config())


def test_run_of_another_architecture_or_tokenizer_is_refused_with_the_field(folder, tmp_path):
    config = run_config(recipe="portable")
    config.init = Init(export=str(folder))
    with pytest.raises(ConfigError, match=r"cannot start from .*model\.(text\.causal|image\.positions)|text\.causal"):
        warm_start.resolve_init(config, [tmp_path])
    config = run_config(tokenizer=make_tokenizer(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="byte pairs"):
        warm_start.load_converted(built(run_config()), config, folder)


@pytest.mark.parametrize("name", ["visual.transformer.resblocks.0.ls_1.gamma", "visual.ln_pre.scale", "text_gain"])
def test_weights_with_a_tensor_that_the_toolkit_does_not_know_are_refused(folder, tmp_path, name):
    (tmp_path / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    file = tmp_path / "open_clip_model.safetensors"
    save_file(load_file(folder / file.name) | {name: torch.ones(1)}, file)
    config = run_config()
    with pytest.raises(ConfigError, match=rf"parameters that the toolkit does not know.*{name}"):
        warm_start.load_converted(built(config), config, tmp_path)
