"""Tests the metrics of data sets against scikit-learn on the same answers, and WinoGAViL's against its definition."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    jaccard_score,
    top_k_accuracy_score,
)

from flip.data.decode import DecodeError
from flip.evaluation.datasets import associations, catalog
from flip.evaluation.metrics.measures import METRICS, Answers, label_and_group
from flip.evaluation.tasks import association
from flip.evaluation.tasks.zero_shot import classify, nearest_classes
from flip.runs.errors import DataError

CLASSES = 9


@pytest.fixture(scope="module")
def answers():
    random = np.random.default_rng(0)
    # the last class never occurs
    labels = random.integers(0, CLASSES - 1, 400)
    groups = random.integers(2, 6, 400)
    scores = random.normal(size=(400, CLASSES))
    scores[np.arange(400), labels] += 0.5 + 0.3 * groups
    return Answers(labels, np.argsort(-scores, axis=1, kind="stable")[:, :5], groups), scores


def test_metrics_match_scikit_learn(answers):
    (labels, nearest, groups), _ = answers
    best = nearest[:, 0]
    assert METRICS["mean_per_class"](answers[0]) == pytest.approx(balanced_accuracy_score(labels, best), abs=1e-12)
    expected = f1_score(labels, best, average="macro", labels=np.unique(labels))
    assert METRICS["macro_f1"](answers[0]) == pytest.approx(expected, abs=1e-12)
    by_group = [accuracy_score(labels[groups == g], best[groups == g]) for g in range(2, 6)]
    assert METRICS["worst_group"](answers[0]) == pytest.approx(min(by_group), abs=1e-12) and len(set(by_group)) == 4


def test_worst_group_top5_matches_scikit_learn(answers):
    (labels, _, groups), scores = answers
    own = [groups == g for g in range(2, 6)]
    by_group = [top_k_accuracy_score(labels[rows], scores[rows], k=5, labels=range(CLASSES)) for rows in own]
    assert METRICS["worst_group_top5"](answers[0]) == pytest.approx(min(by_group), abs=1e-12)


def test_nearest_classes_agree_with_classify_accuracy():
    features, classes = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1) for n in (50, CLASSES))
    labels = torch.arange(50) % CLASSES
    nearest = nearest_classes(features, classes, 5)[0].numpy()
    right = classify(features, labels, classes, "set")["top1"]
    assert (nearest[:, 0] == labels.numpy()).mean() == pytest.approx(right)


def metadata(*values):
    file = io.BytesIO()
    np.save(file, np.array(values))
    return file.getvalue()


def test_label_and_group_reads_group_from_metadata_column():
    assert label_and_group(1, {"cls": b"3", "npy": metadata(5, 2, 9)}) == [3, 2]
    for sample in (
        {"cls": b"3"},
        {"cls": b"3", "npy": b"?"},
        {"cls": b"3", "npy": metadata(5)},
        {"npy": metadata(5, 2)},
    ):
        with pytest.raises(DecodeError):
            label_and_group(1, sample)


@pytest.fixture
def winogavil(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(12):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / "images" / f"{i}.jpg")
    names = [f"{i}.jpg" for i in range(12)]
    rows = [
        {"cue": "Owl", "candidates": names[:10], "associations": ["3.jpg", "7.jpg"]},
        {"cue": "tree", "candidates": names, "associations": ["0.jpg", "1.jpg", "11.jpg"]},
        {"cue": "sea", "candidates": names[:5], "associations": ["4.jpg"]},
    ]
    (tmp_path / "associations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path, rows


def test_associations_score_matches_jaccard_index(winogavil):
    folder, rows = winogavil
    files, instances = associations.read(str(folder))
    assert [association.prompt(i.cue) for i in instances] == ["An owl", "A tree", "A sea"] and len(files) == 12
    images = torch.randn(12, 6)
    cues = torch.randn(3, 6)
    names = [file.key.rpartition("/")[2] for file in files]
    expected = []
    for row, cue in zip(rows, cues, strict=True):
        scores = [float(images[names.index(name)] @ cue) for name in row["candidates"]]
        chosen = np.argsort(scores)[-len(row["associations"]) :]
        right = np.isin(row["candidates"], row["associations"])
        expected.append(jaccard_score(right, np.isin(np.arange(len(scores)), chosen)))
    result = association.score(instances, images, cues)
    assert result["top1"] == pytest.approx(np.mean(expected[:2])) and result["n"] == 2, "10 and 12 candidates count"
    assert result["all"] == pytest.approx(np.mean(expected))


def test_associations_read_rejects_contradictory_or_missing_instances(tmp_path):
    (tmp_path / "associations.jsonl").write_text('{"cue": "a", "candidates": ["x"], "associations": ["y"]}\n')
    with pytest.raises(DataError, match="line 1"):
        associations.read(str(tmp_path))
    with pytest.raises(DataError, match="the instances cannot be read"):
        associations.read(str(tmp_path / "none"))


def test_suites_name_known_sets_and_metrics():
    known = catalog.entries()
    suites = catalog.suites()
    members = {catalog.DatasetRequest.parse(text).name for suite in suites.values() for text in suite}
    assert members <= known.keys() and len(set(suites["datacomp38"])) == 38
    assert {entry["metric"] for entry in known.values() if "metric" in entry} == METRICS.keys()
    assert all(catalog.source(known[name]) for name in members), "download instructions"
