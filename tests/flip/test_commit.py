"""The commit protocol: a folder without commit.json does not exist, and what is kept."""

import json

import pytest

from flip import commit
from flip.rundir import RunDir


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    run.begin_attempt({})
    return run


def write(run, stage, samples, attempt=1, mark=True):
    path = commit.folder(run, stage, samples, attempt)
    path.mkdir(parents=True)
    (path / "shard-1.safetensors").write_bytes(b"one" * samples)
    (path / "shard-2.safetensors").write_bytes(b"two" * samples)
    if mark:
        commit.commit(path, {"stage": stage, "samples": samples, "attempt": attempt})
    return path


def test_only_what_is_marked_exists(run):
    write(run, "pretrain", 8)
    write(run, "pretrain", 16, mark=False)
    assert [c.samples for c in commit.commits(run)] == [8]


def test_newest_is_by_samples_then_attempt(run):
    for stage, samples, attempt in (("unmasked", 24, 1), ("pretrain", 16, 2), ("pretrain", 16, 1), ("pretrain", 8, 3)):
        write(run, stage, samples, attempt)
    assert [(c.samples, c.attempt) for c in commit.commits(run)] == [(8, 3), (16, 1), (16, 2), (24, 1)]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damage_is_found_by_the_reader_of_that_part(run, damage):
    path = write(run, "pretrain", 8)
    (checkpoint,) = commit.commits(run)
    commit.verify(checkpoint)
    file = path / "shard-2.safetensors"
    if damage == "flip":
        file.write_bytes(b"twO" + file.read_bytes()[3:])
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    with pytest.raises(commit.Damaged, match="shard-2"):
        commit.verify(checkpoint)
    commit.verify(checkpoint, part=0, parts=2)
    with pytest.raises(commit.Damaged):
        commit.verify(checkpoint, part=1, parts=2)


@pytest.mark.parametrize("text", ["{", "[]", '{"files": 3}', "{}", "\x00"])
def test_a_damaged_mark_is_no_commit(run, text):
    path = write(run, "pretrain", 8)
    (path / commit.MARK).write_text(text)
    assert commit.commits(run) == []
    with pytest.raises(commit.Damaged):
        commit.read(path)


def test_retention_keeps_the_newest_the_last_of_a_stage_and_the_named(run):
    for samples in (8, 16, 24):
        write(run, "pretrain", samples)
    for samples in (32, 40, 48, 56):
        write(run, "unmasked", samples)
    unfinished = write(run, "unmasked", 64, mark=False)
    gone = commit.retain(run, 1, keep=2, named=[commit.folder(run, "pretrain", 8, 1)])
    assert [c.samples for c in commit.commits(run)] == [8, 24, 48, 56]
    assert unfinished in gone and not unfinished.exists()


def test_only_the_newest_attempt_deletes_and_never_a_newer_ones_files(run):
    for samples in (8, 16, 24):
        write(run, "pretrain", samples)
    theirs = write(run, "pretrain", 32, attempt=3, mark=False)
    assert commit.retain(run, 1, keep=1) and theirs.exists()
    run.begin_attempt({})
    write(run, "pretrain", 40)
    assert commit.retain(run, 1, keep=1) == []


def test_removal_takes_the_mark_first(run, monkeypatch):
    path = write(run, "pretrain", 8)
    monkeypatch.setattr("pathlib.Path.rmdir", lambda self: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(OSError, match="killed here"):
        commit.remove(path)
    assert commit.commits(run) == []


def test_a_damaged_one_set_aside_no_longer_counts(run):
    for samples in (8, 16, 24):
        write(run, "pretrain", samples)
    commit.set_aside(commit.folder(run, "pretrain", 24, 1))
    commit.retain(run, 1, keep=2)
    assert [c.samples for c in commit.commits(run)] == [8, 16]


def test_the_record_lists_every_file(run):
    path = write(run, "pretrain", 2)
    files = json.loads((path / commit.MARK).read_text())["files"]
    assert {name: entry["bytes"] for name, entry in files.items()} == {
        "shard-1.safetensors": 6,
        "shard-2.safetensors": 6,
    }
