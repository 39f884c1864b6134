"""Tests of checkpoints in a bucket on real S3 servers: kills, outages and reported errors."""

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from flip.checkpoint import remote
from flip.checkpoint import saver as checkpoint
from flip.checkpoint.remote_folder import OWNER_FILE
from flip.config import schema
from flip.data.storage import s3
from flip.data.storage.base import RequestError
from flip.data.storage.fsspec_storage import FsspecStorage
from flip.data.storage.retry import RetryPolicy
from flip.distributed import parallel
from flip.runs import checkpoint_folder
from flip.runs.errors import ConfigError, DataError, PermissionDenied, StorageError
from flip.runs.rundir import RunDir
from tests.flip.checkpoint.test_saver import state_of, trained
from tests.harness import copied_runs
from tests.harness.training_run import TrainingRun, configuration
from tests.s3.conftest import lead_to, on_nanio
from tests.s3.servers import BUCKET, Nanio, environment, files
from tests.synthetic import make_dataset, make_tokenizer
from tests.verdicts import check_equal

ROOT = Path(__file__).resolve().parents[2]
URL = f"s3://{BUCKET}/checkpoints"

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def world():
    yield parallel.start(schema.Compute(device="cpu", threads=1, deterministic="no"))
    parallel.stop()


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    run.start_attempt({})
    return run


def delete_all(checkpoint_store):
    for name in checkpoint_store.names():
        checkpoint_store.delete(name)


def saver_of(run, world, url=URL, deadline=30.0, **more):
    return checkpoint.Checkpointer(
        run, 1, world, 1, url=url, retry_policy=RetryPolicy(deadline=deadline, timeout=5), **more
    )


def test_checkpoint_in_bucket_loads_as_saved(server, world, run, monkeypatch):
    lead_to(monkeypatch, server.address)
    saver = saver_of(run, world, background=True)
    expected = state_of(*trained())
    for samples in (16, 32):
        saver.save(expected, "pretrain", samples)
    saver.wait()
    (saved,) = checkpoint_folder.checkpoints(run)
    assert saved.samples_seen == 32 and os.listdir(saved.path) == [checkpoint_folder.COMMIT_FILE]
    objects = dict(s3.S3Storage().list(f"{URL}/sweep/"))
    assert {Path(key).name for key in objects} == {*saved.record["files"], checkpoint_folder.COMMIT_FILE, OWNER_FILE}
    assert len(objects) == 3
    address = f"{saved.record['url']}/commit.json"
    stored = s3.S3Storage().get(address, 0, objects[address].size).result().data
    assert (saved.path / checkpoint_folder.COMMIT_FILE).read_bytes() == stored
    loaded = state_of(*trained(steps=0))
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")  # no copy on the node
    newest = saver.restorer.newest()
    saver.restorer.load(newest, loaded)
    assert newest.samples_seen == 32 and all(torch.equal(expected[name], loaded[name]) for name in expected)


def test_remote_checkpoint_uploads_large_file_in_parts(server, monkeypatch, tmp_path):
    lead_to(monkeypatch, server.address)
    monkeypatch.setattr(s3, "PART", 5 << 20)
    data = os.urandom((11 << 20) + 17)
    checkpoint_store = remote.RemoteCheckpoint(f"{URL}/{tmp_path.name}", RetryPolicy(deadline=20, timeout=5))
    facts = checkpoint_store.put("large", data)
    assert facts["bytes"] == len(data) and facts["etag"].endswith("-3")
    facts["sha256"] = "0" * 64
    with pytest.raises(checkpoint_folder.CorruptCheckpoint, match="checksum"):
        checkpoint_store.verify({"large": facts}, tmp_path)
    assert (tmp_path / "large").read_bytes() == data
    delete_all(checkpoint_store)
    with pytest.raises(checkpoint_folder.CorruptCheckpoint, match="missing"):
        checkpoint_store.check("large", facts)


@on_nanio
def test_restorer_falls_back_to_older_checkpoint_if_object_is_damaged(server, world, run, monkeypatch):
    lead_to(monkeypatch, server.address)
    saver = saver_of(run, world)
    saver.save(state_of(*trained()), "first", 16)
    saver.save(state_of(*trained()), "second", 32)
    old, new = checkpoint_folder.checkpoints(run)
    (name,) = new.record["files"]
    s3.S3Storage().put(f"{new.record['url']}/{name}", b"rot")
    assert saver.restorer.newest().samples_seen == old.samples_seen == 16
    assert [c.samples_seen for c in checkpoint_folder.checkpoints(run)] == [16]


def test_save_survives_short_outage_and_reports_outage_past_deadline(own, world, run, proxied):
    proxied(own)
    saver = saver_of(run, world, background=True)
    saver.save(state_of(*trained()), "pretrain", 16)
    saver.wait()
    own.kill()
    saver.save(state_of(*trained()), "pretrain", 32)
    back = threading.Timer(2.0, own.start)
    back.start()
    saver.wait()
    back.join()
    assert [c.samples_seen for c in checkpoint_folder.checkpoints(run)] == [32]
    own.kill()
    with pytest.raises(StorageError, match=r"reading failed for 1 s.*; it takes [\d,]+ bytes\.") as error:
        saver_of(run, world, deadline=1.0).save(state_of(*trained()), "pretrain", 48)
    assert error.value.code == 69 and [c.samples_seen for c in checkpoint_folder.checkpoints(run)] == [32]
    own.start()
    saver.save(state_of(*trained()), "pretrain", 64)
    saver.wait()
    # The incomplete checkpoint at 48 samples is removed.
    assert [p.name for p in run.checkpoints.glob("pretrain/*")] == ["64-1"]


@on_nanio
def test_put_retries_slowdown_server_and_throttle_errors(server, proxied, tmp_path):
    proxy = proxied(server)
    data = os.urandom(1 << 20)
    proxy.plan(("slowdown", "server", "throttle"), 1, limit=3, writes=True)
    checkpoint_store = remote.RemoteCheckpoint(f"{URL}/{tmp_path.name}", RetryPolicy(deadline=20, timeout=5))
    facts = checkpoint_store.put("one", data)
    assert proxy.counts["slowdown"] == proxy.counts["server"] == proxy.counts["throttle"] == 1
    checkpoint_store.verify({"one": facts | {"sha256": hashlib.sha256(data).hexdigest()}}, tmp_path)
    assert (tmp_path / "one").read_bytes() == data
    delete_all(checkpoint_store)


@on_nanio
def test_save_fails_at_once_for_missing_bucket_or_wrong_secret(server, world, run, monkeypatch):
    lead_to(monkeypatch, server.address)
    with pytest.raises(DataError, match="the place of the checkpoint is missing") as error:
        saver_of(run, world, "s3://nowhere/x").save(state_of(*trained()), "pretrain", 16)
    assert error.value.code == 65
    lead_to(monkeypatch, server.address, secret="wrong")
    with pytest.raises(PermissionDenied, match="does not let us (read|write)"):
        saver_of(run, world, "s3://nowhere/x").save(state_of(*trained()), "pretrain", 16)


def test_checkpoint_saves_and_loads_at_local_path_url(world, run, tmp_path):
    saver = saver_of(run, world, str(tmp_path / "elsewhere"))
    expected = state_of(*trained())
    saver.save(expected, "pretrain", 16)
    saver.save(expected, "pretrain", 32)
    (saved,) = checkpoint_folder.checkpoints(run)
    assert saved.record["url"].startswith(f"file://{tmp_path}/elsewhere/sweep/run-")
    loaded = state_of(*trained(steps=0))
    saver.restorer.load(saver.restorer.newest(), loaded)
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)
    assert len([p for p in (tmp_path / "elsewhere").rglob("*") if p.is_file()]) == 3


def test_save_leaves_no_object_if_newer_attempt_removed_its_folder(world, run, tmp_path, monkeypatch):
    """A newer attempt deletes the folder during the last upload. No later attempt would remove its objects."""
    real = checkpoint_folder.complete_checkpoint

    def remove_and_complete(path, *rest):
        shutil.rmtree(path)
        return real(path, *rest)

    monkeypatch.setattr(checkpoint_folder, "complete_checkpoint", remove_and_complete)
    saver = saver_of(run, world, str(tmp_path / "elsewhere"))
    with pytest.raises(StorageError, match="No such file"):
        saver.save(state_of(*trained()), "pretrain", 16)
    assert [path.name for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()] == [OWNER_FILE]


@pytest.mark.slow
@pytest.mark.kill
@on_nanio
@pytest.mark.parametrize("size, least", [(1, 16), (2, 22)])
def test_bucket_holds_loadable_checkpoint_after_kill_at_any_write(server, size, least, monkeypatch, tmp_path):
    lead_to(monkeypatch, server.address)
    url = f"{URL}/{tmp_path.name}"
    command = [
        sys.executable,
        "-m",
        "tests.flip.checkpoint.save_worker",
        str(tmp_path / "sweep" / "run"),
        str(size),
        url,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= least, done.stdout


@pytest.mark.slow
@pytest.mark.kill
def test_run_with_checkpoints_in_bucket_resumes_to_same_bits(tmp_path, monkeypatch):
    """A killed and stopped run of two ranks ends with the same bits as a run with checkpoints on disk."""
    data = make_dataset(tmp_path / "data", samples=200, shards=3, chunk=4, classes=8)
    make_tokenizer(data / "tokenizer.json")
    server = Nanio(tmp_path / "nanio").start()
    try:
        files(server.address).mkdir(BUCKET)
        calm, storm = (TrainingRun(tmp_path, name, configured(data)) for name in ("calm", "storm"))
        calm.submit()
        storm.env |= environment(server.address)
        lead_to(monkeypatch, server.address)  # weights() reads from this server, too
        storm.config.checkpoint.url = URL
        storm.save_config()
        storm.submit()
        storm.wait_step(7)
        storm.kill(rank=1)
        storm.wait_attempt(2)
        storm.wait_step(12)
        storm.kill(number=signal.SIGTERM)
        storm.wait_over()
        calm.wait_over()
        check_equal(calm, storm, scores=3)
        assert not list(storm.run.checkpoints.rglob("*.safetensors"))
    finally:
        server.kill()


def configured(data):
    config = configuration(data, world=2, samples=(16, 4))
    config.evaluate.every = 0
    return config


def test_put_succeeds_if_last_answer_of_multipart_upload_is_lost(server, proxied, monkeypatch, tmp_path):
    """The server has created the object by then and no longer knows the upload."""
    proxy = proxied(server)
    monkeypatch.setattr(s3, "PART", 5 << 20)
    data = os.urandom((5 << 20) + 17)
    url = f"{URL}/{tmp_path.name}"
    checkpoint_store = remote.RemoteCheckpoint(url, RetryPolicy(deadline=20, timeout=5))
    expected = checkpoint_store.put("large", data)
    proxy.lost = rb"POST .*[?&]uploadId="
    assert checkpoint_store.put("again", data) == expected and not proxy.lost
    checkpoint_store.check("again", expected)
    with pytest.raises(RequestError) as error:
        s3.S3Storage()._complete(f"{url}/again", "never-begun", [], len(data), call_twice)
    assert error.value.kind == "missing", "the object comes from another upload"
    delete_all(checkpoint_store)


def call_twice(request):
    with contextlib.suppress(RequestError):
        request()
    return request()


@on_nanio
def test_verify_refetches_object_after_corrupt_download(server, proxied, tmp_path):
    proxy = proxied(server)
    data = os.urandom(1 << 20)
    checkpoint_store = remote.RemoteCheckpoint(f"{URL}/{tmp_path.name}", RetryPolicy(deadline=20, timeout=5))
    files = {"one": checkpoint_store.put("one", data) | {"sha256": hashlib.sha256(data).hexdigest()}}
    proxy.plan(["flip"], 1, limit=1)
    checkpoint_store.verify(files, tmp_path)
    assert (tmp_path / "one").read_bytes() == data and proxy.counts["flip"] == 1
    proxy.plan(["flip"], 1)
    with pytest.raises(checkpoint_folder.CorruptCheckpoint, match="fetched twice"):
        checkpoint_store.verify(files, tmp_path)
    delete_all(checkpoint_store)


def test_fsspec_storage_turns_protocol_errors_into_request_errors(monkeypatch):
    """The errors of the protocols' packages share no class: botocore has its own for a closed connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=hang_up, args=(server,), daemon=True).start()
        lead_to(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(RequestError, match="ConnectionClosedError") as error:
            FsspecStorage().get(f"{URL}/x", 0, 4).result()
        assert error.value.kind == "connection"
    with pytest.raises(ConfigError, match="is not admitted"):
        FsspecStorage().stat("nosuch://bucket/x")


def hang_up(server):
    with contextlib.suppress(OSError):
        while True:
            client, _ = server.accept()
            client.recv(1 << 16)
            client.close()


@on_nanio
@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(scenario, id=scenario.__name__, marks=[] if n < 2 else pytest.mark.slow)
        for n, scenario in enumerate(copied_runs.SCENARIOS)
    ],
)
def test_remote_folder_in_bucket(scenario, server, world, tmp_path, monkeypatch):
    """The first two represent the others, which also run on disk (tests/flip/checkpoint/test_remote_folder.py)."""
    lead_to(monkeypatch, server.address)
    scenario(tmp_path, world, f"{URL}/{tmp_path.name}")
