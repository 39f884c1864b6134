"""Tests Checkpointer: exact round trips, background saves, refused saves, and recovery from errors."""

import resource
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from flip.checkpoint import safetensors_io
from flip.checkpoint import saver as checkpoint
from flip.config import schema
from flip.distributed import parallel
from flip.runs import checkpoint_folder
from flip.runs.errors import DataError, Diverged, StorageError, Superseded
from flip.runs.rundir import RunDir
from flip.training import parameter_groups


@pytest.fixture(scope="module")
def world():
    yield parallel.start(schema.Compute(device="cpu", threads=1, deterministic="no"))
    parallel.stop()


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    run.start_attempt({})
    return run


def trained(steps=2):
    torch.manual_seed(3)
    pair = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7))
    optimizer = parameter_groups.build(pair.named_parameters(), schema.Optim())
    for _ in range(steps):
        parameter_groups.set_learning_rate(optimizer, schema.Stage(samples=64, batch=8, base_lr=0.1), 8)
        pair(torch.ones(4, 5)).square().sum().backward()
        optimizer.step()
    return pair, optimizer


def state_of(pair, optimizer):
    return checkpoint.model_state(pair) | checkpoint.optimizer_state(pair, optimizer)


def test_checkpointer_round_trip_restores_all_tensors(run, world):
    pair, optimizer = trained()
    saver = checkpoint.Checkpointer(run, 1, world, keep=2)
    saver.save(state_of(pair, optimizer), "pretrain", 16, step=2)
    other, fresh = trained(steps=0)
    newest = checkpoint.Checkpointer(run, 1, world, keep=2).restorer.newest()
    assert (newest.samples_seen, newest.record["step"], newest.record["world"]) == (16, 2, 1)
    saver.restorer.load(newest, state_of(other, fresh))
    expected = state_of(pair, optimizer)
    actual = state_of(other, fresh)
    assert expected.keys() == actual.keys() and float(actual["optim.step.0.weight"]) == 2
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_restorer_reads_headers_once_for_weights_and_moments(run, world, monkeypatch):
    read = safetensors_io._read_header
    reads = []
    monkeypatch.setattr(
        safetensors_io, "_read_header", lambda files, name: reads.append(files.folder) or read(files, name)
    )
    checkpoint.Checkpointer(run, 1, world, keep=2).save(state_of(*trained()), "pretrain", 16)
    saver = checkpoint.Checkpointer(run, 1, world, keep=2)
    pair, optimizer = trained(steps=0)
    for samples in (16, 32):
        newest = saver.restorer.newest()
        saver.restorer.load(newest, checkpoint.model_state(pair))
        saver.restorer.load(newest, checkpoint.optimizer_state(pair, optimizer))
        assert [path.name for path in reads] == [f"{samples}-1"]
        saver.save(state_of(pair, optimizer), "pretrain", 32)
        reads.clear()


@pytest.mark.long
def test_background_save_stores_state_of_its_start(run, world, monkeypatch):
    """Training continues during a background save. Only one save runs at a time, so the next save waits."""
    pair, optimizer = trained()
    before = {name: tensor.clone() for name, tensor in state_of(pair, optimizer).items()}
    saver = checkpoint.Checkpointer(run, 1, world, keep=2, background=True)
    go = threading.Event()
    mark = checkpoint_folder.complete_checkpoint

    def waits(path, record, known):
        assert go.wait(60)
        return mark(path, record, known)

    monkeypatch.setattr(checkpoint_folder, "complete_checkpoint", waits)
    saver.save(state_of(pair, optimizer), "pretrain", 16)
    assert checkpoint_folder.checkpoints(run) == [] and not saver.failed
    with torch.no_grad():
        for tensor in state_of(pair, optimizer).values():
            tensor += 1
    threading.Timer(2.0, go.set).start()
    saver.save(state_of(pair, optimizer), "pretrain", 32)
    assert saver.blocked_seconds > 0.1 and [c.samples_seen for c in checkpoint_folder.checkpoints(run)][:1] == [16]
    saver.wait()
    saver.wait()
    old, new = checkpoint_folder.checkpoints(run)
    assert (new.samples_seen, new.record["parent"]) == (32, "pretrain/16-1") and 0 < old.record["saving"] < 60
    for saved, offset in ((old, 0), (new, 1)):
        state = state_of(*trained(steps=0))
        saver.restorer.load(saved, state)
        assert all(torch.equal(before[name] + offset, state[name]) for name in before)


def test_background_saves_restore_if_set_of_tensors_changes(run, world):
    """The set of tensors changes between stages if weights are frozen: their moments are no longer saved."""
    pair, optimizer = trained()
    saver = checkpoint.Checkpointer(run, 1, world, keep=9, background=True)
    buffers = []
    states = {16: state_of(pair, optimizer), 32: state_of(pair, optimizer), 48: checkpoint.model_state(pair)}
    values = {}
    for samples, state in states.items():
        with torch.no_grad():
            pair[0].weight += 1
        values[samples] = {name: tensor.clone() for name, tensor in state.items()}
        saver.save(state, "pretrain", samples)
        buffers.append(saver._staged)
    saver.wait()
    assert buffers[0] is buffers[1] is not buffers[2]
    for saved in checkpoint_folder.checkpoints(run):
        loaded = {name: torch.zeros_like(tensor) for name, tensor in values[saved.samples_seen].items()}
        saver.restorer.load(saved, loaded)
        assert all(torch.equal(loaded[name], values[saved.samples_seen][name]) for name in loaded)


def test_background_save_error_is_raised_once_by_next_save(run, world):
    saver = checkpoint.Checkpointer(run, 1, world, keep=2, background=True)
    pair, optimizer = trained()
    pair[0].weight.data[0, 0] = float("inf")
    saver.save(state_of(pair, optimizer), "pretrain", 16)
    end = time.monotonic() + 60
    while not saver.failed and time.monotonic() < end:
        time.sleep(0.01)
    with pytest.raises(Diverged, match="0.weight"):
        saver.save(state_of(pair, optimizer), "pretrain", 32)
    saver.wait()
    assert not saver.failed and checkpoint_folder.checkpoints(run) == []


def test_checkpoint_contains_and_loads_no_pickle(run, world):
    checkpoint.Checkpointer(run, 1, world, keep=2).save(state_of(*trained()), "pretrain", 16)
    (saved,) = checkpoint_folder.checkpoints(run)
    assert {path.suffix for path in saved.path.iterdir()} == {".safetensors", ".json"}
    (saved.path / ".metadata").write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    other, fresh = trained(steps=0)
    checkpoint.Checkpointer(run, 1, world, keep=2).restorer.load(saved, state_of(other, fresh))


def test_save_rejects_non_finite_weights(run, world):
    pair, optimizer = trained()
    pair[0].weight.data[0, 0] = float("nan")
    with pytest.raises(Diverged, match="0.weight"):
        checkpoint.Checkpointer(run, 1, world, keep=2).save(state_of(pair, optimizer), "pretrain", 16)
    assert checkpoint_folder.checkpoints(run) == []


def test_save_of_superseded_attempt_leaves_no_checkpoint(run, world):
    run.start_attempt({})
    with pytest.raises(Superseded):
        checkpoint.Checkpointer(run, 1, world, keep=2).save(state_of(*trained()), "pretrain", 16)
    assert not run.checkpoints.exists()


def test_restorer_falls_back_to_older_checkpoint_and_fails_if_all_are_damaged(run, world):
    saver = checkpoint.Checkpointer(run, 1, world, keep=2)
    for samples in (16, 32):
        saver.save(state_of(*trained()), "pretrain", samples)
    old, new = checkpoint_folder.checkpoints(run)
    next(new.path.glob("*.safetensors")).write_bytes(b"rot")
    assert saver.restorer.newest().path == old.path
    assert [c.path for c in checkpoint_folder.checkpoints(run)] == [old.path]
    (old.path / checkpoint_folder.COMMIT_FILE).write_text("{")
    for _ in range(2):  # a second try must not start from zero either
        with pytest.raises(DataError, match="all checkpoints are damaged"):
            saver.restorer.newest()


def test_save_is_complete_even_if_retention_fails(run, world, monkeypatch):
    saver = checkpoint.Checkpointer(run, 1, world, keep=1)
    saver.save(state_of(*trained()), "pretrain", 16)

    def broken(*_args, **_named):
        raise OSError("the file is busy")

    monkeypatch.setattr(checkpoint_folder, "apply_retention", broken)
    saver.save(state_of(*trained()), "pretrain", 32)
    assert [c.samples_seen for c in checkpoint_folder.checkpoints(run)] == [16, 32]


def test_save_raises_storage_error_if_folder_cannot_be_created(run, world):
    run.checkpoints.mkdir()
    (run.checkpoints / "pretrain").write_text("a file is in the way")
    with pytest.raises(StorageError, match="could not be written"):
        checkpoint.Checkpointer(run, 1, world, keep=2).save(state_of(*trained()), "pretrain", 16)


@contextmanager
def full_disk():
    """Limits files to 100 bytes until the yielded function is called or the block ends.

    The old limit must return, because the output of pytest itself may be a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_save_on_full_disk_keeps_old_checkpoint_and_reports_bytes(run, world):
    saver = checkpoint.Checkpointer(run, 1, world, keep=1)
    text = r"too large.*; it takes [\d,]+ bytes, [\d,]+ are free"
    saver.save(state_of(*trained()), "pretrain", 16)
    with pytest.raises(StorageError, match=f"{text}, and a second"), full_disk():
        saver.save(state_of(*trained()), "pretrain", 32)
    assert [c.samples_seen for c in checkpoint_folder.checkpoints(run)] == [16]
    assert len(list(run.checkpoints.glob("*/*"))) == 1
    checkpoint_folder.verify(checkpoint_folder.checkpoints(run)[0])


def test_save_retries_after_removing_first_try_and_leftovers(run, world, monkeypatch):
    left = checkpoint_folder.folder(run, "pretrain", 8, 0)
    left.mkdir(parents=True)
    remove = checkpoint_folder.remove
    freed = []
    with full_disk() as make_room:

        def makes_room(path, files):
            reason = remove(path, files)
            freed.append(path)
            if path == left:
                make_room()
            return reason

        monkeypatch.setattr(checkpoint_folder, "remove", makes_room)
        checkpoint.Checkpointer(run, 1, world, keep=1).save(state_of(*trained()), "pretrain", 16)
    (saved,) = checkpoint_folder.checkpoints(run)
    checkpoint_folder.verify(saved)
    assert freed == [saved.path, left]


def test_optimizer_state_rejects_parameters_unknown_to_optimizer():
    pair, optimizer = trained()
    pair[0].weight = torch.nn.Parameter(pair[0].weight.detach().clone())
    with pytest.raises(AssertionError, match="0.weight"):
        checkpoint.optimizer_state(pair, optimizer)
