"""Time to the first batch at full size: loading the manifest and the order of samples; compared with a permutation.

A manifest of the size of LAION-2B (230,000 shards, 1.92e9 samples, R = 256; tables only) is written to a temporary
folder and loaded in new processes; batches are computed at several positions of the stream.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np

from benchmarks.lib import results, synthetic
from benchmarks.lib.results import median, rounded
from flip.data import masking
from flip.data.manifest import manifest
from flip.data.manifest.manifest import Manifest
from flip.data.order import SampleOrder

BATCH = 32_768
LANES = 4096
BLOCK = 4
WORLDS = 8, 512
SHARES = 0.0, 0.01, 0.5, 0.99, 3.0
PATCHES = 196
MASK = "0.5"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=synthetic.SHARDS, help="default: %(default)s")
    parser.add_argument("--peer", type=int, default=100_000_000, help="ids that NumPy permutes (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="medians are over these (default: %(default)s)")
    results.options(parser, "order")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.shards = 600
        chosen.peer = 1000
        chosen.repeats = 1
    results.publish(measure(chosen.shards, chosen.peer, chosen.repeats, chosen.seed), chosen)
    return 0


def measure(shards: int, peer: int, repeats: int, seed: int) -> dict[str, Any]:
    """All figures of one data set."""
    facts = results.machine()
    with tempfile.TemporaryDirectory(prefix="flip-order-") as folder:
        table = synthetic.table(shards, seed)
        start_time = time.perf_counter()
        manifest.write(Path(folder) / "m", table, synthetic.checksums(table, seed))
        written = time.perf_counter() - start_time
        sizes = {path.name: path.stat().st_size for path in sorted((Path(folder) / "m").iterdir())}
        loads = [load(f"{folder}/m", check, repeats) for check in (False, True)]
        loaded = Manifest.load(f"{folder}/m", check=False)
        lanes, batch = fit(loaded.samples // loaded.chunk)
        order = SampleOrder(seed, loaded.samples, loaded.chunk, BLOCK, lanes)
        return {
            "benchmark": "order",
            "machine": facts,
            "data": {"shards": shards, "N": loaded.samples, "R": loaded.chunk, "Q": BLOCK, "L": lanes, "B": batch},
            "disk": {"bytes": sum(sizes.values()), "write_seconds": rounded(written)} | sizes,
            "load": loads,
            "first_batch": [first(order, batch, share, world, repeats) for share in SHARES for world in (1, *WORLDS)],
            "afterwards": [after(order, batch, world, repeats) for world in WORLDS],
            "chunk_reads_per_second": reads(loaded, seed, repeats),
            "peer": permutation(peer, order, seed),
        }


def fit(chunks: int) -> tuple[int, int]:
    """L and B: 4096 and 32,768, less if there are too few data for them (2 L Q <= C)."""
    lanes = LANES
    while lanes > WORLDS[-1] and 2 * lanes * BLOCK > chunks:
        lanes //= 2
    return lanes, BATCH * lanes // LANES


def load(folder: str, check: bool, repeats: int) -> dict[str, Any]:
    """Seconds and memory of Manifest.load, each time in a new process; the files are in the page cache."""
    times = []
    grown = []
    for _ in range(repeats):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            seconds, more = pool.submit(_load, folder, check).result()
        times.append(seconds)
        grown.append(more)
    at = int(np.argsort(times)[len(times) // 2])
    return {"check": check, "seconds": rounded(times[at]), "slowest": rounded(max(times))} | grown[at]


def _load(folder: str, check: bool) -> tuple[float, dict[str, int]]:
    before = _resident()
    start_time = time.perf_counter()
    loaded = Manifest.load(folder, check)
    seconds = time.perf_counter() - start_time
    now = _resident()
    assert loaded.samples
    return seconds, {f"{name}_bytes": now[name] - before[name] for name in before}


def _resident() -> dict[str, int]:
    """Bytes of this process: private (anonymous) memory, mapped file pages, and the peak of both."""
    names = {"RssAnon": "private", "RssFile": "mapped", "VmHWM": "peak"}
    fields = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {names[f[0][:-1]]: int(f[1]) * 1024 for f in fields if f and f[0][:-1] in names}


def first(order: SampleOrder, batch: int, share: float, world: int, repeats: int) -> dict[str, Any]:
    """Milliseconds until ids and epochs of rank 0's part of the global batch at S = share * N are known."""
    start = int(share * order.samples) // batch * batch

    def run() -> None:
        fresh = SampleOrder(order.seed, order.samples, order.chunk, order.block, order.lanes)
        fresh.batch(start, batch, range(order.lanes // world))

    times = [1000 * results.seconds(run) for _ in range(repeats)]
    return {"passes": share, "S": start, "W": world} | results.spread(times, "milliseconds")


def after(order: SampleOrder, batch: int, world: int, repeats: int) -> dict[str, Any]:
    """Microseconds per sample of one rank over full blocks: the order alone, and with its masks."""
    lanes = range(order.lanes // world)
    count = batch // order.lanes
    count_visible = round(PATCHES * (1 - float(MASK)))
    steps = order.block_samples // count

    def run(masks: bool) -> None:
        fresh = SampleOrder(order.seed, order.samples, order.chunk, order.block, order.lanes)
        for step in range(steps):
            ids, epochs = fresh.positions(lanes, step * count, count)
            if masks:
                masking.visible_patches(order.seed, epochs.ravel(), ids.ravel(), PATCHES, count_visible)

    samples = steps * count * len(lanes)
    alone = median(lambda: run(False), repeats)
    masked = [results.seconds(lambda: run(True)) for _ in range(repeats)]
    figures = {"order_us": rounded(1e6 * alone / samples)}
    figures |= results.spread([1e6 * time / samples for time in masked], "with_mask_us")
    return {"W": world, "b": count * len(lanes), "steps": steps} | figures


def reads(loaded: Manifest, seed: int, repeats: int) -> int:
    """Chunks per second, in random order, whose reads are looked up."""
    chosen = np.random.default_rng(seed).integers(0, loaded.chunks - 1, 10_000).tolist()
    return round(len(chosen) / median(lambda: [loaded.chunk_reads(j) for j in chosen], repeats))


def permutation(ids: int, order_of_samples: SampleOrder, seed: int) -> dict[str, Any]:
    """NumPy's permutation of all ids, the plain way to shuffle an epoch. Names of extrapolated values say so."""
    start_time = time.perf_counter()
    shuffled = np.random.default_rng(seed).permutation(ids)
    seconds = time.perf_counter() - start_time
    return {
        "ids": ids,
        "seconds": rounded(seconds),
        "bytes": shuffled.nbytes,
        "extrapolated_to_N_seconds": rounded(seconds * order_of_samples.samples / ids),
        "computed_for_N_bytes": shuffled.itemsize * order_of_samples.samples,
        "ours_held_bytes_by_W": {str(world): synthetic.held_bytes(order_of_samples, world) for world in WORLDS},
    }


if __name__ == "__main__":
    sys.exit(main())
