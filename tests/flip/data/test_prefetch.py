"""Prefetching: each chunk is read once, in time, spread over lanes, in the background; and its errors."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from flip.data import prefetch
from flip.data.order import SampleOrder
from flip.data.prefetch import Prefetch, chunks_due, phase
from flip.runs.errors import DataError

ORDER = {"seed": 5, "samples": 4000, "chunk": 8, "block": 4, "lanes": 16}


def len_of(j):
    """Bytes of a chunk, one like no other."""
    return 1000 + j


class Storage:
    """Notes what is read; ``hold`` keeps reads from being answered."""

    def __init__(self):
        self.reads, self.lock, self.hold = [], threading.Lock(), threading.Event()
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
    """Use positions start .. stop - 1 of all lanes; the chunks that each lane asked for, block by block."""
    used = {}
    for position in range(start, stop):
        k, n = divmod(position, order.block_samples)
        for a in range(len(lanes)):
            j = int(order.cached_block(lanes, k)[0][a][n]) // order.chunk
            assert prefetcher.chunk(a, k, j) == [j]
            used.setdefault((a, k), set()).add(j)
            prefetcher.advance(a, k, n)
    return used


def test_each_chunk_is_read_once_per_block_and_only_what_is_left_of_the_first(storage):
    order, lanes = SampleOrder(**ORDER), range(4, 8)
    prefetcher = Prefetch(order, lanes, 10, storage.read, lambda j: False, len_of)
    used = walk(prefetcher, order, lanes, 10, 3 * order.block_samples)
    asked = [(a, j) for a in range(4) for j in prefetcher._chunks[a][3]]
    assert all(len(held) == 1 for held in prefetcher._chunks), "used blocks are dropped"
    assert prefetcher.bytes == sum(len_of(j) for _, j in asked), "and not counted any more"
    wanted = [j for chunks in used.values() for j in chunks]
    following = [
        (a, j) for a in range(4) for j in np.unique(order.cached_block(lanes, 3)[0][a] // order.chunk).tolist()
    ]
    assert sorted(asked) == sorted(following), "all of the next block, before it starts"
    for a, j in asked:
        prefetcher.chunk(a, 3, j)
    assert sorted(storage.reads) == sorted(wanted + [j for _, j in asked])
    prefetcher.close()


def test_reads_run_in_the_background_and_are_waited_for_when_needed(storage):
    order, lanes = SampleOrder(**ORDER), range(1)
    prefetcher = Prefetch(order, lanes, 0, storage.read, lambda j: False, len_of)
    walk(prefetcher, order, lanes, 0, order.block_samples // 2)
    storage.hold.clear()
    walk(
        prefetcher, order, lanes, order.block_samples // 2, order.block_samples
    )  # waits for none of the requested chunks
    needed = np.unique(order.cached_block(lanes, 1)[0][0] // order.chunk).tolist()
    assert set(needed) - set(storage.reads), "some are still under way"
    waited = threading.Thread(target=lambda: [prefetcher.chunk(0, 1, j) for j in needed])
    waited.start()
    waited.join(0.2)
    assert waited.is_alive()
    storage.hold.set()
    waited.join(30)
    assert not waited.is_alive() and set(needed) <= set(storage.reads)
    prefetcher.close()


def test_what_a_read_raises_is_raised_where_the_chunk_is_asked_for(storage):
    order = SampleOrder(**ORDER)
    prefetcher = Prefetch(order, range(1), 0, storage.read, lambda j: False, len_of)
    with pytest.raises(DataError, match="rot"):
        prefetcher.chunk(0, 0, -1)
    prefetcher.close()


def test_chunks_without_a_good_sample_are_not_read(storage):
    order, lanes = SampleOrder(**ORDER), range(1)
    bad = int(order.cached_block(lanes, 0)[0][0][0]) // order.chunk
    prefetcher = Prefetch(order, lanes, 0, storage.read, lambda j: j == bad, len_of)
    for j in set(prefetcher._chunks[0][0]):
        prefetcher.chunk(0, 0, j)
    prefetcher.close()
    assert len(storage.reads) == ORDER["block"] - 1 and bad not in storage.reads


def test_the_end_of_the_interpreter_waits_for_no_read():
    script = (
        "import time; from flip.data.order import SampleOrder; from flip.data.prefetch import Prefetch\n"
        f"order = SampleOrder(**{ORDER!r})\n"
        "Prefetch(order, range(2), 0, lambda j: time.sleep(600), lambda j: False, abs).close()\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_all_is_asked_for_the_lead_before_its_block(storage, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(prefetch.time, "monotonic", lambda: clock[0])
    order = SampleOrder(**{**ORDER, "block": 16})
    prefetcher = Prefetch(order, range(1), 0, storage.read, lambda j: False, len_of)
    assert prefetcher.lookahead == 0, "the rate is not known yet"
    for _ in range(40):
        clock[0] += 2.0
        prefetcher.update_rate(4)  # 2 samples a second
    assert prefetcher.lookahead == round(prefetch.LOOKAHEAD_SECONDS * 2)
    assert (
        chunks_due(
            order.block_samples - prefetcher.lookahead - 1, order.block_samples - prefetcher.lookahead, order.block, 1.0
        )
        == order.block
    )
    for _ in range(100):
        clock[0] += 0.001
        prefetcher.update_rate(4)
    assert prefetcher.lookahead == prefetch.MAX_LOOKAHEAD * order.block_samples, "memory bounds it"
    prefetcher.close()


@pytest.mark.parametrize("lanes", [8, 100, 4096])
def test_lanes_ask_at_moments_that_are_spread(lanes):
    """Whoever they belong to: as many in each eighth of the time, give or take two."""
    moments = np.array([phase(lane) for lane in range(lanes)])
    assert ((moments > 0) & (moments <= 1)).all()
    counts = np.histogram(moments, 8, (0, 1))[0]
    assert abs(counts - lanes / 8).max() <= 2


def test_due_grows_from_none_to_all():
    for at in (0.001, 0.5, 1.0):
        counts = [chunks_due(n, 32, 4, at) for n in range(-1, 40)]
        assert counts[0] == 0 and counts[32:] == [4] * 9 and counts == sorted(counts)
