"""Exported folders: stock open_clip and timm compute what we compute, and flip.load gives our weights back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flip
from flip import commit, export, model
from flip.config import load as configuration
from flip.data import decode
from flip.evaluate.zeroshot import class_embeddings
from flip.loaded import Loaded
from tests.synthetic import COLOURS, SHAPES, make_tokenizer, picture

STOCK = Path(__file__).with_name("stock.py")
RECIPES = Path(__file__).resolve().parents[2] / "sweeps" / "recipes"
WORDS = {
    "names": [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES],
    "templates": ["{}", "a picture of {}", "a {} number 3"],
}
TEXTS = [
    "", "a red square", " A  RED\tSquare\n number 4 ", "AT&amp;amp;T &lt;b&gt;", "[PAD] [CLS] [SEP] [UNK] ##s",
    "x" * 150, " ".join(f"a blue frame {i}" for i in range(40)), "caf\u00e9 nai\u0308ve", "\u732b\u304c\u597d\u304d",
    "don't 3.5-inch", "\U0001f600 \u200b zero", "\u0130stanbul STRASSE", "nul \x00 bell \x07",
]  # fmt: skip
BROKEN = ["caf\u00c3\u00a9", "\u201cquoted\u201d it\u2019s", "\uff21\uff22"]


def configured(recipe, tokenizer, size="tiny", *settings):
    layers = [("recipe", configuration.read_yaml(RECIPES / f"{name}.yaml")) for name in ("paper", recipe)]
    layers[-1][1].pop("base", None)
    return configuration.merge(layers, [f"model.size={size}", f"data.tokenizer={tokenizer}", *settings])


@torch.no_grad()
def randomised(config, seed=1):
    """No bias is 0, no gain is 1, and the logit scale is above its limit: a wrong fold or a forgotten one shows."""
    pair = model.build(config.model, config.augment, "sdpa")
    model.initialise(pair, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in pair.named_parameters():
        if parameter.ndim == 1 and name != "logit_scale":
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    pair.logit_scale.fill_(5.0)
    return pair


def loaded_of(config, folder, seed=1):
    record = {"stage": "pretrain", "samples": 640, "attempt": 2, "manifest": "d1ge57"}
    path = Path(folder) / "sweep" / "run" / "checkpoints" / "pretrain" / "640-2"
    return Loaded(randomised(config, seed), config, commit.Commit(path, record), "cpu")


class Given:
    """What both sides compute with: pictures, twice as large as the model's, and texts."""

    def __init__(self, config, texts, n):
        tower = config.model.image
        self.texts, self.pictures = texts, np.stack([picture(i, 2 * tower.size) for i in range(n)])
        views = [decode.evaluation_view(one, tower.size) for one in self.pictures]
        mean, std = np.float32(config.augment.mean), np.float32(config.augment.std)
        self.pixels = ((np.stack(views) / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
        self.patches = torch.from_numpy(np.stack([decode.patches(view, tower.patch) for view in views]))


def stock(folder, given, scratch):
    """What stock.py finds: in a process and a working directory of its own, without hub and network."""
    words = json.dumps(WORDS | {"texts": given.texts})
    np.savez(scratch / "given.npz", pixels=given.pixels, pictures=given.pictures, words=words)
    elsewhere = scratch / "elsewhere"
    elsewhere.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(elsewhere), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    arguments = [sys.executable, str(STOCK), str(folder), str(scratch / "given.npz"), str(scratch / "found.npz")]
    done = subprocess.run(arguments, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: torch.from_numpy(value) for name, value in np.load(scratch / "found.npz").items()}


def near(found, expected):
    assert found.shape == expected.shape
    return float((found - expected).abs().max()) < 1e-5


def unit(features):
    return torch.nn.functional.normalize(features, dim=-1)


@torch.no_grad()
def same(loaded, given, found, raw=True):
    """All that the script found is what our own model says. ``raw``: features before they are normalised as well."""
    pair = loaded.pair
    tokens = torch.from_numpy(loaded.tokenizer(given.texts))
    assert torch.equal(found["tokens"], tokens.long())
    image, text = pair.image(given.patches), pair.text(tokens)
    assert near(found["text"], text) and near(unit(found["image"]), unit(image))
    assert near(found["image"], image) == raw
    assert float(found["scale"]) == pytest.approx(loaded.config.model.max_logit_scale)
    pixels = torch.from_numpy(given.pixels)
    assert near(found["views"], pixels) and near(found["timm_views"], pixels)
    assert near(found["classes"], class_embeddings(pair, loaded.tokenizer, WORDS["names"], WORDS["templates"]))
    ours = loaded.classify([Image.fromarray(one) for one in given.pictures], WORDS["names"], WORDS["templates"])
    assert near(found["scores"].softmax(-1), ours) and torch.equal(found["scores"].argmax(-1), ours.argmax(-1))
    pair.image.projection = torch.nn.Identity()
    pooled = pair.image(given.patches)
    assert near(found["timm0"], pooled) and near(found["head0"], pooled) and near(found["timm10"], pooled)
    assert found["head10"].shape == (len(pooled), 10)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


CASES = [
    pytest.param("portable", "tiny", "native", id="tiny-portable"),
    pytest.param("paper", "tiny", "extra-block", id="tiny-paper"),
    pytest.param("paper", "tiny", "timm-tower", id="tiny-paper-timm"),
    pytest.param("portable", "B/16", "native", id="B16-portable"),
    pytest.param("paper", "B/16", "extra-block", id="B16-paper", marks=pytest.mark.slow),
    pytest.param("portable", "L/16", "native", id="L16-portable", marks=pytest.mark.slow),
    pytest.param("paper", "L/16", "extra-block", id="L16-paper", marks=pytest.mark.slow),
    pytest.param("portable", "H/14", "native", id="H14-portable", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("recipe, size, variant", CASES)
def test_open_clip_and_timm_compute_what_we_compute(recipe, size, variant, tokenizer, tmp_path):
    loaded = loaded_of(configured(recipe, tokenizer, size), tmp_path)
    record = export.export(loaded, tmp_path / "made", variant)
    assert record["variant"] == variant
    folder = tmp_path / "made"
    if variant != "timm-tower":  # which is bound to its place
        folder = (tmp_path / "else" / "where").absolute()
        folder.parent.mkdir()
        (tmp_path / "made").rename(folder)
    given = Given(
        loaded.config, TEXTS + (BROKEN if loaded.config.model.text.repair else []), 4 if size == "tiny" else 2
    )
    again = flip.load(folder)
    theirs, ours = again.pair.state_dict(), loaded.pair.state_dict()
    assert float(theirs.pop("logit_scale")) == np.float32(loaded.pair.max_logit_scale) and ours.pop("logit_scale")
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    same(loaded, given, stock(folder, given, tmp_path), raw=variant != "extra-block")
