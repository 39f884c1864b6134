"""Measures the speeds of a core that plans assume until a site has measured its own: jobs/planning/assumed_speeds.yaml.

The loader prepares samples on one core from local files: synthetic photographs of 64, 256 and 384 px
(jobs/measuring/functions/photo_shards.py), whole and with restart markers, with and without the visible-patch kernel.
A row is the processor time of a sample, the median over rounds. `flip doctor --measure` measures the same on shards of
a user. Takes about seven minutes of an idle machine.

Examples:
  python benchmarks/core_speeds.py                # print the rows
  python benchmarks/core_speeds.py --write        # and replace those that plans assume
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import datetime
import os
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from benchmarks.lib import results, s3_datasets, steady
from benchmarks.lib.pipelines import MASKS, name_of
from benchmarks.lib.work import SIZE, Work
from benchmarks.stream import CHUNK, REPEATS, open_batches, warm
from flip import environment
from flip.runs.rundir import write_json
from jobs.measuring.functions import photo_shards
from jobs.measuring.functions.photo_shards import Kind
from jobs.planning.core_speeds import ASSUMED_FILE, SpeedRow
from jobs.planning.measurement import MEASURED, Machine, MeasuredRow, Measurement

KINDS = (Kind("64 px", 64, True, 1.75), *photo_shards.KINDS)
FORMS = ((False, False), (True, False), (True, True))
"""(with the kernel, with restart markers): markers help the kernel alone."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=1024, help="of each kind (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--write", action="store_true", help=f"replace {ASSUMED_FILE.name}, which plans read")
    results.options(parser, "core_speeds")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.rounds = 1
        chosen.samples = 64
        chosen.batch = 8
    rows = list(measure(chosen))
    report = {"benchmark": "core_speeds", "machine": results.machine(), "rows": [asdict(row) for row in rows]}
    results.publish(report, chosen)
    if chosen.write and chosen.quick:
        print("made with --quick, whose figures mean nothing; nothing was written", file=sys.stderr)
        return 1
    if chosen.write:
        write_json(ASSUMED_FILE, measurement(rows).as_dict())
    return 0


def measurement(rows: list[SpeedRow]) -> Measurement:
    """The rows in the form of `flip doctor --measure`."""
    values = {"rows": [asdict(row) for row in rows]}
    return Measurement(
        date=datetime.date.today().isoformat(),
        nodes=1,
        machine=Machine(processor=environment.processor()),
        packages=environment.environment()["packages"],
        rows=(MeasuredRow("input_cost", "cost of a sample on a core", MEASURED, values),),
    )


def measure(chosen: argparse.Namespace) -> Iterator[SpeedRow]:
    """All rows."""
    with tempfile.TemporaryDirectory(prefix="flip-core-speeds-") as folder:
        for kind in KINDS:
            work = _photographs(kind, chosen, Path(folder))
            for uses_kernel, is_marked in FORMS:
                for mask in MASKS:
                    cost = _cost(work, name_of(mask, is_marked), uses_kernel, chosen.rounds)
                    yield SpeedRow(kind.side, is_marked, SIZE, float(mask), uses_kernel, cost)


def _photographs(kind: Kind, chosen: argparse.Namespace, folder: Path) -> Work:
    pairs = photo_shards.samples(kind, chosen.samples, chosen.seed) * REPEATS
    chunk = min(CHUNK, len(pairs) // 16)
    work = s3_datasets.as_files(pairs, folder / str(kind.side), chunk, chosen.batch, chosen.seed)
    return s3_datasets.add_marked(work, kind.side)


def _cost(work: Work, name: str, uses_kernel: bool, rounds: int) -> float:
    """Microseconds of processor time of a sample, in a process on one core."""
    with s3_datasets.alone() as process:
        process.submit(_switch, uses_kernel).result()
        process.submit(warm, name, work).result()
        measured: Any = partial(steady.measure, partial(open_batches, work), name, work.samples, work.batch)
        return round(statistics.median(process.submit(measured).result().cpu for _ in range(rounds)), 1)


def _switch(uses_kernel: bool) -> None:
    if not uses_kernel:
        os.environ["FLIP_KERNEL"] = "0"


if __name__ == "__main__":
    sys.exit(main())
