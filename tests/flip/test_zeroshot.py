"""Zero-shot scores against a loop over the images; the run over two ranks is in test_loaded.py."""

import io
import json

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from flip import model
from flip.config.schema import Augment, ImageTower, Model, TextTower, ZeroShot
from flip.data.index import index
from flip.data.manifest import Manifest
from flip.evaluate import prompts
from flip.evaluate.zeroshot import _correct, class_embeddings, wilson, zeroshot
from flip.exitcodes import ConfigError, DataError, Diverged
from flip.tokenizer import Tokenizer
from tests.synthetic import make_dataset, make_tokenizer, picture

CONFIG = Model(
    embed=48,
    image=ImageTower(64, 8, 64, 3, 2),
    text=TextTower(length=32, vocabulary=1000, width=64, layers=2, heads=2),
)


@pytest.fixture(scope="module")
def pair():
    built = model.build(CONFIG, Augment(), "sdpa")
    model.initialise(built, 1)
    return built


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_dataset(tmp_path_factory.mktemp("data"), samples=50, shards=3, classes=7)
    make_tokenizer(folder / "tokenizer.json")
    return folder


@torch.no_grad()
def test_counts_are_exact(pair, data):
    tokenizer = Tokenizer(data / "tokenizer.json", 32, True)
    item = ZeroShot("synthetic", str(data), str(data / "classes.json"), "validation")
    found = zeroshot(pair, item, tokenizer, CONFIG.image, 8)
    wording = json.loads((data / "classes.json").read_text())
    rows = []
    for name in wording["names"]:
        each = [pair.encode_text(torch.from_numpy(tokenizer([t.format(name)])))[0] for t in wording["templates"]]
        mean = torch.stack(each).mean(0)
        rows.append(mean / mean.norm())
    right = {1: 0, 5: 0}
    for i in range(50):
        pixels = picture(i).reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(1, 64, 192)
        ranking = (torch.stack(rows) @ pair.encode_image(torch.from_numpy(pixels))[0]).argsort(descending=True)
        for k in right:
            right[k] += i % 7 in ranking[:k]
    assert (found["n"], found["correct1"], found["correct5"]) == (50, right[1], right[5])
    assert 0 < right[1] < right[5] < 50  # else the test could not tell
    assert (found["top1"], found["top5"], found["chance"]) == (right[1] / 50, right[5] / 50, 1 / 7)
    assert (found["name"], found["role"], found["manifest"]) == ("synthetic", "validation", Manifest.load(data).digest)
    assert found["interval"] == wilson(right[1], 50)
    json.dumps(found, allow_nan=False)


@torch.no_grad()
def test_prompts_of_many_classes_in_chunks(pair, data):
    tokenizer = Tokenizer(data / "tokenizer.json", 32, True)
    names = [f"red square {i}" for i in range(11)]
    whole, parts = (class_embeddings(pair, tokenizer, names, ["{}", "a {}"], batch) for batch in (1000, 3))
    assert whole.shape == (11, 48)
    assert torch.allclose(whole, parts, atol=1e-6)
    assert torch.allclose(whole.norm(dim=-1), torch.ones(11), atol=1e-6)


def test_fewer_than_five_classes_and_a_label_without_a_name(pair, data, tmp_path):
    tokenizer = Tokenizer(data / "tokenizer.json", 32, True)
    (tmp_path / "few.json").write_text('{"names": ["a", "b"], "templates": ["{}"]}')
    with pytest.raises(DataError, match="no class name"):
        zeroshot(pair, ZeroShot("x", str(data), str(tmp_path / "few.json")), tokenizer, CONFIG.image, 8)
    two = make_dataset(tmp_path / "two", samples=6, shards=1, classes=2)
    found = zeroshot(pair, ZeroShot("x", str(two), str(two / "classes.json")), tokenizer, CONFIG.image, 4)
    assert (found["n"], found["top5"]) == (6, 1.0)


def test_equal_scores_do_not_count_as_right(pair, data, tmp_path):
    """Two classes of one name: the second is never first."""
    (tmp_path / "same.json").write_text(json.dumps({"names": ["same"] * 2, "templates": ["{}"]}))
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for i in range(10):
            buffer = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(picture(i))).save(buffer, "PNG")
            writer.write({"__key__": f"{i}", "png": buffer.getvalue(), "cls": i % 2})
    index([str(tmp_path / "0.tar")], tmp_path)
    tokenizer = Tokenizer(data / "tokenizer.json", 32, True)
    found = zeroshot(pair, ZeroShot("x", str(tmp_path), str(tmp_path / "same.json")), tokenizer, CONFIG.image, 4)
    assert (found["correct1"], found["correct5"]) == (5, 10)


def test_scores_that_are_no_numbers(data):
    nan = float("nan")
    scores = torch.tensor([[nan, nan], [nan, 1.0], [1.0, nan], [1.0, 0.0]])
    assert _correct(scores, torch.zeros(4, dtype=torch.int64)).tolist() == [4, 1, 4, 3]
    sick = model.build(CONFIG, Augment(), "sdpa")
    model.initialise(sick, 1)
    with torch.no_grad():
        next(weight for weight in sick.parameters() if weight.ndim == 2).fill_(nan)
    item, tokenizer = ZeroShot("x", str(data), str(data / "classes.json")), Tokenizer(data / "tokenizer.json", 32, True)
    with pytest.raises(Diverged, match="50 of 50"):
        zeroshot(sick, item, tokenizer, CONFIG.image, 8)


def test_wilson():
    assert wilson(0, 0) == [0.0, 1.0]
    assert wilson(50, 100) == pytest.approx([0.40383, 0.59617], abs=1e-5)
    assert wilson(0, 10) == pytest.approx([0.0, 0.27753], abs=1e-5)
    assert wilson(10, 10)[1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "text, problem",
    [
        (None, "cannot be read"),
        ("[]", "TypeError"),
        ('{"names": [], "templates": ["{}"]}', "at least one"),
        ('{"names": ["a"], "templates": ["none"]}', "needs one"),
        ('{"names": ["a"], "templates": []}', "needs one"),
    ],
)
def test_class_files_that_are_none(tmp_path, text, problem):
    file = tmp_path / "classes.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        prompts.read(str(file))


def test_braces_in_a_name_mean_themselves():
    assert prompts.fill("a {0} b", ["see {}"]) == ["see a {0} b"]
