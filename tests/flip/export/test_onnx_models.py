"""Tests `export --to onnx`: the real ONNX Runtime computes the features of flip, and model card code works."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import flip
from flip.export import exporter, onnx_models
from flip.runs.errors import ConfigError
from tests.flip.export.test_exporter import Given, configured, loaded_of
from tests.flip.test_byte_pairs import PUBLISHED
from tests.synthetic import draw_image, make_tokenizer
from tools.commands import export as command

pytestmark = pytest.mark.long

TEXTS = ["a red square", "", "[PAD] [CLS] ##s", " ".join(f"a blue frame {i}" for i in range(40)), "caf\u00e9"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """Returns a function: recipe -> (its model, the folder of its export). Each recipe is exported once."""
    exports = {}

    def export(recipe, *settings):
        if recipe not in exports:
            path = tmp_path_factory.mktemp(recipe)
            file = PUBLISHED if recipe == "clip" else tokenizer
            loaded = loaded_of(configured(recipe, file, "tiny", *settings), path)
            with pytest.MonkeyPatch.context() as patch:
                if recipe == "paper":  # use external data files, as for a large model
                    patch.setattr(onnx_models, "_SINGLE_FILE_BYTES", 100_000)
                exporter.export(loaded, path / "out", form="onnx")
            exports[recipe] = loaded, path / "out"
        return exports[recipe]

    return export


RECIPES = [("paper", ("model.text.padding=mask",)), ("clip", ("model.objective=siglip",))]


@torch.no_grad()
@pytest.mark.parametrize("recipe, settings", RECIPES)
def test_onnx_runtime_matches_model_features_for_any_batch_size(recipe, settings, exported):
    loaded, folder = exported(recipe, *settings)
    image = session(folder / "image_encoder.onnx")
    text = session(folder / "text_encoder.onnx")
    inputs = Given(loaded.config, TEXTS, 5)
    tokens = loaded.tokenizer(TEXTS).astype(np.int64)
    expected = loaded.model.encode_image(inputs.patches), loaded.model.encode_text(torch.from_numpy(tokens))
    for batch in (1, 5):
        (images,) = image.run(["image_embeds"], {"pixel_values": inputs.pixels[:batch]})
        (texts,) = text.run(["text_embeds"], {"input_ids": tokens[:batch]})
        assert np.abs(images - expected[0][:batch].numpy()).max() < 1e-5
        assert np.abs(texts - expected[1][:batch].numpy()).max() < 1e-5
    record = json.loads((folder / "export.json").read_text())
    assert record["logit_scale"] == pytest.approx(min(np.exp(5), loaded.config.model.max_logit_scale))
    assert ("logit_bias" in record) == (recipe == "clip")


def card_logits(folder, image_path, labels, scratch):
    """Runs the first code block of README.md in a process without hub, network or package flip. Returns ``logits``."""
    block = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    values = {'"..."': str(folder), '"a.png"': str(image_path), '["a frog", "a toad"]': labels}
    for old, new in values.items():
        assert block.count(old) == 1
        block = block.replace(old, repr(new))
    block += "\nimport json, sys; assert 'flip' not in sys.modules; print(json.dumps(logits.tolist()))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch), "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", block], cwd=scratch, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout))


@torch.no_grad()
def test_onnx_model_card_code_computes_model_logits(exported, tmp_path):
    loaded, folder = exported(*RECIPES[1][:1], *RECIPES[1][1])
    Image.fromarray(draw_image(3, 100)).save(tmp_path / "square.png")
    logits = card_logits(folder, tmp_path / "square.png", TEXTS, tmp_path)
    pair = loaded.model
    scale = pair.logit_scale.clamp(max=pair.max_logit_scale).exp()
    cosines = loaded.encode_image(tmp_path / "square.png") @ loaded.encode_text(TEXTS).T
    assert ((logits - pair.logit_bias) / scale - cosines).abs().max() < 1e-5


def test_onnx_export_lists_its_files_and_is_rejected_by_load(exported, tmp_path, capsys):
    loaded, folder = exported("paper")
    record = json.loads((folder / "export.json").read_text())
    assert record["format"] == "onnx"
    assert set(record["files"]) == {
        "README.md", "flip_config.yaml", "image_encoder.onnx", "image_encoder.onnx.data", "preprocessor_config.json",
        "text_encoder.onnx", "text_encoder.onnx.data", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    root = str(Path(__file__).resolve().parents[3]).encode()
    assert not any(root in path.read_bytes() for path in folder.iterdir())
    with pytest.raises(ConfigError, match="does not read back this format.*--to open_clip"):
        flip.load(folder)
    with pytest.raises(ConfigError, match="an export exists already"):
        exporter.export(loaded, folder, form="onnx")
    assert any("not square" in sentence for sentence in record["differences"])


def test_choose_format_rejects_unknown_format_variant_or_missing_package(tokenizer, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as error:
        command.main(["run", "--to", "tensorflow"])
    assert error.value.code == 2 and "choose from" in capsys.readouterr().err
    model = configured("paper", tokenizer).model
    with pytest.raises(ConfigError, match="There are: open_clip"):
        exporter.choose_format(model, "tensorflow")
    with pytest.raises(ConfigError, match="for --to open_clip only"):
        exporter.choose_format(model, "onnx", "native")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match="pip install onnxscript"):
        exporter.choose_format(model, "onnx")
