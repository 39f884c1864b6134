"""The same promises over the other client: the reader's tests, and each fault of the network."""

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
    impatient,
    test_a_body_that_broke_off_is_gone_on_with,
    test_a_second_request_answers_for_one_that_does_not,
    test_an_object_that_ends_early,
    test_another_object_under_the_key,
    test_denied_after_a_success_is_an_outage,
    test_denied_at_once,
    test_expired_credentials_are_fetched_anew,
    test_missing,
    test_no_credentials_at_all,
    texts,
)

pytestmark = pytest.mark.s3


@pytest.fixture(autouse=True)
def client(monkeypatch):
    """Readers have obstore, and give up pieces as small as the shards here."""
    monkeypatch.setattr("flip.data.storage.s3.S3Storage", obstore_storage.ObstoreStorage)
    monkeypatch.setattr(obstore_storage, "_PIECE", 1)


@on_nanio
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_shows_of_a_fault(server, proxied, remote, fault):
    proxy, made = proxied(server), remote()
    reader = impatient(deadline=60, timeout=0.5 if COUNTED_AS[fault] == "stall" else 10)
    expected = texts(made, reader)
    assert isinstance(reader._remote, obstore_storage.ObstoreStorage)
    before = reader.counters.requests
    proxy.plan([fault], 0.3, seed=1, limit=3)
    assert texts(made, reader) == expected
    retries = {kind: count for kind, count in reader.counters.retries.items() if count}
    if COUNTED_AS[fault] == "stall":  # on a busy machine other answers may be as late
        assert list(retries) == ["stall"] and retries["stall"] >= proxy.counts[fault] == 3
    else:
        assert retries == {COUNTED_AS[fault]: 3} and reader.counters.requests - before == proxy.counts["gets"]
    assert (reader.counters.resumed > 0) == (fault in ("reset", "stall"))


@on_nanio
def test_workers_have_it(original, server, proxied, remote):
    proxied(server)
    source = loader(original, folder=remote().folder, workers=1, client="obstore")
    assert same(take(source, 3), take(loader(original), 3)) and source.counters().requests > 20


@on_nanio
def test_without_the_package(server, proxied, monkeypatch):
    proxied(server)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match="obstore is not installed.*pip install obstore"):
        impatient().read(f"s3://{BUCKET}/set/00000.tar", 0, 512)
