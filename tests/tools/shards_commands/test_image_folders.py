"""Tests of shards make for folders of images with metadata files, splits and class folders."""

import json

import pytest

from tests.synthetic import draw_image, encode
from tests.tools.commands.test_shards_cli import call
from tests.tools.shards_commands.test_make import members, write_table


def imagefolder(root, layout):
    """Write images in Hugging Face's imagefolder layout; ``layout`` maps an image's path to its row, or to None."""
    for number, name in enumerate(layout):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(draw_image(number, 16)))
    return root


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("place", ["", "train"])
def test_make_takes_captions_from_metadata_of_an_imagefolder(tmp_path, capsys, kind, place):
    """Each image got the caption "a photo of a train"."""
    root = imagefolder(tmp_path / "hf", [f"train/{i}.png" for i in range(4)])
    prefix = "" if place else "train/"
    rows = [{"file_name": f"{prefix}{i}.png", "text": f"number {i}", "source": "here"} for i in range(3)]
    write_table(root / place / f"metadata.{kind}", rows)
    code, report = call(capsys, "make", root, "--out", tmp_path / "out", "--json")
    assert code == 0 and "classes" not in report
    assert report["refused_rows"] == [
        {"row": str(root / "train" / "3.png"), "reason": f"no row of metadata.{kind} names it"}
    ]
    written = members(tmp_path / "out")
    assert [sample["txt"].decode() for sample in written] == ["number 0", "number 1", "number 2"]
    assert [sample["png"] for sample in written] == [encode(draw_image(i, 16)) for i in range(3)]
    assert json.loads(written[2]["json"]) == {"file": "train/2.png", "source": "here"}


def test_make_takes_named_columns_of_metadata(tmp_path, capsys):
    root = imagefolder(tmp_path / "hf", ["train/a.png", "train/b.png"])
    rows = [{"file_name": "a.png", "kind": "cat", "words": "one"}, {"file_name": "b.png", "kind": "dog", "words": ""}]
    write_table(root / "train" / "metadata.jsonl", rows)
    assert call(capsys, "make", root, "--caption", "words", "--label", "kind", "--out", tmp_path / "out")[0] == 0
    assert [sample["txt"].decode() for sample in members(tmp_path / "out")] == ["one", "a photo of a dog"]
    assert json.loads((tmp_path / "out" / "classes.json").read_text())["names"] == ["cat", "dog"]


def test_make_takes_class_folders_below_a_split(tmp_path, capsys):
    root = imagefolder(tmp_path / "hf", ["train/cat/0.png", "train/dog/1.png", "train/dog/2.png"])
    assert call(capsys, "make", root, "--out", tmp_path / "out")[0] == 0
    assert json.loads((tmp_path / "out" / "classes.json").read_text())["names"] == ["cat", "dog"]
    captions = sorted(sample["txt"].decode() for sample in members(tmp_path / "out"))
    assert captions == ["a photo of a cat", "a photo of a dog", "a photo of a dog"]


def test_make_takes_a_split_name_among_other_folders_as_a_class(tmp_path, capsys):
    root = imagefolder(tmp_path / "vehicles", ["train/0.png", "car/1.png", "bus/2.png"])
    assert call(capsys, "make", root, "--out", tmp_path / "out")[0] == 0
    assert json.loads((tmp_path / "out" / "classes.json").read_text())["names"] == ["bus", "car", "train"]


@pytest.mark.parametrize(
    "layout, tables, words",
    [
        (
            ["train/0.png"],
            {},
            ["train is the name of a split or of a class", "metadata.jsonl with file_name", "rename"],
        ),
        (
            ["train/0.png", "Test/1.png"],
            {},
            ["Test and train are names of splits or of classes", "a set of each split", "rename them"],
        ),
        (["train/cat/0.png", "test/cat/1.png"], {}, ["test and train are names of splits or of classes"]),
        (
            ["train/0.png", "test/1.png"],
            {"train/metadata.jsonl": "0.png", "test/metadata.jsonl": "1.png"},
            ["test and train", "a set of each split"],
        ),
        (
            ["train/0.png"],
            {"train/metadata.jsonl": "0.png", "train/metadata.csv": "0.png"},
            ["several files can hold the captions", "metadata.jsonl, metadata.csv"],
        ),
        (
            ["train/0.png", "train/0.txt"],
            {"train/metadata.jsonl": "0.png"},
            ["both metadata.jsonl and text files", "as the source, or move it away"],
        ),
    ],
)
def test_make_refuses_folder_with_two_readings_and_names_both(tmp_path, capsys, layout, tables, words):
    root = imagefolder(tmp_path / "hf", layout)
    for path, name in tables.items():
        write_table(root / path, [{"file_name": name, "text": "words"}])
    code, text = call(capsys, "make", root, "--out", tmp_path / "out")
    assert code == 78 and all(word in text for word in words), text
    assert not (tmp_path / "out").exists()


def test_make_reads_no_metadata_file_outside_of_the_source(tmp_path, capsys):
    root = imagefolder(tmp_path / "hf", ["train/0.png"])
    write_table(tmp_path / "private.jsonl", [{"file_name": "0.png", "text": "secret"}])
    (root / "train" / "metadata.jsonl").symlink_to(tmp_path / "private.jsonl")
    code, text = call(capsys, "make", root, "--out", tmp_path / "out")
    assert code == 78 and "lies outside of the source" in text and not (tmp_path / "out").exists()
