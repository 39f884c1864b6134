"""`shards bench`: the cost of a sample on one core, per stage (read, walk, decode, whole).

Each stage runs alone in this process for an equal share of the time, over chunks in random order, as in training.
`measure_stages` measures, `judge` names the limiting stage and the number of workers, `bench` is the command.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np

from flip.config import schema
from flip.data import augment as augmenting
from flip.data import decode, masking
from flip.data.chunk_reader import ChunkReader, Sample
from flip.data.decode import Undecodable
from flip.data.manifest import tar
from flip.data.manifest.manifest import Manifest
from flip.data.order import permute
from flip.data.worker import Spec, captions_of, image_of
from flip.runs.errors import COMPLETE, ConfigError, DataError
from tools.shards_commands.output import Outcome, captions

STAGES = ("read", "walk", "decode", "whole")
_T = TypeVar("_T")

HELD = 64 << 20
"""Bytes of chunks held in memory for the stages that do not read."""


@dataclass
class Stage:
    """Measurement of one stage. ``cpu``: seconds of this process on all of its threads."""

    name: str
    samples: int
    bytes: int
    seconds: float
    cpu: float
    skipped: int = 0
    """Samples that cannot be decoded."""

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.samples / self.seconds

    @property
    def wall_us(self) -> float:
        """Microseconds per sample."""
        return 1e6 * self.seconds / self.samples

    @property
    def cpu_us(self) -> float:
        """CPU microseconds per sample."""
        return 1e6 * self.cpu / self.samples


@dataclass(frozen=True)
class Verdict:
    """``limit``: the stage that takes most of a sample's time: read, walk, decode, or view (crop, resize, patches)."""

    limit: str
    shares: dict[str, float]
    """Stage -> share of the time per sample; ``view`` is the remainder."""
    per_worker: float
    """Samples per second of one worker."""
    workers: int
    """Workers needed for ``--want``, one core each; 0 if it was not given."""
    wanted_bytes: float
    """Bytes per second that storage must deliver to these workers."""


def measure_stages(manifest: Manifest, spec: Spec, mask: str, seconds: float) -> list[Stage]:
    """Measure all stages, in the order of STAGES. Raises ConfigError, DataError, StorageError."""
    if not seconds > 0:
        raise ConfigError("must be above 0", "seconds", seconds)
    _check_mask(spec.patches, mask)
    if manifest.samples < manifest.chunk:
        raise ConfigError("there is no whole chunk", str(manifest.folder), manifest.samples)
    reader, share = ChunkReader(), seconds / len(STAGES)
    chunks = _chunks(manifest, spec.seed)
    pieces, samples = _hold(manifest, reader, chunks)
    return [
        _measure("read", share, lambda j: _read(manifest, reader, j), chunks),
        _measure("walk", share, lambda chunk: _walk(chunk, manifest.chunk), _again(pieces)),
        _measure("decode", share, lambda chunk: _decode(chunk, spec), _again(samples)),
        _measure("whole", share, _Whole(manifest, reader, spec, mask), chunks),
    ]


def judge(stages: list[Stage], mean_bytes: float, want: float = 0.0) -> Verdict:
    """Name the limiting stage, and the number of workers that deliver ``want`` samples per second."""
    by_name = {stage.name: stage for stage in stages}
    whole = by_name["whole"]
    spent = {name: min(by_name[name].wall_us, whole.wall_us) for name in ("read", "walk", "decode")}
    spent["view"] = max(0.0, whole.wall_us - sum(spent.values()))
    total = sum(spent.values())
    shares = {name: cost / total for name, cost in spent.items()}
    workers = math.ceil(want / whole.rate) if want else 0
    return Verdict(max(shares, key=shares.__getitem__), shares, whole.rate, workers, want * mean_bytes)


def spec_of(
    manifest: Manifest, captions: list[str], decoder: str, resize: str, size: int, patch: int, seed: int
) -> Spec:
    """Worker configuration of the default recipe for these sizes. Raises ConfigError."""
    if not 0 < patch <= size or size % patch:
        raise ConfigError("the side of a patch must divide the side of the view", "patch", patch, f"Size is {size}.")
    data = schema.Data(chunk=manifest.chunk, lanes=1, decoder=decoder, resize=resize, captions=captions)
    return Spec(data, schema.Augment(), schema.ImageTower(size=size, patch=patch), schema.TextTower(), seed)


def _check_mask(patches: int, mask: str) -> None:
    try:
        share = Fraction(mask)
    except (ValueError, ZeroDivisionError):
        share = Fraction(-1)
    if not 0 <= share < 1:
        raise ConfigError("a mask is a share of the patches, at least 0 and below 1", "mask", mask)
    if masking.kept(patches, mask) < 1:
        raise ConfigError(f"keeps none of {patches} patches", "mask", mask, "Mask less.")


Work = tuple[int, int, int]
"""Samples done, their bytes, samples skipped."""


def _measure(name: str, share: float, work: Callable[[_T], Work], items: Iterator[_T]) -> Stage:
    work(next(items))  # what is only slow the first time: imports, connections
    stage, cpu, begin = Stage(name, 0, 0, 0.0, 0.0), time.process_time(), time.perf_counter()
    while stage.seconds < share or not stage.samples:
        samples, size, skipped = work(next(items))
        stage.samples, stage.bytes, stage.skipped = stage.samples + samples, stage.bytes + size, stage.skipped + skipped
        stage.seconds, stage.cpu = time.perf_counter() - begin, time.process_time() - cpu
        if not stage.samples and stage.seconds > 10 * share:
            raise DataError("no sample can be decoded", "bench", remedy="Check the shards: tools/shards.py verify")
    return stage


def _chunks(manifest: Manifest, seed: int) -> Iterator[int]:
    """Complete chunks in random order, epoch after epoch."""
    count, visit = manifest.samples // manifest.chunk, 0
    while True:
        for at in range(0, count, 1024):
            yield from permute(seed, visit, count, np.arange(at, min(at + 1024, count))).tolist()
        visit += 1


def _hold(
    manifest: Manifest, reader: ChunkReader, chunks: Iterator[int]
) -> tuple[list[list[bytes]], list[list[Sample]]]:
    pieces, samples, held = list[list[bytes]](), list[list[Sample]](), 0
    for _ in range(manifest.samples // manifest.chunk):
        j = next(chunks)
        samples.append(reader.read_chunk(manifest, j))
        pieces.append([reader.read(key, start, stop) for key, start, stop, _ in manifest.chunk_reads(j)])
        held += 2 * sum(map(len, pieces[-1]))
        if held > HELD:
            break
    return pieces, samples


def _again(items: list[_T]) -> Iterator[_T]:
    while True:
        yield from items


def _read(manifest: Manifest, reader: ChunkReader, j: int) -> Work:
    got = [len(reader.read(key, start, stop)) for key, start, stop, _ in manifest.chunk_reads(j)]
    return len(manifest.chunk_ids(j)), sum(got), 0


def _walk(pieces: list[bytes], samples: int) -> Work:
    for piece in pieces:
        list(tar.samples(memoryview(piece)))  # more than its own where others were filtered out
    return samples, sum(map(len, pieces)), 0


def _decode(chunk: list[Sample], spec: Spec) -> Work:
    done = size = 0
    for sample in chunk:
        try:
            image_of(sample, spec.data.decoder, spec.data.to_rgb)
        except Undecodable:
            continue
        done, size = done + 1, size + sum(map(len, sample.values()))
    return done, size, len(chunk) - done


class _Whole:
    """The work of a loader process on a chunk: read, CRC, walk, decode, crop, cut visible patches; no tokenizer."""

    def __init__(self, manifest: Manifest, reader: ChunkReader, spec: Spec, mask: str) -> None:
        self.manifest, self.reader, self.spec = manifest, reader, spec
        self.kept = masking.kept(spec.patches, mask)

    def __call__(self, j: int) -> Work:
        spec, ids = self.spec, np.array(self.manifest.chunk_ids(j))
        visits = np.zeros_like(ids)
        draws = augmenting.Draws.of(spec.seed, visits, ids)
        keep = masking.keep(spec.seed, visits, ids, spec.patches, self.kept)
        done = size = 0
        for row, sample in enumerate(self.reader.read_chunk(self.manifest, j)):
            try:
                image = image_of(sample, spec.data.decoder, spec.data.to_rgb)
                captions_of(sample, spec.data.captions)
            except Undecodable:
                continue
            view = augmenting.view(image, spec.image.size, spec.augment, draws, row, spec.data.resize)
            decode.patches(view, spec.image.patch, keep[row])
            done, size = done + 1, size + sum(map(len, sample.values()))
        return done, size, len(ids) - done


def cached(manifest: Manifest) -> bool:
    """Whether reads may have come from the page cache: the shards are local and fit into memory."""
    local = not any("://" in key for key in manifest.keys)
    return local and int(manifest.shards[:, 1].sum()) < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def bench(options: argparse.Namespace) -> Outcome:
    """Measure each stage of the data pipeline on one core of this machine."""
    if not 0 <= options.want < math.inf:
        raise ConfigError("must be a number, and not negative", "--want", options.want)
    manifest = Manifest.load(options.manifest)
    members, sizes = captions(options), (options.size, options.patch)
    spec = spec_of(manifest, members, options.decoder, options.resize, *sizes, options.seed)
    if options.resize == "torchvision":
        import torch

        torch.set_num_threads(1)  # as a loader process does
    stages = measure_stages(manifest, spec, options.mask, options.seconds)
    verdict = judge(stages, manifest.mean_bytes, options.want)
    rows = [
        {
            "stage": one.name,
            "samples_per_second": round(one.rate, 1),
            "megabytes_per_second": round(one.bytes / 1e6 / one.seconds, 1),
            "us_per_sample": round(one.wall_us, 1),
            "cpu_us_per_sample": round(one.cpu_us, 1),
            "samples": one.samples,
            "skipped": one.skipped,
        }
        for one in stages
    ]
    report = {
        "manifest": str(manifest.folder),
        "decoder": options.decoder,
        "resize": options.resize,
        "size": options.size,
        "stages": rows,
        "limit": verdict.limit,
        "shares": {name: round(share, 3) for name, share in verdict.shares.items()},
        "samples_per_second_per_worker": round(verdict.per_worker, 1),
        "reads_may_be_cached": cached(manifest),
    }
    if options.want:
        needed = verdict.wanted_bytes / 1e6
        report |= {"want": options.want, "workers": verdict.workers, "megabytes_per_second_needed": round(needed, 1)}
    return Outcome(report, COMPLETE, _bench_text(report))


def _bench_text(report: dict[str, Any]) -> str:
    lines = [f"{'stage':8}{'samples/s':>12}{'MB/s':>10}{'us/sample':>12}{'of them CPU':>13}"]
    for one in report["stages"]:
        lines.append(
            f"{one['stage']:8}{one['samples_per_second']:>12,.0f}{one['megabytes_per_second']:>10,.1f}"
            f"{one['us_per_sample']:>12,.0f}{one['cpu_us_per_sample']:>13,.0f}"
        )
    shares = ", ".join(f"{name} {share:.0%}" for name, share in report["shares"].items())
    lines += [
        "(read: bytes from the storage alone; walk: tar headers in memory; decode: images in memory; "
        "whole: all that a worker does but the tokenizer)",
        f"{report['limit']} limits: of a sample's time {shares}",
        f"one worker on a core of its own: {report['samples_per_second_per_worker']:,.0f} samples/s",
    ]
    if report["reads_may_be_cached"]:
        lines.append(
            "These shards fit into this machine's memory: reads may have come from there and not from the storage."
        )
    if "want" in report:
        lines.append(
            f"{report['want']:,.0f} images/s take {report['workers']:,} workers, as many cores, "
            f"and {report['megabytes_per_second_needed']:,.0f} MB/s of the storage"
        )
    return "\n".join(lines)
