"""Tests the order of samples and the mask against a plain reference that follows the specification.

The reference uses Python integers only, one sample at a time. It shares no code with the vectorised product, so that an
error in wrapping, integer width or broadcasting cannot occur in both.
"""

import random

import numpy as np
import pytest

from flip import rng
from flip.data import masking, order

TOP = 2**64 - 1
SEEDS = (0, 1, 7, 2**63 - 1, 2**63, TOP - 1, TOP)


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & TOP
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & TOP
    return z ^ (z >> 31)


def key(*values: int) -> int:
    h = 0
    for value in values:
        h = mix((h + 0x9E3779B97F4A7C15 + value) & TOP)
    return h


def pi(seed: int, epoch: int, chunks: int, c: int) -> int:
    bits = max(1, ((chunks - 1).bit_length() + 1) // 2)
    low = 2**bits - 1
    value = c
    while True:
        left = value >> bits
        right = value & low
        for turn in range(4):
            left, right = right, left ^ (key(seed, 2**63, epoch, turn, right) & low)
        value = (left << bits) | right
        if value < chunks:
            return value


def block(seed: int, n: int, r: int, q: int, lanes: int, lane: int, k: int) -> list[tuple[int, int]]:
    """(sample id, visit) of block k of a lane, in reading order."""
    chunks = n // r
    stream = []
    for number in range(k * q, (k + 1) * q):
        epoch, c = divmod(lane + number * lanes, chunks)
        first = pi(seed, epoch, chunks, c) * r
        for i in range(r):
            stream.append((first + i, epoch))
    numbers = sorted(range(q * r), key=lambda i: (key(seed, 2**63 + 1, lane, k, i), i))
    return [stream[i] for i in numbers]


def lane_stream(
    seed: int, n: int, r: int, q: int, lanes: int, lane: int, start: int, count: int
) -> list[tuple[int, int]]:
    """`count` samples of a lane, starting at its position `start`."""
    first = start // (q * r)
    last = (start + count - 1) // (q * r)
    stream = []
    for k in range(first, last + 1):
        stream.extend(block(seed, n, r, q, lanes, lane, k))
    skipped = start - first * q * r
    return stream[skipped : skipped + count]


def global_batch(seed: int, n: int, r: int, q: int, lanes: int, s: int, b: int) -> list[tuple[int, int]]:
    samples = []
    for lane in range(lanes):
        samples.extend(lane_stream(seed, n, r, q, lanes, lane, s // lanes, b // lanes))
    return samples


def keep(seed: int, epoch: int, sample: int, patches: int, visible: int) -> list[int]:
    by_key = sorted(range(patches), key=lambda p: (key(seed, epoch, sample, 3, p), p))
    return sorted(by_key[:visible])


def product_batch(seed: int, n: int, r: int, q: int, lanes: int, s: int, b: int) -> list[tuple[int, int]]:
    ids, epochs = order.SampleOrder(seed=seed, samples=n, chunk=r, block=q, lanes=lanes).batch(s, b)
    assert len(ids) == len(epochs) == b
    return [(int(i), int(v)) for i, v in zip(ids, epochs, strict=True)]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def starts(n: int, lanes: int, b: int) -> list[int]:
    """Multiples of L: zero, both sides of the first border between passes, and far beyond."""
    near = [0, lanes, b, n - b, n, n + b, 3 * n, 7 * n + b, 1000 * n]
    return sorted({max(0, s) // lanes * lanes for s in near})


@pytest.mark.parametrize("count", range(1, 7))
def test_rng_key_matches_reference(count):
    draw = random.Random(count)
    edges = (0, 1, 2**32, 2**63 - 1, 2**63, 2**63 + 1, 2**63 + 2, TOP)
    for _ in range(50):
        values = [draw.choice((draw.choice(edges), draw.getrandbits(64), draw.randrange(1000))) for _ in range(count)]
        assert int(rng.key(*values)) == key(*values), values


@pytest.mark.parametrize("seed", SEEDS)
def test_permute_matches_reference(seed):
    # Both sides of powers of two, at which the halves change their width and the walk back below C is longest.
    for chunks in (1, 2, 3, 4, 5, 15, 16, 17, 64, 65, 257):
        for epoch in (0, 1, 5):
            expected = [pi(seed, epoch, chunks, c) for c in range(chunks)]
            assert sorted(expected) == list(range(chunks))
            assert [int(order.permute(seed, epoch, chunks, c)) for c in range(chunks)] == expected, (chunks, epoch)


@pytest.mark.parametrize("case", range(60))
def test_batch_matches_reference_for_random_parameters(case):
    draw = random.Random(f"batch {case}")
    n = draw.randint(1, 400)
    r = draw.randint(1, min(8, n))
    q = draw.randint(1, 4)
    b = draw.choice((1, 2, 6, 8, 12, 16, 24))
    lanes = draw.choice(divisors(b))
    seed = draw.choice((*SEEDS, draw.getrandbits(64)))
    for s in starts(n, lanes, b):
        expected = global_batch(seed, n, r, q, lanes, s, b)
        assert product_batch(seed, n, r, q, lanes, s, b) == expected, (seed, n, r, q, lanes, s, b)


@pytest.mark.parametrize("seed", [3, TOP])
@pytest.mark.parametrize(("n", "r", "q", "lanes", "b"), [(1, 1, 4, 4, 8), (7, 2, 3, 2, 6), (100, 8, 4, 8, 32)])
def test_batch_matches_reference_for_tiny_data_sets(n, r, q, lanes, b, seed):
    for s in starts(n, lanes, b):
        assert product_batch(seed, n, r, q, lanes, s, b) == global_batch(seed, n, r, q, lanes, s, b), s


@pytest.mark.parametrize("seed", [3, TOP])
def test_batch_matches_reference_for_small_data_set(seed):
    n = 5513
    r = 1
    q = 4
    lanes = 64
    b = 256
    for s in starts(n, lanes, b):
        assert product_batch(seed, n, r, q, lanes, s, b) == global_batch(seed, n, r, q, lanes, s, b), s


def test_pass_reads_every_sample_of_complete_chunks_once():
    n = 100
    r = 4
    q = 1
    lanes = 5
    used = n // r * r
    ids, epochs = order.SampleOrder(seed=TOP, samples=n, chunk=r, block=q, lanes=lanes).batch(0, used)
    assert sorted(int(i) for i in ids) == list(range(used))
    assert {int(v) for v in epochs} == {0}


# N is a multiple of L: the second start is the last position before the first border; the third lies after it.
@pytest.mark.parametrize("s", [0, 1_920_000_000 - 4096, 1_920_000_000 + 4096 * 1024, 10**10])
def test_batch_matches_reference_at_full_size(s):
    n = 1_920_000_000
    r = 256
    q = 4
    lanes = 4096
    s = s // lanes * lanes
    samples = product_batch(TOP - 5, n, r, q, lanes, s, 2 * lanes)
    for lane in (0, 1, 2047, 4095):
        expected = lane_stream(TOP - 5, n, r, q, lanes, lane, s // lanes, 2)
        assert samples[2 * lane : 2 * lane + 2] == expected, lane


@pytest.mark.parametrize("seed", SEEDS)
def test_visible_patches_match_reference(seed):
    draw = random.Random(seed)
    for patches, visible in ((1, 1), (16, 4), (196, 49), (196, 98), (196, 196), (256, 1)):
        samples = [
            (draw.randrange(6), draw.choice((0, draw.randrange(10**6), 2**48 + 12, 3 * 2**48))) for _ in range(5)
        ]
        epochs = np.array([epoch for epoch, _ in samples], dtype=np.int64)
        ids = np.array([sample for _, sample in samples], dtype=np.int64)
        actual = masking.visible_patches(seed, epochs, ids, patches, visible)
        assert actual.dtype == np.int16 and actual.shape == (len(samples), visible)
        expected = [keep(seed, epoch, sample, patches, visible) for epoch, sample in samples]
        assert actual.tolist() == expected, (patches, visible)
