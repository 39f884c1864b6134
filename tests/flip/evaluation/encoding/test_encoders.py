"""Tests that OpenClipEncoder computes the features of open_clip and rejects damaged or hostile folders."""

import contextlib
import json
import shutil
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import tokenizers
import torch
from PIL import Image
from safetensors.torch import save_file

from flip.config.schema import EvaluationSet
from flip.data.decode import open_image
from flip.evaluation.datasets.catalog import ResolvedDataset
from flip.evaluation.encoding import encoders, open_clip_folder
from flip.evaluation.evaluator import Evaluator
from flip.runs.checkpoint_folder import sha256
from flip.runs.errors import ConfigError, DataError
from tests.synthetic import draw_image

MODEL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def make_folder(folder):
    """Writes a small model with random weights. open_clip's default tokenizer needs no further files."""
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
def test_open_clip_encoder_features_match_open_clip(folder):
    clip_encoder = encoders.OpenClipEncoder(str(folder))
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    images = [draw_image(i, 50)[:40] for i in range(3)]
    views = torch.from_numpy(np.stack([clip_encoder.view(image) for image in images]))
    expected = model.encode_image(torch.stack([preprocess(Image.fromarray(image)) for image in images]), normalize=True)
    assert torch.allclose(clip_encoder.image(views, torch.arange(3)), expected, atol=1e-6)
    texts = ["a red square", "a blue stripe"]
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
    assert torch.allclose(clip_encoder.text(texts), model.encode_text(tokens, normalize=True), atol=1e-6)
    assert clip_encoder.width == 24


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "CMYK"])
def test_open_clip_encoder_prepares_images_of_all_modes_as_open_clip(folder, tmp_path, mode):
    """open_clip drops transparency and clips 16-bit grey. Training does neither by default."""
    pixels = np.dstack([draw_image(1, 50), np.tile(np.arange(50, dtype=np.uint8), (50, 1))])
    stored = Image.fromarray(pixels).convert(mode if mode != "I;16" else "L")
    if mode == "I;16":
        stored = Image.fromarray((np.arange(2500, dtype=np.uint16) * 26).reshape(50, 50))
    stored.save(tmp_path / "image", "TIFF" if mode == "CMYK" else "PNG", **({"transparency": 3} if mode == "P" else {}))
    image = open_image((tmp_path / "image").read_bytes())
    assert image.mode == mode
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert np.array_equal(encoders.OpenClipEncoder(str(folder)).view(image), preprocess(image).numpy())


def test_open_clip_encoder_scores_data_set_in_fp32_and_bf16(folder, data):
    item = ResolvedDataset.from_config(EvaluationSet("x", str(data), str(data / "classes.json")))
    (result,) = Evaluator(encoders.OpenClipEncoder(str(folder)), 16).score(item)
    assert (result["n"], result["classes"], result["view"], result["precision"]) == (50, 7, "open_clip-own", "fp32")
    (other,) = Evaluator(encoders.OpenClipEncoder(str(folder), precision="bf16"), 16).score(item)
    assert other["precision"] == "bf16"


def test_open_clip_encoder_in_bf16_differs_from_default_precision(folder):
    exact, rounded = (encoders.OpenClipEncoder(str(folder), **more) for more in ({}, {"precision": "bf16"}))
    texts = ["a red square", "a blue stripe"]
    difference = (exact.text(texts) - rounded.text(texts)).abs().max()
    assert 1e-5 < difference < 0.1


def test_open_clip_encoder_rejects_incomplete_or_invalid_folder(folder, tmp_path):
    with pytest.raises(ConfigError, match="open_clip_config.json is missing"):
        encoders.OpenClipEncoder(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"vision_cfg": {}, "text_cfg": {}, "nonsense": 1}}')
    (tmp_path / "open_clip_model.safetensors").write_bytes((folder / "open_clip_model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match="open_clip cannot build this model"):
        encoders.OpenClipEncoder(str(tmp_path))
    assert open_clip_folder.verified_digest(str(folder)) != open_clip_folder.verified_digest(str(tmp_path))


@pytest.mark.slow
def test_printed_lines_convert_checkpoint_of_open_clip(tmp_path, monkeypatch):
    """A checkpoint as open_clip's training writes it, of the smallest architecture that it knows by name."""
    name = "ViT-S-32-alt"
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    source = tmp_path / "epoch_32.pt"
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 32, "state_dict": state}, source)
    assert open_clip_folder.is_pickle(str(source))
    lines, folder = open_clip_folder.conversion(str(source))
    subprocess.run([sys.executable, "-c", lines.replace("ViT-B-16", name)], cwd=tmp_path, check=True)
    assert not open_clip_folder.check(folder)
    encoder = encoders.OpenClipEncoder(folder)
    texts = ["a red square", "a blue circle"]
    with torch.no_grad():
        expected = model.eval().encode_text(open_clip.get_tokenizer(name)(texts), normalize=True)
    assert torch.allclose(encoder.text(texts), expected, atol=1e-5)


def test_only_files_with_known_endings_count_as_pickles(tmp_path):
    for word in ("quickstart/masked", "missing.pt", str(tmp_path)):
        assert not open_clip_folder.is_pickle(word)


def test_truncated_open_clip_weights_raise_data_error(folder, tmp_path):
    truncated = shutil.copytree(folder, tmp_path / "theirs")
    weights = truncated / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for check in (open_clip_folder.check, encoders.OpenClipEncoder):
        with pytest.raises(DataError, match="model.safetensors: .*cannot be read.*Copy"):
            check(str(truncated))


def test_open_clip_folder_verify_allows_edited_config_but_not_weights(folder, tmp_path):
    """An exported folder records the sizes and SHA-256 of its files. Two files may be edited."""
    exported = shutil.copytree(folder, tmp_path / "theirs")
    open_clip_folder.verify(str(exported))
    (exported / "README.md").write_text("a card")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in exported.iterdir()}
    record = {"form": 1, "stage": "pretrain", "samples": 64, "attempt": 1, "files": files}
    (exported / "export.json").write_text(json.dumps(record))
    open_clip_folder.verify(str(exported))
    config = exported / "open_clip_config.json"
    config.write_text(config.read_text() + "\n"), (exported / "README.md").write_text("another card")
    open_clip_folder.verify(str(exported))
    weights = exported / "open_clip_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DataError, match="damaged: .*model.safetensors.*checksum.*Copy"):
        open_clip_folder.verify(str(exported))


EVIL = """
from transformers import PreTrainedTokenizerFast
open({place!r}, "w").close()
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def malicious_folder(folder, tmp_path, monkeypatch):
    """(function that writes a folder with malicious tokenizer code, file that this code creates)."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))
    model_folder = tmp_path / "evil"
    marker = tmp_path / "was-run"
    model_folder.mkdir()
    (model_folder / "open_clip_model.safetensors").write_bytes((folder / "open_clip_model.safetensors").read_bytes())
    (model_folder / "theirs.py").write_text(EVIL.format(place=str(marker)))
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "cat": 4}
    tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")).save(
        str(model_folder / "tokenizer.json")
    )
    settings = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": [None, "theirs.Tokenizer"]}}
    (model_folder / "tokenizer_config.json").write_text(json.dumps(settings))

    def write_config(**text):
        config = {**MODEL, "text_cfg": {**MODEL["text_cfg"], "hf_tokenizer_name": "local", **text}}
        (model_folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        return str(model_folder)

    return write_config, marker


def test_open_clip_encoder_runs_no_code_from_folder(malicious_folder):
    write_config, marker = malicious_folder
    with pytest.raises(ConfigError, match="tokenizer_kwargs: an argument that is not allowed"):
        encoders.OpenClipEncoder(write_config(tokenizer_kwargs={"trust_remote_code": True}))
    with contextlib.suppress(ConfigError):  # either an error or a plain tokenizer is correct
        encoders.OpenClipEncoder(write_config())
    assert not marker.exists()
    with contextlib.suppress(Exception):  # open_clip alone runs the code of the first folder
        open_clip.get_tokenizer(f"local-dir:{write_config(tokenizer_kwargs={'trust_remote_code': True})}")
    assert marker.exists(), "open_clip runs no code from this folder, so the test proves nothing"


def test_open_clip_encoder_rejects_text_encoder_from_hub(malicious_folder):
    write_config, _ = malicious_folder
    with pytest.raises(ConfigError, match="names an encoder of a hub"):
        encoders.OpenClipEncoder(write_config(hf_model_name="user/model"))
