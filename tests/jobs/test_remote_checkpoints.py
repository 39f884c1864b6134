"""Runs with checkpoints at a URL: branches, ``debug`` and ``evaluate`` read the checkpoints from the URL."""

import json
from pathlib import Path

import pytest

from flip.config.merge import read_config
from flip.runs import commit
from flip.runs.rundir import RunDir, read_json
from tests.harness.command_line import JobsCommandLine
from tests.jobs.test_debug import weights
from tests.synthetic import make_dataset, make_tokenizer

pytestmark = pytest.mark.long


class Away(JobsCommandLine):
    """Runs save checkpoints to a folder that stands for a bucket, and score them on their training data."""

    def __init__(self, folder, data):
        super().__init__(folder, data)
        self.bucket = folder / "bucket"
        self.head = self.head.replace("keep: 9", f"keep: 9, url: {self.bucket}")
        self.head += f"  evaluate: {{sets: [{{name: own, manifest: {data}, classes: {data}/classes.json}}]}}\n"

    def files(self):
        """The files in the bucket and their modification times."""
        return {path: path.stat().st_mtime_ns for path in self.bucket.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def away(tmp_path_factory):
    """A command line with a complete run ``base``."""
    data = make_dataset(tmp_path_factory.mktemp("data"), samples=128, shards=2, size=64, classes=4)
    make_tokenizer(data / "tokenizer.json")
    made = Away(tmp_path_factory.mktemp("desk"), data)
    made.type("submit", "--watch")
    return made


def test_run_directory_holds_only_commit_files_if_checkpoints_are_remote(away):
    run = away.run("base")
    made = commit.commits(run)
    assert [one.samples for one in made] == [16, 32, 48]
    for one in made:
        assert [path.name for path in one.path.iterdir()] == [commit.COMMIT_FILE]
        there = Path(one.record["url"].removeprefix("file://"))
        assert there.is_relative_to(away.bucket)
        assert {path.name for path in there.iterdir()} == {*one.record["files"], commit.COMMIT_FILE}
        assert (there / commit.COMMIT_FILE).read_bytes() == (one.path / commit.COMMIT_FILE).read_bytes()
    assert [one["name"] for one in read_json(run.result)["evaluations"]] == ["own"]


def test_branch_and_extended_run_start_from_remote_checkpoint(away):
    before = away.files()
    runs = """runs:
  base: {}
  branch: {init: {run: base, samples: 32}, stages.pretrain.base_lr: 0}
  extended: {init: {run: base, extend: true}, stages.pretrain.samples: 64}
"""
    said = away.type("submit", "--watch", runs=runs)
    assert "branch: complete" in said and "extended: complete" in said
    ours, theirs = weights(away.run("branch"), 48), weights(away.run("base"), 32)
    assert theirs and ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    assert [one.samples for one in commit.commits(away.run("extended"))] == [64]
    (made,) = commit.commits(away.run("extended"))
    assert made.record["parent"] == str(commit.commits(away.run("base"))[-1].path) and made.record["step"] == 4
    assert before.items() <= away.files().items(), "what lies there of the other run is as it was"


def test_debug_leaves_remote_checkpoints_untouched(away):
    run, before = away.run("base"), away.files()
    newest = commit.commits(run)[-1].path
    newest.rename(away.folder / "aside")
    run.result.rename(away.folder / "result")
    try:
        said = away.type("debug", "--run", "base")
    finally:
        (away.folder / "aside").rename(newest)
        (away.folder / "result").rename(run.result)
    assert away.files() == before
    copy = RunDir(said.split("a scratch copy: ")[1].splitlines()[0])
    assert "S = 32 of 48, 1 ranks" in said and read_json(copy.result)["samples"] == 48
    assert read_config(copy.config).checkpoint.url == ""
    for one in commit.commits(copy):  # the copied commit and the new commit
        assert "url" not in one.record and {path.name for path in one.path.iterdir()} > {commit.COMMIT_FILE}


def test_evaluate_reads_remote_checkpoint(away):
    run = away.run("base")
    (evaluation,) = read_json(run.result)["evaluations"]
    for path in run.eval.rglob("*"):  # with these results, evaluate would do nothing
        if path.is_file():
            path.unlink()
    words = ["--commit", "48", "--no-cache", "--json"]
    (found,), _ = json.JSONDecoder().raw_decode(away.call("evaluate", "demo/base", *words))  # notes from stderr follow
    assert (found["samples"], found["predictions"]) == (48, evaluation["predictions"])
    assert found["commit"] == commit.summary(commit.commits(run)[-1])
