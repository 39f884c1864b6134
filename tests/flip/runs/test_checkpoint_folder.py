"""Tests the protocol of checkpoints (a folder without commit.json is none) and retention."""

import ctypes
import hashlib
import json
import mmap
import os
import re
from pathlib import Path

import pytest

from flip.checkpoint import remote
from flip.data.storage.retry import RetryPolicy
from flip.runs import checkpoint_folder
from flip.runs.checkpoint_folder import pin
from flip.runs.rundir import RunDir, read_json, write_json

FIRST = checkpoint_folder.SHARD_FILE % 1
SECOND = checkpoint_folder.SHARD_FILE % 2


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    run.start_attempt({})
    return run


def write(run, stage, samples, attempt=1, mark=True):
    path = checkpoint_folder.folder(run, stage, samples, attempt)
    path.mkdir(parents=True)
    (path / FIRST).write_bytes(b"one" * samples)
    (path / SECOND).write_bytes(b"two" * samples)
    if mark:
        checkpoint_folder.complete_checkpoint(path, {"stage": stage, "samples": samples, "attempt": attempt})
    return path


def test_checkpoints_lists_only_folders_with_commit_file(run):
    write(run, "pretrain", 8)
    write(run, "pretrain", 16, mark=False)
    assert [c.samples_seen for c in checkpoint_folder.checkpoints(run)] == [8]


@pytest.mark.parametrize("folder", ["checkpoints", "checkpoints/pretrain", "pins"])
def test_listing_that_fails_hides_no_checkpoint_and_deletes_none(run, tmp_path, monkeypatch, folder):
    """NFS returns ESTALE at times; Path.glob of Python 3.12 and newer then returns what it has seen so far."""
    for samples in (8, 16, 24):
        write(run, "pretrain", samples)
    by = RunDir(tmp_path / "sweep" / "by")
    by.path.mkdir()
    pin(run, by, "pretrain", 8)
    real = {name: getattr(os, name) for name in ("listdir", "scandir")}
    failures = []

    def once(name):
        def listing(path="."):
            if Path(path) == run.path / folder and not failures:
                failures.append(path)
                raise OSError(116, "Stale file handle", str(path))
            return real[name](path)

        return listing

    for name in real:
        monkeypatch.setattr(os, name, once(name))
    with pytest.raises(OSError, match="Stale"):
        checkpoint_folder.apply_retention(run, 1, keep=1)
    monkeypatch.undo()
    assert failures and [c.samples_seen for c in checkpoint_folder.checkpoints(run)] == [8, 16, 24]


def test_checkpoints_are_ordered_by_samples_then_attempt(run):
    for stage, samples, attempt in (("unmasked", 24, 1), ("pretrain", 16, 2), ("pretrain", 16, 1), ("pretrain", 8, 3)):
        write(run, stage, samples, attempt)
    assert [(c.samples_seen, c.attempt) for c in checkpoint_folder.checkpoints(run)] == [
        (8, 3),
        (16, 1),
        (16, 2),
        (24, 1),
    ]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_verify_detects_damage_only_in_the_given_part(run, damage):
    path = write(run, "pretrain", 8)
    (checkpoint,) = checkpoint_folder.checkpoints(run)
    checkpoint_folder.verify(checkpoint)
    file = path / SECOND
    if damage == "flip":
        file.write_bytes(b"twO" + file.read_bytes()[3:])
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    with pytest.raises(checkpoint_folder.CorruptCheckpoint, match="shard-00002"):
        checkpoint_folder.verify(checkpoint)
    checkpoint_folder.verify(checkpoint, part=0, parts=2)
    with pytest.raises(checkpoint_folder.CorruptCheckpoint):
        checkpoint_folder.verify(checkpoint, part=1, parts=2)


@pytest.mark.parametrize("text", ["{", "[]", '{"files": 3}', "{}", "\x00"])
def test_commit_file_with_invalid_json_is_no_checkpoint(run, text):
    path = write(run, "pretrain", 8)
    (path / checkpoint_folder.COMMIT_FILE).write_text(text)
    assert checkpoint_folder.checkpoints(run) == []
    with pytest.raises(checkpoint_folder.CorruptCheckpoint):
        checkpoint_folder.read_checkpoint(path)


def test_retention_keeps_newest_last_of_stage_and_named_checkpoints(run):
    for samples in (8, 16, 24):
        write(run, "pretrain", samples)
    for samples in (32, 40, 48, 56):
        write(run, "unmasked", samples)
    unfinished = write(run, "unmasked", 64, mark=False)
    gone = checkpoint_folder.apply_retention(run, 1, keep=2, named=[checkpoint_folder.folder(run, "pretrain", 8, 1)])
    assert [c.samples_seen for c in checkpoint_folder.checkpoints(run)] == [8, 24, 48, 56]
    assert unfinished in gone and not unfinished.exists()


def test_retention_keeps_checkpoints_listed_in_keep_at(run):
    for samples in (8, 16, 24, 32):
        write(run, "pretrain", samples)
    checkpoint_folder.apply_retention(run, 1, keep=1, keep_at=[8, 24])
    assert [c.samples_seen for c in checkpoint_folder.checkpoints(run)] == [8, 24, 32]


def test_retention_deletes_only_for_current_attempt_and_spares_newer_files(run):
    for samples in (8, 16, 24):
        write(run, "pretrain", samples)
    newer = write(run, "pretrain", 32, attempt=3, mark=False)
    assert checkpoint_folder.apply_retention(run, 1, keep=1) and newer.exists()
    run.start_attempt({})
    write(run, "pretrain", 40)
    assert checkpoint_folder.apply_retention(run, 1, keep=1) == []


def test_remove_interrupted_at_rmdir_leaves_no_checkpoint(run, monkeypatch):
    path = write(run, "pretrain", 8)
    monkeypatch.setattr("os.rmdir", lambda *_, **__: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(OSError, match="killed here"):
        checkpoint_folder.remove(path)
    assert checkpoint_folder.checkpoints(run) == []


def test_retention_ignores_checkpoints_marked_corrupt(run):
    for samples in (8, 16, 24):
        write(run, "pretrain", samples)
    checkpoint_folder.mark_corrupt(checkpoint_folder.folder(run, "pretrain", 24, 1))
    checkpoint_folder.apply_retention(run, 1, keep=2)
    assert [c.samples_seen for c in checkpoint_folder.checkpoints(run)] == [8, 16]


def test_checkpoint_record_lists_every_file_with_its_size(run):
    path = write(run, "pretrain", 2)
    files = json.loads((path / checkpoint_folder.COMMIT_FILE).read_text())["files"]
    assert {name: entry["bytes"] for name, entry in files.items()} == {
        FIRST: 6,
        SECOND: 6,
    }


def test_complete_checkpoint_syncs_files_and_folders_before_commit_file(run, monkeypatch):
    """A power cut leaves a complete checkpoint or none: all files and new folders are synced before commit.json."""
    synced = []
    fsync = os.fsync

    def noted(handle):
        synced.append((os.readlink(f"/proc/self/fd/{handle}"), mark.exists()))
        fsync(handle)

    mark = checkpoint_folder.folder(run, "pretrain", 8, 1) / checkpoint_folder.COMMIT_FILE
    monkeypatch.setattr("os.fsync", noted)
    handles = os.listdir("/proc/self/fd")
    path = write(run, "pretrain", 8)
    assert os.listdir("/proc/self/fd") == handles
    before = {name for name, marked in synced if not marked}
    assert before >= {
        str(path / FIRST),
        str(path / SECOND),
    }
    assert before >= {str(path), str(path.parent), str(run.checkpoints)}
    assert (str(path), True) in synced, "the folder is synced after commit.json is created"
    synced.clear()
    checkpoint_folder.mark_corrupt(path)
    assert [name for name, _ in synced] == [str(path)]
    mark.write_text("{}")
    synced.clear()
    checkpoint_folder.make_incomplete(path)
    assert [name for name, _ in synced] == [str(path)] and not mark.exists()
    checkpoint_folder.make_incomplete(path)


def test_complete_checkpoint_takes_known_files_without_reading_them(run):
    path = write(run, "pretrain", 8, mark=False)
    known = {
        FIRST: {"bytes": 1, "sha256": "x"},
        "far": {"bytes": 2, "sha256": "y"},
    }
    record = {"stage": "pretrain", "samples": 8, "attempt": 1, "url": "s3://b/c"}
    checkpoint = checkpoint_folder.complete_checkpoint(path, record, known)
    assert checkpoint.record["files"][FIRST] == known[FIRST]
    assert sorted(checkpoint.record["files"]) == [
        "far",
        FIRST,
        SECOND,
    ]
    assert "files" not in record
    assert len(known) == 2
    assert checkpoint_folder.read_checkpoint(path).record == checkpoint.record
    again = checkpoint_folder.complete_checkpoint(path, record)
    assert checkpoint_folder.COMMIT_FILE not in again.record["files"]


@pytest.mark.parametrize(
    "change",
    [
        dict(stage=3), dict(stage=".."), dict(stage="../../x"), dict(stage="/tmp/x"), dict(stage="a/b"), dict(stage=""),
        dict(stage="other"), dict(samples=9), dict(attempt=2),
        dict(samples=-1), dict(samples="8"), dict(samples=True), dict(attempt=-1), dict(attempt=1.0),
        dict(url=3), dict(files=[]), dict(files={"../x": None}), dict(files={"a/../x": None}), dict(files={"/x": None}),
        dict(files={"./x": None}), dict(files={"": None}), dict(files={"a\0": None}), dict(files={"a": {"bytes": 1}}),
        dict(files={"a": {"bytes": True, "sha256": ""}}), dict(files={"a": {"bytes": 1, "sha256": 3}}),
        dict(files={"a": {"sha256": ""}}), dict(files={"a": 3}),
    ],
)  # fmt: skip
def test_read_checkpoint_rejects_record_with_invalid_fields(run, change):
    path = write(run, "pretrain", 8)
    good = json.loads((path / checkpoint_folder.COMMIT_FILE).read_text())
    for name in change.get("files", {}):
        change["files"][name] = change["files"][name] or {"bytes": 1, "sha256": ""}
    (path / checkpoint_folder.COMMIT_FILE).write_text(json.dumps({**good, **change}))
    with pytest.raises(checkpoint_folder.CorruptCheckpoint, match=re.escape(str(path / checkpoint_folder.COMMIT_FILE))):
        checkpoint_folder.read_checkpoint(path)
    (path / checkpoint_folder.COMMIT_FILE).write_text(json.dumps({**good, "url": "s3://b"}))
    restored = checkpoint_folder.read_checkpoint(path)
    assert (restored.samples_seen, restored.attempt) == (8, 1)
    (path / checkpoint_folder.COMMIT_FILE).unlink()
    with pytest.raises(checkpoint_folder.CorruptCheckpoint, match="has no commit.json"):
        checkpoint_folder.read_checkpoint(path)


@pytest.mark.parametrize("stage", [3, ".", "..", "a/b", "/tmp/x", "a\0", "x" * 256])
def test_record_of_an_export_needs_a_name_as_stage(stage):
    """No folder shows what the stage of an export must be, and results are written to a folder of this name."""
    record = {"stage": "pretrain", "samples": 8, "attempt": 1, "files": {}}
    checkpoint_folder.validate_record(record)
    with pytest.raises(ValueError, match="`stage` is not a name"):
        checkpoint_folder.validate_record({**record, "stage": stage})


def test_summary_describes_checkpoint_of_given_samples(run):
    write(run, "pretrain", 8)
    write(run, "pretrain", 8, attempt=2)
    path = write(run, "pretrain", 16)
    digest = hashlib.sha256((path / checkpoint_folder.COMMIT_FILE).read_bytes()).hexdigest()
    expected = {"path": "pretrain/16-1", "stage": "pretrain", "samples": 16, "digest": digest}
    assert checkpoint_folder.summary(checkpoint_folder.checkpoints(run)[-1]) == expected
    assert checkpoint_folder.summary_at(run, 16) == expected
    assert checkpoint_folder.summary_at(run, 8)["path"] == "pretrain/8-2"
    assert checkpoint_folder.summary_at(run, 9) is None


def test_summary_at_reads_only_the_matching_checkpoint(run, monkeypatch):
    for samples in (8, 16, 24):
        write(run, "pretrain", samples)
    read = checkpoint_folder.read_checkpoint
    names = []
    monkeypatch.setattr(checkpoint_folder, "read_checkpoint", lambda path: (names.append(path.name), read(path))[1])
    assert checkpoint_folder.summary_at(run, 16)["path"] == "pretrain/16-1" and names == ["16-1"]


def resident(path):
    """The share of a file's pages that are in the page cache."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        held = (ctypes.c_ubyte * -(-len(pages) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(pages)
        address = ctypes.c_void_p(ctypes.addressof(start))
        assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(pages)), held) == 0
        del start
        return sum(page & 1 for page in held) / len(held)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="Linux drops single files from the page cache")
def test_verify_drops_page_cache_before_reading(run, monkeypatch):
    path = write(run, "pretrain", 1 << 20)
    held = {file: resident(file) for file in path.glob("*.safetensors")}
    os.sync()
    if min(held.values()) < 1 or not _drops(path):
        pytest.skip("this file system keeps no page cache of its own, or nothing but one")
    opened = open
    shares = []

    class Watched:
        """``open`` that records the cached share of the file's pages when its first block is read."""

        def __init__(self, name, mode):
            self.name = name
            self.file = opened(name, mode)
            self.first = True
            self.fileno = self.file.fileno

        def read(self, size):
            if self.first:
                shares.append(resident(self.name))
            self.first = False
            return self.file.read(size)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    monkeypatch.setattr(checkpoint_folder, "open", Watched, raising=False)
    (checkpoint,) = [checkpoint_folder.SavedCheckpoint(path, read_json(path / checkpoint_folder.COMMIT_FILE))]
    remote.verify(checkpoint, RetryPolicy())
    assert len(shares) == 2 and max(shares) < 0.5, "the pages were dropped before they were read"


def _drops(folder):
    """Whether the file system drops clean pages on request (tmpfs does not)."""
    (folder / "probe").write_bytes(b"x" * (1 << 20))
    with open(folder / "probe", "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return resident(folder / "probe") < 0.5


def test_ever_had_checkpoint_counts_valid_and_corrupt_ones(run):
    write(run, "pretrain", 8, mark=False)
    assert not checkpoint_folder.ever_had_checkpoint(run)
    path = write(run, "pretrain", 16)
    assert checkpoint_folder.ever_had_checkpoint(run)
    checkpoint_folder.mark_corrupt(path)
    assert checkpoint_folder.ever_had_checkpoint(run) and checkpoint_folder.checkpoints(run) == []
    checkpoint_folder.remove(path)
    assert not checkpoint_folder.ever_had_checkpoint(run) and not path.exists()


def test_retention_spares_foreign_paths_and_newer_attempts(run):
    path = write(run, "pretrain", 8)
    (path.parent / "notes-1").write_text("a file")
    (path.parent / "copy-of").mkdir()
    newer = write(run, "pretrain", 4, attempt=2, mark=False)
    older = write(run, "pretrain", 4, attempt=0, mark=False)
    own = write(run, "pretrain", 2, attempt=1, mark=False)
    assert checkpoint_folder.apply_retention(run, 1, keep=1) == sorted([own, older])
    assert (path.parent / "notes-1").exists() and (path.parent / "copy-of").exists() and newer.exists()


def test_sha256_covers_entire_large_file(tmp_path):
    data = b"0123456789abcdef" * (1 << 17)
    (tmp_path / "big").write_bytes(data)
    assert checkpoint_folder.sha256(tmp_path / "big") == hashlib.sha256(data).hexdigest()


def test_verify_splits_files_among_parts(run):
    path = write(run, "pretrain", 8)
    (checkpoint,) = checkpoint_folder.checkpoints(run)
    (path / FIRST).write_bytes(b"")
    checkpoint_folder.verify(checkpoint, part=1, parts=2)
    for part, parts in ((0, 2), (0, 1)):
        with pytest.raises(
            checkpoint_folder.CorruptCheckpoint,
            match=f"{FIRST} has 0 bytes, but 24 were saved",
        ):
            checkpoint_folder.verify(checkpoint, part, parts)


def test_remove_deletes_commit_file_first(run, monkeypatch):
    path = write(run, "pretrain", 8)
    gone = []
    unlink = os.unlink
    monkeypatch.setattr(os, "unlink", lambda name, **more: (gone.append(name), unlink(name, **more)))
    checkpoint_folder.remove(path)
    assert gone[0] == checkpoint_folder.COMMIT_FILE and len(gone) == 3 and not path.exists()


def test_retention_keeps_pinned_checkpoint(run):
    for samples in (8, 16, 24):
        write(run, "pretrain", samples)
    other = RunDir(run.path.parent / "other")
    other.path.mkdir()
    pin(run, other, "pretrain", 8)
    assert checkpoint_folder.apply_retention(run, 1, keep=1) == [checkpoint_folder.folder(run, "pretrain", 16, 1)]


ENDS = {
    "evaluated": ("result.json", {}), "cancelled": ("cancel.json", {}),
    "failed": ("attempts/1/end.json", {"action": "stop"}), "waits": ("attempts/1/end.json", {"action": "requeue"}),
    "damaged": ("attempts/1/end.json", {"action": 1}),
}  # fmt: skip


@pytest.mark.parametrize("place", [".evaluate/run-1", "other"])
@pytest.mark.parametrize("end", ENDS)
def test_pin_ends_with_evaluation_that_does_not_continue(run, place, end):
    """A run that failed or was cancelled may continue; an evaluation job never does."""
    for samples in (8, 16):
        write(run, "pretrain", samples)
    holder = RunDir(run.path.parent / place)
    holder.start_attempt({})
    pin(run, holder, "pretrain", 8)
    assert checkpoint_folder.pin_holders(run) == {holder.path}
    write_json(holder.path / ENDS[end][0], ENDS[end][1])
    over = end == "evaluated" or (place != "other" and end in ("cancelled", "failed"))
    assert checkpoint_folder.pin_holders(run) == (set() if over else {holder.path})
    oldest = checkpoint_folder.folder(run, "pretrain", 8, 1)
    assert checkpoint_folder.apply_retention(run, 1, keep=1) == ([oldest] if over else [])


def test_retention_deletes_others_if_a_checkpoint_cannot_be_deleted(run, monkeypatch):
    for samples in (8, 16, 24, 32):
        write(run, "pretrain", samples)
    busy = checkpoint_folder.folder(run, "pretrain", 16, 1)
    unlink = os.unlink

    def fails(name, dir_fd=None):
        if os.readlink(f"/proc/self/fd/{dir_fd}") == str(busy):
            raise OSError(16, "Device or resource busy", name)
        unlink(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", fails)
    with pytest.raises(OSError, match="busy"):
        checkpoint_folder.apply_retention(run, 1, keep=1)
    assert [c.samples_seen for c in checkpoint_folder.checkpoints(run)] == [16, 32]
    assert not checkpoint_folder.folder(run, "pretrain", 8, 1).exists()
    assert not checkpoint_folder.folder(run, "pretrain", 24, 1).exists()


def test_retention_leaves_files_of_others_in_a_checkpoint_and_logs_them_once(run, caplog):
    for samples in (8, 16, 24):
        write(run, "pretrain", samples)
    path = checkpoint_folder.folder(run, "pretrain", 8, 1)
    (path / "notes.txt").write_text("mine")
    (path / ".ipynb_checkpoints").mkdir()
    for _ in range(2):
        checkpoint_folder.apply_retention(run, 1, keep=1)
    assert [c.samples_seen for c in checkpoint_folder.checkpoints(run)] == [24]
    assert sorted(p.name for p in path.iterdir()) == [".ipynb_checkpoints", "notes.txt"]
    assert caplog.text.count("8-1 is left alone: files stay that no checkpoint has: .ipynb_checkpoints, notes.txt") == 1


@pytest.mark.parametrize("linked", ["8-1", "pretrain"])
def test_retention_does_not_follow_links(run, tmp_path, linked):
    """A folder of another run, linked into this one: deleting through the link would empty that run."""
    other = RunDir(tmp_path / "sweep" / "other")
    victim = write(other, "pretrain", 8)
    write(run, "unmasked", 24)
    place = {"8-1": checkpoint_folder.folder(run, "pretrain", 8, 1), "pretrain": run.checkpoints / "pretrain"}[linked]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(victim if linked == "8-1" else victim.parent)
    write(run, "pretrain" if linked == "8-1" else "unmasked", 16)
    assert victim not in checkpoint_folder.apply_retention(run, 1, keep=1)
    reason = checkpoint_folder.remove(checkpoint_folder.folder(run, "pretrain", 8, 1))
    assert reason.startswith("it, or a folder above it")
    assert [c.samples_seen for c in checkpoint_folder.checkpoints(other)] == [8] and len(list(victim.iterdir())) == 3


def test_retention_deletes_only_listed_shards_of_a_checkpoint_and_leftovers_of_its_writer(run):
    shard = checkpoint_folder.SHARD_FILE % 3
    temporary = f"{checkpoint_folder.COMMIT_FILE}.tmp.{'0' * 16}"
    path = write(run, "pretrain", 8)
    left = write(run, "pretrain", 16, mark=False)
    write(run, "pretrain", 24)
    for name in (shard, temporary, "shard-3.safetensors", "commit.json.tmp.1", "weights.safetensors"):
        (path / name).write_text("x")
        (left / name).write_text("x")
    for place, stays in ((path, {shard}), (left, set())):
        checkpoint_folder.remove(place)
        names = {file.name for file in place.iterdir()}
        assert names == stays | {"shard-3.safetensors", "commit.json.tmp.1", "weights.safetensors"}
