"""The launcher: planning and submitting 50 runs, `status` of 200, every `--help`; compared with submitit and Hydra.

Slurm's commands are stubs in a temporary folder that answer at once, so that only the launchers' time is measured.
Peers: a loop of `submitit.submit`, and a Hydra multirun by its submitit launcher, whose wait for job results is patched
out. The output says whether limits are met (ok, missed).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks.lib import results
from benchmarks.lib.results import ABSENT, rounded
from benchmarks.lib.slurm_stub import SHAPES, Site, judged, status
from jobs.__main__ import PACKAGES

ROOT = Path(__file__).resolve().parents[1]
OURS = "ours"
LOOP = "a loop of submitit.submit"
HYDRA_RUN = "a Hydra multirun"
PEERS = ("submitit", "hydra-core", "hydra-submitit-launcher")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="medians are over these (default: %(default)s)")
    results.options(parser, "launcher")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        runs = 4
        many = 6
        repeats = 1
    else:
        runs = 50
        many = 200
        repeats = chosen.repeats
    results.publish(measure(runs, many, repeats), chosen)
    return 0


def measure(runs: int, many: int, repeats: int) -> dict[str, Any]:
    """All figures. ``runs`` are planned and submitted; the status of ``many`` is shown."""
    facts = results.machine()
    with tempfile.TemporaryDirectory(prefix="flip-launcher-") as name:
        site = Site(Path(name))
        versions = results.versions(PEERS)
        return {
            "benchmark": "launcher",
            "machine": facts,
            "plan": {"runs": runs} | judged("plan", lambda: site.plan(runs), repeats),
            "status": {"runs": many} | status(site, many, repeats),
            "help": help_(site, repeats),
            "versions": versions,
            "submit": submit(site, runs, repeats, versions["hydra-submitit-launcher"] != ABSENT),
        }


def submit(site: Site, runs: int, rounds: int, hydra: bool) -> dict[str, Any]:
    """Seconds until all runs are submitted, ours and the peers' in turn, and calls of sbatch."""
    ways: dict[str, Callable[[], Any]] = {OURS: lambda: site.submit(runs), LOOP: lambda: site.submitit(runs)}
    if hydra:
        ways[HYDRA_RUN] = lambda: site.hydra(runs)
    calls = {}
    for name, way in ways.items():  # the first of each imports
        before = site.called("sbatch")
        way()
        calls[name] = site.called("sbatch") - before
    times = results.in_turn(ways, rounds)
    rows = [
        {"way": name, "seconds": rounded(statistics.median(times[name])), "sbatch_calls": calls[name]}
        | results.ratio(times[OURS], times[name], "ours_to_it")
        for name in ways
    ]
    return {"runs": runs, "shapes": len(SHAPES), "ways": rows}


def help_(site: Site, repeats: int) -> list[dict[str, Any]]:
    """A row per user command."""
    return [
        {"command": name} | judged("help", lambda name=name: site.command(ROOT / "jobs", name, "--help"), repeats)
        for name in sorted(PACKAGES)
    ]


if __name__ == "__main__":
    sys.exit(main())
