"""Tests the remote folder of a run in a folder on disk: its address, its owner, and copies of the run directory.

tests/s3/test_checkpoint.py runs the same scenarios on an S3 server.
"""

import json
import shutil
from pathlib import Path

import pytest

from flip.checkpoint import saver as checkpoint
from flip.checkpoint.remote import RemoteCheckpoint
from flip.checkpoint.remote_folder import OWNER_FILE, RemoteFolder
from flip.config import schema
from flip.data.storage.retry import RetryPolicy
from flip.distributed import parallel
from flip.runs import checkpoint_folder
from flip.runs.errors import DataError, PermissionDenied, StorageError
from flip.runs.formats import FormatError
from flip.runs.rundir import RunDir, read_json, write_json
from tests.flip.checkpoint.test_saver import state_of, trained
from tests.harness import copied_runs

POLICY = RetryPolicy(deadline=1.0)


@pytest.fixture(scope="module")
def world():
    yield parallel.start(schema.Compute(device="cpu", threads=1, deterministic="no"))
    parallel.stop()


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "sweep" / "run")


@pytest.mark.parametrize("scenario", copied_runs.SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_remote_folder_on_disk(scenario, tmp_path, world):
    scenario(tmp_path, world, f"file://{tmp_path}/there")


def claimed(run, url):
    folder = RemoteFolder(run, url, POLICY, run.start_attempt({}))
    folder.claim()
    return folder.url


def test_address_keeps_name_and_follows_configured_url(run, tmp_path):
    """The bucket is full: the user names another one and submits the run again."""
    first = claimed(run, f"{tmp_path}/full")
    name = first.rpartition("/")[2]
    assert first == claimed(run, f"file://{tmp_path}/full/") == f"file://{tmp_path}/full/sweep/{name}"
    assert name.startswith("run-")
    assert read_json(run.checkpoints / "url.json") == {
        "url": first,
        "folder": str(run.path),
    }
    assert claimed(run, f"{tmp_path}/new") == f"file://{tmp_path}/new/sweep/{name}"


def test_copy_gets_own_folder_without_help_of_owner_record(run, tmp_path):
    """url.json names the original, which exists or was renamed. The renamed original gets another folder, too."""
    copy = RunDir(tmp_path / "sweep" / "copy")
    second = RunDir(tmp_path / "sweep" / "second")
    url = claimed(run, f"{tmp_path}/there")
    RemoteCheckpoint(url, POLICY).delete(OWNER_FILE)
    for other in (copy, second):
        shutil.copytree(run.path, other.path)
        write_json(other.path / "job.json", {"folder": str(other.path), "copy_of": str(run.path)})
    assert claimed(copy, f"{tmp_path}/there") != url
    run.path.rename(tmp_path / "sweep" / "renamed")
    assert claimed(second, f"{tmp_path}/there") != url
    own = read_json(copy.checkpoints / "url.json")["url"]
    assert claimed(copy, f"{tmp_path}/there") == own, "the copy keeps the folder that it got"
    assert claimed(RunDir(tmp_path / "sweep" / "renamed"), f"{tmp_path}/there") not in (url, own)


def test_checkpoints_at_previous_url_stay_and_are_logged_once(run, tmp_path, world, caplog):
    copied_runs.save(run, world, f"{tmp_path}/full", 16)
    (old,) = checkpoint_folder.checkpoints(run)
    before = copied_runs.files(old.record["url"])
    copied_runs.save(run, world, f"{tmp_path}/new", 32, 48, 64)
    assert [entry.samples_seen for entry in checkpoint_folder.checkpoints(run)] == [16, 64]
    assert copied_runs.files(old.record["url"]) == before
    assert caplog.text.count(f"16-1 is left alone: its files are at {old.record['url']}") == 1


def test_leftovers_of_a_killed_save_are_deleted_by_the_names_of_the_writer(run, tmp_path, world):
    """The attempt was killed before its checkpoint: only names that the writer makes are its leftovers."""
    copied_runs.save(run, world, f"{tmp_path}/there", 16)
    left = checkpoint_folder.folder(run, "pretrain", 24, 1)
    left.mkdir()
    store = RemoteCheckpoint(f"{copied_runs.address(run)}/pretrain/24-1", POLICY)
    for name in (checkpoint_folder.SHARD_FILE % 1, checkpoint_folder.SHARD_FILE % 2, "notes", "deep/commit.json"):
        store.put(name, b"x")
    copied_runs.save(run, world, f"{tmp_path}/there", 32)
    assert sorted(store.names()) == ["deep/commit.json", "notes"] and not left.exists()


def test_older_attempt_deletes_nothing_after_newer_one_has_claimed_the_folder(run, tmp_path):
    old, new = (RemoteFolder(run, f"{tmp_path}/there", POLICY, run.start_attempt({})) for _ in range(2))
    old.claim()
    new.claim()
    new.check_owner()
    with pytest.raises(PermissionDenied, match="has another owner"):
        old.check_owner()


def test_late_write_of_older_attempt_does_not_stop_the_newer_one(run, tmp_path):
    """A node that was cut off while it claimed the folder comes back after the next attempt has claimed it."""
    old, new = (RemoteFolder(run, f"{tmp_path}/there", POLICY, run.start_attempt({})) for _ in range(2))
    old.claim()
    late = RemoteCheckpoint(old.url, POLICY).read_small(OWNER_FILE, 1 << 16)
    new.claim()
    RemoteCheckpoint(new.url, POLICY).put(OWNER_FILE, late)
    new.check_owner()
    assert RemoteCheckpoint(new.url, POLICY).read_small(OWNER_FILE, 1 << 16) != late
    with pytest.raises(PermissionDenied, match="has another owner"):
        old.check_owner()


def test_attempt_of_a_run_of_the_same_path_on_another_host_is_another_owner(run, tmp_path):
    folder = RemoteFolder(run, f"{tmp_path}/there", POLICY, run.start_attempt({}))
    folder.claim()
    other = {"folder": str(run.path), "id": "0" * 32}
    RemoteCheckpoint(folder.url, POLICY).put(OWNER_FILE, json.dumps(other).encode())
    with pytest.raises(PermissionDenied, match="has another owner"):
        folder.check_owner()


def test_retention_deletes_nothing_if_another_run_takes_the_folder_during_the_save(
    run, tmp_path, world, monkeypatch, caplog
):
    """The owner is read before each deletion, not only at the begin of a save."""
    saver = copied_runs.save(run, world, f"{tmp_path}/there", 16)
    other = RunDir(tmp_path / "b")
    real = checkpoint_folder.complete_checkpoint
    other.path.mkdir()

    def complete_and_lose(*arguments):
        checkpoint = real(*arguments)
        copied_runs.take(copied_runs.address(run), other)
        return checkpoint

    monkeypatch.setattr(checkpoint_folder, "complete_checkpoint", complete_and_lose)
    copied_runs.save_at(saver, 32)
    copied_runs.check_whole(run, 16, 32)
    assert "an old checkpoint could not be deleted" in caplog.text and "has another owner" in caplog.text


@pytest.mark.parametrize("linked", ["pretrain", "pretrain/16-1"])
def test_links_below_url_are_neither_written_nor_deleted_through(run, tmp_path, world, linked, caplog):
    """Another user who may write to the remote folder replaces a folder of it by a link to a folder of this user."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "there").symlink_to(tmp_path / "disk")  # the user's own: checkpoint.url names it
    saver = copied_runs.save(run, world, f"{tmp_path}/there", 16)
    folder = Path(copied_runs.address(run).removeprefix("file://")) / linked
    folder.rename(tmp_path / "precious")
    folder.symlink_to(tmp_path / "precious")
    before = {path: path.read_bytes() for path in (tmp_path / "precious").rglob("*") if path.is_file()}
    if linked == "pretrain":
        with pytest.raises(PermissionDenied, match="a folder of this address is a symbolic link"):
            copied_runs.save_at(saver, 32)
    else:
        copied_runs.save_at(saver, 32)
        assert "a folder of this address is a symbolic link" in caplog.text
    after = {path: path.read_bytes() for path in (tmp_path / "precious").rglob("*") if path.is_file()}
    assert len(before) == 2 and after == before


def test_missing_owner_record_is_written_again_and_damaged_one_refuses_deletion(run, tmp_path, caplog):
    folder = RemoteFolder(run, f"{tmp_path}/there", POLICY, run.start_attempt({}))
    folder.claim()
    store = RemoteCheckpoint(folder.url, POLICY)
    store.delete(OWNER_FILE)
    folder.check_owner()
    assert copied_runs.owner(folder.url) == str(run.path)
    for damaged in (b"", b"{", b'{"folder": 3, "id": "0"}', b"[" * (1 << 17)):
        store.put(OWNER_FILE, damaged)
        caplog.clear()
        with pytest.raises(PermissionDenied, match="a damaged owner.json"):
            folder.check_owner()
        assert f"{folder.url}/{OWNER_FILE} is damaged: " in caplog.text
    assert claimed(run, f"{tmp_path}/there") == folder.url, "the next attempt knows its folder from url.json"


def test_bit_that_changes_on_the_way_is_no_other_owner(run, tmp_path, monkeypatch):
    """A storm with flipped bytes stopped a run for good with 77."""
    folder = RemoteFolder(run, f"{tmp_path}/there", POLICY, run.start_attempt({}))
    folder.claim()
    read = RemoteCheckpoint.read_small
    flips = []

    def flipped(self, name, limit):
        data = bytearray(read(self, name, limit))
        if flips:
            data[flips.pop()] ^= 1
        return bytes(data)

    monkeypatch.setattr(RemoteCheckpoint, "read_small", flipped)
    last = (Path(folder.url.removeprefix("file://")) / OWNER_FILE).stat().st_size - 5  # in the id
    for places in ([0], [0, last], [0, last, 1]):
        flips.extend(places)
        folder.check_owner()
        assert not flips
    flips.extend([0, 1] * 4)
    with pytest.raises(StorageError, match="8 reads of owner.json differ"):
        folder.check_owner()
    flips.clear()
    assert claimed(run, f"{tmp_path}/there") == folder.url
    with pytest.raises(PermissionDenied, match="has another owner"):
        folder.check_owner()


def test_claim_reports_damaged_url_file(run, tmp_path):
    run.checkpoints.mkdir(parents=True)
    write_json(run.checkpoints / "url.json", {"url": 3, "folder": str(run.path)})
    with pytest.raises(DataError, match="url.json"):
        claimed(run, f"{tmp_path}/there")


def test_claim_refuses_address_without_its_run_directory(run, tmp_path):
    url = claimed(run, f"{tmp_path}/there")
    write_json(run.checkpoints / "url.json", {"url": url})
    with pytest.raises(FormatError, match="url.json: lacks `folder`") as error:
        claimed(run, f"{tmp_path}/there")
    assert error.value.code == 78


def test_save_fails_without_deletion_if_storage_refuses_the_claim(run, tmp_path, world):
    (tmp_path / "file").write_text("in the way")
    left = checkpoint_folder.folder(run, "pretrain", 8, 0)
    left.mkdir(parents=True)
    run.start_attempt({})
    saver = checkpoint.Checkpointer(run, 1, world, 1, url=f"{tmp_path}/file/there", retry_policy=POLICY)
    with pytest.raises(Exception, match="could not be written"):
        saver.save(state_of(*trained()), "pretrain", 16)
    assert left.exists(), "its files at the URL could not be deleted either"
