"""Runs with checkpoints at a URL: warm starts, ``debug`` and ``evaluate`` read the checkpoints from the URL."""

import json
import shutil
from pathlib import Path

import pytest

from flip.config.merge import read_config
from flip.runs import checkpoint_folder
from flip.runs.rundir import RunDir, read_json
from tests.harness.command_line import JobsCommandLine
from tests.jobs.commands.test_debug import weights
from tests.synthetic import make_dataset, make_tokenizer

pytestmark = pytest.mark.long


class RemoteCommandLine(JobsCommandLine):
    """Runs save checkpoints to a folder that replaces a bucket, and score them on their training data."""

    def __init__(self, folder, data):
        super().__init__(folder, data)
        self.bucket = folder / "bucket"
        self.head = self.head.replace("keep: 9", f"keep: 9, url: {self.bucket}")
        self.head += f"  evaluate: {{sets: [{{name: own, manifest: {data}, classes: {data}/classes.json}}]}}\n"

    def files(self):
        """The files in the bucket and their modification times."""
        return {path: path.stat().st_mtime_ns for path in self.bucket.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """A command line with a complete run ``base``."""
    data = make_dataset(tmp_path_factory.mktemp("data"), samples=128, shards=2, size=64, classes=4)
    make_tokenizer(data / "tokenizer.json")
    command_line = RemoteCommandLine(tmp_path_factory.mktemp("desk"), data)
    command_line.type("submit", "--watch")
    return command_line


def test_run_directory_holds_only_commit_files_if_checkpoints_are_remote(remote):
    run = remote.run("base")
    checkpoints = checkpoint_folder.checkpoints(run)
    assert [checkpoint.samples_seen for checkpoint in checkpoints] == [16, 32, 48]
    for checkpoint in checkpoints:
        assert [path.name for path in checkpoint.path.iterdir()] == [checkpoint_folder.COMMIT_FILE]
        folder = Path(checkpoint.record["url"].removeprefix("file://"))
        assert folder.is_relative_to(remote.bucket)
        assert {path.name for path in folder.iterdir()} == {*checkpoint.record["files"], checkpoint_folder.COMMIT_FILE}
        expected_record = (checkpoint.path / checkpoint_folder.COMMIT_FILE).read_bytes()
        assert (folder / checkpoint_folder.COMMIT_FILE).read_bytes() == expected_record
    assert [evaluation["name"] for evaluation in read_json(run.result)["evaluations"]] == ["own"]


def test_branch_and_extended_run_start_from_remote_checkpoint(remote):
    before = remote.files()
    runs = """runs:
  base: {}
  branch: {init: {run: base, samples: 32}, stages.pretrain.base_lr: 0}
  extended: {init: {run: base, extend: true}, stages.pretrain.samples: 64}
"""
    output = remote.type("submit", "--watch", runs=runs)
    assert "branch: complete" in output and "extended: complete" in output
    actual = weights(remote.run("branch"), 48)
    expected = weights(remote.run("base"), 32)
    assert expected
    assert actual.keys() == expected.keys()
    assert all((actual[name] == expected[name]).all() for name in actual)
    assert [checkpoint.samples_seen for checkpoint in checkpoint_folder.checkpoints(remote.run("extended"))] == [64]
    (extended,) = checkpoint_folder.checkpoints(remote.run("extended"))
    assert extended.record["parent"] == str(checkpoint_folder.checkpoints(remote.run("base"))[-1].path)
    assert extended.record["step"] == 4
    assert before.items() <= remote.files().items(), "the remote files of the other run are unchanged"


def test_debug_leaves_remote_checkpoints_untouched(remote):
    run = remote.run("base")
    before = remote.files()
    newest = checkpoint_folder.checkpoints(run)[-1].path
    newest.rename(remote.folder / "aside")
    run.result.rename(remote.folder / "result")
    try:
        output = remote.type("debug", "--run", "base")
    finally:
        (remote.folder / "aside").rename(newest)
        (remote.folder / "result").rename(run.result)
    assert remote.files() == before
    copy = RunDir(output.split("a scratch copy: ")[1].splitlines()[0])
    assert "S = 32 of 48, 1 ranks" in output and read_json(copy.result)["samples"] == 48
    assert read_config(copy.config).checkpoint.url == ""
    for checkpoint in checkpoint_folder.checkpoints(copy):  # the copied checkpoint and the new checkpoint
        assert "url" not in checkpoint.record
        assert {path.name for path in checkpoint.path.iterdir()} > {checkpoint_folder.COMMIT_FILE}


def test_evaluate_reads_remote_checkpoint(remote):
    run = remote.run("base")
    (evaluation,) = read_json(run.result)["evaluations"]
    for path in run.eval.rglob("*"):  # if these results existed, evaluate would do nothing
        if path.is_file():
            path.unlink()
    argv = ["--checkpoint", "48", "--no-cache", "--json"]
    # The output also contains notes from stderr after the JSON document.
    (result,), _ = json.JSONDecoder().raw_decode(remote.call("evaluate", "demo/base", *argv))
    assert (result["samples"], result["predictions"]) == (48, evaluation["predictions"])
    assert result["commit"] == checkpoint_folder.summary(checkpoint_folder.checkpoints(run)[-1])


@pytest.mark.slow
def test_copied_run_continues_in_its_own_remote_folder_and_original_keeps_all(remote):
    """``cp -r`` of a run directory, which is then submitted: it once deleted the checkpoints of its original."""
    run = remote.run("base")
    copy = remote.run("copy")
    before = remote.files()
    first = checkpoint_folder.checkpoints(run)[0].path
    last = checkpoint_folder.checkpoints(run)[-1].path
    shutil.copytree(run.path, copy.path, symlinks=True)
    copy.result.unlink()
    shutil.rmtree(copy.checkpoints / last.parent.name / last.name)
    output = remote.type("submit", "--watch", runs="runs:\n  base: {}\n  copy: {checkpoint.keep: 1}\n")
    assert "copy: complete" in output
    assert before.items() <= remote.files().items(), "the files of the original are unchanged"
    job = read_json(copy.path / "job.json")
    place = read_json(copy.checkpoints / "url.json")
    assert (job["folder"], job["copy_of"]) == (str(copy.path), str(run.path))
    assert place["folder"] == str(copy.path) and place["url"] != read_json(run.checkpoints / "url.json")["url"]
    assert checkpoint_folder.checkpoints(copy)[-1].record["url"].startswith(place["url"])
    assert checkpoint_folder.checkpoints(copy)[0].path.name == first.name, "inherited checkpoints stay readable"
    actual = weights(copy, 48)
    expected = weights(run, 48)
    assert expected and all((actual[name] == expected[name]).all() for name in expected)
