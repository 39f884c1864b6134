"""The cost of a sample on a core, by mask and kernel, and reads of shards by one and by several processes."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier
from typing import Any

from flip.data.chunk_reader import ChunkReader
from flip.data.kernel import obstacle
from flip.data.manifest.build import index
from flip.data.manifest.manifest import MARK, Manifest
from flip.environment import processor
from jobs.measuring.functions import input_stages, photo_shards

SYNTHETIC = 128
"""Synthetic photographs of 384 px: they take about two seconds to make."""
SHARDS = 2
SMALL_READ = 4096
SMALL_READS = 16
"""Bytes of a read that shows the latency of the storage, and how many there are."""
SIZE = 224
PATCH = 16


def cost(folder: str, manifest: str, seconds: float) -> dict[str, Any]:
    """Rows of the table of core speeds, and the stages of the work, of a manifest or of synthetic photographs."""
    import torch  # the processes of ``reads`` do without

    data = _manifest(folder, manifest)
    spec = input_stages.spec_of(data, "simplejpeg", "torchvision", SIZE, PATCH)
    torch.set_num_threads(1)  # as a loader process does
    rows, stages = input_stages.measure(data, spec, seconds)
    costs = {f"{row.mask:g}{' kernel' if row.kernel else ''}": round(1e6 / row.microseconds) for row in rows}
    return {
        "synthetic": not manifest,
        "processor": processor(),
        "samples_per_second": costs,
        "without_kernel_because": obstacle(spec.data, spec.augment, spec.image),
        "rows": [asdict(row) for row in rows],
        "cached": input_stages.cached(data),
        "stages": [stage.report() for stage in stages],
    } | input_stages.find_bottleneck(stages, with_kernel=rows[-1].kernel)


def reads(folder: str, manifest: str, seconds: float, processes: int) -> dict[str, Any]:
    """MB/s of reads in the order of training, by one process and by ``processes``; a small set may be cached.

    ``read_milliseconds``: the median of small reads of a single process, which is the latency of the storage.
    """
    data = _manifest(folder, manifest)
    result: dict[str, Any] = {"cached": input_stages.cached(data), "bytes_per_sample": round(data.mean_bytes)}
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, _meet, (context.Barrier(processes),)) as pool:
        wait([pool.submit(os.getpid) for _ in range(processes)])  # all have been started
        for count in dict.fromkeys((1, processes)):
            futures = [pool.submit(_read, str(data.folder), seconds, number) for number in range(count)]
            rates, milliseconds = zip(*(future.result() for future in futures), strict=True)
            result[f"megabytes_per_second_{count}"] = round(sum(rates), 1)
            result.setdefault("read_milliseconds", milliseconds[0])
    return result | {"processes": processes}


def _meet(barrier: Barrier) -> None:
    """Wait until all processes of the pool have started, so that none of them imports while another one reads."""
    barrier.wait()


def _manifest(folder: str, manifest: str) -> Manifest:
    """The manifest, or one of synthetic photographs, which rows with the same folder share."""
    if manifest:
        return Manifest.load(manifest)
    for mark in Path(folder).glob(f"photos-*/manifest/{MARK}"):
        return Manifest.load(str(mark.parent))
    photos = Path(tempfile.mkdtemp(prefix="photos-", dir=folder))
    pairs = photo_shards.samples(photo_shards.KINDS[1], SYNTHETIC, 0)
    paths = photo_shards.write(pairs, photos / "shards", SHARDS)
    return index([str(path) for path in paths], photos / "manifest", chunk=16)


def _read(manifest: str, seconds: float, seed: int) -> tuple[float, float]:
    """MB/s of this process, and the median milliseconds of small reads."""
    data = Manifest.load(manifest)
    reader = ChunkReader()
    chunks = input_stages.chunks_in_random_order(data, seed)
    size = 0
    for key, start, stop, _ in data.chunk_reads(next(chunks)):  # connects
        reader.read(key, start, stop)
    latency = _latency(data, reader, chunks, seconds)
    start_time = time.perf_counter()
    while (spent := time.perf_counter() - start_time) < seconds or not size:
        for key, start, stop, _ in data.chunk_reads(next(chunks)):
            size += len(reader.read(key, start, stop))
    return size / spent / 1e6, float(f"{1000 * latency:.3g}")


def _latency(data: Manifest, reader: ChunkReader, chunks: Iterator[int], limit: float) -> float:
    """The median seconds of small reads, which take about ``limit`` seconds at most."""
    times = list[float]()
    while len(times) < SMALL_READS and sum(times) < limit:
        key, start, stop, _ = next(iter(data.chunk_reads(next(chunks))))
        before = time.perf_counter()
        reader.read(key, start, min(start + SMALL_READ, stop))
        times.append(time.perf_counter() - before)
    return statistics.median(times)
