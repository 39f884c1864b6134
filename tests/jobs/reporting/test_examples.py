"""Tests of the example images and worst classes in reports, from predictions on real shards and files."""

import io

import numpy as np
import pytest
from PIL import Image

from flip.data.manifest.manifest import Manifest
from flip.evaluation.metrics.predictions import Predictions, path_of
from flip.monitoring.results import read_run
from flip.runs.rundir import read_json
from jobs.pages import html, markdown
from jobs.pages.document import CaptionedImages, Table, Text
from jobs.reporting import examples, seed_groups
from tests.jobs.outcomes import make
from tests.jobs.outcomes import write_result as store_result
from tests.synthetic import draw_image, encode, make_dataset
from tools.commands.shards import main as shards_main

NAMES = ["cat", "dog", "<script>bird", "owl", "ant"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), samples=12, shards=2, chunk=5)


def scored(folder, name, where, images, digest, wrong=(), top1=0.2, **fields):
    """A run with correct predictions for twemoji, except that the images ``wrong`` are classified as dogs."""
    run = make(folder, name, top1=top1, **fields)
    labels = np.arange(len(images)) % 3
    first = np.where(np.isin(np.arange(len(images)), wrong), 1, labels)
    rest = [np.full(len(images), 3), np.full(len(images), 4)]
    classes = np.stack([first, (first + 1) % 3, (first + 2) % 3, *rest], axis=1)
    scores = np.tile([0.5, 0.25, 0.125, 0.1, 0.05], (len(images), 1))
    predicted = Predictions("0" * 64, str(where), NAMES, images, labels, classes, scores)
    predicted.write(path_of(run, "pretrain", 12_800, "twemoji"))
    result = read_json(run.result)
    for item in result["evaluations"]:
        if item["name"] == "twemoji":
            item |= {"predictions": predicted.digest, "data": digest}
    store_result(run, result)
    return run


def example_blocks(*runs, **options):
    outcomes = [read_run(run.path) for run in runs]
    return examples.examples(seed_groups.group_by_seed(outcomes), outcomes, **options)


def test_examples_show_images_and_worst_classes_of_best_run(tmp_path, data):
    digest = Manifest.load(data).digest
    worse = scored(tmp_path / "s", "worse", data, range(12), digest, top1=0.1)
    best = scored(tmp_path / "s", "best", data, range(12), digest, wrong=[0, 3, 2], top1=0.3, mask="0.75")
    blocks = example_blocks(worse, best)
    (images,) = [block for block in blocks if isinstance(block, CaptionedImages)]
    # Every report shows the same images.
    assert len(images.items) == 12 < examples.IMAGES
    assert example_blocks(worse, best)[2] == images
    for item in images.items:
        with Image.open(io.BytesIO(item.jpeg)) as image:
            assert max(image.size) <= 128
        assert len(item.captions) == 3 and item.captions[0][1] == 0.5
    verdicts = {item.name.split()[-1]: item.verdict for item in images.items}
    expected = {"0": "wrong, label: cat", "3": "wrong, label: cat", "2": "wrong, label: <script>bird"}
    assert verdicts == {i: expected.get(i, "right") for i in verdicts} and set(verdicts) & set(expected)
    (table,) = [block for block in blocks if isinstance(block, Table)]
    assert [(row["class"], row["right, %"], row["taken for"]) for row in table.rows] == [
        ("cat", "50.0", "dog (2)"), ("<script>bird", "75.0", "dog (1)"),
    ]  # fmt: skip
    (note,) = [block.text for block in blocks if isinstance(block, Text) and "chosen by a hash" in block.text]
    assert "Of all 12 images 30.0 % are right, and 30.0 % have the right caption" in note
    page = html.render("t", blocks)
    assert page.count('<li class="image right">') == list(verdicts.values()).count("right") == 9
    assert page.count('src="data:image/jpeg;base64,') == 12 and "<script" not in page and "best on twemoji" in page
    assert "wrong, label: cat" in markdown.markdown(blocks) and len(example_blocks(best, images=0)) == 3


def test_classes_with_few_images_are_not_among_the_worst(tmp_path, data):
    """Three classes have four images each of 12, and two each of 6."""
    digest = Manifest.load(data).digest
    few = scored(tmp_path / "s", "few", data, range(6), digest, wrong=[0, 2, 3])
    assert [block for block in example_blocks(few) if isinstance(block, Table)] == []


def test_examples_show_names_of_images_in_their_source(tmp_path):
    """A number does not tell which of one's images is meant."""
    for i in range(3):
        path = tmp_path / "birds" / "wren" / f"<u>{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(draw_image(i, 16)))
    assert shards_main(["make", str(tmp_path / "birds"), "--out", str(tmp_path / "set")]) == 0
    digest = Manifest.load(tmp_path / "set").digest
    run = scored(tmp_path / "s", "run", tmp_path / "set", range(3), digest)
    blocks = example_blocks(run)
    (images,) = [block for block in blocks if isinstance(block, CaptionedImages)]
    names = {item.name.partition(" (")[2] for item in images.items}
    assert names == {f"wren/<u>{i}.png)" for i in range(3)} and "<u>" not in html.render("t", blocks)


def test_examples_show_image_files_with_transparency_as_white(tmp_path, data):
    (tmp_path / "d" / "cat").mkdir(parents=True)
    Image.new("RGBA", (400, 200), (0, 0, 0, 0)).save(tmp_path / "d" / "cat" / "1.png")
    run = scored(tmp_path / "s", "a", tmp_path / "d", ["cat/1.png"], None)
    (item,) = example_blocks(run)[2].items
    with Image.open(io.BytesIO(item.jpeg)) as image:
        assert image.size == (128, 64) and image.convert("L").getpixel((9, 9)) > 250, "transparent is white"


@pytest.mark.parametrize(
    "where, image, digest, why",
    [
        ("{data}", 0, "another", "has changed since"),
        ("{data}", 99, None, "has changed since"),
        ("{data}/absent", 0, None, "absent"),
        ("s3://bucket/data", 0, None, "not below a local folder"),
        ("{data}", "../secret.png", None, "not below a local folder"),
        ("{data}", "/etc/passwd", None, "not below a local folder"),
        ("{data}", "00000.tar", None, "not an image"),
    ],
)
def test_examples_report_unreadable_images_without_showing_them(tmp_path, data, where, image, digest, why):
    digest = digest or Manifest.load(data).digest
    run = scored(tmp_path / "s", "a", where.format(data=data), [image] * 7, digest, wrong=[0])
    blocks = example_blocks(run)
    assert {item.jpeg for item in blocks[2].items} == {b""} and why in blocks[1].text
    assert any(isinstance(block, Table) for block in blocks)


def test_examples_show_no_images_of_another_users_run(tmp_path, data, monkeypatch):
    run = scored(tmp_path / "s", "a", data, range(12), Manifest.load(data).digest)
    monkeypatch.setattr(examples, "is_mine", lambda path: False)
    blocks = example_blocks(run)
    assert not any(item.jpeg for item in blocks[2].items) and "belongs to another user" in blocks[1].text


def test_examples_are_empty_without_predictions_and_report_damaged_file(tmp_path, data):
    run = scored(tmp_path / "s", "a", data, range(12), "x")
    path = path_of(run, "pretrain", 12_800, "twemoji")
    text = path.read_text()
    path.write_text(text.replace("0" * 64, "1" * 64))
    assert example_blocks(run) == [], "the file belongs to another evaluation"
    path.write_text("{")
    (block,) = example_blocks(run)
    assert isinstance(block, Text) and block.tone == "trouble" and str(path) in block.text
    path.unlink()
    assert example_blocks(run) == [] and example_blocks(make(tmp_path / "s", "old")) == []
