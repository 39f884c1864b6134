"""Tests of predict, which shows test images with their nearest captions as text, as JSON, and on a colour terminal."""

import json
import sys
from unittest.mock import Mock

import pytest
import torch

from flip.data.manifest.manifest import Manifest
from tests.harness.terminal import Terminal
from tests.jobs.reporting.test_examples import scored
from tests.synthetic import make_dataset
from tools.commands.predict import main


@pytest.fixture
def arguments(tmp_path):
    """Return the arguments for a run that classifies images 0 and 2 of 12 as dogs; its result records 20 % accuracy."""
    data = make_dataset(tmp_path / "data", samples=12, shards=2, chunk=5)
    run = scored(tmp_path / "s", "masked", data, range(12), Manifest.load(data).digest, wrong=[0, 2])
    return [str(run.path), "--set", "twemoji"]


def test_predict_shows_images_with_nearest_captions(arguments, capsys):
    assert main(arguments) == 0
    head, *blocks = capsys.readouterr().out.split("\n\n")
    assert "masked on twemoji: 3 of 12 images" in head
    assert "20.0 % are right, as the right caption is the nearest (chance 0.085 %)" in head
    assert len(blocks) == 3 and all(block.count("\n   0.") == 5 for block in blocks)
    for block in blocks:
        title, nearest, *_ = block.splitlines()
        assert (": right (image " in title) == nearest.endswith("<- right caption") != (": wrong (image " in title)
    assert main([*arguments, "--count", "12", "--top", "2", "--json"]) == 0
    rows = {row["image"].split()[-1]: row for row in json.loads(capsys.readouterr().out)}
    assert len(rows) == 12
    assert rows["1"] == {
        "image": "image 1",
        "label": "dog",
        "captions": {"dog": 0.5, "<script>bird": 0.25},
    }
    assert list(rows["0"]["captions"]) == ["dog", "<script>bird"] and rows["0"]["label"] == "cat"


def test_predict_draws_images_on_colour_terminal(arguments, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    outputs = []
    for setting in ("", "NO_COLOR"):
        if setting:
            monkeypatch.setenv(setting, "1")
        with Terminal(80, 100) as screen, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen.file)
            assert main(arguments) == 0
            outputs.append(screen.close().text())
    assert outputs[0].count("▀" * 24) == 3 * 12 and "▀" not in outputs[1]
    assert [text.count("  <- right caption") for text in outputs] == [3, 3]


def test_predict_escapes_control_characters(tmp_path, capsys, monkeypatch):
    model = Mock()
    model.classify.return_value = torch.tensor([[0.25, 0.75]])
    monkeypatch.setattr("flip.export.load.load", lambda *_: model)
    assert main([str(tmp_path), "a\x1b[2J\udce9.png", "--labels", "c\x1b[31mat\x07,dog"]) == 0
    name = "a\\x1b[2J\\udce9.png"
    label = "c\\x1b[31mat\\x07"
    assert capsys.readouterr().out == f"{name}   75.0%  dog\n{'':{len(name)}}   25.0%  {label}\n"


@pytest.mark.parametrize(
    "labels, message",
    [
        ("a cat;a dog", "--labels: separate labels by commas, not by ';'"),
        ("a cat|a dog,a bird", "--labels: separate labels by commas, not by '|'"),
        ("cat, dog ,cat", "--labels: a label is repeated, and would share its probability (found: 'cat')"),
        (" , ", "--labels: needs at least one label"),
    ],
)
def test_predict_refuses_labels_whose_probabilities_would_mislead(tmp_path, capsys, labels, message):
    assert main([str(tmp_path), "a.png", "--labels", labels]) == 78
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_predict_rejects_unknown_set_and_arguments(arguments, capsys):
    assert main([*arguments[:2], "openmoji"]) == 78
    error = capsys.readouterr().err
    assert "openmoji" in error and "Sets with final scores: validation, twemoji, openmoji" in error
    for wrong in (["cat.png"], ["--labels", "a"]):
        with pytest.raises(SystemExit) as caught:
            main([*arguments, *wrong])
        assert caught.value.code == 2
    with pytest.raises(SystemExit):
        main([arguments[0], "--labels", "a"])
