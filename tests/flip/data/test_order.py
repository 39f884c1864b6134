"""Tests the order of samples, which must never change: vectors, golden digests and promised properties."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flip import rng
from flip.data import masking, order
from flip.data.order import SampleOrder
from flip.runs.formats import ORDER_NUMBER

VECTORS = json.loads(Path(__file__).with_name("order_vectors.json").read_text(encoding="utf-8"))

#: N, R, Q, L, S, samples -> SHA-256 of the ids, then the visits, as little-endian int64.
GOLDEN = [
    (1, 1, 4, 1, 0, 64, "c33a4e44ffacfd8d3ad2187c9b434b37254644ea17c3ae81c0fd5394bcb293f9"),
    (7, 1, 2, 3, 0, 96, "62ee6c23a0023aa1d8e0be6d6e17845b6352bf6d6cc95467cc0f3e6705050428"),
    (100, 4, 4, 2, 40, 1000, "5a52301b4eaf0c9495c673dff8a692699086fa126973484a8be52c67a914317e"),
    (5513, 1, 4, 128, 0, 12800, "6b9e4c4851c5000d9e7b0b20a2838e39a1561a6d6a4424579337df1e5a944b18"),
    (5513, 1, 4, 128, 128 * 50_000, 1280, "8736862c6f7844a629b1d30520b4c80b2a56cfb56313243310c7f73d14d1690d"),
    (1_920_000_000, 256, 4, 4096, 0, 8192, "609b6da002bc1e8b4e5d87c6193ec87b400b66888dd233e6fe7eb72ccfefd79e"),
    (
        1_920_000_000,
        256,
        4,
        4096,
        65536 * 60_000,
        65536,
        "a927473691780338ca7171ec6e595e4c7ddddb8a30b4ce37bcdba1c759e8cba2",
    ),
]


def test_key_permutation_order_and_mask_match_stored_vectors():
    for values, expected in VECTORS["key"]:
        assert int(rng.key(*values)) == int(expected, 16)
    for seed, epoch, chunks, expected in VECTORS["pi"]:
        assert order.permute(seed, epoch, chunks, np.arange(len(expected))).tolist() == expected
    for v in VECTORS["batch"]:
        ids, epochs = SampleOrder(v["seed"], v["N"], v["R"], v["Q"], v["L"]).batch(v["S"], v["B"])
        assert np.stack([ids, epochs], axis=1).tolist() == v["ids"]
    for seed, epoch, id, patches, visible, expected in VECTORS["keep"]:
        assert masking.visible_patches(seed, [epoch], [id], patches, visible).tolist() == [expected]


def test_order_version_is_pinned():
    """Checkpoints hold the version: a new version forces running experiments to start again."""
    assert ORDER_NUMBER == 1


@pytest.mark.parametrize("n, r, q, lanes, start, count, golden", GOLDEN)
def test_order_matches_golden_digest(n, r, q, lanes, start, count, golden):
    ids, epochs = SampleOrder(2**64 - 3, n, r, q, lanes).batch(start, count)
    digest = hashlib.sha256(ids.astype("<i8").tobytes() + epochs.astype("<i8").tobytes()).hexdigest()
    assert digest == golden


def test_uniform_uses_upper_bits_of_key():
    keys = np.array([0, 2**11 - 1, 2**11, 2**63, 2**64 - 1], dtype=np.uint64)
    assert rng.uniform(keys).tolist() == [0.0, 0.0, 2.0**-53, 0.5, 1 - 2.0**-53]


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1), st.integers(0, 1000))
def test_permutation_is_a_bijection(chunks, seed, epoch):
    assert sorted(order.permute(seed, epoch, chunks, np.arange(chunks)).tolist()) == list(range(chunks))


@given(st.data())
def test_every_pass_holds_every_chunk_once(data):
    r, q, lanes = (data.draw(st.integers(1, high)) for high in (5, 4, 6))
    chunks = data.draw(st.integers(1, 12)) * lanes * q  # no block spans two passes
    samples = chunks * r + data.draw(st.integers(0, r - 1))
    stream = SampleOrder(data.draw(st.integers(0, 2**64 - 1)), samples, r, q, lanes)
    for epoch in range(3):
        ids, epochs = stream.batch(epoch * chunks * r, chunks * r)
        assert sorted(ids.tolist()) == list(range(chunks * r)) and set(epochs.tolist()) == {epoch}


@given(st.data())
def test_order_is_independent_of_start_batch_size_and_lane_range(data):
    r, q, lanes = (data.draw(st.integers(1, high)) for high in (4, 3, 6))
    stream = SampleOrder(5, data.draw(st.integers(r, 300)), r, q, lanes)
    per_lane = data.draw(st.integers(1, 40))
    full = stream.batch(0, lanes * per_lane)[0].reshape(lanes, per_lane)
    offset = data.draw(st.integers(0, per_lane - 1))
    first = data.draw(st.integers(0, lanes - 1))
    part = stream.batch(offset * lanes, (per_lane - offset) * lanes, range(first, lanes))[0]
    assert part.tolist() == full[first:, offset:].ravel().tolist()
    assert stream.positions(range(first, first + 1), offset, per_lane - offset)[0].tolist() == [
        full[first, offset:].tolist()
    ]


def test_order_cache_stays_small_over_many_batches():
    stream = SampleOrder(1, 5513, 1, 4, 8)
    for step in range(200):
        stream.batch(step * 64, 64)
    assert len(stream._block_cache) <= 4


def test_order_rejects_chunk_above_sample_count_and_unaligned_start():
    with pytest.raises(ValueError, match="no order"):
        SampleOrder(0, 3, 4, 1, 1)
    with pytest.raises(ValueError, match="multiples"):
        SampleOrder(0, 100, 1, 1, 8).batch(4, 8)


@given(st.integers(0, 2**64 - 1), st.integers(0, 50), st.integers(1, 3000))
def test_inverse_of_permute_restores_positions(seed, epoch, chunks):
    positions = np.arange(chunks)
    permuted = order.permute(seed, epoch, chunks, positions)
    assert order.permute(seed, epoch, chunks, permuted, inverse=True).tolist() == positions.tolist()


@given(
    st.integers(0, 2**64 - 1), st.integers(8, 60), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4),
    st.integers(0, 90), st.integers(1, 400), st.data(),
)  # fmt: skip
def test_block_within_returns_first_block_of_bad_chunks(seed, chunks, chunk, q, lanes, start, count, data):
    stream = SampleOrder(seed, chunks * chunk, chunk, q, lanes)
    bad = data.draw(st.sets(st.integers(0, chunks - 1)))
    expected = None
    for k in range(start // stream.block_samples, -(-(start + count) // stream.block_samples)):
        ids = stream.blocks(range(lanes), range(k, k + 1))[0][0]
        bad_lanes = [lane for lane in range(lanes) if set((ids[lane] // chunk).tolist()) <= bad]
        if bad_lanes:
            expected = bad_lanes[0], k
            break
    assert stream.block_within(np.array(sorted(bad), dtype=np.int64), start, start + count) == expected


def test_block_within_result_is_independent_of_search_batches(monkeypatch):
    monkeypatch.setattr(order, "_SEARCHED", 64)
    stream = SampleOrder(5, 40, 1, 4, 2)
    bad = np.arange(20)
    expected = [stream.block_within(bad, start, 4000) for start in range(0, 2000, 100)]
    monkeypatch.undo()
    assert expected == [stream.block_within(bad, start, 4000) for start in range(0, 2000, 100)] and None not in expected
