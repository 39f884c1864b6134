"""A loader worker without its process, or as a separate process: ``python -m tests.flip.data.many_steps FOLDER``.

Prints a line of JSON: RSS after 1,000 steps and after 10,000, and the largest number of bytes held. No torch.
"""

import json
import sys
from pathlib import Path

import numpy as np
import psutil

from flip.config import schema
from flip.data import sources
from flip.data.masking import MaskSpec
from flip.data.worker import BatchBuffers, BatchProducer, WorkerConfig

CHUNK = 2
BLOCK = 3
LANES = 12
KEPT = MaskSpec(4, 8)


def streams(folder, lanes):
    """Return a producer for some of LANES lanes, with one sample per lane and step, and its output buffers."""
    data = schema.Data(
        manifest=str(folder), tokenizer=str(Path(folder).parent / "tokenizer.json"), chunk=CHUNK, block=BLOCK,
        lanes=LANES, decoder="pillow", resize="pillow",
    )  # fmt: skip
    image = schema.ImageTower(size=24, patch=8)
    text = schema.TextTower(length=8, vocabulary=300)
    config = WorkerConfig(data, schema.Augment(), image, text, seed=11)
    out = BatchBuffers(*(np.empty(shape, kind) for shape, kind in BatchBuffers.shapes(config, len(lanes), KEPT)))
    return BatchProducer(config, sources.load_sources(data), lanes, 0, LANES, KEPT), out


def main(folder):
    producer, out = streams(folder, range(1))
    process = psutil.Process()
    rss = {}
    held = 0
    for step in range(1, 10_001):
        producer.fill(out)
        held = max(held, producer.counters.held)
        if step in (1_000, 10_000):
            rss[step] = process.memory_info().rss
    print(json.dumps({"rss": list(rss.values()), "held": held, "bytes": producer.counters.bytes}))


if __name__ == "__main__":
    main(sys.argv[1])
