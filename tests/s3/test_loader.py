"""Tests that batches from object storage equal batches from local files, byte for byte, despite network faults."""

import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flip.data.chunk_reader import ChunkReader
from flip.data.storage.retry import RetryPolicy
from flip.evaluation.datasets import catalog
from flip.evaluation.datasets.image_sources import Shards
from flip.runs.errors import DataError, PermissionDenied, StorageError
from tests.flip.data.loading import BATCH, CHUNK, loader
from tests.s3.conftest import ROOT, either, lead_to, on_nanio
from tests.s3.proxy import COUNTED_AS, FAULTS
from tests.s3.servers import BUCKET, files
from tools.commands.shards import main

pytestmark = pytest.mark.s3

STEPS = 6
"""More than a pass over the data, so that every shard is read."""


def take(source, count=STEPS, between=lambda t: None):
    batches = source.batches(0, BATCH, "0.5")
    try:
        taken = []
        for t in range(count):
            taken.append(next(batches))
            between(t)
        return taken
    finally:
        batches.close()


def same(actual, expected):
    names = ("patches", "keep_indices", "tokens", "ids")
    return all(
        torch.equal(getattr(a, n), getattr(b, n)) for a, b in zip(actual, expected, strict=True) for n in names
    )  # fmt: skip


def until(condition, seconds=20):
    """Wait for the condition and return its value: requests that were read ahead are counted when they end."""
    limit = time.monotonic() + seconds
    while not (result := condition()) and time.monotonic() < limit:
        time.sleep(0.02)
    return result


def retries(source):
    return {kind: count for kind, count in source.counters().retries.items() if count}


@pytest.fixture(scope="module")
def expected(original):
    return take(loader(original), 6)


def test_batches_from_bucket_equal_local_batches(original, server, proxied, remote, expected):
    proxied(server)
    manifest = remote()
    reader = ChunkReader()
    assert reader.list(manifest.keys[0]) == {manifest.keys[0]: reader.stat(manifest.keys[0])}
    source = loader(original, folder=manifest.folder, workers=1)
    assert same(take(source), expected)
    counters = source.counters()
    assert counters.requests > 50 and counters.bytes > 100_000 and counters.seconds > 0
    assert not retries(source)


@on_nanio
@pytest.mark.parametrize("fault", FAULTS)
def test_batches_are_unchanged_by_network_fault(original, server, proxied, remote, expected, fault):
    proxy = proxied(server)
    kind = COUNTED_AS[fault]
    manifest = remote()
    proxy.plan([fault], 0.3, seed=1, limit=3 if kind in ("stall", "checksum", "expired") else 12)
    source = loader(original, folder=manifest.folder, timeout=1 if kind == "stall" else 10, hedge=0)
    assert same(take(source), expected)
    assert proxy.counts[fault] > 2
    if fault == "refuse":  # on a reused connection aiohttp itself retries once
        assert until(lambda: list(retries(source)) == [kind] and retries(source)[kind] <= proxy.counts[fault])
    elif kind == "stall":  # on a busy machine other answers may be as late
        assert until(lambda: retries(source).get(kind, 0) >= proxy.counts[fault]) and list(retries(source)) == [kind]
    else:
        assert until(lambda: retries(source) == {kind: proxy.counts[fault]}), (retries(source), proxy.counts)
        assert until(lambda: source.counters().requests == proxy.counts["gets"]), "only the reader retries"
    assert (source.counters().resumed > 0) == (fault in ("reset", "stall"))


@either
def test_batches_are_unchanged_by_all_faults_combined(original, server, proxied, remote, expected, workers):
    proxy = proxied(server)
    manifest = remote()
    proxy.plan(FAULTS, 0.3, seed=2, limit=2 * len(FAULTS))
    source = loader(original, folder=manifest.folder, workers=workers, timeout=1, hedge=0)
    assert same(take(source), expected)
    assert {fault: proxy.counts[fault] for fault in FAULTS} == dict.fromkeys(FAULTS, 2)
    assert until(lambda: set(retries(source)) == {COUNTED_AS[fault] for fault in FAULTS}), retries(source)
    counters = source.counters()
    assert counters.resumed > 0
    take(source, 1)  # the readers of the next stage continue the counters
    assert source.counters().requests > counters.requests


@on_nanio
@pytest.mark.parametrize("after", [0, 20])
def test_loader_hedges_request_that_gets_no_answer(original, server, proxied, remote, expected, after):
    """This holds for the first requests, before latencies of the storage are known, and for later ones."""
    proxy = proxied(server)
    manifest = remote()
    proxy.plan(["silence"], 1, limit=1, after=after)
    source = loader(original, folder=manifest.folder, timeout=600, hedge=0.5)
    assert same(take(source), expected)
    counters = source.counters()
    assert proxy.counts["silence"] == 1 <= counters.hedges_won and not any(counters.retries.values())


@either
def test_batches_are_unchanged_by_temporary_denial(original, server, proxied, remote, expected, workers):
    proxy = proxied(server)
    source = loader(original, folder=remote().folder, workers=workers)
    assert same(take(source, between=lambda t: t or proxy.plan(["denied"], 0.5, limit=4)), expected)
    assert proxy.counts["denied"] and retries(source)["denied"]


@either
def test_batches_are_unchanged_by_server_restart(original, server, proxied, remote, expected, workers):
    proxy = proxied(server)
    source = loader(original, folder=remote().folder, workers=workers, deadline=200)
    with ThreadPoolExecutor() as threads:
        restarts = []

        def restart():
            assert until(lambda: proxy.counts["away"] > 2)
            server.start()

        def kill(t):
            if t == 1:
                server.kill()
                restarts.append(threads.submit(restart))

        try:
            assert same(take(source, between=kill), expected)
        finally:
            for each in restarts:
                each.result()
    if not workers:  # worker processes report counts with batches, and these requests may have been read ahead
        assert until(lambda: retries(source).get("connection")), retries(source)


@pytest.mark.slow
@on_nanio
def test_loader_reports_outage_while_it_lasts(original, server, proxied, remote, expected, caplog):
    """The outage occurs in a loader process and lasts until the parent process has shown it."""
    proxy = proxied(server)
    shown = []
    source = loader(original, folder=remote().folder, workers=1, deadline=60)

    def show(text):
        shown.append(text)
        proxy.away = False

    source.outages.show = show
    with caplog.at_level("WARNING", "flip.data"):
        assert same(take(source, between=lambda t: t or setattr(proxy, "away", True)), expected)
    lines = [record.getMessage() for record in caplog.records if record.name == "flip.data"]
    assert len(lines) == 2 and shown[0] == lines[0] and shown[-1] is None
    assert lines[0].startswith("storage does not answer since ") and "answers again" in lines[1]


# -- permanent errors --------------------------------------------------------------------------------------------------


@on_nanio
def test_loader_raises_permission_denied_for_wrong_secret(original, server, proxied, remote, monkeypatch):
    proxy = proxied(server)
    manifest = remote()
    lead_to(monkeypatch, proxy.address, secret="another")
    with pytest.raises(PermissionDenied, match="does not let us read: 403") as error:
        take(loader(original, folder=manifest.folder, workers=1))
    assert error.value.code == 77


@either
@pytest.mark.parametrize("fault", ["denied", "slowdown"])
def test_loader_raises_storage_error_after_deadline(original, server, proxied, remote, fault, workers):
    proxy = proxied(server)
    source = loader(original, folder=remote().folder, workers=workers, deadline=1)
    with pytest.raises(StorageError, match="reading failed for 1 s, at last with: ") as error:
        take(source, between=lambda t: t or proxy.plan([fault], 1))
    assert error.value.code == 69 and proxy.counts[fault]


@on_nanio
def test_evaluation_raises_storage_error_after_deadline(server, proxied, remote):
    proxy = proxied(server)
    manifest = remote()
    proxy.plan(["slowdown"], 1)
    with pytest.raises(StorageError, match="reading failed for 0.5 s, at last with: 503"):
        next(Shards(manifest, RetryPolicy(deadline=0.5)).samples(range(1)))


@on_nanio
def test_locate_split_returns_only_splits_present_in_bucket(original, server, proxied, tmp_path, monkeypatch):
    """A listing contains all objects below a prefix; objects in folders of other splits do not belong to a split."""
    monkeypatch.setenv("FLIP_CACHE", str(tmp_path / "cache"))
    proxied(server)
    store = files(server.address)
    shard = min(original.glob("*.tar")).read_bytes()
    for name in ("tested/test/0.tar", "trained/train/0.tar", "plain/0.tar", "plain/old/1.tar"):
        store.pipe_file(f"{BUCKET}/splits/{name}", shard)
    locations = {
        (name, split): catalog.locate_split(f"s3://{BUCKET}/splits/{name}", split)
        for name in ("tested", "trained", "plain") for split in ("test", "train")
    }  # fmt: skip
    assert [pair for pair, location in locations.items() if location] == [
        ("tested", "test"),
        ("trained", "train"),
        ("plain", "test"),
    ]
    assert len({location.open().count for location in locations.values() if location}) == 1


@either
@pytest.mark.parametrize("change, words", [("removed", "the shard is missing"), ("replaced", "its ETag is ")])
def test_loader_raises_data_error_if_shard_is_removed_or_replaced(
    original, server, prefix, proxied, remote, change, words, workers
):
    proxied(server)
    source = loader(original, folder=remote(prefix).folder, workers=workers)
    store = files(server.address)

    def act(t):
        for path in original.glob("*.tar") if t == 0 else ():
            key = f"{BUCKET}/{prefix}/{path.name}"
            store.rm_file(key) if change == "removed" else store.pipe_file(key, path.read_bytes() + bytes(512))

    with pytest.raises(DataError, match=words) as error:
        take(source, 10, act)
    assert error.value.code == 65


@either
def test_loader_stops_at_damaged_chunk_until_samples_are_excluded(original, server, proxied, remote, tmp_path, workers):
    """The command in the error message, run unchanged, writes a manifest with which training continues."""
    proxy = proxied(server)
    manifest = remote()
    bad = int(manifest.samples - 5)
    shard, start, _, _ = manifest.chunk_ranges(bad // CHUNK)[0]
    proxy.rotten = manifest.keys[shard].removeprefix("s3:/").encode(), start + 600
    source = loader(original, folder=manifest.folder, workers=workers)
    with pytest.raises(DataError, match="is damaged: CRC32") as error:
        take(source)
    assert error.value.code == 65 and proxy.counts["rot"] >= 2 and (workers or list(retries(source)) == ["checksum"])

    command = re.search(r"flip (shards exclude .*--ids (\S+) --out) NEW_FOLDER", error.value.remedy)
    subprocess.run([sys.executable, "jobs", *shlex.split(command[1]), str(tmp_path / "repaired")], cwd=ROOT, check=True)
    assert main(["except", str(original), "--ids", command[2], "--out", str(tmp_path / "local")]) == 0
    source = loader(original, folder=tmp_path / "repaired", workers=workers)
    batches = take(source)
    assert same(batches, take(loader(original, folder=tmp_path / "local"))) and not retries(source)
    assert not any(batch.replaced for batch in batches), "known exceptions do not count as replaced"
