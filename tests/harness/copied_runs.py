"""Scenarios of copied, moved and prepared run directories with checkpoints at a URL, for storage of any kind.

Each takes a folder for the runs, the world of a single rank, and the URL.
"""

import json
import shutil

import pytest
import torch

from flip.checkpoint import saver as checkpoint
from flip.checkpoint.remote import RemoteCheckpoint, local_copy
from flip.checkpoint.remote_folder import OWNER_FILE, RemoteFolder
from flip.data.storage.retry import RetryPolicy
from flip.runs import checkpoint_folder, remote_owner
from flip.runs.errors import PermissionDenied
from flip.runs.rundir import RunDir, read_json, to_json, write_json
from tests.flip.checkpoint.test_saver import state_of, trained

POLICY = RetryPolicy(deadline=20.0, timeout=5.0)


def save(run, world, url, *positions, keep=1, resume=True):
    """Start an attempt, resume if there is a checkpoint, and save these S. Returns the checkpointer."""
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


def inherited(run, url):
    return remote_owner.inherited(run, url, checkpoint_folder.checkpoints(run))


def owner(url):
    return json.loads(RemoteCheckpoint(url, POLICY).read_small(OWNER_FILE, 1 << 16))["folder"]


def files(url):
    """Relative names of all files below a URL."""
    return sorted(RemoteCheckpoint(url, POLICY).names())


def check_whole(run, *positions):
    """The run has exactly these checkpoints, with all their files and the values that were saved."""
    checkpoints = checkpoint_folder.checkpoints(run)
    assert [entry.samples_seen for entry in checkpoints] == list(positions)
    for entry in checkpoints:
        with local_copy(entry, POLICY):
            pass


def check_loads(run, world, url, samples):
    """The newest checkpoint is S = ``samples`` and has the bits of that save."""
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
    own = [entry for entry in checkpoint_folder.checkpoints(copy) if entry.record["url"].startswith(address(copy))]
    # Retention works for its own.
    assert [entry.samples_seen for entry in own] == [80]
    assert len(files(address(copy))) == 3
    check_whole(copy, 16, 32, 80)
    check_loads(copy, world, url, 80)
    save(run, world, url, 48)
    check_whole(run, 48)
    assert len(files(address(run))) == 3, "the original keeps its folder and deletes its own checkpoints"


def record_that_names_another_folder_deletes_nothing(folder, world, url):
    run = RunDir(folder / "sweep" / "a")
    outside = f"{url}/outside"
    store = RemoteCheckpoint(outside, POLICY)
    shard = checkpoint_folder.SHARD_FILE % 1
    for name in (shard, checkpoint_folder.COMMIT_FILE, "deep/x"):
        store.put(name, b"mine")
    save(run, world, url, 16)
    prepared = checkpoint_folder.checkpoints(run)[0]
    write_json(prepared.path / checkpoint_folder.COMMIT_FILE, {**prepared.record, "url": outside})
    save(run, world, url, 32, 48, resume=False)
    assert files(outside) == ["commit.json", "deep/x", shard]
    assert [entry.samples_seen for entry in checkpoint_folder.checkpoints(run)] == [16, 48]


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


def prepared_address_of_a_folder_without_owner_is_not_used(folder, world, url):
    """The folder of the victim has lost its owner record, and url.json of the other run names it."""
    victim = RunDir(folder / "sweep" / "victim")
    run = RunDir(folder / "sweep" / "a")
    save(victim, world, url, 16)
    RemoteCheckpoint(address(victim), POLICY).delete(OWNER_FILE)
    shutil.copytree(victim.path, run.path)
    write_json(run.checkpoints / "url.json", {"url": address(victim), "folder": str(run.path)})
    before = files(address(victim))
    save(run, world, url, 32, 48)
    assert address(run) != address(victim) and files(address(victim)) == before
    check_whole(victim, 16)
    save(victim, world, url, 32)
    check_whole(victim, 16, 32)


def renamed_original_keeps_checkpoints_that_its_copy_inherited(folder, world, url):
    """``cp -r r1 r2``, then ``mv r1/s/a r1/s/a_best``: the copy finds no run directory at the path of its original."""
    run = RunDir(folder / "r1" / "s" / "a")
    copy = RunDir(folder / "r2" / "s" / "a")
    best = RunDir(folder / "r1" / "s" / "a_best")
    save(run, world, url, 16, 32, keep=2)
    first = address(run)
    shutil.copytree(folder / "r1", folder / "r2")
    run.path.rename(best.path)
    before = files(first)
    save(copy, world, url, 48, 64, 80, keep=2)
    assert files(first) == before and address(copy) != first
    check_whole(copy, 16, 32, 64, 80)
    check_whole(best, 16, 32)
    check_loads(best, world, url, 32)
    save(best, world, url, 48)
    assert files(first) == before and address(best) not in (first, address(copy))
    check_whole(best, 16, 32, 48)
    check_whole(copy, 16, 32, 64, 80)


def renamed_run_gets_new_folder_and_continues(folder, world, url):
    """It reads the checkpoints of its earlier names, also as the one before a damaged checkpoint, and deletes none of
    them."""
    run = RunDir(folder / "sweep" / "a")
    second = RunDir(folder / "sweep" / "second")
    third = RunDir(folder / "other-root" / "sweep" / "third")
    save(run, world, url, 16)
    first = address(run)
    before = files(first)
    run.path.rename(second.path)
    save(second, world, url, 32, 48)
    middle = address(second)
    assert middle.rpartition("/")[2].startswith("second-") and owner(middle) == str(second.path)
    third.path.parent.mkdir(parents=True)
    second.path.rename(third.path)
    check_loads(third, world, url, 48)
    save(third, world, url, 64, 80)
    assert files(first) == before and len(files(middle)) == 3 and len(files(address(third))) == 3
    check_whole(third, 16, 48, 80)
    checkpoint_folder.mark_corrupt(checkpoint_folder.checkpoints(third)[-1].path)
    check_loads(third, world, url, 48)


def renamed_run_deletes_inherited_checkpoints_after_take_over(folder, world, url):
    run = RunDir(folder / "sweep" / "a")
    second = RunDir(folder / "sweep" / "second")
    third = RunDir(folder / "sweep" / "third")
    save(run, world, url, 16)
    first = address(run)
    run.path.rename(second.path)
    save(second, world, url, 32)
    middle = address(second)
    second.path.rename(third.path)
    old_folders = inherited(third, url)
    assert [(old.address, old.checkpoints) for old in old_folders] == [(first, 1), (middle, 1)]
    files_of_third = checkpoint_folder.checkpoints(third)[0].record["files"]
    assert old_folders[0].bytes == sum(file["bytes"] for file in files_of_third.values())
    RemoteFolder(third, url, POLICY).take_over()
    assert inherited(third, url) == [] and owner(first) == owner(middle) == str(third.path)
    check_whole(third, 16, 32)
    save(third, world, url, 48)
    assert files(first) == files(middle) == [OWNER_FILE] and address(third) not in (first, middle)
    check_whole(third, 48)


def folder_of_existing_run_is_not_taken_over(folder, world, url):
    run = RunDir(folder / "sweep" / "a")
    copy = RunDir(folder / "sweep" / "b")
    save(run, world, url, 16)
    shutil.copytree(run.path, copy.path)
    with pytest.raises(
        PermissionDenied, match="the run directory that owns this remote folder exists.*sweep/a"
    ) as error:
        RemoteFolder(copy, url, POLICY).take_over()
    assert error.value.code == 77 and owner(address(run)) == str(run.path)
    assert [old.address for old in inherited(copy, url)] == [address(run)]
    RemoteFolder(run, url, POLICY).take_over()
    assert "taken" not in read_json(run.checkpoints / "url.json"), "there is nothing to take over"


def taken_folder_that_another_run_takes_later_is_left_alone(folder, world, url):
    run = RunDir(folder / "sweep" / "a")
    moved = RunDir(folder / "sweep" / "b")
    other = RunDir(folder / "sweep" / "c")
    save(run, world, url, 16)
    first = address(run)
    run.path.rename(moved.path)
    RemoteFolder(moved, url, POLICY).take_over()
    take(first, other)
    before = files(first)
    save(moved, world, url, 32, 48)
    assert files(first) == before
    check_whole(moved, 16, 48)


def checkpoint_of_another_writer_is_not_deleted(folder, world, url):
    """A run directory of the same path on another host wrote the files at this address."""
    run = RunDir(folder / "sweep" / "a")
    save(run, world, url, 16)
    place = checkpoint_folder.checkpoints(run)[0]
    store = RemoteCheckpoint(place.record["url"], POLICY)
    store.put(checkpoint_folder.COMMIT_FILE, to_json({**place.record, "writer": "0" * 32}).encode())
    before = files(place.record["url"])
    save(run, world, url, 32)
    assert files(place.record["url"]) == before
    check_whole(run, 16, 32)


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
    """Another run takes the folder: this one neither writes nor deletes there, also if that run is gone."""
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
    other.path.rmdir()  # or it was renamed
    with pytest.raises(PermissionDenied, match="the remote folder of checkpoints has another owner"):
        save_at(saver, 48)
    assert files(address(run)) == before


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
    prepared_address_of_a_folder_without_owner_is_not_used,
    renamed_original_keeps_checkpoints_that_its_copy_inherited,
    renamed_run_gets_new_folder_and_continues,
    renamed_run_deletes_inherited_checkpoints_after_take_over,
    folder_of_existing_run_is_not_taken_over,
    taken_folder_that_another_run_takes_later_is_left_alone,
    checkpoint_of_another_writer_is_not_deleted,
    unreachable_original_counts_as_copy,
    folder_of_another_owner_is_left_alone,
    attempt_moves_to_new_folder_if_another_run_has_its_own,
]
