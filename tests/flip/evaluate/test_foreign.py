"""A folder as open_clip writes it, through our reader: open_clip's own features and clip_benchmark's numbers."""

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flip.config.schema import EvaluationSet
from flip.evaluate import foreign
from flip.evaluate.score import DataSet, Scorer
from flip.exitcodes import ConfigError
from tests.synthetic import picture

MODEL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def make_folder(folder):
    """A small model with random weights and the usual tokenizer of open_clip, which needs nothing else."""
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.CLIP(**{**MODEL, "vision_cfg": open_clip.CLIPVisionCfg(**MODEL["vision_cfg"]),
                              "text_cfg": open_clip.CLIPTextCfg(**MODEL["text_cfg"])})  # fmt: skip
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models") / "theirs")


@torch.no_grad()
def test_features_are_open_clips(folder):
    ours = foreign.OpenClipEncoder(str(folder))
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    pictures = [picture(i, 50)[:40] for i in range(3)]
    views = torch.from_numpy(np.stack([ours.view(one) for one in pictures]))
    expected = model.encode_image(torch.stack([preprocess(Image.fromarray(one)) for one in pictures]), normalize=True)
    assert torch.allclose(ours.image(views, torch.arange(3)), expected, atol=1e-6)
    texts = ["a red square", "a blue stripe"]
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
    assert torch.allclose(ours.text(texts), model.encode_text(tokens, normalize=True), atol=1e-6)
    assert ours.width == 24


def test_on_a_data_set(folder, data):
    encoder = foreign.OpenClipEncoder(str(folder))
    (found,) = Scorer(encoder, 16).score(DataSet.of(EvaluationSet("x", str(data), str(data / "classes.json"))))
    assert (found["n"], found["classes"], found["view"]) == (50, 7, "open_clip")


def test_what_is_no_folder_of_open_clip(folder, tmp_path):
    with pytest.raises(ConfigError, match="open_clip_config.json is missing"):
        foreign.OpenClipEncoder(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 3, "nonsense": 1}}')
    (tmp_path / "open_clip_model.safetensors").write_bytes((folder / "open_clip_model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match="open_clip cannot make this model"):
        foreign.OpenClipEncoder(str(tmp_path))
    assert foreign.digest(str(folder)) != foreign.digest(str(tmp_path))
