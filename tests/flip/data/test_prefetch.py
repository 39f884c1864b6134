"""Tests prefetching: each chunk is read once, in time, in the background; and errors of reads."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from flip.data import prefetch
from flip.data.order import SampleOrder
from flip.data.prefetch import Prefetch, chunks_due, phase
from flip.runs.errors import DataError, StorageError

ORDER = {"seed": 5, "samples": 4000, "chunk": 8, "block": 4, "lanes": 16}


def len_of(j):
    """Bytes of a chunk; unique per chunk."""
    return 1000 + j


class Storage:
    """Records all reads; reads wait until ``hold`` is set."""

    def __init__(self):
        self.reads = []
        self.lock = threading.Lock()
        self.hold = threading.Event()
        self.hold.set()

    def read(self, j):
        self.hold.wait(30)
        with self.lock:
            self.reads.append(j)
        if j < 0:
            raise DataError("rot")
        return [j]


@pytest.fixture
def storage():
    return Storage()


def walk(prefetcher, order, lanes, start, stop):
    """Use positions start .. stop - 1 of all lanes. Returns the chunks used per (lane, block)."""
    used = {}
    for position in range(start, stop):
        k, n = divmod(position, order.block_samples)
        for a in range(len(lanes)):
            j = int(order.cached_block(lanes, k)[0][a][n]) // order.chunk
            assert prefetcher.chunk(a, k, j) == [j]
            used.setdefault((a, k), set()).add(j)
            prefetcher.advance(a, k, n)
    return used


def test_prefetch_reads_each_chunk_once_per_block(storage):
    order = SampleOrder(**ORDER)
    lanes = range(4, 8)
    prefetcher = Prefetch(order, lanes, 10, storage.read, lambda j: False, len_of)
    used = walk(prefetcher, order, lanes, 10, 3 * order.block_samples)
    prefetched = [(a, j) for a in range(4) for j in prefetcher._chunks[a][3]]
    assert all(len(held) == 1 for held in prefetcher._chunks), "the prefetcher drops used blocks"
    assert prefetcher.bytes == sum(len_of(j) for _, j in prefetched), "the prefetcher no longer counts dropped blocks"
    used_chunks = [j for chunks in used.values() for j in chunks]
    following = [
        (a, j) for a in range(4) for j in np.unique(order.cached_block(lanes, 3)[0][a] // order.chunk).tolist()
    ]
    assert sorted(prefetched) == sorted(following), "the prefetcher requests the full next block before it starts"
    for a, j in prefetched:
        prefetcher.chunk(a, 3, j)
    assert sorted(storage.reads) == sorted(used_chunks + [j for _, j in prefetched])
    prefetcher.close()


def test_prefetch_reads_in_background_and_waits_only_for_needed_chunks(storage):
    order = SampleOrder(**ORDER)
    lanes = range(1)
    prefetcher = Prefetch(order, lanes, 0, storage.read, lambda j: False, len_of)
    walk(prefetcher, order, lanes, 0, order.block_samples // 2)
    storage.hold.clear()
    walk(
        prefetcher, order, lanes, order.block_samples // 2, order.block_samples
    )  # waits for none of the requested chunks
    needed = np.unique(order.cached_block(lanes, 1)[0][0] // order.chunk).tolist()
    assert set(needed) - set(storage.reads), "some reads are pending"
    waiter = threading.Thread(target=lambda: [prefetcher.chunk(0, 1, j) for j in needed])
    waiter.start()
    waiter.join(0.2)
    assert waiter.is_alive()
    storage.hold.set()
    waiter.join(30)
    assert not waiter.is_alive() and set(needed) <= set(storage.reads)
    prefetcher.close()


def test_prefetch_chunk_raises_error_of_its_read(storage):
    order = SampleOrder(**ORDER)
    prefetcher = Prefetch(order, range(1), 0, storage.read, lambda j: False, len_of)
    with pytest.raises(DataError, match="rot"):
        prefetcher.chunk(0, 0, -1)
    prefetcher.close()


def test_prefetch_skips_chunks_without_good_sample(storage):
    order = SampleOrder(**ORDER)
    lanes = range(1)
    bad = int(order.cached_block(lanes, 0)[0][0][0]) // order.chunk
    prefetcher = Prefetch(order, lanes, 0, storage.read, lambda j: j == bad, len_of)
    for j in set(prefetcher._chunks[0][0]):
        prefetcher.chunk(0, 0, j)
    prefetcher.close()
    assert len(storage.reads) == ORDER["block"] - 1 and bad not in storage.reads


def test_read_that_hangs_is_an_outage_of_storage(storage):
    storage.hold.clear()
    prefetcher = Prefetch(SampleOrder(**ORDER), range(1), 0, storage.read, lambda j: False, len_of, patience=0.05)
    with pytest.raises(StorageError, match=r"no read has ended for 0\.05 s"):
        prefetcher.chunk(0, 0, 3)
    storage.hold.set()
    prefetcher.close()


@pytest.mark.long
def test_read_behind_others_in_the_queue_is_waited_for(monkeypatch):
    """Each read takes much less than the patience, all before this one take more."""
    monkeypatch.setattr(prefetch, "THREADS", 1)
    order = SampleOrder(**ORDER)
    prefetcher = Prefetch(order, range(4), 0, lambda j: time.sleep(0.15) or [j], lambda j: False, len_of, patience=1.5)
    last = next(j for j in range(500) if j not in prefetcher._chunks[0][0])  # requested after all others
    assert prefetcher.chunk(0, 0, last) == [last]
    prefetcher.close()


def test_interpreter_exit_waits_for_no_prefetch_read():
    script = (
        "import time; from flip.data.order import SampleOrder; from flip.data.prefetch import Prefetch\n"
        f"order = SampleOrder(**{ORDER!r})\n"
        "Prefetch(order, range(2), 0, lambda j: time.sleep(600), lambda j: False, abs).close()\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_prefetch_lookahead_follows_measured_rate_within_bound(storage, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(prefetch.time, "monotonic", lambda: clock[0])
    order = SampleOrder(**{**ORDER, "block": 16})
    prefetcher = Prefetch(order, range(1), 0, storage.read, lambda j: False, len_of)
    assert prefetcher.lookahead == 0, "the rate is unknown at first"
    for _ in range(40):
        clock[0] += 2.0
        prefetcher.update_rate(4)  # 2 samples a second
    assert prefetcher.lookahead == round(prefetch.LOOKAHEAD_SECONDS * 2)
    due = order.block_samples - prefetcher.lookahead
    assert chunks_due(due - 1, due, order.block, 1.0) == order.block
    for _ in range(100):
        clock[0] += 0.001
        prefetcher.update_rate(4)
    assert prefetcher.lookahead == prefetch.MAX_LOOKAHEAD * order.block_samples, "memory bounds the lookahead"
    prefetcher.close()


@pytest.mark.parametrize("lanes", [8, 100, 4096])
def test_prefetch_phases_of_lanes_are_spread_evenly(lanes):
    """Each eighth of the time holds an eighth of the moments, within two."""
    moments = np.array([phase(lane) for lane in range(lanes)])
    assert ((moments > 0) & (moments <= 1)).all()
    counts = np.histogram(moments, 8, (0, 1))[0]
    assert abs(counts - lanes / 8).max() <= 2


def test_chunks_due_grows_from_zero_to_all_chunks_of_block():
    for lane_phase in (0.001, 0.5, 1.0):
        counts = [chunks_due(n, 32, 4, lane_phase) for n in range(-1, 40)]
        assert counts[0] == 0 and counts[32:] == [4] * 9 and counts == sorted(counts)
