"""Tests the command that writes a file of weights."""

import io
import json
import tarfile

import numpy as np
import pytest

from flip.config.weights import UNIT
from flip.data.manifest.build import index
from flip.data.weighted_order import Weights
from flip.runs.errors import CONFIG, DATA
from tests.synthetic import draw_image, encode
from tools.commands import shards


@pytest.fixture
def folder(tmp_path):
    """Eight samples with uids and scores; the last has no score."""
    path = tmp_path / "shards" / "0.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for i in range(8):
            record = {"uid": f"{i:032x}", "score": i / 4}
            if i == 7:
                del record["score"]
            for name, content in (("png", encode(draw_image(i, 8))), ("json", json.dumps(record).encode())):
                info = tarfile.TarInfo(f"{i:03d}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    index([str(path)], path.parent, chunk=2)
    return path.parent


def written(folder, tmp_path, *arguments):
    out = tmp_path / "weights"
    assert shards.main(["weights", str(folder), *arguments, "--out", str(out)]) == 0
    return (Weights(str(out)).weights / UNIT).tolist()


def test_weights_of_an_array_are_capped_and_reported(folder, tmp_path, capsys):
    np.save(tmp_path / "views.npy", np.array([0, 1, 2, 8, 1, 1, 1, 1], dtype=np.float32))
    values = written(folder, tmp_path, "--values", str(tmp_path / "views.npy"), "--cap", "4", "--json")
    assert values == [0, 1, 2, 6, 1, 1, 1, 1]
    report = json.loads(capsys.readouterr().out)
    assert (report["samples"], report["with_a_weight"], report["sum"], report["capped"]) == (8, 7, 13, 1)
    assert report["effective_samples"] == round(13**2 / (5 + 4 + 36), 1) and report["largest"] == 6


def test_weights_of_a_field_need_it_in_each_sample(folder, tmp_path, capsys):
    assert shards.main(["weights", str(folder), "--field", "score", "--out", str(tmp_path / "weights")]) == DATA
    assert "no weight of sample 7" in (error := capsys.readouterr().err) and "0.tar, sample 7" in error
    excluded = tmp_path / "excluded"
    assert shards.main(["exclude", str(folder), "--ids", "7", "--out", str(excluded)]) == 0
    assert written(excluded, tmp_path, "--field", "score") == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 0]


@pytest.mark.parametrize("has_numbers", [True, False])
def test_weights_of_a_table_are_found_by_uid(folder, tmp_path, has_numbers):
    rows = [(0, 5, 0.5), (0, 2, 1.0), (7, 7, 9.0), (0, 2, 2.0)]
    kind = "u8,u8,f8"
    if not has_numbers:
        rows = [row[:2] for row in rows]
        kind = "u8,u8"
    np.save(tmp_path / "table.npy", np.array(rows, dtype=kind))
    values = written(folder, tmp_path, "--table", str(tmp_path / "table.npy"))
    assert values == ([0, 0, 3, 0, 0, 0.5, 0, 0] if has_numbers else [0, 0, 2, 0, 0, 1, 0, 0])


@pytest.mark.parametrize(
    ("array", "option", "error"),
    [
        (np.array([1.0, -1] * 4), "--values", "the weight of sample 1 is no number"),
        (np.zeros(8), "--values", "all weights are 0"),
        (np.ones(7), "--values", "fewer numbers than the 8 samples"),
        (np.ones((8, 2)), "--values", "needs one dimension"),
        (np.ones(8), "--table", "no table of uids and weights"),
    ],
)
def test_bad_weights_are_refused_and_leave_no_file(folder, tmp_path, capsys, array, option, error):
    np.save(tmp_path / "bad.npy", array)
    out = tmp_path / "weights"
    assert shards.main(["weights", str(folder), option, str(tmp_path / "bad.npy"), "--out", str(out)]) == CONFIG
    assert error in capsys.readouterr().err and not out.exists()


def test_existing_file_is_not_replaced(folder, tmp_path, capsys):
    np.save(tmp_path / "views.npy", np.ones(8))
    arguments = ["weights", str(folder), "--values", str(tmp_path / "views.npy"), "--out", str(tmp_path / "views.npy")]
    assert shards.main(arguments) == CONFIG
    assert "already exists" in capsys.readouterr().err
