"""Tests that S3 read through fsspec's s3fs, as storages without a client of their own are, equals the fast client."""

import pytest

from flip.data.storage.client import StorageClient
from flip.data.storage.fsspec_storage import FsspecStorage
from flip.data.storage.retry import RetryPolicy
from flip.data.storage.s3 import S3Storage
from flip.data.storage.storages import STORAGES
from flip.runs.errors import DataError, PermissionDenied
from tests.flip.data.loading import loader
from tests.s3.conftest import lead_to, on_nanio
from tests.s3.servers import BUCKET, files
from tests.s3.test_loader import same, take

pytestmark = pytest.mark.s3

POLICY = RetryPolicy(deadline=20.0, timeout=10.0)


def clients():
    return [StorageClient(retry_policy=POLICY, remote=remote) for remote in (S3Storage(10.0), FsspecStorage(10.0))]


def test_fsspec_reads_equal_those_of_the_fast_client(server, proxied, original):
    proxied(server)
    fast, general = clients()
    prefix = f"s3://{BUCKET}/set/"
    listed = fast.list(prefix)
    assert general.list(prefix) == listed and len(listed) == 5
    for key, stat in listed.items():
        assert general.stat(key) == fast.stat(key) == stat
        for start, stop in ((0, 1), (512, 4096), (0, stat.size)):
            piece = (key, start, min(stop, stat.size), stat.etag)
            assert general.read(*piece) == fast.read(*piece)


@on_nanio
def test_fsspec_requests_fetch_exactly_the_ranges(server, proxied):
    proxy = proxied(server)
    _, general = clients()
    key = f"s3://{BUCKET}/set/00000.tar"
    general.read(key, 512, 4096)
    before = proxy.counts["gets"]
    assert len(general.read(key, 1024, 2048)) == 1024 and proxy.counts["gets"] == before + 1


@on_nanio
def test_batches_over_fsspec_equal_those_of_files(server, proxied, remote, original, monkeypatch):
    proxied(server)
    manifest = remote()
    monkeypatch.setitem(STORAGES, "s3", FsspecStorage)
    source = loader(original, folder=manifest.folder)
    assert same(take(source, 3), take(loader(original), 3))


@on_nanio
def test_fsspec_faults_end_with_the_exit_codes_of_the_fast_client(server, proxied, prefix, monkeypatch):
    proxy = proxied(server)
    monkeypatch.setattr("flip.data.storage.retry.FIRST_ACCESS", 0.5)
    key = f"s3://{BUCKET}/{prefix}/00000.tar"
    for client in clients():
        size, etag, _ = client.stat(key)
        assert client.read(key, 0, 512, etag)
        with pytest.raises(DataError):  # by the reply of the server, 400, or by the size
            client.read(key, size - 512, size + 512, etag)
        with pytest.raises(DataError, match="is missing"):
            client.read(f"s3://{BUCKET}/{prefix}/none.tar", 0, 512)
        with pytest.raises(DataError, match="its ETag is"):
            client.read(key, 0, 512, "other")
    files(server.address).pipe_file(f"{BUCKET}/{prefix}/00000.tar", b"x" * 2048)
    for client in clients():
        with pytest.raises(DataError, match="its ETag is"):
            client.read(key, 0, 512, etag)
    lead_to(monkeypatch, proxy.address, "wrong")
    for client in clients():
        with pytest.raises(PermissionDenied) as error:
            client.read(key, 0, 512)
        assert error.value.code == 77
