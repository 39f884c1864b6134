"""The cost of a sample on one core: the complete work of a loader process at the usual masks, and of its stages.

Each stage runs alone in this process, over chunks in random order, as in training: ``read`` (bytes from storage),
``walk`` (tar headers in memory), ``decode`` (whole images in memory), ``whole``. The last one is the loader's own
`BatchProducer`, which reads ahead. It tokenises with a vocabulary made of the captions, because there may be no
tokenizer yet. ``measure`` measures, `find_bottleneck` names the limiting stage.
"""

import itertools
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from flip.common.image_formats import EXTENSIONS
from flip.config import derived, schema
from flip.data import decode, kernel, sample_members
from flip.data.chunk_reader import Chunk, ChunkReader, Sample
from flip.data.decode import DecodeError
from flip.data.kernel import VisiblePatches
from flip.data.manifest.manifest import Manifest
from flip.data.masking import MaskSpec
from flip.data.order import permute
from flip.data.sample_members import captions_of, image_of
from flip.data.sources import DatasetSource
from flip.data.worker import BatchBuffers, BatchProducer, WorkerConfig
from flip.runs.cgroup import total_memory
from flip.runs.errors import ConfigError, DataError
from flip.tokenizer import train
from jobs.planning.core_speeds import SpeedRow

BUFFER_BYTES = 64 << 20
"""Bytes of chunks in memory for the stages that do not read."""
MASKS = ("0", "0.5", "0.75")
STAGES_MASK = "0.5"
"""Masks of the rows, and the one at which the complete work is compared with its stages."""
BATCH = 64
"""Samples of a batch of the complete work."""
DECODE_AND_VIEW = "decode and view"
WAIT = "wait"
VERIFY = "Check the shards: flip shards verify"
_T = TypeVar("_T")
Work = tuple[int, int, int]
"""Samples done, their bytes, samples skipped."""


@dataclass
class PipelineStage:
    """Measurement of one stage."""

    name: str
    samples: int = 0
    bytes: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    """Seconds of this process on all of its threads."""
    skipped: int = 0
    """Samples that cannot be decoded."""

    def report(self) -> dict[str, Any]:
        return {
            "stage": self.name,
            "samples_per_second": round(self.samples / self.seconds, 1),
            "megabytes_per_second": round(self.bytes / 1e6 / self.seconds, 1),
            "microseconds": round(1e6 * self.cpu / self.samples, 1),
            "samples": self.samples,
            "skipped": self.skipped,
        }


def measure(manifest: Manifest, spec: WorkerConfig, seconds: float) -> tuple[list[SpeedRow], list[PipelineStage]]:
    """Measure the processor time of the complete work at each of MASKS, and the stages at STAGES_MASK.

    Takes ``seconds`` together. Raises ConfigError, DataError, StorageError.
    """
    reader = ChunkReader()
    chunks = chunks_in_random_order(manifest, spec.seed)
    loaded, samples = _load(manifest, reader, chunks)
    every = list(itertools.chain.from_iterable(samples))
    spec = replace(spec, data=replace(spec.data, captions=caption_members(every[0])))
    kernels = [False]
    if VisiblePatches.of(spec.data, spec.augment, spec.image) is not None:
        kernels.append(True)
    cases = list(itertools.product(kernels, MASKS))
    short = _median_short_side(every)
    markers = manifest.restart_markers_verified
    share = seconds / (len(cases) + 3)
    with _tokenizer(spec, every) as spec:
        stages = [
            _measure("read", share, lambda j: _read(manifest, reader, j), chunks),
            _measure("walk", share, _walk, itertools.cycle(loaded)),
            _measure("decode", share, lambda chunk: _decode(chunk, spec), itertools.cycle(samples)),
        ]
        rows = []
        for uses_kernel, mask in cases:
            work = _measure_work(share, manifest, spec, mask, uses_kernel)
            cost = round(1e6 * work.cpu / work.samples, 1)
            rows.append(SpeedRow(short, markers, spec.image.size, float(mask), uses_kernel, cost))
            if mask == STAGES_MASK:
                whole = work  # with the kernel, if it is used
    return rows, [*stages, whole]


def caption_members(sample: Sample) -> list[str]:
    """A member of a sample with text, as ``data.captions`` names it: the cost of any caption is about the same."""
    if "txt" in sample:
        return ["txt"]
    texts = [name for name in sample if name not in EXTENSIONS and not name.endswith("json")]
    return [*sample_members.json_fields(sample), *texts][:1]


def find_bottleneck(stages: list[PipelineStage], with_kernel: bool = False) -> dict[str, Any]:
    """The limiting stage, shares of the time, and samples per second of a worker.

    A worker reads ahead, so that a stage counts by its processor time. ``wait``: the time of "whole" without work, for
    storage or because of other programs. ``view``: its processor time that the other stages do not explain: crops,
    patches, tokens. ``with_kernel``: "whole" used the visible-patch kernel, which decodes no whole images, so that
    decoding and view are one share.
    """
    microseconds = {stage.name: 1e6 * stage.cpu / stage.samples for stage in stages}
    work = microseconds.pop("whole")
    (whole,) = (stage for stage in stages if stage.name == "whole")
    total = max(work, 1e6 * whole.seconds / whole.samples)
    rest = "view"
    if with_kernel:
        del microseconds["decode"]
        rest = DECODE_AND_VIEW
    costs = {name: min(cost, work) for name, cost in microseconds.items()}
    costs[rest] = max(0.0, work - sum(costs.values()))
    if total > work:
        costs[WAIT] = total - work
    shares = {name: round(cost / sum(costs.values()), 3) for name, cost in costs.items()}
    return {
        "limit": max(costs, key=costs.__getitem__),
        "shares": shares,
        "samples_per_second_per_worker": round(1e6 / total, 1),
    }


def spec_of(manifest: Manifest, decoder: str, resize: str, size: int, patch: int) -> WorkerConfig:
    """Worker configuration of the default recipe for these sizes."""
    data = schema.Data(chunk=manifest.chunk, lanes=1, decoder=decoder, resize=resize)
    return WorkerConfig(data, schema.Augment(), schema.ImageTower(size=size, patch=patch), schema.TextTower(), 0)


def _median_short_side(samples: list[Sample]) -> int:
    """The median of the shorter sides of images, pixels. Raises DataError if no image has a header."""
    sides = []
    for sample in samples:
        with suppress(DecodeError):
            header = decode.header(sample_members.encoded_image(sample))
            sides.append(min(header["width"], header["height"]))
    if not sides:
        raise DataError("no image of a chunk has a readable header", "input_cost", remedy=VERIFY)
    return sorted(sides)[len(sides) // 2]


def _measure(name: str, share: float, work: Callable[[_T], Work], items: Iterator[_T]) -> PipelineStage:
    work(next(items))  # warm up: imports, connections
    stage = PipelineStage(name)
    cpu = time.process_time()
    start_time = time.perf_counter()
    while stage.seconds < share or not stage.samples:
        samples, size, skipped = work(next(items))
        stage.samples += samples
        stage.bytes += size
        stage.skipped += skipped
        stage.seconds = time.perf_counter() - start_time
        stage.cpu = time.process_time() - cpu
        if not stage.samples and stage.seconds > 10 * share:
            raise DataError("no sample can be decoded", "input_cost", remedy=VERIFY)
    return stage


def chunks_in_random_order(manifest: Manifest, seed: int) -> Iterator[int]:
    """Complete chunks with samples that are not excluded, in random order, epoch after epoch.

    Raises ConfigError if there is none.
    """
    count = manifest.samples // manifest.chunk
    excluded = Counter(id // manifest.chunk for id in manifest.exceptions)
    skipped = {j for j, samples in excluded.items() if samples == manifest.chunk}  # may be damaged
    if count <= len(skipped):
        raise ConfigError("no complete chunk has a sample that is not excluded", str(manifest.folder))
    for epoch in itertools.count():
        for start in range(0, count, 1024):
            order = permute(seed, epoch, count, np.arange(start, min(start + 1024, count))).tolist()
            yield from (j for j in order if j not in skipped)


def _load(manifest: Manifest, reader: ChunkReader, numbers: Iterator[int]) -> tuple[list[Chunk], list[list[Sample]]]:
    """Chunks and their samples, up to BUFFER_BYTES."""
    chunks = list[Chunk]()
    samples = list[list[Sample]]()
    size = 0
    for j in itertools.islice(numbers, manifest.samples // manifest.chunk):
        chunk = reader.fetch(manifest, j)
        chunks.append(chunk)
        samples.append(chunk.samples)
        size += sum(map(len, chunk.pieces))
        if size > BUFFER_BYTES:
            break
    return chunks, samples


def _read(manifest: Manifest, reader: ChunkReader, j: int) -> Work:
    sizes = [len(reader.read(key, start, stop)) for key, start, stop, _ in manifest.chunk_reads(j)]
    return len(manifest.chunk_ids(j)), sum(sizes), 0


def _walk(chunk: Chunk) -> Work:
    return len(chunk.keys()), sum(map(len, chunk.pieces)), 0  # walks over samples that filters left out, too


def _decode(chunk: list[Sample], spec: WorkerConfig) -> Work:
    done = size = 0
    for sample in chunk:
        try:
            image_of(sample, spec.data.decoder, spec.data.to_rgb, spec.data.exif)
        except DecodeError:
            continue
        done += 1
        size += sum(map(len, sample.values()))
    return done, size, len(chunk) - done


@contextmanager
def _tokenizer(spec: WorkerConfig, samples: Iterable[Sample]) -> Iterator[WorkerConfig]:
    """The specification with a tokenizer of the samples' captions. Raises DataError if there is no caption."""
    texts = list[str]()
    for sample in samples:
        with suppress(DecodeError):
            texts += captions_of(sample, spec.data.captions)
    if not texts:
        raise DataError("no sample has a caption", "input_cost", spec.data.captions, VERIFY)
    with tempfile.TemporaryDirectory(prefix="flip-input-") as folder:
        path = Path(folder, "tokenizer.json")
        train(texts, spec.text.vocabulary, path)
        yield replace(spec, data=replace(spec.data, tokenizer=str(path)))


def _measure_work(share: float, manifest: Manifest, spec: WorkerConfig, mask: str, uses_kernel: bool) -> PipelineStage:
    """Measure the complete work of a loader process: batches of a lane that has all of the data set."""
    masks = MaskSpec(derived.visible_patch_count(spec.image, mask), spec.text.length)
    out = BatchBuffers(*(np.empty(shape, kind) for shape, kind in BatchBuffers.shapes(spec, BATCH, masks)))
    lanes = range(1)
    with _kernel(uses_kernel):
        producer = BatchProducer(spec, [DatasetSource(0, manifest, lanes)], lanes, 0, BATCH, masks)

    def fill(_: None) -> Work:
        return BATCH, round(BATCH * manifest.mean_bytes), producer.fill(out).replaced

    with closing(producer):
        return _measure("whole", share, fill, itertools.repeat(None))


@contextmanager
def _kernel(is_used: bool) -> Iterator[None]:
    """Switches the visible-patch kernel off for loaders that are made inside, unless it is used."""
    before = os.environ.get(kernel.VARIABLE)
    if not is_used:
        os.environ[kernel.VARIABLE] = "0"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(kernel.VARIABLE, None)
        else:
            os.environ[kernel.VARIABLE] = before


def cached(manifest: Manifest) -> bool:
    """Whether reads may have come from the page cache: the shards are local and fit into memory."""
    local = not any("://" in key for key in manifest.keys)
    return local and int(manifest.shards[:, 1].sum()) < total_memory()
