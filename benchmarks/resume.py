"""Time to the first batch when training resumes from object storage: early, in the middle and late in an epoch.

The manifest repeats one small data set of an S3 server until it has as many shards as LAION-2B: batches are really
read, decoded and tokenised, and the order is that of the large set. One rank of W = 512 starts on one core in a new
process, at S = 1, 50 and 99 % of an epoch.

Peers: webdataset cannot resume, so that an epoch is read again up to S (measured: samples per second that it reads on
this core without decoding; the seconds are computed). mosaicml-streaming resumes exactly; its index has fewer samples,
as it lays out all samples of an epoch first and its time grows with them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import dataclasses
import itertools
import json
import shutil
import statistics
import tempfile
import time
from contextlib import closing
from typing import Any

import numpy as np

from benchmarks.lib import peers, pipelines, results, s3_datasets, synthetic
from benchmarks.lib.pipelines import BLOCK
from benchmarks.lib.results import rounded
from benchmarks.lib.work import AUGMENT, PATCH, SIZE, Work
from flip.config import schema
from flip.data.manifest import manifest
from flip.data.manifest.manifest import ChunkTable, Manifest
from jobs.measuring.functions import photo_shards
from tests.s3.servers import files

SHARES = 0.01, 0.5, 0.99
WORLD = 512
EACH = 8
COUNT = 8
"""W; lanes of a rank, L/W; samples of a lane in a global batch, B/L."""
PACKAGES = "torch", "s3fs", "webdataset", "mosaicml-streaming"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--shards", type=int, default=synthetic.SHARDS, help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=4096, help="that exist, 256 px (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=256, help="R (default: %(default)s)")
    parser.add_argument("--peer", type=int, default=20_000_000, help="of mosaicml-streaming (default: %(default)s)")
    parser.add_argument("--server", choices=s3_datasets.SERVERS, default="weed", help="default: %(default)s")
    results.options(parser, "resume")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.rounds = 1
        chosen.shards = 200_000
        chosen.samples = 128
        chosen.peer = 1000
        chosen.server = "nanio"
        chosen.chunk = 16
    results.publish(measure(chosen), chosen)
    return 0


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    facts = results.machine()
    with (
        tempfile.TemporaryDirectory(prefix="flip-resume-") as name,
        s3_datasets.serving(chosen.server, Path(name)) as s3_address,
    ):
        folder = Path(name)
        small = s3_datasets.prepare(
            photo_shards.KINDS[0], chosen.samples, chosen.chunk, EACH * COUNT, s3_address, folder, chosen.seed
        )
        work = repeat(small, chosen.shards, folder / "all")
        return {
            "benchmark": "resume",
            "machine": facts,
            "versions": results.versions(PACKAGES),
            "data": {
                "shards": chosen.shards, "N": work.samples, "R": work.chunk, "Q": BLOCK, "L": WORLD * EACH, "W": WORLD,
                "B": WORLD * EACH * COUNT, "b": EACH * COUNT, "server": chosen.server,
            },
            "ours": [flip_resume(work, share, chosen.rounds) for share in SHARES],
            "webdataset": skipping(small, work.samples, chosen.rounds),
            "mosaicml_streaming": mosaicml(small, chosen.peer, folder),
        }  # fmt: skip


def repeat(small: Work, shards: int, folder: Path) -> Work:
    """A data set that repeats the shards of ``small``."""
    table = Manifest.load(small.manifest)
    assert not table.tail, "chunks must begin anew with every repetition"
    times = shards // len(table.keys)
    many = ChunkTable(
        list(table.keys) * times, np.tile(table.shards, (times, 1)), table.chunk, np.tile(table.offsets, times),
        list(table.etags) * times,
    )  # fmt: skip
    manifest.write(folder, many, np.tile(table.checksums, times))
    return dataclasses.replace(small, manifest=str(folder), samples=many.samples)


def flip_resume(work: Work, share: float, rounds: int) -> dict[str, Any]:
    """Medians over new processes."""
    step = WORLD * EACH * COUNT
    start = int(share * work.samples) // step * step
    measured = []
    for _ in range(rounds):
        with s3_datasets.alone() as process:
            measured.append(process.submit(_first, work, start).result())
    load, first, size = (statistics.median(column) for column in zip(*measured, strict=True))
    return {
        "passes": share, "S": start, "load_seconds": rounded(load), "first_batch_seconds": rounded(first),
        "least": rounded(min(row[1] for row in measured)), "most": rounded(max(row[1] for row in measured)),
        "megabytes_read": rounded(size / 1e6),
    }  # fmt: skip


def _first(work: Work, start: int) -> tuple[float, float, float]:
    """Seconds to load the manifest, further seconds to the first batch, and bytes read by then."""
    from flip.data.loader import Loader
    from flip.data.worker import WorkerConfig

    start_time = time.perf_counter()
    data = dataclasses.replace(pipelines.data_of(work), lanes=WORLD * EACH)
    image = schema.ImageTower(size=SIZE, patch=PATCH)
    loader = Loader(WorkerConfig(data, AUGMENT, image, schema.TextTower(), work.seed), WORLD // 2, WORLD)
    loaded = time.perf_counter()
    with closing(loader.batches(start, WORLD * EACH * COUNT, "0.5")) as batches:
        next(batches)
        return loaded - start_time, time.perf_counter() - loaded, loader.counters().bytes


def skipping(small: Work, samples: int, rounds: int) -> list[dict[str, Any]]:
    """webdataset: its rate of reading, and the computed seconds until S."""
    with s3_datasets.alone() as process:
        rate = statistics.median(process.submit(_read, small).result() for _ in range(rounds))
    return [
        {"passes": share, "reads_samples_per_s": rounded(rate), "computed_seconds": rounded(share * samples / rate)}
        for share in SHARES
    ]  # fmt: skip


def _read(small: Work) -> float:
    start_time = time.perf_counter()
    seen = sum(1 for _ in peers.samples_of_webdataset(small, at_once=False))
    return seen / (time.perf_counter() - start_time)


def mosaicml(small: Work, samples: int, folder: Path) -> list[dict[str, Any]]:
    """mosaicml-streaming: seconds from its state to the first sample, each in a new process with an empty cache."""
    if not results.is_installed("streaming"):
        return [{"passes": share, "note": results.ABSENT} for share in SHARES]
    index = json.loads(Path(small.folder, "mds", "index.json").read_text())
    times = max(1, samples // small.samples)
    index["shards"] = list(itertools.islice(itertools.cycle(index["shards"]), times * len(index["shards"])))
    remote = f"{small.remote}/mds"
    files(small.address).pipe_file(f"{remote}/index.json", json.dumps(index).encode())
    rows = []
    for share in SHARES:
        with s3_datasets.alone() as process:
            seconds = process.submit(
                _resumed, small, int(share * times * small.samples), str(folder / "cache")
            ).result()
        rows.append({"passes": share, "N": times * small.samples, "first_sample_seconds": rounded(seconds)})
    return rows


def _resumed(small: Work, seen: int, cache: str) -> float:
    from streaming import StreamingDataset

    start_time = time.perf_counter()
    data = StreamingDataset(
        remote=small.url("mds"), local=cache, shuffle=True, shuffle_seed=small.seed, batch_size=small.batch
    )
    state = {"epoch": 0, "sample_in_epoch": seen, "num_canonical_nodes": 1, "shuffle_seed": small.seed}
    data.load_state_dict(state | {"initial_physical_nodes": 1})
    next(iter(data))
    seconds = time.perf_counter() - start_time
    shutil.rmtree(cache, ignore_errors=True)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
