"""The paper's largest run on 512 GPUs: arithmetic of storage, memory and checkpoints; simulations of the rest.

Nothing is trained or read. Events are drawn from the seed, the order and the rules are the real ones, calls of Slurm's
commands are counted at stubs. benchmarks/scale.md explains each figure.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import math
import tempfile
from typing import Any

from benchmarks import prefetch
from benchmarks.lib import burst, controller, fleet, interruptions, page_numbers, results, synthetic
from benchmarks.lib.burst import Burst
from benchmarks.lib.interruptions import Life
from benchmarks.prefetch import Case, Fleet
from flip.config.derived import world_size
from flip.config.schema import Config
from flip.data.order import SampleOrder
from flip.data.prefetch import LOOKAHEAD_SECONDS

RUNS = 200


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="also write the numbers into this page (benchmarks/scale.md)")
    results.options(parser, "scale")
    chosen = parser.parse_args(arguments)
    report = measure(chosen.seed, chosen.quick)
    if chosen.page:
        try:
            text = page_numbers.fill(chosen.page.read_text(encoding="utf-8"), report)
        except KeyError as error:
            parser.error(f"{chosen.page}: no number is called {error.args[0]}")
        chosen.page.write_text(text, encoding="utf-8")
    results.publish(report, chosen)
    return 0


def measure(seed: int, quick: bool = False) -> dict[str, Any]:
    facts = results.machine()
    config, profile = fleet.planned()
    speeds = fleet.measured()
    figures = fleet.arithmetic(config, profile, speeds) | {"measured": speeds}
    every = figures["run"]["step_s"]
    figures["reads"] = reads(config, every, seed, quick)
    figures["burst"] = bursts(config, seed, quick)
    figures["simulated"] = {
        name: lives(life, seed + number, 2_000 if quick else 300_000)
        for number, (name, life) in enumerate(fleet.cases(config).items())
    }
    figures["slurm"] = slurm(seed, 3 if quick else RUNS)
    return {"benchmark": "scale", "machine": facts} | fleet.shorter(figures)


def reads(config: Config, step: float, seed: int, quick: bool) -> dict[str, Any]:
    """Requests of the loaders of all ranks, by the real order: ``benchmarks/prefetch.py`` at this size."""
    data = config.data
    shards = 3000 if quick else synthetic.SHARDS
    table = synthetic.table(shards, seed, mean=data.samples / synthetic.SHARDS)
    small, steps = (64, 200) if quick else (1, 600)
    lanes = data.lanes // small
    count = config.stages[0].batch // data.lanes
    ranks = Fleet(world_size(config) // small, steps, count)
    stream = SampleOrder(seed, table.samples, table.chunk, data.block, lanes)
    needs = prefetch.plan(stream, table, ranks)
    figures = {}
    for latency in ("constant", "slow", "tail"):
        case = Case(step, data.workers, "waiting", latency, "spread", LOOKAHEAD_SECONDS, data.hedge)
        row = prefetch.simulate(case, stream, ranks, needs, seed)
        figures[latency] = {
            key: row[key]
            for key in ("per_s_mean", "per_s_max", "per_100ms_max", "stalled_share", "longest_stall_s", "flight_max_gb")
        }
    return figures


def bursts(config: Config, seed: int, quick: bool) -> dict[str, Any]:
    """The first blocks of all lanes, from one partitioned prefix, from two, and without a limit."""
    data = config.data
    readers = data.lanes // 64 if quick else data.lanes
    figures = {}
    for name, prefixes in {"one_prefix": 1, "two_prefixes": 2, "no_limit": 1_000_000}.items():
        limit = prefixes * fleet.GETS / (64 if quick else 1)
        case = Burst(readers, data.block, limit, data.chunk * data.sample_bytes / 1e6, fleet.PACE)
        figures[name] = burst.simulate(case, seed)
    return figures


def lives(life: Life, seed: int, events: int) -> dict[str, float]:
    """Goodput in per cent by events: our interval with known costs, and as a run learns them."""
    interval = interruptions.interval_of_known_costs(life)
    count = max(100, int(min(20_000, events * interval / life.between)))
    share, error = interruptions.simulate(life, lambda history: interval, count, seed)
    learnt, _ = interruptions.simulate(life, interruptions.learning(life), count, seed)
    formula = interruptions.goodput(life, interval)
    return {
        "interruptions": count,
        "formula": 100 * formula,
        "events": 100 * share,
        "error": 100 * error,
        "errors_apart": (share - formula) / error,
        "learning": 100 * learnt,
    }


def slurm(seed: int, runs: int) -> dict[str, Any]:
    """Counted calls, and the effect of limits on them."""
    with tempfile.TemporaryDirectory(prefix="flip-scale-") as folder:
        calls = controller.counted(Path(folder), runs)
    ends = sum(calls["end"].values())
    return {
        "runs": runs,
        "of_max_jobs": runs / controller.MAX_JOBS,
        "arrays": math.ceil(runs / (controller.MAX_ARRAY - 1)),
        "calls": {name: sum(counts.values()) for name, counts in calls.items()},
        "storm_unlimited": controller.storm(runs, ends, seed, bucket=runs * ends),
        "storm_limited": controller.storm(runs, ends, seed),
    }


if __name__ == "__main__":
    sys.exit(main())
