"""Tests of the obstore client: the tests of the reader, and each network fault."""

import sys

import pytest

from flip.data.storage import obstore_storage
from flip.runs.errors import ConfigError
from tests.flip.data.loading import loader
from tests.s3.conftest import on_nanio
from tests.s3.proxy import FAULTS
from tests.s3.servers import BUCKET
from tests.s3.test_loader import COUNTED_AS, same, take
from tests.s3.test_reader import (  # noqa: F401
    brief_first_access,
    impatient,
    test_hedge_replaces_silent_or_stalled_request,
    test_read_fails_soon_if_first_request_is_denied,
    test_read_of_missing_object_or_bucket_raises_data_error,
    test_read_rejects_object_with_other_etag,
    test_read_rejects_truncated_object,
    test_read_resumes_interrupted_body,
    test_read_retries_denial_after_earlier_success,
    test_read_without_credentials_raises_permission_denied,
    test_reader_reloads_expired_credentials,
    texts,
)

pytestmark = pytest.mark.s3


@pytest.fixture(autouse=True)
def client(monkeypatch):
    """Use obstore in all readers, with pieces small enough for the shards of these tests."""
    monkeypatch.setattr("flip.data.storage.s3.S3Storage", obstore_storage.ObstoreStorage)
    monkeypatch.setattr(obstore_storage, "_PIECE", 1)


@on_nanio
@pytest.mark.parametrize("fault", FAULTS)
def test_obstore_reads_are_unchanged_by_network_fault(server, proxied, remote, fault):
    proxy = proxied(server)
    manifest = remote()
    reader = impatient(deadline=60, timeout=0.5 if COUNTED_AS[fault] == "stall" else 10)
    expected = texts(manifest, reader)
    assert isinstance(reader._storages["s3"], obstore_storage.ObstoreStorage)
    before = reader.counters.requests
    proxy.plan([fault], 0.3, seed=1, limit=3)
    assert texts(manifest, reader) == expected
    retries = {kind: count for kind, count in reader.counters.retries.items() if count}
    if COUNTED_AS[fault] == "stall":  # on a busy machine other answers may be as late
        assert list(retries) == ["stall"] and retries["stall"] >= proxy.counts[fault] == 3
    else:
        assert retries == {COUNTED_AS[fault]: 3} and reader.counters.requests - before == proxy.counts["gets"]
    assert (reader.counters.resumed > 0) == (fault in ("reset", "stall"))


@on_nanio
def test_obstore_is_used_by_loader_workers(original, server, proxied, remote):
    proxied(server)
    source = loader(original, folder=remote().folder, workers=1, client="obstore")
    assert same(take(source, 3), take(loader(original), 3)) and source.counters().requests > 20


@on_nanio
def test_obstore_missing_package_raises_config_error(server, proxied, monkeypatch):
    proxied(server)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match="obstore is not installed.*pip install obstore"):
        impatient().read(f"s3://{BUCKET}/set/00000.tar", 0, 512)
