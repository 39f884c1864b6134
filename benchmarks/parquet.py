"""Parquet files read in place, beside tars of the same rows and peers on the same files.

Rows are images of random bytes (nothing decodes them) with captions. For each way of writing: bytes read per byte used,
rows that the index reads per second of processor time, processor time of reading all chunks in random order to that of
tars (by turns), and the peak memory of these reads beyond that of tars. The peers read the rows in the order of the
files, which is the most that they can: `datasets` streaming, pyarrow, and LitData. Files are in the page cache.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.lib import results
from benchmarks.lib.results import ABSENT, rounded
from flip.data.chunk_reader import ChunkReader
from flip.data.manifest import build
from flip.data.manifest.manifest import Manifest
from flip.data.manifest.row_texts import Columns
from jobs.measuring.functions.peak_memory import peak_bytes, start_peak

PLAIN = "plain"
WRITERS: dict[str, dict[str, Any]] = {
    PLAIN: {"compression": "none", "use_dictionary": False},
    "snappy, one dictionary": {"compression": "snappy", "dictionary_pagesize_limit": 1 << 30},
    "snappy": {"compression": "snappy", "use_dictionary": False},
    "zstd, pages of 1 MB": {"compression": "zstd", "use_dictionary": False, "write_batch_size": 16},
}
"""As `datasets` from version 4.6 on, pyarrow with large dictionaries, Spark, and polars write."""
TARS = "tars"
FILE_ROWS = 2048
SIZES = 12_000, 30_000
COLUMNS = Columns("image", ("caption",))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="default: %(default)s")
    parser.add_argument("--chunk", type=int, default=64, help="R (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="reads of all rows (default: %(default)s)")
    results.options(parser, "parquet")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.rows = 256
        chosen.chunk = 16
        chosen.rounds = 2
    with tempfile.TemporaryDirectory(prefix="flip-parquet-") as folder:
        report = measure(chosen, Path(folder))
    results.publish(report, chosen)
    return 0


def measure(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows = table(chosen.rows, chosen.seed)
    manifests = {TARS: tars(rows, folder / TARS, chosen.chunk)}
    written = {}
    indexed = {}
    for number, (name, options) in enumerate(WRITERS.items()):
        written[name] = write(rows, folder / f"files-{number}", options)
        indexed[name] = index(written[name], folder / f"manifest-{number}", chosen.chunk)
        manifests[name] = Manifest.load(folder / f"manifest-{number}")
    for manifest in manifests.values():
        read(manifest, chosen.seed)  # into the page cache
    times: dict[str, list[float]] = {name: [] for name in manifests}
    for _ in range(chosen.rounds):
        for name, manifest in manifests.items():
            times[name].append(read(manifest, chosen.seed))
    peaks = {name: in_process(_peak, str(manifest.folder), chosen.seed) for name, manifest in manifests.items()}
    cases = [
        {
            "writer": name,
            "read_per_used": manifests[name].settings["parquet"]["read_per_used"],
            "indexed_per_core_second": rounded(chosen.rows / indexed[name]),
            "read_us": rounded(1e6 * statistics.median(times[name]) / chosen.rows),
            **results.ratio(times[name], times[TARS], "to_tars"),
            "memory_beyond_tars_MB": rounded((peaks[name] - peaks[TARS]) / 1e6),
        }
        for name in WRITERS
    ]
    facts = results.machine() | results.versions(["pyarrow", "datasets", "litdata"])
    return {
        "benchmark": "parquet", "machine": facts, "rows": chosen.rows, "R": chosen.chunk,
        "mean_bytes": round(float(np.mean([len(image) for image in rows["image"].to_pylist()]))),
        "tars_read_us": rounded(1e6 * statistics.median(times[TARS]) / chosen.rows),
        "cases": cases, "peers": peers(written[PLAIN], chosen.rows, chosen.rounds),
    }  # fmt: skip


def table(rows: int, seed: int) -> pa.Table:
    draw = np.random.default_rng(seed)
    images = [b"\xff\xd8\xff" + draw.bytes(int(size)) for size in draw.integers(*SIZES, rows)]
    captions = [f"a caption of row {row}" for row in range(rows)]
    return pa.table({"image": pa.array(images, pa.binary()), "caption": captions})


def write(rows: pa.Table, folder: Path, options: dict[str, Any]) -> list[str]:
    folder.mkdir()
    paths = []
    for number, start in enumerate(range(0, len(rows), FILE_ROWS)):
        paths.append(str(folder / f"train-{number:05d}.parquet"))
        pq.write_table(rows.slice(start, FILE_ROWS), paths[-1], **options)
    return paths


def tars(rows: pa.Table, folder: Path, chunk: int) -> Manifest:
    folder.mkdir()
    paths = []
    for number, start in enumerate(range(0, len(rows), FILE_ROWS)):
        paths.append(str(folder / f"{number:05d}.tar"))
        with tarfile.open(paths[-1], "w") as tar:
            for row, sample in enumerate(rows.slice(start, FILE_ROWS).to_pylist(), start):
                line = json.dumps({"caption": sample["caption"]}).encode()
                for name, content in (("jpg", sample["image"]), ("json", line)):
                    info = tarfile.TarInfo(f"{row:09d}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return build.index(paths, folder / "manifest", chunk)


def index(paths: list[str], out: Path, chunk: int) -> float:
    """Index the files in this process. Returns its seconds of processor time."""
    before = time.process_time()
    scanned = build.scan_shards(build.sorted_keys(paths), out, columns=COLUMNS)
    build.merge(scanned, out, chunk, columns=COLUMNS)
    return time.process_time() - before


def read(manifest: Manifest, seed: int) -> float:
    """Read all chunks in a random order. Returns seconds of processor time."""
    reader = ChunkReader()
    order = np.random.default_rng(seed).permutation(manifest.chunks).tolist()
    before = time.process_time()
    for j in order:
        reader.read_chunk(manifest, j)
    return time.process_time() - before


def _peak(folder: str, seed: int) -> int:
    """The peak memory of reads, in bytes above that before them."""
    import flip.data.worker  # noqa: F401, as a loader process has it

    manifest = Manifest.load(folder)
    before = start_peak()
    read(manifest, seed)
    return peak_bytes() - before


def peers(paths: list[str], rows: int, rounds: int) -> list[dict[str, Any]]:
    """The processor time of peers that read the files from their start to their end, and their peak memory."""
    found: list[dict[str, Any]] = []
    for name, (module, samples) in PEERS.items():
        if not results.is_installed(module):
            found.append({"peer": name, "read_us": None, "memory_MB": None, "note": ABSENT})
            continue
        seconds, peak = in_process(_peer, samples, paths, rows, rounds)
        microseconds = rounded(1e6 * seconds / rows)
        found.append({"peer": name, "read_us": microseconds, "memory_MB": rounded(peak / 1e6), "note": "in order"})
    return found


def _peer(samples: Callable[[list[str]], Iterator[int]], paths: list[str], rows: int, rounds: int) -> tuple[float, int]:
    times = []
    before = start_peak()
    for _ in range(rounds):
        start = time.process_time()
        sizes = list(samples(paths))
        times.append(time.process_time() - start)
        assert len(sizes) == rows and min(sizes) >= SIZES[0]
    return statistics.median(times), peak_bytes() - before


def _datasets(paths: list[str]) -> Iterator[int]:
    import datasets

    for row in datasets.load_dataset("parquet", data_files=paths, split="train", streaming=True):
        yield len(row["image"])


def _pyarrow(paths: list[str]) -> Iterator[int]:
    for path in paths:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(64, use_threads=False):
                for row in batch.to_pylist():
                    yield len(row["image"])


def _litdata(paths: list[str]) -> Iterator[int]:
    from litdata import StreamingDataset, index_parquet_dataset
    from litdata.streaming.item_loader import ParquetLoader

    folder = str(Path(paths[0]).parent)
    if not Path(folder, "index.json").exists():
        index_parquet_dataset(folder)
    for row in StreamingDataset(folder, item_loader=ParquetLoader(), shuffle=False):
        yield len(row["image"])


PEERS: dict[str, tuple[str, Callable[[list[str]], Iterator[int]]]] = {
    "datasets, streaming": ("datasets", _datasets),
    "pyarrow": ("pyarrow", _pyarrow),
    "LitData": ("litdata", _litdata),
}


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a process of its own, which has no memory of others."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    sys.exit(main())
