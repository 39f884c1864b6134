"""Rows per second and memory of `flip shards make` on parquet files, beside a plain copy of the same files by pyarrow.

Each call is a process of its own, on one core. Rates are of processor time, which hardly depends on what other programs
do. The plain copy reads all batches and writes them to a parquet file again. Memory is the peak for one file of few and
of many rows, all in one row group: it must not depend on them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import io
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.lib import results
from jobs.measuring.functions.photo_shards import image

SIDE = 256
QUALITY = 80
IMAGES = 64
"""Different images; rows repeat them with other last bytes."""
GOAL = {"header": 10_000, "decode": 2_000}
"""Least rows per second of one core."""
_CHILD = """
import json, os, resource, sys, time
kind, *arguments = sys.argv[1:]
if kind == "copy":
    import pyarrow.parquet as pq
    out, *paths = arguments
    writer = None
    for path in paths:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(256, use_threads=False):
                writer = writer or pq.ParquetWriter(out, batch.schema, compression="none", use_dictionary=False)
                writer.write_batch(batch)
    writer.close()
else:
    from tools.commands.shards import main
    sys.stdout = open(os.devnull, "w")
    code = main(arguments)
    assert code == 0, code
def seconds(who): return sum(resource.getrusage(who)[:2])
both = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
with open("/proc/self/status") as file:  # ru_maxrss would count the parent, of which this process is a fork
    peak, = [int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")]
print(json.dumps([sum(map(seconds, both)), peak]), file=sys.__stdout__)
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100, help="files of the rates (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=100, help="rows of each (default: %(default)s)")
    many = [1000, 100_000]
    parser.add_argument("--memory", type=int, nargs=2, default=many, help="rows of one file (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    results.options(parser, "make_shards")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.files = 4
        chosen.rows = 50
        chosen.memory = [200, 2000]
        chosen.rounds = 1
    with tempfile.TemporaryDirectory() as folder:
        report: dict[str, Any] = {
            "benchmark": "make_shards", "machine": results.machine(), "versions": results.versions(["pyarrow"]),
            "rates": rates(Path(folder), chosen.files, chosen.rows, chosen.rounds),
            "memory": memory(Path(folder), chosen.memory),
        }  # fmt: skip
    results.publish(report, chosen)
    return 0


def rates(folder: Path, files: int, rows: int, rounds: int) -> dict[str, Any]:
    """Rows per second of processor time of each way, and ratios to the plain copy in the same round."""
    images = encoded(SIDE)
    paths = [write(folder / f"rates-{number:05d}.parquet", rows, images, number) for number in range(files)]
    total = files * rows
    found: dict[str, list[float]] = {"copy": [], "header": [], "decode": []}
    # the start of Python and of the imports costs as much as thousands of rows: a call of one file is subtracted
    for number in range(rounds):
        for way in found:
            out = folder / f"{way}-{number}"
            most = child(way, out, paths)[0]
            least = child(way, out.with_name(f"{out.name}-one"), paths[:1])[0]
            found[way].append((total - rows) / max(most - least, 1e-9))
    cases = {}
    for way, values in found.items():
        case: dict[str, Any] = {"rows_per_second": results.spread(values)}
        if way in GOAL:
            case["goal"] = GOAL[way]
            case["to_plain_copy"] = results.ratio(values, found["copy"])
        cases[way] = case
    size = sum(map(len, images)) // len(images)
    return {"files": files, "rows_per_file": rows, "bytes_per_image": size, "ways": cases}


def memory(folder: Path, rows: Sequence[int]) -> dict[str, Any]:
    """Peak bytes for a file of few and of many rows, in one row group."""
    images = encoded(48)
    found = []
    for count in rows:
        path = write(folder / f"memory-{count}.parquet", count, images, count, group=count)
        peak = child("header", folder / f"memory-{count}", [path])[1]
        found.append({"rows": count, "file_bytes": path.stat().st_size, "peak_bytes": peak})
    return {"cases": found, "more_bytes": found[1]["peak_bytes"] - found[0]["peak_bytes"]}


def child(way: str, out: Path, paths: Sequence[Path]) -> tuple[float, int]:
    """Processor seconds and peak bytes of a process, on one core."""
    arguments = ["copy", f"{out}.parquet", *paths]
    if way in GOAL:
        arguments = [way, "make", *paths, "--check", way, "--out", out]
    core = min(os.sched_getaffinity(0))
    ended = subprocess.run(
        [sys.executable, "-c", _CHILD, *map(str, arguments)], stdout=subprocess.PIPE, check=True, text=True,
        cwd=Path(__file__).resolve().parents[1], preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )  # fmt: skip
    seconds, peak = json.loads(ended.stdout)
    return seconds, peak


def encoded(side: int) -> list[bytes]:
    """JPEG files with the cost of photographs."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(IMAGES):
        file = io.BytesIO()
        Image.fromarray(image(rng, side, side, 1.75)).save(file, "JPEG", quality=QUALITY)
        files.append(file.getvalue())
    return files


def write(path: Path, rows: int, images: Sequence[bytes], first: int, group: int = 1000) -> Path:
    """Write a parquet file as ``datasets`` does: images in one plain, uncompressed column of {bytes, path}."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("caption", pa.string()), ("similarity", pa.float32())])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for start in range(0, rows, group):
            numbers = range(start, min(start + group, rows))
            columns = {
                "image": [{"bytes": images[(first + n) % len(images)] + b"%9d" % n, "path": None} for n in numbers],
                "caption": [f"a photograph of number {n}" for n in numbers],
                "similarity": [n % 100 / 100 for n in numbers],
            }
            writer.write_table(pa.table(columns, schema))
    return path


if __name__ == "__main__":
    sys.exit(main())
