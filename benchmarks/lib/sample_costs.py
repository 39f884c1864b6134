"""Cost of each stage of our pipeline alone, on the same data and core."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.lib.pipelines import BLOCK, LANES, data_of
from benchmarks.lib.results import rounded
from benchmarks.lib.work import AUGMENT, LENGTH, PATCH, SIZE, Work
from flip.config import schema
from flip.data import augment as augmenting
from flip.data import decode, masking, sample_members
from flip.data.chunk_reader import ChunkReader, Sample
from flip.data.kernel import VisiblePatches
from flip.data.manifest.manifest import Manifest
from flip.data.order import SampleOrder
from flip.data.sample_members import captions_of, image_of
from flip.data.storage.checksums import crc32
from flip.tokenizer import Tokenizer

HELD = 512
"""Samples that the stages process repeatedly."""
REPEATS = 5


def measure(work: Work) -> list[dict[str, Any]]:
    """CPU microseconds per sample and stage; medians over REPEATS. Results are discarded."""
    manifest = Manifest.load(work.manifest)
    reader = ChunkReader()
    tokenizer = Tokenizer(work.tokenizer, LENGTH, True)
    numbers = range(min(manifest.chunks, max(1, HELD // work.chunk)))
    reads = [read[:3] for j in numbers for read in manifest.chunk_reads(j)]
    chunks = [reader.fetch(manifest, j) for j in numbers]
    pieces = [piece for chunk in chunks for piece in chunk.pieces]
    samples = [sample for chunk in chunks for sample in chunk.samples]
    captions = [captions_of(sample, ["txt"])[0] for sample in samples]
    batches = [slice(start, start + work.batch) for start in range(0, len(samples), work.batch)]
    ids = np.arange(len(samples))
    epochs = np.zeros(len(samples), dtype=np.int64)
    draws, keep = _drawn(work, epochs, ids)
    stages: dict[str, Callable[[], Iterable[Any]]] = {
        "read": lambda: (reader.read(*read) for read in reads),
        "CRC32": lambda: map(crc32, pieces),
        "tar headers": lambda: (replace(chunk).samples for chunk in chunks),
        "order": lambda: _ordered(work, len(batches)),
        "draws and masks": lambda: (_drawn(work, epochs[batch], ids[batch]) for batch in batches),
        **_pixels(data_of(work), samples, draws, keep),
        "captions": lambda: (captions_of(sample, ["txt"]) for sample in samples),
        "tokens": lambda: (tokenizer(captions[batch]) for batch in batches),
    }
    return [{"stage": name, "us": rounded(1e6 * _cpu(stage) / len(samples))} for name, stage in stages.items()]


def _pixels(
    data: schema.Data, samples: Sequence[Sample], draws: augmenting.Draws, keep: NDArray[np.int16]
) -> dict[str, Callable[[], Iterable[Any]]]:
    """The stages from a JPEG to visible patches: one with the kernel, three without it."""
    kernel = VisiblePatches.of(data, AUGMENT, schema.ImageTower(size=SIZE, patch=PATCH))
    rows = range(len(samples))
    if kernel is not None:
        contents = [sample_members.encoded_image(sample) for sample in samples]
        out = np.empty((keep.shape[1], 3 * PATCH * PATCH), np.uint8)
        return {"visible patches": lambda: (kernel.write(contents[row], draws, row, keep[row], out) for row in rows)}
    images = [image_of(sample, "simplejpeg") for sample in samples]
    views = [augmenting.view(image, SIZE, AUGMENT, draws, row, "torchvision") for row, image in enumerate(images)]
    return {
        "decode": lambda: (image_of(sample, "simplejpeg") for sample in samples),
        "crop and resize": lambda: (
            augmenting.view(images[row], SIZE, AUGMENT, draws, row, "torchvision") for row in rows
        ),
        "patches": lambda: (decode.patches(views[row], PATCH, keep[row]) for row in rows),
    }


def _cpu(stage: Callable[[], Iterable[Any]]) -> float:
    times = []
    for _ in range(REPEATS):
        start_time = time.process_time()
        deque(stage(), maxlen=0)
        times.append(time.process_time() - start_time)
    return statistics.median(times)


def _drawn(work: Work, epochs: Any, ids: Any) -> tuple[augmenting.Draws, Any]:
    patches = (SIZE // PATCH) ** 2
    keep = masking.visible_patches(work.seed, epochs, ids, patches, patches // 2)
    return augmenting.draw(AUGMENT, work.seed, epochs, ids), keep


def _ordered(work: Work, batches: int) -> Iterator[Any]:
    order = SampleOrder(work.seed, work.samples, work.chunk, BLOCK, LANES)
    return (order.positions(range(LANES), number * work.batch, work.batch) for number in range(batches))
