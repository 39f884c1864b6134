"""Tests the memory of the loader: bounded in long runs, logged, and predicted by the plan."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flip.config import schema
from flip.data import prefetch
from flip.data.manifest.manifest import Manifest
from flip.model_costs import IN_HAND, SLOTS, loader_memory
from tests.flip.data.loading import BATCH, BLOCK, CHUNK, loader
from tests.flip.data.many_steps import LANES, streams

ROOT = Path(__file__).resolve().parents[3]


def chunk_bytes(folder):
    return Manifest.load(folder).mean_bytes * CHUNK


def buffered_bytes(stream):
    """Wait for all chunks of a stream and return the bytes of their buffers."""
    futures = [future for lane in stream._prefetcher._chunks for chunks in lane.values() for future in chunks.values()]
    return sum(len(piece) for future in futures for piece in future.result(60).pieces)


@pytest.mark.long
@pytest.mark.parametrize("lead", [0.0, prefetch.LOOKAHEAD_SECONDS])
def test_held_bytes_are_counted_exactly_and_bounded(original, monkeypatch, lead):
    monkeypatch.setattr(prefetch, "LOOKAHEAD_SECONDS", lead)
    held = []
    reads = prefetch.THREADS * chunk_bytes(original)
    block = 6 * BLOCK * chunk_bytes(original)
    producer, out = streams(original, range(6))
    for t in range(400):
        producer.fill(out)
        held.append(producer.counters.held)
        if t % 50 == 0:
            assert held[-1] == buffered_bytes(producer._streams[0][0])
    producer.close()
    most = 2 * block
    mean = (1.5 + prefetch.MAX_LOOKAHEAD / 2) * block
    assert 0.9 * most < max(held) <= most + reads and 0.75 * mean < sum(held) / len(held) <= mean


@pytest.mark.long
def test_loader_memory_does_not_grow_over_ten_thousand_steps(original):
    command = [sys.executable, "-m", "tests.flip.data.many_steps", str(original)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["held"] <= (2 * BLOCK + prefetch.THREADS) * chunk_bytes(original)
    before, after = result["rss"]
    assert result["bytes"] > 30e6 and after - before < 4e6, "the loader retains no data that it has used"


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_memory_plan_counts_all_held_batches(original, workers):
    """The plan counts the shared memory, or two batches of the rank: one in use and the next one."""
    source = loader(original, workers=workers)
    batches = source.batches(0, BATCH, "0.5")
    arrays = [array for array in next(batches) if isinstance(array, torch.Tensor) and array.ndim]
    if workers:
        held = len(source._producer._slots._memory)
    else:
        held = 2 * sum(array.nbytes for array in arrays)
    batches.close()
    spec = source.config
    config = schema.Config(data=schema.Data(lanes=LANES, chunk=CHUNK, block=BLOCK, sample_bytes=0, workers=workers))
    config.model.image = spec.image
    config.model.text = spec.text
    planned = loader_memory(config, schema.Stage(batch=BATCH, mask="0.5"))
    assert held <= planned < 1.1 * held
    config.compute.device = "cuda"
    locked = loader_memory(config, schema.Stage(batch=BATCH, mask="0.5")) - planned
    assert locked == planned * IN_HAND // (SLOTS * bool(workers) + IN_HAND), "page-locked copies"
