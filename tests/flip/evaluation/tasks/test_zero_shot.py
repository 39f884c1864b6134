"""Tests zero-shot scores of one rank against a loop over the images and against clip_benchmark's functions."""

import io
import json

import numpy as np
import pytest
import torch
import webdataset
from clip_benchmark.metrics import zeroshot_classification
from PIL import Image

from flip.config.schema import Augment, EvaluationSet
from flip.data.manifest.build import index
from flip.data.manifest.manifest import Manifest
from flip.evaluation.datasets import prompts
from flip.evaluation.datasets.catalog import ResolvedDataset
from flip.evaluation.encoding.encoders import ModelEncoder
from flip.evaluation.evaluator import Evaluator
from flip.evaluation.metrics.measures import rank_of_target, wilson
from flip.evaluation.tasks.zero_shot import SCALES, class_embeddings, class_loss, classify
from flip.models import clip
from flip.runs.errors import ConfigError, DataError, Diverged
from flip.tokenizer import Tokenizer
from tests.flip.evaluation.conftest import CONFIG
from tests.synthetic import COLOURS, SHAPES, draw_image, make_dataset


def score(model, folder, batch, manifest, classes, role="test"):
    """The result of the evaluator on a zero-shot set."""
    encoder = ModelEncoder(model, Tokenizer(folder / "tokenizer.json", 32, True), CONFIG.image)
    (result,) = Evaluator(encoder, batch).score(
        ResolvedDataset.from_config(EvaluationSet("synthetic", str(manifest), str(classes))), role
    )
    return result


def test_class_loss_is_cross_entropy_at_best_scale():
    """It depends on all images and on no learned temperature; features without information have the loss of chance."""
    random = torch.Generator().manual_seed(0)
    classes = torch.nn.functional.normalize(torch.randn(6, 8, generator=random), dim=1)
    labels = torch.arange(60) % 6
    noisy = torch.nn.functional.normalize(classes[labels] + 0.5 * torch.randn(60, 8, generator=random), dim=1)
    logits = (noisy @ classes.T).double()
    plain = min(-(logits * s - (logits * s).exp().sum(1, keepdim=True).log())[range(60), labels].mean() for s in SCALES)
    assert class_loss(noisy, labels, classes) == pytest.approx(float(plain), abs=1e-4)
    assert classify(noisy, labels, classes, "t")["loss"] == class_loss(noisy, labels, classes)
    same = classes[:1].expand(60, 8)
    assert class_loss(same, labels, classes) == pytest.approx(float(torch.tensor(6.0).log()), abs=1e-4)
    assert class_loss(noisy[:0], labels[:0], classes) is None


@torch.no_grad()
def test_zero_shot_counts_match_loop_over_images(model, data):
    tokenizer = Tokenizer(data / "tokenizer.json", 32, True)
    result = score(model, data, 8, data, data / "classes.json", "validation")
    wording = json.loads((data / "classes.json").read_text())
    rows = []
    for name in wording["names"]:
        embeddings = [model.encode_text(torch.from_numpy(tokenizer([t.format(name)])))[0] for t in wording["templates"]]
        mean = torch.stack(embeddings).mean(0)
        rows.append(mean / mean.norm())
    correct = {1: 0, 5: 0}
    for i in range(50):
        pixels = draw_image(i).reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(1, 64, 192)
        ranking = (torch.stack(rows) @ model.encode_image(torch.from_numpy(pixels))[0]).argsort(descending=True)
        for k in correct:
            correct[k] += i % 7 in ranking[:k]
    assert (result["n"], result["correct1"], result["correct5"]) == (50, correct[1], correct[5])
    assert 0 < correct[1] < correct[5] < 50  # otherwise the comparison proves nothing
    assert (result["top1"], result["top5"], result["chance"]) == (correct[1] / 50, correct[5] / 50, 1 / 7)
    assert (result["name"], result["role"], result["data"]) == ("synthetic", "validation", Manifest.load(data).digest)
    assert result["interval"] == wilson(correct[1], 50)
    json.dumps(result, allow_nan=False)


@torch.no_grad()
def test_class_embeddings_are_independent_of_batch_size(model, data):
    tokenizer = Tokenizer(data / "tokenizer.json", 32, True)
    names = [f"red square {i}" for i in range(11)]
    encoder = ModelEncoder(model, tokenizer, CONFIG.image)
    full, parts = (class_embeddings(encoder, names, ["{}", "a {}"], batch) for batch in (1000, 3))
    assert full.shape == (11, 48)
    assert torch.allclose(full, parts, atol=1e-6)
    assert torch.allclose(full.norm(dim=-1), torch.ones(11), atol=1e-6)


def test_zero_shot_accepts_2_classes_and_rejects_label_without_class_name(model, data, tmp_path):
    (tmp_path / "few.json").write_text('{"names": ["a", "b"], "templates": ["{}"]}')
    with pytest.raises(DataError, match="no class name"):
        score(model, data, 8, data, tmp_path / "few.json")
    two = make_dataset(tmp_path / "two", samples=6, shards=1, classes=2)
    result = score(model, data, 4, two, two / "classes.json")
    assert (result["n"], result["top5"]) == (6, 1.0)


def test_zero_shot_ranks_lower_class_first_if_scores_are_equal(model, data, tmp_path):
    """Two classes share a name, so the second class never ranks first."""
    (tmp_path / "same.json").write_text(json.dumps({"names": ["same"] * 2, "templates": ["{}"]}))
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for i in range(10):
            buffer = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(draw_image(i))).save(buffer, "PNG")
            writer.write({"__key__": f"{i}", "png": buffer.getvalue(), "cls": i % 2})
    index([str(tmp_path / "0.tar")], tmp_path)
    result = score(model, data, 4, tmp_path, tmp_path / "same.json")
    assert (result["correct1"], result["correct5"]) == (5, 10)


def test_zero_shot_never_counts_nan_as_correct_and_raises_diverged(data):
    nan = float("nan")
    scores = torch.tensor([[nan, nan], [nan, 1.0], [1.0, nan], [1.0, 0.0]])
    assert rank_of_target(scores, torch.zeros(4, dtype=torch.int64)).tolist() == [2, 2, 1, 0]
    diverged = clip.CLIPModel(CONFIG, Augment(), "sdpa")
    clip.init_weights(diverged, 1)
    with torch.no_grad():
        next(weight for weight in diverged.parameters() if weight.ndim == 2).fill_(nan)
    with pytest.raises(Diverged, match="not finite"):
        score(diverged, data, 8, data, data / "classes.json")


def test_wilson_interval_matches_reference_values():
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
def test_read_prompts_rejects_invalid_file(tmp_path, text, problem):
    file = tmp_path / "classes.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        prompts.read_prompts(str(file))


def test_fill_templates_leaves_braces_in_class_name_unchanged():
    assert prompts.fill_templates("a {0} b", ["see {}"]) == ["see a {0} b"]


@torch.no_grad()
@pytest.mark.parametrize("classes", [7, 40])
def test_zero_shot_matches_clip_benchmark_classifier_and_accuracy(model, data, classes, monkeypatch):
    # clip_benchmark converts an array of one element to a number, which NumPy 2.4 no longer allows
    monkeypatch.setattr(zeroshot_classification, "float", lambda array: array.item(), raising=False)
    tokenizer = Tokenizer(data / "tokenizer.json", 32, True)
    names = [f"{COLOURS[c % 8]} {SHAPES[c // 8 % 4]} {c}" for c in range(classes)]
    templates = ["{}", "a picture of {}", "the number {} of all"]
    encoder = ModelEncoder(model, tokenizer, CONFIG.image)
    embeddings = class_embeddings(encoder, names, templates, batch=16)
    reference = zeroshot_classification.zero_shot_classifier(
        model, lambda texts: torch.from_numpy(tokenizer(texts)), names, [t.replace("{}", "{c}") for t in templates],
        "cpu", amp=False,
    )  # fmt: skip
    assert torch.allclose(embeddings, reference.T, atol=1e-6)
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(classes, (500,), generator=generator)
    noise = torch.randn(500, 48, generator=generator)
    features = torch.nn.functional.normalize(embeddings[labels] + 0.1 * noise, dim=1)
    result = classify(features, labels, embeddings, "synthetic")
    expected = zeroshot_classification.accuracy(100.0 * features @ embeddings.T, labels, topk=(1, 5))
    assert [result["top1"], result["top5"]] == pytest.approx(expected, abs=1e-7)
    assert 0 < result["correct1"] < result["correct5"] < 500
