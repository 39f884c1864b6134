"""Tests of the baseline of pixels and of answers per picture, on pictures whose neighbours are known."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flip.runs.errors import ConfigError
from flip.runs.rundir import read_json, write_json
from jobs.common.paths import REPOSITORY
from lab import study as command
from lab.studies.engine import answers, baseline
from tests.lab.studies.test_arms import SMALL
from tools.demo_datasets import output, render

NAMES = ("ant", "bee", "cat", "dog")


def picture(label: int, shift: int = 0) -> bytes:
    """Return a white picture with a square at a place of its own, moved by ``shift`` pixels."""
    pixels = np.full((64, 64, 3), 255, np.uint8)
    left = 4 + 14 * label + shift
    pixels[20:40, left : left + 12, label % 3] = 0
    return render.png(pixels)


def write_sets(cache: Path) -> None:
    """Write a training set of four classes, and tests: one with all right neighbours, one with a wrong label."""
    training = [{"__key__": f"a_{n}", "png": picture(i), "txt": f"{n}\na drawing of {n}"} for i, n in enumerate(NAMES)]
    training.append({"__key__": "a_eel", "png": picture(0, 1), "txt": "eel"})  # nearest of all, but no class of the set
    output.write_shards(cache / "emoji" / "train", training)
    for name in ("noto-v1", "twemoji", "openmoji"):
        labels = [0, 1, 2, 3]
        if name == "openmoji":
            labels = [0, 1, 2, 0]
        samples = [
            {"__key__": f"b_{i}", "png": picture(i, 1), "txt": NAMES[i], "cls": str(c)} for i, c in enumerate(labels)
        ]
        output.write_shards(cache / "emoji" / name, samples)
    write_json(cache / "emoji" / "classes.json", {"names": list(NAMES), "templates": ["a drawing of {}"]})


def test_command_writes_nearest_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(baseline, "FEATURES", 256)
    docs = tmp_path / "docs"
    shutil.copytree(REPOSITORY / "docs" / "study", docs / "study")
    assert command.main(["--study", "masking", "--baseline", "--docs", str(docs)]) == 78
    assert "flip demo_data" in capsys.readouterr().err
    write_sets(tmp_path / "cache")
    assert command.main(["--study", "masking", "--baseline", "--docs", str(docs)]) == 0
    written = read_json(docs / "study" / "baseline.json")
    assert written is not None
    nearest = [row for row in written["sets"] if "method" not in row]
    rows = {row["set"]: row for row in nearest if row["by"] == "colour"}
    shapes = {row["set"]: row for row in nearest if row["by"] == "shape"}
    assert {name: row["top1"] for name, row in rows.items()} == {"validation": 1.0, "twemoji": 1.0, "openmoji": 0.75}
    assert shapes["twemoji"]["top1"] == 0.25, "without margins and colours all pictures are equal: the first one counts"
    # Shapes without margins are equal.
    assert all(row["pictures"] == 4 and row["near"] == 1.0 for row in rows.values())
    probes = {(row["by"], row["set"]): row["top1"] for row in written["sets"] if row.get("method") == baseline.PROBE}
    assert [probes["colour", name] for name in rows] == [1.0, 1.0, 0.75], "as the nearest picture"
    assert probes["shape", "twemoji"] == 0.25 and len(nearest) == len(probes) == 6
    right = answers.right(rows["openmoji"])
    assert right is not None and right.sum() == 3
    assert SMALL.test_sets()[0].name == "validation"


def test_interrupted_call_keeps_training_sets_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "FEATURES", 256)
    write_sets(tmp_path)
    study: Any = SimpleNamespace(name="two", test_sets=SMALL.test_sets)
    study.training_sets = lambda: {"first": "emoji/train", "second": "emoji/absent"}
    old = [{"train": "first", "top1": 0.5}, {"train": "second", "top1": 0.25}]
    (tmp_path / "docs" / "two").mkdir(parents=True)
    write_json(tmp_path / "docs" / "two" / "baseline.json", {"sets": old})
    with pytest.raises(ConfigError, match="the data set is absent"):
        baseline.write(study, tmp_path / "docs", tmp_path)
    rows = (read_json(tmp_path / "docs" / "two" / "baseline.json") or {})["sets"]
    assert [row["train"] for row in rows] == 12 * ["first"] + ["second"] and rows[-1] == old[1]


def test_absent_data_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the data set is absent"):
        baseline.read(tmp_path)


def test_nearest_agrees_with_plain_distances() -> None:
    random = np.random.default_rng(0)
    a, b = random.random((7, 12), np.float32), random.random((30, 12), np.float32)
    index, distance = baseline.nearest(a, b)
    plain = np.sqrt(((a[:, None] - b) ** 2).mean(2))
    assert (index == plain.argmin(1)).all() and distance == pytest.approx(plain.min(1), abs=1e-6)


def test_probe_is_ridge_regression_on_random_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of several blocks, with pictures that have no class. A line divides the classes, so all are right."""
    monkeypatch.setattr(baseline, "FEATURES", 256)
    monkeypatch.setattr(baseline, "BLOCK", 1024)
    random = np.random.default_rng(0)
    pixels = random.random((3 * baseline.BLOCK // 2, 12), np.float32)
    labels = (pixels[:, 0] + pixels[:, 1] > 1).astype(np.int64) * 2
    keys = list(map(str, range(len(pixels))))
    learned = baseline.Reduced(pixels, pixels[:, :6], [], labels, keys)
    known = np.where(random.random(len(pixels)) < 0.1, -1, labels)
    shown = baseline.Reduced(pixels[:500], pixels[:500, :6], [], labels[:500], keys[:500])
    probed = baseline.probe(baseline.fit(learned, known, "colour"), shown, "colour")
    assert probed["pictures"] == (known >= 0).sum() and probed["top1"] > 0.95
    other = baseline.Reduced(shown.thumbnails, shown.shapes, [], 2 - labels[:500], keys[:500])
    inverted = baseline.probe(baseline.fit(learned, known, "colour"), other, "colour")
    assert inverted["top1"] == pytest.approx(1 - probed["top1"])


def test_answers_are_packed_and_checked() -> None:
    bits = np.random.default_rng(1).random(13) < 0.3
    item = {"name": "t", "n": 13, "top1": float(bits.mean()), **answers.pack(range(13), bits)}
    read = answers.right(item)
    assert read is not None and (read == bits).all() and len(item["right"]) == 4
    other = item | answers.pack(range(1, 14), bits)
    assert answers.is_paired(item, item) and not answers.is_paired(item, other) and answers.right({"n": 3}) is None
    with pytest.raises(ValueError, match="do not have its top-1"):
        answers.right(item | {"top1": 0.99})
