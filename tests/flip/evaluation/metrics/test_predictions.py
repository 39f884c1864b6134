"""Tests the predictions per image that the evaluator collects, and their file."""

import json

import numpy as np
import pytest
import torch

from flip.config.schema import EvaluationSet
from flip.evaluation.datasets.catalog import ResolvedDataset
from flip.evaluation.datasets.image_sources import File, ImageFiles
from flip.evaluation.encoding.encoders import ModelEncoder
from flip.evaluation.evaluator import Evaluator
from flip.evaluation.metrics import predictions
from flip.evaluation.metrics.predictions import Predictions
from flip.evaluation.tasks.zero_shot import nearest_classes
from flip.tokenizer import Tokenizer
from tests.flip.evaluation.conftest import CONFIG


@torch.no_grad()
def test_predictions_file_agrees_with_reported_accuracy(model, data, tmp_path):
    evaluator = Evaluator(ModelEncoder(model, Tokenizer(data / "tokenizer.json", 32, True), CONFIG.image), 8)
    item = EvaluationSet("synthetic", str(data), str(data / "classes.json"))
    (result,) = evaluator.score(ResolvedDataset.from_config(item))
    path = tmp_path / "pretrain-1" / "synthetic.predictions.jsonl"
    evaluator.predictions["synthetic"].write(path)
    loaded = predictions.read(path)
    assert (loaded.digest, loaded.where, loaded.images) == (result["predictions"], str(data), list(range(50)))
    assert loaded.labels.tolist() == [i % 7 for i in range(50)]
    assert loaded.classes.shape == (50, 5)
    assert loaded.scores.shape == (50, 5)
    assert int((loaded.classes[:, 0] == loaded.labels).sum()) == result["correct1"]
    assert int((loaded.classes == loaded.labels[:, None]).any(axis=1).sum()) == result["correct5"]
    assert (np.diff(loaded.scores, axis=1) <= 0).all()
    assert loaded.names == json.loads((data / "classes.json").read_text())["names"]


def test_nearest_classes_puts_lower_class_first_if_scores_are_equal():
    classes, scores = nearest_classes(torch.ones(3, 2), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), 5)
    assert classes.tolist() == [[1, 2, 0]] * 3 and scores.tolist() == [[1.0, 1.0, 0.0]] * 3


def test_image_files_are_named_by_relative_paths():
    images = ImageFiles([File("/d/cat/1.png", 0), File("/d/dog/2.png", 1)], "/d")
    assert images.names([1, 0]) == ["dog/2.png", "cat/1.png"]


def test_predictions_file_of_50000_images_is_below_7_megabytes(tmp_path):
    n = 50_000
    scores = np.random.default_rng(0).random((n, 5), np.float32)
    classes = np.full((n, 5), 999)
    path = tmp_path / "a.predictions.jsonl"
    Predictions("d" * 64, "/d", ["name"] * 1000, range(n), np.full(n, 999), classes, scores).write(path)
    assert path.stat().st_size < 7e6 and [file.name for file in tmp_path.iterdir()] == [path.name]


HEAD = {"set": "a", "predictions": "d", "where": "/d", "names": ["x", "y"]}
ROW = {"image": 0, "label": 1, "classes": [1, 0], "scores": [0.5, 0.25]}


@pytest.mark.parametrize(
    "head, row",
    [
        (HEAD, {**ROW, "label": 2}),
        (HEAD, {**ROW, "classes": [1, 2]}),
        (HEAD, {**ROW, "classes": [1]}),
        (HEAD, {**ROW, "scores": ["a", "b"]}),
        (HEAD, {**ROW, "image": ["a"]}),
        (HEAD, {**ROW, "label": 10**17}),
        (HEAD, {"image": 0}),
        ({**HEAD, "names": [1]}, ROW),
        ([], ROW),
    ],
)
def test_predictions_read_rejects_invalid_file(tmp_path, head, row):
    path = tmp_path / "a.predictions.jsonl"
    path.write_text(f"{json.dumps(HEAD)}\n{json.dumps(ROW)}\n")
    assert predictions.read(path).images == [0]
    path.write_text(f"{json.dumps(head)}\n{json.dumps(ROW)}\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=r"a\.predictions\.jsonl: invalid predictions"):
        predictions.read(path)
