"""What a loader holds stays below what it says, however long it runs."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flip.config import schema
from flip.config.schema import Data
from flip.costs import loader as loader_bytes
from flip.data import mixture, prefetch
from flip.data.manifest.manifest import Manifest
from flip.data.memory import memory
from tests.flip.data.loading import BATCH, BLOCK, CHUNK, loader
from tests.flip.data.many_steps import LANES, streams

ROOT = Path(__file__).resolve().parents[3]


def bound(folder, lanes):
    return memory(mixture.sources(Data(manifest=str(folder), lanes=LANES)), lanes, BLOCK, 0, 0)


def really(stream):
    """Bytes of all buffers behind the samples of a stream; waits for them."""
    futures = [one for lane in stream._ahead._held for chunks in lane.values() for one in chunks.values()]
    return sum(len(piece) for one in futures for piece in one.result(60).pieces)


@pytest.mark.parametrize("lead", [0.0, prefetch.LEAD])
def test_what_is_held_is_counted_and_bounded(original, monkeypatch, lead):
    monkeypatch.setattr(prefetch, "LEAD", lead)
    said, held = bound(original, range(6)), []
    made, out = streams(original, range(6))
    for t in range(400):
        made.fill(out)
        held.append(made.counters.held)
        if t % 50 == 0:
            assert held[-1] == really(made._streams[0][0])
    made.close()
    assert max(held) <= said.most + said.flight and sum(held) / len(held) <= said.mean
    assert max(held) > 0.9 * said.most and sum(held) / len(held) > 0.75 * said.mean, "it is no idle bound"


@pytest.mark.long
def test_ten_thousand_steps_hold_no_more_than_a_thousand(original):
    command = [sys.executable, "-m", "tests.flip.data.many_steps", str(original)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found, said = json.loads(done.stdout), bound(original, range(1))
    assert found["held"] <= said.most + said.flight
    before, after = found["rss"]
    assert found["bytes"] > 30e6 and after - before < 4e6, "what was read is not kept"


def test_a_loader_says_it(original, caplog):
    with caplog.at_level(logging.INFO, "flip.data"):
        for rank in range(2):
            source = loader(original, rank, 2)
            source.batches(0, BATCH, "0.5").close()
    block = Manifest.load(original).mean_bytes * CHUNK * BLOCK
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1, "the first rank for all"
    mean, most = (f"{6 * blocks * block / 1e6:.1f} MB" for blocks in (1.625, 2))
    assert lines[0].startswith(f"of 6 lanes the loader holds {mean} of raw samples on average, {most} at the end of")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_plan_counts_all_batches_that_are_held(original, workers):
    """Those that the processes are ahead, in shared memory, and two of the rank: one in use, one that is made."""
    source = loader(original, workers=workers)
    batches = source.batches(0, BATCH, "0.5")
    arrays = [array for array in next(batches) if isinstance(array, torch.Tensor) and array.ndim]
    held = 2 * sum(array.nbytes for array in arrays)
    if workers:
        held += sum(array.nbytes for parts in source._pool._parts for part in parts for array in part)
    batches.close()
    spec = source.spec
    config = schema.Config(data=schema.Data(lanes=LANES, chunk=CHUNK, block=BLOCK, sample_bytes=0, workers=workers))
    config.model.image, config.model.text = spec.image, spec.text
    said = loader_bytes(config, schema.Stage(batch=BATCH, mask="0.5"))
    assert held <= said < 1.1 * held
