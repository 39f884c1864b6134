"""Tests of the shards command in a subprocess: index, info, except, error messages and help."""

import json
import subprocess
import sys

import pytest

from flip.data.manifest.manifest import Manifest
from tests.harness.common import ROOT
from tests.synthetic import make_dataset

JOBS = ROOT / "jobs"


def run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, str(JOBS), "shards", *map(str, arguments)], capture_output=True, text=True, cwd=cwd
    )


@pytest.mark.long
def test_shards_indexes_shows_and_excepts_samples(tmp_path):
    make_dataset(tmp_path / "data", samples=30, shards=3, size=16)
    indexed = run(
        "index", "data/{00000..00001}.tar", "data/00002.*", "--out", "m", "--chunk", 4, "--json", cwd=tmp_path
    )
    facts = json.loads(indexed.stdout)
    assert (facts["samples"], facts["shards"], facts["chunk"], facts["left_out_by_training"]) == (30, 3, 4, 2)
    shown = run("info", tmp_path / "m", cwd="/")
    assert facts["digest"] in shown.stdout and "left out by training" in shown.stdout
    less = run("except", tmp_path / "m", "--ids", "3,8-11", "--out", tmp_path / "less", "--json")
    assert json.loads(less.stdout)["exceptions"] == 5
    assert sorted(Manifest.load(tmp_path / "less").exceptions) == [3, 8, 9, 10, 11]


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["info", "nowhere"], 65, "no manifest here"),
        (["index", "nowhere/{0..3}.tar", "--out", "m"], 65, "the shard is missing"),
        (
            ["make", "nowhere.csv", "--out", "m"],
            78,
            "No such file or directory. Give the path of a table, or of a folder of images.",
        ),
        (["make", "good.csv", "--out", "m", "--per-shard", "0"], 78, "--per-shard"),
        (["make", "good.csv", "--out", "good.csv/m"], 78, "a file is where a folder must be"),
        (["make", "good.csv", "--out", "m"], 65, "good.csv, row 1: the image cannot be read: Is a directory"),
        (["make", "text.csv", "--out", "m"], 65, "text.csv, row 1: not an image of a known format"),
        (["make", "nul.csv", "--out", "m"], 78, "the table cannot be read"),
        (["index", "folder.png", "--out", "m"], 78, "an image, not a tar file"),
    ],
)
def test_shards_reports_mistake_in_single_line(tmp_path, arguments, code, words):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "good.csv").write_text("image,caption\nfolder.png,a folder\n")
    (tmp_path / "text.csv").write_text("image,caption\ngood.csv,a table\n")
    (tmp_path / "nul.csv").write_text("image,caption\n" + "x" * 200_000 + ",a\n")
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == code and words in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "m" / "manifest.json").exists()


def test_shards_help_ends_with_examples():
    *_, examples = run("make", "--help").stdout.partition("examples:\n")
    assert examples and all(" make " in line for line in examples.rstrip().splitlines())
