"""Tests the order with weights against a plain reference that follows docs/weights.md, and the promised properties."""

import hashlib
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flip.config.weights import UNIT, read_facts
from flip.data.manifest.weights import piece_size, pieces, soft_cap, write_weights
from flip.data.weighted_order import VIEWS, WeightedOrder, Weights
from flip.runs.errors import ConfigError, DataError
from tests.flip.data.test_order_reference import key, pi

#: SHA-256 of ids and epochs of three batches, as little-endian int64: the order must never change.
GOLDEN = "fe6522716a0ff55117155b651eae063a09f2e1502c9d47f5881a0f2099890451"


def reference_block(seed, units, r_chunk, q, lanes, lane, k):
    """(id, epoch of the view) of block k of a lane, in reading order: docs/weights.md in Python's integers."""
    chunks = len(units) // r_chunk
    loads = [sum(units[j * r_chunk : (j + 1) * r_chunk]) for j in range(chunks)]
    total = sum(loads)
    r = max(1, min(r_chunk, total // (65536 * chunks)))
    sections = -(-max(loads) // (65536 * r)) + 1
    turns = total // (65536 * r * sections * 4)
    visits = 4 * turns * sections
    places = []
    for j in range(q):
        c = lane + lanes * (k * q + j)
        epoch, x = divmod(c, visits)
        section, x = divmod(x, 4 * turns)
        quarter, x = divmod(x, turns)
        m = sections * (4 * pi(seed, epoch, turns, x) + (0, 1, 3, 2)[quarter]) + section
        point = (m * total + key(seed, 2**63 + 3, epoch) % total) // visits
        chunk = next(j for j in range(chunks) if sum(loads[: j + 1]) > point)
        own = units[chunk * r_chunk : (chunk + 1) * r_chunk]
        offset = key(seed, 2**63 + 4, c) % loads[chunk]
        seen = {}
        for p in range(r):
            inner = (p * loads[chunk] + offset) // r
            i = next(i for i in range(r_chunk) if sum(own[: i + 1]) > inner)
            view = seen.get(i, 0)
            seen[i] = view + 1
            places.append((chunk * r_chunk + i, epoch + 2**32 * (section * r + view), len(places) - view))
    order = sorted(range(len(places)), key=lambda n: (key(seed, 2**63 + 1, lane, k, places[n][2]), n))
    most = max(n - places[n][2] for n in range(len(places))) + 1
    order = [n for first in range(most) for n in order[first::most]]
    return [places[n][:2] for n in order]


def manifest_of(samples, chunk, exceptions=()):
    return SimpleNamespace(samples=samples, chunk=chunk, digest="d" * 64, exceptions=dict.fromkeys(exceptions, "bad"))


def weights_file(path, values, chunk, cap=0.0, exceptions=()):
    manifest = manifest_of(len(values), chunk, exceptions)
    write_weights(path, manifest, pieces(np.asarray(values), piece_size(chunk)), cap, "a test")
    return Weights(str(path))


def order_of(weights, seed=5, block=4, lanes=2):
    return WeightedOrder(seed, weights.facts, weights.weights, weights.sums, block, lanes)


def drawn(samples, seed=3):
    """Weights of eight kinds, from 0 to 6."""
    return np.random.default_rng(seed).choice([0, 0.25, 0.5, 1, 1, 1.5, 3, 6], samples)


@pytest.mark.parametrize("case", range(12))
def test_blocks_match_reference_for_random_weights(tmp_path, case):
    draw = random.Random(f"weights {case}")
    chunk = draw.choice((1, 2, 5, 8))
    samples = draw.randint(40 * chunk, 60 * chunk)
    weights = weights_file(tmp_path / "w", drawn(samples, case) * draw.choice((0.3, 1, 4)), chunk)
    seed, block, lanes = draw.choice((0, 2**64 - 1, 77)), draw.randint(1, 4), draw.randint(1, 3)
    order = order_of(weights, seed, block, lanes)
    lane = draw.randrange(lanes)
    for k in (0, 1, 7, 1000):
        ids, epochs = (field[0, 0].tolist() for field in order.blocks(range(lane, lane + 1), range(k, k + 1)))
        expected = reference_block(seed, weights.weights.tolist(), chunk, block, lanes, lane, k)
        assert list(zip(ids, epochs, strict=True)) == expected, (case, k)


def test_weighted_order_matches_golden_digest(tmp_path):
    order = order_of(weights_file(tmp_path / "w", drawn(5000), 16), 2**64 - 3, 4, 8)
    content = b""
    for start in (0, 512, 8 * 10**9):
        content += b"".join(field.astype("<i8").tobytes() for field in order.batch(start, 512))
    assert hashlib.sha256(content).hexdigest() == GOLDEN


@pytest.mark.parametrize("chunk", [1, 16, 256])
def test_views_of_each_weight_are_within_four_standard_deviations(tmp_path, chunk):
    """About 2^22.7 draws of 2^14 samples."""
    samples = 2**14
    values = drawn(samples)
    weights = weights_file(tmp_path / "w", values, chunk)
    order = order_of(weights, 9, 4, 16)
    counts = np.zeros(samples, dtype=np.int64)
    epochs = 256
    for epoch in range(epochs):  # whole epochs, in visits
        c = np.arange(epoch * order.visits, (epoch + 1) * order.visits)
        chunks, found, _ = order.chunk_of(c)
        assert (found == epoch).all()
        counts += np.bincount((chunks[:, None] * chunk + order._samples_of(c, chunks)).ravel(), minlength=samples)
    assert counts.sum() == epochs * weights.facts.epoch
    for value in np.unique(values):
        group = values == value
        expected = epochs * weights.facts.epoch * float(weights.weights[group].sum()) / weights.facts.total
        assert abs(counts[group].sum() - expected) <= 4 * math.sqrt(expected), value
    each = epochs * weights.facts.epoch * weights.weights.astype(float) / weights.facts.total
    assert (np.abs(counts - each) <= 6 * np.sqrt(each) + 3).all()


def test_share_of_a_rank_does_not_depend_on_ranks_and_start(tmp_path):
    weights = weights_file(tmp_path / "w", drawn(2**15), 8)
    lanes = 512
    whole = order_of(weights, 1, 2, lanes)
    steps = [[field.reshape(lanes, -1) for field in whole.batch(step * 1024, 1024)] for step in range(24)]
    for world in (1, 8, 64, 512):
        for rank in {0, world // 2, world - 1}:
            own = range(rank * lanes // world, (rank + 1) * lanes // world)
            for step in (0, 7, 8, 23):
                part = order_of(weights, 1, 2, lanes).batch(step * 1024, 1024, own)
                for field, expected in zip(part, steps[step], strict=True):
                    assert field.tolist() == expected[own.start : own.stop].ravel().tolist()


@pytest.mark.parametrize(("chunk", "block", "lanes", "batch"), [(1, 4, 8, 32), (16, 4, 4, 16), (64, 4, 1, 8)])
def test_views_of_a_sample_never_share_a_batch_and_have_draws_of_their_own(tmp_path, chunk, block, lanes, batch):
    weights = weights_file(tmp_path / "w", drawn(2**13), chunk)
    facts = weights.facts
    assert facts.why_unfit(lanes, block, batch) == ""
    order = order_of(weights, 2, block, lanes)
    views = set()
    steps = 3 * facts.epoch // batch
    for step in range(steps):
        ids, epochs = order.batch(step * batch, batch)
        assert len(set(ids.tolist())) == batch, step
        views.update(zip(ids.tolist(), epochs.tolist(), strict=True))
    assert len(views) == steps * batch
    assert {epoch % VIEWS for _, epoch in views} <= {0, 1, 2, 3}


def test_why_unfit_refuses_what_could_share_a_batch(tmp_path):
    weights = weights_file(tmp_path / "w", drawn(2**13), 64)
    assert "two of its views would share a batch" in weights.facts.why_unfit(1, 4, 512)
    assert "could share a batch" in weights.facts.why_unfit(4, 64, 4)
    few = weights_file(tmp_path / "few", np.ones(8), 1)
    assert few.facts.turns == 1 and "visits apart" in few.facts.why_unfit(4, 1, 4)
    none = weights_file(tmp_path / "none", np.ones(4), 1)
    assert none.facts.why_unfit(1, 1, 1) == "an epoch has 4 views, at least 8 are needed"


@pytest.mark.parametrize(("block", "count"), [(4, 4), (6, 5), (4, 1)])
def test_replacements_never_bring_a_second_view_into_a_batch(tmp_path, block, count):
    weights = weights_file(tmp_path / "w", drawn(2**12), 32)
    order = order_of(weights, 4, block, 2)
    for k in range(5):
        ids, epochs = (field[0, 0] for field in order.blocks(range(1), range(k, k + 1)))
        views = set(zip(ids.tolist(), epochs.tolist(), strict=True))
        tried = []
        for n in range(order.block_samples):
            places = list(order.replacements(ids, n, count))
            assert sorted(places) == list(range(order.block_samples)) and places[0] == n
            tried.append(places[1])
            views.add((int(ids[places[1]]), order.replacement_epoch(epochs, n, places[1])))
            assert order.replacement_epoch(epochs, n, n) == epochs[n]
        assert len(views) == 2 * order.block_samples, "each replacement is a view of its own"
        for n, m in enumerate(tried):
            near = range(max(0, n - count + 1), min(n + count, order.block_samples))
            assert ids[m] not in ids[near.start : near.stop]
            assert sum(ids[tried[other]] == ids[m] for other in near) == 1


def test_soft_cap_lowers_large_weights_alone():
    values = np.array([0.0, 0.5, 4.0, 8.0, 1e9])
    assert soft_cap(values, 4.0).tolist() == [0.0, 0.5, 4.0, 6.0, 8.0 - 1.6e-8]
    assert soft_cap(values, 0.0) is values


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ([1.0, -1.0, 1, 1], "weight of sample 1 is no number"),
        ([1.0, 1, float("nan"), 1], "weight of sample 2"),
        ([1.0, 1, float("inf"), 1], "weight of sample 2"),
        ([1.0, 1, 70_000, 1], "weight of sample 2"),
        ([0.0, 0, 0, 0], "all weights are 0"),
        ([1.0, 1, 1], "fewer numbers than the 4 samples"),
        ([1.0, 1, 1, 1, 1], "more numbers than the 4 samples"),
        (["1", "1", "1", "1"], "no numbers"),
    ],
)
def test_write_weights_refuses_bad_numbers(tmp_path, values, error):
    values = [np.asarray(values)]
    with pytest.raises(ConfigError, match=error):
        write_weights(tmp_path / "w", manifest_of(4, 2), values, 0.0, "a test")
    assert list(tmp_path.iterdir()) == []


def test_excluded_samples_and_the_last_part_of_a_chunk_have_no_views(tmp_path):
    weights = weights_file(tmp_path / "w", np.ones(1003), 10, exceptions=[7, 1001])
    assert weights.weights[7] == weights.weights[1001] == 0 and weights.weights[1002] == UNIT
    assert weights.facts.total == 999 * UNIT and weights.facts.positive == 999
    ids, _ = order_of(weights).batch(0, 20_000)
    assert 7 not in ids and max(ids) < 1000


def test_damaged_file_is_refused(tmp_path):
    path = tmp_path / "w"
    weights_file(path, drawn(1000), 10)
    content = path.read_bytes()
    cases = {
        b"": "a header of 0 bytes", content[:5000]: "bytes of tensors",
        content.replace(b'\\"version\\": 1', b'\\"version\\": 7'): "version 7",
        content.replace(b'\\"total\\"', b'\\"tutal\\"'): "total",
    }  # fmt: skip
    for damaged, error in cases.items():
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=error):
            read_facts(str(path))
    path.write_bytes(content[:-4000] + bytes(4000))
    with pytest.raises(DataError, match="do not have the sum"):
        order_of(Weights(str(path))).batch(0, 4000)
    with pytest.raises(DataError, match="there is no file of weights"):
        read_facts(str(tmp_path / "absent"))


def test_safetensors_reads_the_file(tmp_path):
    from safetensors.numpy import load_file

    weights = weights_file(tmp_path / "w", drawn(1000), 10, cap=2.0)
    tensors = load_file(tmp_path / "w")
    assert tensors["weights"].tolist() == weights.weights.tolist()
    assert tensors["sums"].tolist() == [0, *np.cumsum(tensors["weights"].reshape(-1, 10).sum(axis=1)).tolist()]
    assert weights.facts.capped == (drawn(1000) > 2).sum() and abs(weights.facts.largest - 2 * (2 - 2 / 6)) < 1e-5
    assert json.loads(json.dumps(weights.facts.__dict__)) and Path(tmp_path / "w").stat().st_size > 4096
