"""Tests that records, links and files of another user make retention delete or overwrite nothing, with real user ids.

Alice saves. ``bucket`` is a folder to which all users may write and in which all may delete, as in a bucket for which
they have the same credentials.
"""

import pytest

from flip.runs import checkpoint_folder
from flip.runs.rundir import RunDir, read_json, write_json
from tests.harness.copied_runs import address

pytestmark = pytest.mark.long


@pytest.fixture
def bucket(users):
    folder = users.folder / "bucket"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


def save(user, run, url, *positions, code=0):
    """Start an attempt of the run, save these S and keep one; returns the log."""
    done = user.python("-m", "tests.security.save_checkpoints", run.path, url, *positions, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stderr


def open_to_all(folder):
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def remote(run):
    """The remote folder of a run as a path."""
    return RunDir(address(run).removeprefix("file://")).path


def run_of(users, owner, place):
    """A run directory users.shared/<place>/demo/<name>, below folders of its owner."""
    run = RunDir(users.shared / place)
    with owner.acts():
        run.path.mkdir(parents=True)
    return run


def copy(user, source, target):
    with user.acts():
        target.path.parent.mkdir(parents=True, exist_ok=True)
    done = user.run("cp", "-r", source.path, target.path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("owned", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["owner.json", "none"])
def test_prepared_records_of_copied_run_delete_nothing(users, bucket, owned):
    """Mallory's records name the remote folder of another run of Alice's, and a folder of checkpoints of hers."""
    alice = users.alice
    mallory = users.mallory
    victim = run_of(users, alice, "a/demo/victim")
    hers = run_of(users, mallory, "m/demo/hers")
    mine = RunDir(users.shared / "c/demo/hers")
    save(alice, victim, bucket, 16)
    save(alice, victim, "", 8)
    open_to_all(bucket)
    save(mallory, hers, bucket, 16)
    outside = victim.checkpoints / "pretrain" / "8-2"
    with mallory.acts():
        write_json(hers.checkpoints / "url.json", {"url": address(victim), "folder": str(mine.path)})
        record = hers.checkpoints / "pretrain" / "16-1" / checkpoint_folder.COMMIT_FILE
        write_json(record, {**read_json(record), "url": f"file://{outside}"})
    if not owned:
        (remote(victim) / "owner.json").unlink()
    copy(alice, hers, mine)
    before = (content(remote(victim)), content(victim.path))
    log = save(alice, mine, bucket, 32, 48)
    assert (content(remote(victim)), content(victim.path)) == before
    assert remote(mine) != remote(victim) and "16-1 is left alone: its files are at file://" in log, log
    assert [entry.samples_seen for entry in checkpoint_folder.checkpoints(mine)] == [16, 48]


READ = """
import sys
from flip.checkpoint.remote import RemoteCheckpoint
from flip.data.storage.retry import RetryPolicy
from flip.runs import checkpoint_folder
from flip.runs.rundir import RunDir
(entry,) = checkpoint_folder.checkpoints(RunDir(sys.argv[1]))
print(RemoteCheckpoint(entry.record["url"], RetryPolicy(deadline=1.0)).read_small("owner.json", 100))
"""


@pytest.mark.parametrize("form", ["reference::file://{}", "simplecache::file://{}", "github://me:repo@main/x"])
def test_address_of_other_scheme_in_copied_record_reaches_no_library(users, bucket, form):
    """fsspec executed templates of a ``reference::`` file. A chain or another scheme is refused before it is read."""
    hers = run_of(users, users.mallory, "m/demo/hers")
    mine = RunDir(users.shared / "c/demo/hers")
    save(users.mallory, hers, bucket, 16)
    prepared = users.shared / "m" / "prepared.json"
    with users.mallory.acts():
        write_json(prepared, {"owner.json": "read by a library"})
        record = hers.checkpoints / "pretrain" / "16-1" / checkpoint_folder.COMMIT_FILE
        write_json(record, {**read_json(record), "url": form.format(prepared)})
    copy(users.alice, hers, mine)
    done = users.alice.python("-c", READ, mine.path, timeout=60)
    assert "read by a library" not in done.stdout
    assert done.returncode != 0 and "is no address of a storage" in done.stderr, done.stderr


@pytest.mark.slow
def test_copy_of_other_users_run_gets_remote_folder_of_its_own(users, bucket):
    alice = users.alice
    bob = users.bob
    theirs = run_of(users, bob, "b/demo/run")
    mine = RunDir(users.shared / "a/demo/run")
    save(bob, theirs, bucket, 16)
    open_to_all(bucket)
    copy(alice, theirs, mine)
    before = content(remote(theirs))
    save(alice, mine, bucket, 32, 48)
    assert content(remote(theirs)) == before and remote(mine) != remote(theirs)
    owner = read_json(remote(mine) / "owner.json")["folder"]
    assert owner == str(mine.path) and [entry.samples_seen for entry in checkpoint_folder.checkpoints(mine)] == [16, 48]
    save(bob, theirs, bucket, 32)
    assert [entry.samples_seen for entry in checkpoint_folder.checkpoints(theirs)] == [32]


@pytest.mark.slow
def test_owner_record_of_other_user_stops_saves_and_deletions(users, bucket):
    """It names a run directory that exists: nothing is written or deleted until a person has decided."""
    alice = users.alice
    mallory = users.mallory
    run = run_of(users, alice, "a/demo/run")
    hers = run_of(users, mallory, "m/demo/run")
    save(alice, run, bucket, 16)
    open_to_all(bucket)
    with mallory.acts():
        write_json(remote(run) / "owner.json", {"folder": str(hers.path), "id": "0" * 32})
    old = remote(run)
    before = content(old)
    save(alice, run, bucket, 32)
    assert content(old) == before and remote(run) != old, "the next attempt has a folder of its own"


@pytest.mark.slow
@pytest.mark.parametrize("linked", ["pretrain", "pretrain/16-1"])
def test_links_of_other_user_in_remote_folder_lead_nowhere(users, bucket, linked):
    alice = users.alice
    mallory = users.mallory
    run = run_of(users, alice, "a/demo/run")
    other = run_of(users, alice, "a/demo/other")
    save(alice, run, bucket, 16)
    save(alice, other, bucket, 16)
    open_to_all(bucket)
    with mallory.acts():
        (remote(run) / linked).rename(remote(run) / "aside")
        (remote(run) / linked).symlink_to(remote(other) / linked)
    before = content(remote(other))
    log = save(alice, run, bucket, 32, code=77 if linked == "pretrain" else 0)
    assert content(remote(other)) == before and len(before) == 3
    assert "a folder of this address is a symbolic link" in log, log


def test_files_and_links_of_other_user_in_checkpoint_folders_stay(users):
    """The folders are open to the group, as in a copy without modes."""
    alice = users.alice
    mallory = users.mallory
    run = run_of(users, alice, "a/demo/run")
    other = run_of(users, alice, "a/demo/other")
    save(alice, run, "", 16)
    save(alice, other, "", 8)
    open_to_all(run.checkpoints)
    folder = run.checkpoints / "pretrain" / "16-1"
    shard = checkpoint_folder.SHARD_FILE % 3
    temporary = f"{checkpoint_folder.COMMIT_FILE}.tmp.{'0' * 16}"
    with mallory.acts():
        for name in (shard, "notes"):
            (folder / name).write_text("mallory's")
        (folder / temporary).symlink_to(other.checkpoints / "pretrain" / "8-1" / checkpoint_folder.COMMIT_FILE)
        (run.checkpoints / "pretrain" / "8-1").symlink_to(other.checkpoints / "pretrain" / "8-1")
        (run.checkpoints / "linked").symlink_to(other.checkpoints / "pretrain")
    before = content(other.path)
    log = save(alice, run, "", 32)
    assert content(other.path) == before and len(before) == 3, log
    assert sorted(path.name for path in folder.iterdir()) == sorted(["notes", shard])
    assert [entry.samples_seen for entry in checkpoint_folder.checkpoints(other)] == [8]
    assert "16-1 is left alone: files stay that no checkpoint has" in log, log
