"""Tests `export --to transformers`: AutoModel, AutoProcessor and the pipeline give the predictions of flip, offline."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flip
from flip.export import exporter
from flip.runs.errors import ConfigError
from flip.tokenizer import train_byte_pairs
from tests.flip.export.test_exporter import FILES, configured, loaded_of
from tests.flip.export.test_onnx_models import card_logits
from tests.flip.test_byte_pairs import PUBLISHED
from tests.synthetic import caption, draw_image

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[3]
STOCK = Path(__file__).with_name("transformers_reference.py")
TEXTS = [
    "", "a red square", " A  RED\tSquare\n number 4 ", "<|endoftext|> <|startoftext|> x", "!!! don't 3.5-inch",
    "x" * 150, " ".join(f"a blue frame {i}" for i in range(40)), "caf\u00e9 na\u00efve", "\u732b\u304c\u597d\u304d",
    "\U0001f600 \u200b zero", "\u0130stanbul STRASSE",
]  # fmt: skip
LABELS = ["red square", "blue circle", "green"]


def bpe(path, vocabulary=700):
    train_byte_pairs([caption(i) for i in range(64)], vocabulary, path)
    return path


def in_transformers(folder, scratch):
    """Runs transformers_reference.py in its own process, without hub and network. Returns its outputs."""
    for name, data in FILES.items():
        (scratch / name).write_bytes(data)
    files = [str(scratch / name) for name in FILES]
    (scratch / "given.json").write_text(json.dumps({"texts": TEXTS, "labels": LABELS, "files": files}))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch), "OMP_NUM_THREADS": "2"}
    arguments = [sys.executable, str(STOCK), str(folder), str(scratch / "given.json"), str(scratch / "found.npz")]
    done = subprocess.run(arguments, cwd=scratch, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: torch.from_numpy(value) for name, value in np.load(scratch / "found.npz").items()}


def near(actual, expected):
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("settings", [(), ("model.activation=gelu_tanh", "model.image.positions=sincos")])
def test_transformers_matches_model_features_logits_and_scores(settings, tmp_path):
    if settings:
        tokenizer = bpe(tmp_path / "own.json")
    else:
        tokenizer = PUBLISHED
    loaded = loaded_of(configured("clip", tokenizer, "tiny", *settings), tmp_path)
    scale = 100.0  # the limit, because exp(5) exceeds it
    if not settings:
        loaded.model.logit_scale.fill_(2.66)
        scale = np.exp(2.66)
    record = exporter.export(loaded, tmp_path / "out", form="transformers")
    (tmp_path / "out").rename(tmp_path / "moved")
    outputs = in_transformers(tmp_path / "moved", tmp_path)
    rows = loaded.tokenizer(TEXTS)
    for row, reference in zip(rows, outputs["tokens"].numpy(), strict=True):
        tokens = loaded.tokenizer.without_padding(row)
        assert np.array_equal(reference, [*tokens, *[tokens.max()] * (77 - len(tokens))])
    files = [tmp_path / name for name in FILES]
    image = loaded.encode_image(files)
    text = loaded.encode_text(TEXTS)
    alike = torch.tensor([name not in ("RGBA", "LA", "clear palette") for name in FILES])
    assert near(outputs["text"], text) and near(outputs["image"][alike], image[alike])
    assert [sentence.split(":")[0] for sentence in record["differences"]] == ["Images with transparency", "Texts"]
    assert near(torch.nn.functional.normalize(outputs["alone"], dim=-1), text)
    assert float(outputs["scale"]) == pytest.approx(scale, rel=1e-6)
    logits = scale * image @ text.T
    for name in ("logits", "shorter"):
        unit = scale if settings else 1.0  # float32 logits of scale 100 are not exact to 1e-5
        assert near(outputs[name][alike] / unit, logits[alike] / unit)
    expected = loaded.classify(files, LABELS, "a {}")
    assert near(outputs["scores"][alike], expected[alike])


@torch.no_grad()
def test_transformers_model_card_code_computes_model_logits(tmp_path):
    settings = ("evaluate.preprocess=resize_crop", "recipe=clip")
    loaded = loaded_of(configured("clip", bpe(tmp_path / "own.json"), "tiny", *settings), tmp_path)
    record = exporter.export(loaded, tmp_path / "out", form="transformers")
    (tmp_path / "square.png").write_bytes(FILES["square"])
    logits = card_logits(tmp_path / "out", tmp_path / "square.png", TEXTS, tmp_path)
    expected = loaded.encode_image(tmp_path / "square.png") @ loaded.encode_text(TEXTS).T
    assert near(logits / 100, expected)
    assert "a quarter of them differ by one pixel" in record["differences"][0]
    assert "a palette" in record["differences"][2]
    with pytest.raises(ConfigError, match="does not read back this format.*--to open_clip"):
        flip.load(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"\| recipe \| clip, objective clip \|", card) and "between `<|startoftext|>`" in card


def test_choose_format_rejects_model_unfit_for_transformers_with_reasons(tmp_path):
    model = configured("siglip", "none.json").model
    with pytest.raises(ConfigError) as error:
        exporter.choose_format(model, "transformers")
    for reason in (
        "pool: patches",
        "norm_pre: false",
        "causal: false",
        "objective: siglip",
        "recipe clip",
        "--to onnx",
    ):
        assert reason in str(error.value)
    assert exporter.choose_format(configured("clip", "none.json").model, "transformers") == ""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_documented_commands_turn_own_images_into_transformers_model(tmp_path):
    """Runs the commands of docs/export.md, "From your own images to transformers". Trains 100 steps."""
    for i in range(200):
        path = tmp_path / "shapes" / caption(i % 4).replace("/", " ") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_image(i % 4, 96)[: 96 - i % 30]).save(path)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FLIP_RUNS": str(tmp_path / "runs")}
    steps = ["stages.pretrain.samples=12800", "stages.pretrain.warmup=1280"]
    for args in (
        ["shards", "make", "shapes", "--out", "data/shapes", "--template", "a photo of a {label}"],
        ["tokenizer", "train", "--kind", "bpe", "--captions", "data/shapes", "--vocabulary", "4000"]
        + ["--out", "data/tokenizer.json"],
        ["new", "mine", "--data", "data/shapes", "--recipe", "clip"],
        ["submit", "mine.yaml", "--only", "mask0.5", *steps, "--watch"],
        ["export", "mine/mask0.5", "--to", "transformers"],
    ):
        arguments = [sys.executable, "-m", "jobs", *args]
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{args}: {done.stdout} {done.stderr}"
    outputs = in_transformers(tmp_path / "runs/mine/mask0.5/export/pretrain-12800-transformers", tmp_path)
    loaded = flip.load(tmp_path / "runs/mine/mask0.5")
    image = loaded.encode_image([tmp_path / name for name in FILES])
    text = loaded.encode_text(TEXTS)
    scale = loaded.model.logit_scale.detach().exp()  # about 14: float32 logits have few digits below 1e-5
    alike = torch.tensor([name not in ("RGBA", "LA", "clear palette") for name in FILES])
    assert (outputs["logits"] / scale - image @ text.T)[alike].abs().max() < 1e-6
