"""Tests that CheckpointRestorer reads a remote checkpoint by byte ranges and rejects untrusted or damaged files."""

import errno
from types import SimpleNamespace

import pytest
import torch

from flip.checkpoint import safetensors_io
from flip.checkpoint import saver as checkpoint
from flip.checkpoint.remote import RemoteCheckpoint
from flip.checkpoint.restorer import CheckpointRestorer
from flip.checkpoint.safetensors_io import CheckpointFiles, read_headers
from flip.config import schema
from flip.data.storage.fsspec_storage import FsspecStorage
from flip.data.storage.retry import RetryPolicy
from flip.distributed import parallel
from flip.runs import checkpoint_folder
from flip.runs.errors import DataError, PermissionDenied, StorageError
from flip.runs.rundir import RunDir
from tests.flip.checkpoint.test_saver import state_of, trained
from tests.harness.remote_reads import record_reads


@pytest.fixture(scope="module")
def world():
    yield parallel.start(schema.Compute(device="cpu", threads=1, deterministic="no"))
    parallel.stop()


@pytest.fixture
def saved(tmp_path, world, monkeypatch):
    """A run with one checkpoint at a URL, its checkpointer, the saved state, and a list of the ranges read from now
    on."""
    run = RunDir(tmp_path / "sweep" / "run")
    run.start_attempt({})
    saver = checkpoint.Checkpointer(
        run, 1, world, 1, url=f"file://{tmp_path}/there", retry_policy=RetryPolicy(deadline=1.0)
    )
    expected = state_of(*trained())
    saver.save(expected, "pretrain", 16)
    return run, saver, expected, record_reads(monkeypatch)


def test_restorer_loads_remote_checkpoint_without_local_copy(saved):
    run, saver, expected, ranges = saved
    (size,) = (facts["bytes"] for facts in checkpoint_folder.checkpoints(run)[0].record["files"].values())
    newest = saver.restorer.newest()
    assert ranges == [(0, size)], "a single rank reads the file once to verify it"
    restored = state_of(*trained(steps=0))
    saver.restorer.load(newest, restored)
    assert restored.keys() == expected.keys()
    assert all(torch.equal(expected[name], restored[name]) for name in expected)


def test_restorer_reads_only_header_and_bytes_of_requested_tensor(saved, monkeypatch):
    _, saver, expected, ranges = saved
    monkeypatch.setattr(safetensors_io, "HEADER_BYTES", 64)
    monkeypatch.setattr(safetensors_io, "GAP_BYTES", 0)
    newest = saver.restorer.newest()
    name = "model.0.weight"
    del ranges[:]
    restored = {name: torch.zeros_like(expected[name])}
    saver.restorer.load(newest, restored, left_out=("model.",))
    assert torch.equal(restored[name], expected[name])
    (_, first_stop), (second_start, header_end), (start, stop) = ranges
    assert (first_stop, second_start) == (64, 64) and start >= header_end and stop - start == expected[name].nbytes


def test_restorer_raises_data_error_if_remote_file_is_missing(saved):
    run, saver, _, _ = saved
    newest = saver.restorer.newest()
    saver.restorer.load(newest, state_of(*trained(steps=0)))
    for path in run.path.parents[1].glob("there/**/*.safetensors"):
        path.unlink()
    with pytest.raises(DataError, match="a file of the checkpoint is missing"):
        saver.restorer.load(newest, state_of(*trained(steps=0)))


def test_run_without_a_checkpoint_starts_and_one_whose_checkpoints_are_all_damaged_does_not(saved, tmp_path, world):
    run, saver, _, _ = saved
    new = RunDir(tmp_path / "sweep" / "new")
    new.start_attempt({})
    assert CheckpointRestorer(new, 1, world, RetryPolicy(deadline=1.0), "").newest() is None
    for path in run.path.parents[1].glob("there/**/*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match="all checkpoints are damaged") as error:
        saver.restorer.newest()
    assert str(run.checkpoints) in str(error.value)


def test_checkpoint_files_reject_object_with_other_etag(saved, monkeypatch):
    run, _, _, _ = saved
    (entry,) = checkpoint_folder.checkpoints(run)
    ((name, facts),) = entry.record["files"].items()
    files = {name: facts | {"etag": "other"}}
    monkeypatch.setattr(FsspecStorage, "_get", lambda *_: SimpleNamespace(data=b"x", etag="E"))
    with pytest.raises(checkpoint_folder.CorruptCheckpoint, match="another object than was saved: E"):
        CheckpointFiles(entry.path, files, RemoteCheckpoint(entry.record["url"], RetryPolicy(deadline=1.0))).read(
            name, 0, 1
        )


def test_read_headers_rejects_oversized_header_length(tmp_path):
    size = 1 << 40
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write((size - 8).to_bytes(8, "little"))
        file.truncate(size)  # sparse: occupies no disk space
    with pytest.raises(checkpoint_folder.CorruptCheckpoint, match=f"states a header of {size:,} bytes, at most"):
        read_headers(CheckpointFiles(tmp_path, {"a.safetensors": {"bytes": size}}))


def test_restorer_follows_untrusted_record_only_below_given_url(saved, world, tmp_path):
    """Evaluation jobs and warm-started runs read records of other users."""
    run, saver, expected, ranges = saved
    (entry,) = checkpoint_folder.checkpoints(run)
    (entry.path / checkpoint_folder.COMMIT_FILE).chmod(0o666)
    del ranges[:]
    for url in ("", "s3://there", f"file://{tmp_path}/ther"):
        other = CheckpointRestorer(run, 0, world, RetryPolicy(deadline=1.0), url)
        for read in (lambda: other.open(entry.path), other.newest):  # noqa: B023
            with pytest.raises(PermissionDenied, match="names an address, and its record is not trusted"):
                read()
    assert not ranges
    other = CheckpointRestorer(run, 0, world, RetryPolicy(deadline=1.0), f"{tmp_path}/there")
    restored = state_of(*trained(0))
    other.load(other.open(entry.path), restored)
    assert all(torch.equal(expected[name], restored[name]) for name in expected)


@pytest.mark.parametrize(
    "raised, kind",
    [
        (DataError("the checkpoint is gone"), DataError),
        (OSError(errno.ESTALE, "Stale file handle"), StorageError),
        (StorageError("no answer"), StorageError),
    ],
)
def test_start_from_other_run_fails_for_good_only_if_its_checkpoint_is_gone(saved, raised, kind):
    def find():
        raise raised

    with pytest.raises(kind, match="the run cannot start"):
        saved[1].restorer.open_other(find, "sweep/base")
