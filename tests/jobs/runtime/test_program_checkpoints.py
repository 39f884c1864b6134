"""Which checkpoint of a program is complete: never one that a killed attempt has left unfinished."""

import os

import pytest
import torch
from safetensors.torch import save_file

from flip.runs import checkpoint_folder
from flip.runs.errors import DataError
from flip.runs.rundir import RunDir
from jobs.runtime import program_checkpoints
from jobs.runtime.program_checkpoints import CheckpointFollower

RESUME = {"pattern": "step-*.pt", "number": "", "unit": 10, "done": "", "renames": False}


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch):
    monkeypatch.setattr(program_checkpoints, "LOOK_SECONDS", 0.0)


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def follow(tmp_path, out):
    """``follow(n)``: the follower of a new attempt n, and where its program continues."""
    run = RunDir(tmp_path / "run")

    def follow(n, **changes):
        assert run.start_attempt({}) == n
        follower = CheckpointFollower(run, n, {**RESUME, **changes}, out, lambda: 7)
        newest = follower.start()
        return follower, newest and (newest.samples_seen, os.path.basename(newest.record["path"]))

    follow.run = run
    return follow


def saved(follow):
    return [(each.samples_seen, each.attempt) for each in checkpoint_folder.checkpoints(follow.run)]


def test_path_that_changes_is_not_complete(follow, out):
    follower, newest = follow(1)
    assert newest is None
    file = out / "step-1.pt"
    for content in ("a", "ab", "abc"):
        file.write_text(content)
        follower.look()
    assert saved(follow) == []
    follower.look()
    assert saved(follow) == [(10, 1)]


def test_half_of_a_checkpoint_is_never_used(follow, out):
    follower, _ = follow(1)
    (out / "step-1.pt").write_text("whole")
    follower.look()
    follower.look()
    (out / "step-2.pt").write_text("hal")  # the program is killed here
    follower, newest = follow(2)
    assert newest == (10, "step-1.pt")
    for _ in range(3):
        follower.look()
    follower.look(final=True)
    assert saved(follow) == [(10, 1)]
    (out / "step-2.pt").write_text("whole")  # attempt 2 has come there
    follower.look(final=True)
    assert saved(follow) == [(10, 1), (20, 2)]


def test_checkpoint_that_vanishes_is_no_start_from_zero(follow, out):
    follower, _ = follow(1)
    for step in (1, 2):
        (out / f"step-{step}.pt").write_text("whole")
    follower.look(final=True)
    (out / "step-2.pt").unlink()
    assert follow(2)[1] == (10, "step-1.pt")
    (out / "step-1.pt").write_text("other")
    with pytest.raises(DataError, match="has vanished, or has changed"):
        follow(3)


def test_files_from_before_the_run_are_no_checkpoints(follow, out):
    (out / "step-9.pt").write_text("of another run")
    follower, newest = follow(1)
    follower.look()
    follower.look(final=True)
    assert newest is None and saved(follow) == []


def test_program_that_renames_needs_no_second_look(follow, out):
    follower, _ = follow(1, pattern="last.pt", renames=True)
    (out / "last.pt").write_text("first")
    follower.look()
    assert saved(follow) == [(7, 1)], "without a number: the position of the metrics"
    (out / "last.pt").write_text("second, then it was killed")
    assert follow(2, pattern="last.pt", renames=True)[1] == (8, "last.pt")


def test_folder_is_complete_with_its_last_file(follow, out):
    follower, _ = follow(1, pattern="step-*.pt", done=".metadata")
    folder = out / "step-3.pt"
    folder.mkdir()
    (folder / "shard").write_text("a part")
    follower.look()
    follower.look()
    assert saved(follow) == []
    (folder / ".metadata").write_text("done")
    follower.look()
    follower.look()
    assert saved(follow) == [(30, 1)]


def test_pattern_that_matches_nothing_is_named(follow, out):
    (out / "model.bin").write_text("x")
    follower, _ = follow(1)
    assert follower.why_none() == f"resume.pattern 'step-*.pt' matches nothing below {out} (there: model.bin)"


def test_retention_keeps_what_is_a_program_s(follow, out):
    follower, _ = follow(1)
    for step in range(1, 6):
        (out / f"step-{step}.pt").write_text("whole")
        follower.look(final=True)
    assert checkpoint_folder.apply_retention(follow.run, 1, keep=1) == []
    assert len(saved(follow)) == 5 and len(list(out.iterdir())) == 5


@pytest.mark.parametrize("kind", ["torch", "safetensors", "folder"])
def test_writer_that_stands_still_is_not_complete(follow, out, kind):
    """Half of a file of a known format, unchanged for many looks, or at an end with 0, is no checkpoint."""
    whole = out.parent / "whole"
    if kind == "safetensors":
        save_file({"weight": torch.ones(9, 9)}, whole)
    else:
        torch.save({"weight": torch.ones(9, 9)}, whole)
    data = whole.read_bytes()
    path = out / "step-1.pt"
    if kind != "torch":
        path.mkdir()
        path = path / f"weights.{kind}"
    follower, _ = follow(1)
    path.write_bytes(data[: len(data) // 2])
    for _ in range(3):
        follower.look()
    follower.look(final=True)
    assert saved(follow) == []
    path.write_bytes(data)
    follower.look(final=True)
    assert saved(follow) == [(10, 1)]
