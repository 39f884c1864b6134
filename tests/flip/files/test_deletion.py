"""Tests that deletion spares links, folders of other users, and names that the toolkit does not make."""

import os
import shutil

import pytest

from flip.files import deletion
from flip.runs import checkpoint_folder
from flip.runs.rundir import RunDir

OTHER = 65534
root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")


@pytest.fixture
def outside(tmp_path):
    """A folder with a file that must stay."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_text("mine")
    return folder


def test_delete_file_deletes_link_and_not_its_target(outside, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(outside / "file")
    assert deletion.delete_file(link) and not os.path.lexists(link) and (outside / "file").exists()
    assert not deletion.delete_file(link, missing_ok=True)
    with pytest.raises(FileNotFoundError):
        deletion.delete_file(link)
    with pytest.raises(OSError):
        deletion.delete_file(outside)


def test_delete_empty_folder_spares_folder_with_files(outside):
    assert not deletion.delete_empty_folder(outside)
    (outside / "file").unlink()
    assert deletion.delete_empty_folder(outside) and not outside.exists()
    with pytest.raises(FileNotFoundError):
        deletion.delete_empty_folder(outside)


def test_delete_own_folder_deletes_all_below_and_no_target_of_links(outside, tmp_path):
    for delete in (deletion.delete_own_folder, deletion.discard_own_folder):
        folder = tmp_path / "own" / "deep"
        folder.mkdir(parents=True)
        (folder / "link").symlink_to(outside)
        delete(tmp_path / "own")
        assert not (tmp_path / "own").exists() and (outside / "file").exists()
        delete(tmp_path / "own")  # missing


def test_delete_own_folder_refuses_link_and_file(outside, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(outside)
    for path in (link, outside / "file"):
        with pytest.raises(PermissionError, match="not deleted: it is no folder of"):
            deletion.delete_own_folder(path)
        deletion.discard_own_folder(path)
    assert link.is_symlink() and (outside / "file").exists()


@root
def test_delete_own_folder_refuses_folder_of_another_user(outside):
    os.chown(outside, OTHER, OTHER)
    with pytest.raises(PermissionError, match="not deleted"):
        deletion.delete_own_folder(outside)
    deletion.discard_own_folder(outside)
    assert (outside / "file").exists()


def test_delete_folder_below_deletes_folder_and_empty_parents(outside, tmp_path):
    for name in ("first", "second"):
        (tmp_path / "a" / "b" / name / "deep").mkdir(parents=True)
    (tmp_path / "a" / "b" / "first" / "link").symlink_to(outside)
    deletion.delete_folder_below(tmp_path, ("a", "b", "first"), emptied=2)
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["second"]
    deletion.delete_folder_below(tmp_path, ("a", "b", "first"), emptied=2)  # missing
    deletion.delete_folder_below(tmp_path, ("a", "b", "second"), emptied=1)
    assert list((tmp_path / "a").iterdir()) == [] and (outside / "file").exists()


@pytest.mark.parametrize("level", range(3))
def test_delete_folder_below_refuses_link_at_any_level(outside, tmp_path, level):
    names = ("a", "b", "c")
    (outside / "b" / "c" / "c").mkdir(parents=True)
    place = tmp_path.joinpath(*names[:level])
    place.mkdir(parents=True, exist_ok=True)
    (place / names[level]).symlink_to(outside.joinpath(*names[1 : level + 1]))
    with pytest.raises(PermissionError, match="is a symbolic link"):
        deletion.delete_folder_below(tmp_path, names)
    assert (outside / "b" / "c" / "c").exists()


@root
@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_delete_folder_below_refuses_folder_of_another_user(tmp_path, names):
    (tmp_path / "a" / "b").mkdir(parents=True)
    os.chown(tmp_path.joinpath(*names), OTHER, OTHER)
    with pytest.raises(PermissionError, match="belongs to"):
        deletion.delete_folder_below(tmp_path, ("a", "b"))
    assert (tmp_path / "a" / "b").exists()


def test_checkpoint_files_are_the_names_of_the_writer_with_commit_file_first():
    own = [
        checkpoint_folder.COMMIT_FILE,
        f"commit.json.tmp.{'a' * 16}",
        "damaged.json",
        checkpoint_folder.SHARD_FILE % 1,
    ]
    own += [f"{checkpoint_folder.SHARD_FILE % 2}.tmp.{'0' * 16}", checkpoint_folder.SHARD_FILE % 100_000]
    others = [
        "../commit.json",
        "a/commit.json",
        "commit.json/x",
        "commit.json\n",
        "commit.json.tmp.1",
        "owner.json",
        "x",
    ]
    others += ["shard-1.safetensors", "shard-00001-model-00001-of-00001.safetensors.bak", "SHARD", "", ".", ".."]
    found = deletion.checkpoint_files([*reversed(own), *others])
    assert found[0] == checkpoint_folder.COMMIT_FILE and sorted(found) == sorted(own)
    listed = deletion.checkpoint_files(
        [*own, *others], listed=[checkpoint_folder.SHARD_FILE % 1, "x", "../commit.json"]
    )
    assert sorted(listed) == sorted(set(own) - {checkpoint_folder.SHARD_FILE % 100_000})


def test_delete_remote_checkpoint_calls_only_for_own_names():
    deleted = []
    names = [
        "notes",
        "deep/commit.json",
        checkpoint_folder.SHARD_FILE % 2,
        checkpoint_folder.SHARD_FILE % 1,
        checkpoint_folder.COMMIT_FILE,
    ]
    deletion.delete_remote_checkpoint(names, [checkpoint_folder.SHARD_FILE % 1, "notes"], deleted.append)
    assert deleted == [checkpoint_folder.COMMIT_FILE, checkpoint_folder.SHARD_FILE % 1]


def test_delete_checkpoint_leaves_linked_checkpoints_folder(tmp_path):
    """cp -r copies such a link: both runs would delete from one folder."""
    run = RunDir(tmp_path / "a")
    copy = RunDir(tmp_path / "b")
    target = tmp_path / "disk"
    path = target / "pretrain" / "8-1"
    path.mkdir(parents=True)
    (path / checkpoint_folder.COMMIT_FILE).write_text("{}")
    for place in (run, copy):
        place.path.mkdir()
        place.checkpoints.symlink_to(target)
        reason = deletion.delete_checkpoint(checkpoint_folder.folder(place, "pretrain", 8, 1))
        assert "is a symbolic link" in reason and (path / checkpoint_folder.COMMIT_FILE).exists()


def test_start_of_attempt_deletes_temporaries_of_writers_and_no_other_names(tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    run.start_attempt({})
    outside = tmp_path / "outside"
    outside.mkdir()
    own = [f"status.json.tmp.{'a1' * 8}", f".tmp.{'0' * 16}.a.npy", f"latest.new.{'f' * 16}"]
    others = ["notes.tmp.txt", "my.new.ideas", "config.yaml", f"start.json.tmp.{'0' * 16}"]
    for name in own + others:
        (run.path / name).write_text("x")
        (outside / name).write_text("x")
    run.eval.symlink_to(outside)
    run.start_attempt({})
    assert set(own + others) & set(os.listdir(run.path)) == set(others)
    assert sorted(os.listdir(outside)) == sorted(own + others)
    shutil.rmtree(outside)
