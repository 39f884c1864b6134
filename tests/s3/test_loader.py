"""Batches from object storage are those from local files, byte for byte, whatever the network does in between."""

import threading
import time

import pytest
import torch

from flip.data.reader import Reader
from tests.flip.data.loading import BATCH, loader
from tests.s3.proxy import FAULTS

pytestmark = pytest.mark.s3

COUNTED_AS = {
    "slowdown": "slowdown", "throttle": "slowdown", "server": "server", "refuse": "connection", "reset": "connection",
    "short": "short", "flip": "checksum", "stall": "stall",
    "silence": "stall",
}  # fmt: skip
"""What the proxy does -> what the reader counts."""


def take(source, count, between=lambda t: None):
    batches = source.batches(0, BATCH, "0.5")
    try:
        found = []
        for t in range(count):
            found.append(next(batches))
            between(t)
        return found
    finally:
        batches.close()


def same(found, expected):
    names = ("patches", "keep", "tokens", "ids", "witness")
    return all(
        torch.equal(getattr(a, n), getattr(b, n)) for a, b in zip(found, expected, strict=True) for n in names
    )  # fmt: skip


def settled(source, proxy):
    """The counters when what was read ahead has ended as well."""
    limit, before = time.monotonic() + 20, None
    while time.monotonic() < limit:
        seen = (source.counters().requests, proxy.counts["gets"])
        if seen == before:
            break
        before = seen
        time.sleep(1.5)
    return source.counters()


@pytest.fixture(scope="module")
def expected(original):
    return take(loader(original), 6)


def test_weed_gives_the_same(original, weed, proxied, remote, expected):
    proxied(weed)
    made, reader = remote(), Reader()
    assert reader.list(made.keys[0]) == {made.keys[0]: reader.stat(made.keys[0])}
    source = loader(original, folder=made.folder, workers=1)
    assert same(take(source, 6), expected)
    counters = source.counters()
    assert counters.requests > 50 and counters.bytes > 100_000 and counters.seconds > 0
    assert not any(counters.retries.values())


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_shows_of_a_fault(original, shared, proxied, remote, expected, fault):
    proxy = proxied(shared)
    manifest = remote()
    proxy.plan([fault], 0.3, seed=1, limit={"stall": 3, "silence": 3, "flip": 6}.get(fault, 20))
    source = loader(original, folder=manifest.folder, timeout=1 if COUNTED_AS[fault] == "stall" else 10)
    assert same(take(source, 6), expected)
    counters = settled(source, proxy)
    done, told = proxy.counts[fault], {kind: count for kind, count in counters.retries.items() if count}
    assert done > 2 and list(told) == [COUNTED_AS[fault]]
    if fault == "refuse":  # on a connection that was used before, aiohttp asks once more by itself
        assert 0 < told["connection"] <= done
    else:
        assert told[COUNTED_AS[fault]] == done and counters.requests == proxy.counts["gets"], "retries are ours alone"
    assert (counters.resumed > 0) == (fault in ("reset", "stall"))


def test_nothing_shows_of_all_faults_in_a_worker(original, shared, proxied, remote, expected):
    proxy = proxied(shared)
    manifest = remote()
    proxy.plan(FAULTS, 0.3, seed=2, limit=40)
    source = loader(original, folder=manifest.folder, workers=1, timeout=1)
    assert same(take(source, 6), expected)
    counters = source.counters()
    assert all(proxy.counts[fault] for fault in FAULTS) and all(counters.retries[kind] for kind in COUNTED_AS.values())
    assert counters.resumed > 0
    before = counters.requests
    take(source, 1)  # the next stage's workers count on
    assert source.counters().requests > before


def test_a_server_killed_and_started_again(original, own, proxied, remote, expected):
    proxied(own)
    source = loader(original, folder=remote().folder)
    again = []

    def restart():
        time.sleep(1)
        again.append(own.start())

    def kill(t):
        if t == 1:
            own.kill()
            again.append(threading.Thread(target=restart))
            again[0].start()

    try:
        assert same(take(source, 6, kill), expected)
    finally:
        again[0].join()
    assert source.counters().retries["connection"] > 0
