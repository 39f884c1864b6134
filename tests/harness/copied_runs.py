"""Scenarios of copied, moved and prepared run directories with checkpoints at a URL, for storage of any kind.

Each takes a folder for the runs, the world of a single rank, and the URL.
"""

import json
import shutil

import pytest
import torch

from flip.checkpoint import saver as checkpoint
from flip.checkpoint.remote import RemoteCheckpoint, local_copy
from flip.checkpoint.remote_folder import OWNER_FILE
from flip.data.storage.retry import RetryPolicy
from flip.runs import commit
from flip.runs.errors import PermissionDenied
from flip.runs.rundir import RunDir, read_json, to_json, write_json
from tests.flip.checkpoint.test_saver import state_of, trained

POLICY = RetryPolicy(deadline=20.0, timeout=5.0)


def save(run, world, url, *positions, keep=1, resume=True):
    """Start an attempt, resume if there is a commit, and save these S. Returns the checkpointer."""
    saver = checkpoint.Checkpointer(run, run.start_attempt({}), world, keep, url=url, retry_policy=POLICY)
    state = state_of(*trained())
    newest = saver.restorer.newest() if resume else None
    if newest is not None:
        saver.restorer.load(newest, state)
    for samples in positions:
        save_at(saver, samples)
    return saver


def save_at(saver, samples):
    """Save S = ``samples``, with this value in all tensors."""
    state = state_of(*trained())
    for tensor in state.values():
        tensor.fill_(samples)
    saver.save(state, "pretrain", samples)


def address(run):
    return read_json(run.checkpoints / "url.json")["url"]


def owner(url):
    return json.loads(RemoteCheckpoint(url, POLICY).read_small(OWNER_FILE, 1 << 16))["folder"]


def files(url):
    """Relative names of all files below a URL."""
    return sorted(RemoteCheckpoint(url, POLICY).names())


def check_whole(run, *positions):
    """The run has exactly these commits, with all their files and the values that were saved."""
    commits = commit.commits(run)
    assert [entry.samples_seen for entry in commits] == list(positions)
    for entry in commits:
        with local_copy(entry, POLICY):
            pass


def check_loads(run, world, url, samples):
    """The newest commit is S = ``samples`` and has the bits of that save."""
    saver = checkpoint.Checkpointer(run, 0, world, 1, url=url, retry_policy=POLICY)
    state = state_of(*trained())
    newest = saver.restorer.newest()
    saver.restorer.load(newest, state)
    assert newest.samples_seen == samples
    assert all(torch.equal(tensor, torch.full_like(tensor, samples)) for tensor in state.values())


def copy_continues_past_retention(folder, world, url):
    """The copy has a remote folder of its own, and the original loses nothing."""
    run = RunDir(folder / "sweep" / "a")
    copy = RunDir(folder / "sweep" / "b")
    save(run, world, url, 16, 32, keep=2)
    shutil.copytree(run.path, copy.path, symlinks=True)
    before = files(address(run))
    check_loads(copy, world, url, 32)
    save(copy, world, url, 48, 64, 80)
    check_whole(run, 16, 32)
    assert files(address(run)) == before and address(copy) != address(run)
    assert address(copy).rpartition("/")[2].startswith("b-")
    assert (owner(address(run)), owner(address(copy))) == (str(run.path), str(copy.path))
    own = [entry for entry in commit.commits(copy) if entry.record["url"].startswith(address(copy))]
    assert [entry.samples_seen for entry in own] == [80] and len(files(address(copy))) == 3, (
        "retention works for its own"
    )
    check_whole(copy, 16, 32, 80)
    check_loads(copy, world, url, 80)
    save(run, world, url, 48)
    check_whole(run, 48)
    assert len(files(address(run))) == 3, "the original keeps its folder and deletes its own commits"


def record_that_names_another_folder_deletes_nothing(folder, world, url):
    run = RunDir(folder / "sweep" / "a")
    outside = f"{url}/outside"
    store = RemoteCheckpoint(outside, POLICY)
    shard = commit.SHARD_FILE % 1
    for name in (shard, commit.COMMIT_FILE, "deep/x"):
        store.put(name, b"mine")
    save(run, world, url, 16)
    prepared = commit.commits(run)[0]
    write_json(prepared.path / commit.COMMIT_FILE, {**prepared.record, "url": outside})
    save(run, world, url, 32, 48, resume=False)
    assert files(outside) == ["commit.json", "deep/x", shard]
    assert [entry.samples_seen for entry in commit.commits(run)] == [16, 48]


def prepared_address_of_another_run_is_not_used(folder, world, url):
    """url.json of one run names the folder of another; only a name of the form that is written counts."""
    victim = RunDir(folder / "sweep" / "victim")
    run = RunDir(folder / "sweep" / "a")
    save(victim, world, url, 16)
    before = files(address(victim))
    for name in (address(victim), f"{url}/sweep/..", f"{url}/sweep/", "file:///etc/passwd-0123456", ".x-01234567"):
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        write_json(run.checkpoints / "url.json", {"url": name, "folder": str(run.path)})
        save(run, world, url, 16, 32, resume=False)
        assert address(run).startswith(f"{url}/sweep/a-") and owner(address(run)) == str(run.path)
        assert files(address(victim)) == before
    check_whole(victim, 16)


def old_run_gets_owner_record(folder, world, url):
    """Before this version, neither url.json nor the remote folder named the run directory."""
    run = RunDir(folder / "sweep" / "a")
    save(run, world, url, 16)
    first = address(run)
    RemoteCheckpoint(first, POLICY).delete(OWNER_FILE)
    write_json(run.checkpoints / "url.json", {"url": first})
    save(run, world, url, 32)
    assert address(run) == first and owner(first) == str(run.path)
    check_whole(run, 32)
    assert len(files(first)) == 3, "the old commit is deleted"


def prepared_address_of_an_old_run_is_not_used(folder, world, url):
    """The folder of the victim has no owner record yet, and url.json of the other run claims to be of this version."""
    victim = RunDir(folder / "sweep" / "victim")
    run = RunDir(folder / "sweep" / "a")
    save(victim, world, url, 16)
    RemoteCheckpoint(address(victim), POLICY).delete(OWNER_FILE)
    write_json(victim.checkpoints / "url.json", {"url": address(victim)})
    shutil.copytree(victim.path, run.path)
    write_json(run.checkpoints / "url.json", {"url": address(victim), "folder": str(run.path)})
    before = files(address(victim))
    save(run, world, url, 32, 48)
    assert address(run) != address(victim) and files(address(victim)) == before
    check_whole(victim, 16)
    save(victim, world, url, 32)
    check_whole(victim, 32)


def copied_root_of_old_runs_gets_own_folders(folder, world, url):
    """``cp -r`` of a whole runs root: the names are equal, and job.json of an older version names only the snapshot."""
    run = RunDir(folder / "runs" / "sweep" / "a")
    copy = RunDir(folder / "copied" / "sweep" / "a")
    save(run, world, url, 16)
    first = address(run)
    RemoteCheckpoint(first, POLICY).delete(OWNER_FILE)
    write_json(run.checkpoints / "url.json", {"url": first})
    write_json(run.path / "job.json", {"snapshot": str(run.path.parent / ".code" / "0123456789abcdef")})
    shutil.copytree(folder / "runs", folder / "copied")
    save(copy, world, url, 32, 48)
    assert address(copy) != first
    check_whole(run, 16)
    save(run, world, url, 32)
    assert address(run) == first
    check_whole(run, 32)


def copy_of_old_run_gets_own_folder(folder, world, url, submitted):
    """``submitted``: job.json of the copy was replaced by a submission; else it still names the original."""
    run = RunDir(folder / "sweep" / "a")
    copy = RunDir(folder / "sweep" / "b")
    save(run, world, url, 16)
    RemoteCheckpoint(address(run), POLICY).delete(OWNER_FILE)
    write_json(run.checkpoints / "url.json", {"url": address(run)})
    write_json(run.path / "job.json", {"folder": str(run.path)})
    shutil.copytree(run.path, copy.path)
    if submitted is not None:
        write_json(copy.path / "job.json", {"folder": str(copy.path), **submitted})
    save(copy, world, url, 32)
    assert address(copy) != address(run)
    check_whole(run, 16)
    check_whole(copy, 16, 32)


def moved_run_keeps_folder(folder, world, url):
    run = RunDir(folder / "sweep" / "a")
    moved = RunDir(folder / "sweep" / "renamed")
    save(run, world, url, 16)
    first = address(run)
    run.path.rename(moved.path)
    save(moved, world, url, 32)
    assert address(moved) == first and owner(first) == str(moved.path)
    check_whole(moved, 32)
    elsewhere = RunDir(folder / "other-root" / "sweep" / "renamed")
    elsewhere.path.parent.mkdir(parents=True)
    moved.path.rename(elsewhere.path)
    save(elsewhere, world, url, 48)
    assert address(elsewhere) == first and len(files(first)) == 3
    check_whole(elsewhere, 48)


def unreachable_original_counts_as_copy(folder, world, url):
    """The file system of the original is not mounted: the run in hand may be a copy."""
    run = RunDir(folder / "mounted" / "sweep" / "a")
    save(run, world, url, 16)
    copy = RunDir(folder / "sweep" / "a")
    shutil.copytree(run.path, copy.path)
    (folder / "mounted").rename(folder / "unmounted")
    save(copy, world, url, 32)
    (folder / "unmounted").rename(folder / "mounted")
    assert address(copy) != address(run)
    check_whole(run, 16)


def folder_of_another_owner_is_left_alone(folder, world, url):
    """Another run takes the folder: this one neither writes nor deletes there, until that run is gone."""
    run = RunDir(folder / "sweep" / "a")
    other = RunDir(folder / "sweep" / "b")
    saver = save(run, world, url, 16)
    other.path.mkdir()
    take(address(run), other)
    before = files(address(run))
    with pytest.raises(PermissionDenied, match="the remote folder of checkpoints has another owner.*sweep/b") as error:
        save_at(saver, 32)
    assert error.value.code == 77 and files(address(run)) == before
    check_whole(run, 16)
    other.path.rmdir()
    save_at(saver, 48)
    check_whole(run, 48)


def take(url, run):
    """Write another run directory into the owner record."""
    record = {"folder": str(run.path), "id": "0" * 32}
    RemoteCheckpoint(url, POLICY).put(OWNER_FILE, to_json(record).encode())


def attempt_moves_to_new_folder_if_another_run_has_its_own(folder, world, url):
    run = RunDir(folder / "sweep" / "a")
    other = RunDir(folder / "sweep" / "b")
    save(run, world, url, 16)
    first = address(run)
    other.path.mkdir()
    take(first, other)
    before = files(first)
    save(run, world, url, 32, 48)
    assert address(run) != first and files(first) == before
    check_whole(run, 16, 48)


SCENARIOS = [
    copy_continues_past_retention,
    record_that_names_another_folder_deletes_nothing,
    prepared_address_of_another_run_is_not_used,
    old_run_gets_owner_record,
    prepared_address_of_an_old_run_is_not_used,
    copied_root_of_old_runs_gets_own_folders,
    moved_run_keeps_folder,
    unreachable_original_counts_as_copy,
    folder_of_another_owner_is_left_alone,
    attempt_moves_to_new_folder_if_another_run_has_its_own,
]
