"""`shards bench`: the cost of a sample on one core, per stage (read, walk, decode, whole).

Each stage runs alone in this process for an equal share of the time, over chunks in random order, as in training. The
last one is the loader's own `BatchProducer`, which reads ahead. It tokenises with a vocabulary made of the captions,
because there may be no tokenizer yet. `measure_stages` measures, `find_bottleneck` names the limiting stage and the
number of workers, `bench` is the command. With ``--write`` it measures the whole work for the usual masks too, as rows
of the table that plans use.
"""

import argparse
import itertools
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from flip.config import derived, schema
from flip.config.yaml_io import dump_yaml
from flip.data import decode, kernel
from flip.data.chunk_reader import Chunk, ChunkReader, Sample
from flip.data.decode import DecodeError, captions_of, image_of
from flip.data.kernel import VisiblePatches
from flip.data.manifest.manifest import Manifest
from flip.data.masking import MaskSpec
from flip.data.order import DatasetSource, permute
from flip.data.worker import BatchBuffers, BatchProducer, WorkerConfig
from flip.environment import processor
from flip.files.creation import OUTPUT_MODE, atomic_write
from flip.runs.cgroup import total_memory
from flip.runs.errors import COMPLETE, ConfigError, DataError
from flip.tokenizer import train
from jobs.common.filesystem import writing
from jobs.common.text import table
from jobs.planning import core_speeds
from jobs.planning.core_speeds import SpeedRow
from tools.shards_commands.output import CommandResult, captions

STAGES = ("read", "walk", "decode", "whole")
BUFFER_BYTES = 64 << 20
"""Bytes of chunks in memory for the stages that do not read."""
MASKS = ("0", "0.5", "0.75")
"""Masks of the rows of ``--write``."""
BATCH = 64
"""Samples of a batch of the whole work."""
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
            "us_per_sample": round(1e6 * self.seconds / self.samples, 1),
            "cpu_us_per_sample": round(1e6 * self.cpu / self.samples, 1),
            "samples": self.samples,
            "skipped": self.skipped,
        }


def measure_stages(manifest: Manifest, spec: WorkerConfig, mask: str, seconds: float) -> list[PipelineStage]:
    """Measure all stages, in the order of STAGES. Raises ConfigError, DataError, StorageError."""
    if not seconds > 0:
        raise ConfigError("must be above 0", "seconds", seconds)
    try:
        valid = 0 <= Fraction(mask) < 1
    except (ValueError, ZeroDivisionError):
        valid = False
    if not valid:
        raise ConfigError("a mask is a share of the patches, at least 0 and below 1", "mask", mask)
    _visible_patch_count(spec, mask)
    reader = ChunkReader()
    share = seconds / len(STAGES)
    chunks = chunks_in_random_order(manifest, spec.seed)
    loaded, samples = _load(manifest, reader, chunks)
    with _tokenizer(spec, itertools.chain.from_iterable(samples)) as spec:
        return [
            _measure("read", share, lambda j: _read(manifest, reader, j), chunks),
            _measure("walk", share, _walk, itertools.cycle(loaded)),
            _measure("decode", share, lambda chunk: _decode(chunk, spec), itertools.cycle(samples)),
            _measure_whole("whole", share, manifest, spec, mask),
        ]


def measure_rows(manifest: Manifest, spec: WorkerConfig, seconds: float) -> list[SpeedRow]:
    """Measure the processor time of the whole work at each of MASKS, in ``seconds`` together."""
    _, chunks = _load(manifest, ChunkReader(), chunks_in_random_order(manifest, spec.seed))
    samples = list(itertools.chain.from_iterable(chunks))
    short = _median_short_side(samples)
    kernels = [False]
    if VisiblePatches.of(spec.data, spec.augment, spec.image) is not None:
        kernels.append(True)
    cases = list(itertools.product(kernels, MASKS))
    rows = []
    with _tokenizer(spec, samples) as spec:
        for uses_kernel, mask in cases:
            stage = _measure_whole(f"mask {mask}", seconds / len(cases), manifest, spec, mask, uses_kernel)
            cost = round(1e6 * stage.cpu / stage.samples, 1)
            markers = manifest.restart_markers_verified
            rows.append(SpeedRow(short, markers, spec.image.size, float(mask), uses_kernel, cost))
    return rows


def write_rows(path: str, rows: list[SpeedRow]) -> None:
    """Write rows to a file of speeds, which keeps its other rows. Raises ConfigError if it holds something else."""
    earlier = None
    if os.path.lexists(path):
        earlier = core_speeds.read_table(path)
    content = core_speeds.file_content(rows, processor(), earlier)
    with writing(path, "Choose another --write."), atomic_write(path, OUTPUT_MODE) as file:
        file.write(dump_yaml(content).encode())


def find_bottleneck(
    stages: list[PipelineStage], mean_bytes: float, want: float = 0.0, with_kernel: bool = False
) -> dict[str, Any]:
    """The limiting stage, shares of the time, samples per second of a worker, and what ``want`` samples/s need.

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
    report = {
        "limit": max(costs, key=costs.__getitem__),
        "shares": shares,
        "samples_per_second_per_worker": round(1e6 / total, 1),
    }
    if want:
        report |= {"want": want, "workers": math.ceil(want * total / 1e6)}
        report["megabytes_per_second_needed"] = round(want * mean_bytes / 1e6, 1)
    return report


def spec_of(
    manifest: Manifest, captions: list[str], decoder: str, resize: str, size: int, patch: int, seed: int
) -> WorkerConfig:
    """Worker configuration of the default recipe for these sizes. Raises ConfigError."""
    if not 0 < patch <= size or size % patch:
        raise ConfigError("the side of a patch must divide the side of the view", "patch", patch, f"Size is {size}.")
    data = schema.Data(chunk=manifest.chunk, lanes=1, decoder=decoder, resize=resize, captions=captions)
    return WorkerConfig(data, schema.Augment(), schema.ImageTower(size=size, patch=patch), schema.TextTower(), seed)


def _visible_patch_count(spec: WorkerConfig, mask: str) -> int:
    """Patches that a mask leaves. Raises ConfigError if that is none."""
    count = derived.visible_patch_count(spec.image, mask)
    if count < 1:
        raise ConfigError(f"keeps none of {spec.patches} patches", "mask", mask, "Mask less.")
    return count


def _median_short_side(samples: list[Sample]) -> int:
    """The median of the shorter sides of images, pixels. Raises DataError if no image has a header."""
    sides = []
    for sample in samples:
        with suppress(DecodeError):
            header = decode.header(decode.encoded_image(sample))
            sides.append(min(header["width"], header["height"]))
    if not sides:
        raise DataError("no image of a chunk has a readable header", "bench", remedy=VERIFY)
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
            raise DataError("no sample can be decoded", "bench", remedy=VERIFY)
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
        raise DataError("no sample has a caption", "bench", spec.data.captions, VERIFY)
    with tempfile.TemporaryDirectory(prefix="flip-bench-") as folder:
        path = Path(folder, "tokenizer.json")
        train(texts, spec.text.vocabulary, path)
        yield replace(spec, data=replace(spec.data, tokenizer=str(path)))


def _measure_whole(
    name: str, share: float, manifest: Manifest, spec: WorkerConfig, mask: str, uses_kernel: bool = True
) -> PipelineStage:
    """Measure the whole work of a loader process: batches of a lane that has all of the data set."""
    masks = MaskSpec(_visible_patch_count(spec, mask), spec.text.length)
    out = BatchBuffers(*(np.empty(shape, kind) for shape, kind in BatchBuffers.shapes(spec, BATCH, masks)))
    lanes = range(1)
    with _kernel(uses_kernel):
        producer = BatchProducer(spec, [DatasetSource(0, manifest, lanes)], lanes, 0, BATCH, masks)

    def fill(_: None) -> Work:
        replaced, _notes = producer.fill(out)
        return BATCH, round(BATCH * manifest.mean_bytes), replaced

    with closing(producer):
        return _measure(name, share, fill, itertools.repeat(None))


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


def bench(options: argparse.Namespace) -> CommandResult:
    """Measure each stage of the data pipeline on one core of this machine."""
    manifest = Manifest.load(options.manifest)
    members = captions(options)
    sizes = options.size, options.patch
    spec = spec_of(manifest, members, options.decoder, options.resize, *sizes, options.seed)
    if options.resize == "torchvision":
        import torch

        torch.set_num_threads(1)  # as a loader process does
    stages = measure_stages(manifest, spec, options.mask, options.seconds)
    report = {
        "manifest": str(manifest.folder),
        "decoder": options.decoder,
        "resize": options.resize,
        "size": options.size,
        "stages": [stage.report() for stage in stages],
        "reads_may_be_cached": cached(manifest),
    }
    uses_kernel = VisiblePatches.of(spec.data, spec.augment, spec.image) is not None
    report["kernel"] = uses_kernel
    report |= find_bottleneck(stages, manifest.mean_bytes, options.want, uses_kernel)
    if options.write:
        rows = measure_rows(manifest, spec, options.seconds)
        write_rows(options.write, rows)
        report |= {"written": options.write, "rows": [asdict(row) for row in rows]}
    return CommandResult(report, COMPLETE, _text(report))


def _text(report: dict[str, Any]) -> str:
    columns = {
        "samples/s": ("samples_per_second", ",.0f"),
        "MB/s": ("megabytes_per_second", ",.1f"),
        "us/sample": ("us_per_sample", ",.0f"),
        "CPU us/sample": ("cpu_us_per_sample", ",.0f"),
    }
    rows = [
        {"stage": row["stage"]} | {name: format(row[key], form) for name, (key, form) in columns.items()}
        for row in report["stages"]
    ]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in report["shares"].items())
    used = "without"
    if report["kernel"]:
        used = "with"
    lines = [
        table(rows),
        "(read: bytes from storage only; walk: tar headers in memory; decode: whole images in memory; "
        f"whole: all work of a worker, which reads ahead, {used} the visible-patch kernel; view: what remains of it; "
        "wait: its time without work)",
        f"bottleneck: {report['limit']}; shares of the time of a sample: {shares}",
        f"one worker on a core of its own: {report['samples_per_second_per_worker']:,.0f} samples/s",
    ]
    if report["reads_may_be_cached"]:
        lines.append("These shards fit into this machine's memory: reads may have come from its page cache.")
    if "want" in report:
        lines.append(
            f"{report['want']:,.0f} images/s need {report['workers']:,} workers, one core each, "
            f"and {report['megabytes_per_second_needed']:,.0f} MB/s from storage"
        )
    if "written" in report:
        costs = ", ".join(
            f"mask {row['mask']:g}{' with the kernel' if row['kernel'] else ''} {row['microseconds']:,.0f} us"
            for row in report["rows"]
        )
        short = report["rows"][0]["short"]
        lines.append(f"{report['written']}: for plans (core_speeds of a profile), images of {short} px: {costs}")
    return "\n".join(lines)
