"""Shared by all benchmarks: timing, facts of the machine, and files of results."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from flip.common.host import core_seconds, cores
from flip.environment import processor
from flip.runs.rundir import write_json
from jobs.measuring.functions.timing import rounded, seconds

ABSENT = "not installed"


def median(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call."""
    return statistics.median(seconds(run) for _ in range(repeats))


def in_turn(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, one after the other, so that other load affects all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return times


def spread(values: Sequence[float], name: str = "median") -> dict[str, float]:
    """The median (named ``name``), least and most."""
    return {name: rounded(statistics.median(values)), "least": rounded(min(values)), "most": rounded(max(values))}


def ratio(over: Sequence[float], under: Sequence[float], name: str = "ratio") -> dict[str, float]:
    """The ratios of the two in the same round: median, least and most."""
    return spread([a / b for a, b in zip(over, under, strict=True)], name)


def machine() -> dict[str, Any]:
    """Facts of the machine that numbers depend on, without its host name."""
    return {
        "processor": processor(),
        "cores": cores(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Package -> installed version, or ABSENT."""
    result = {}
    for name in packages:
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            result[name] = ABSENT
    return result


def is_installed(module: str) -> bool:
    """Whether a module, which may be part of a package, can be found; it is not imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing
        return False


def options(parser: argparse.ArgumentParser, name: str) -> None:
    """The options of every benchmark."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--out", type=Path, help=f"write the results there as JSON (ours: benchmarks/results/{name}.json)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; the figures mean nothing")
    parser.set_defaults(began=(time.perf_counter(), _others()))


def publish(report: dict[str, Any], chosen: argparse.Namespace) -> None:
    """Print the report with its cost, and write it to ``--out``."""
    report = report | {"took": _took(*chosen.began), "quick": chosen.quick}
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(chosen.out, report)
    if chosen.json:
        print(json.dumps(report, indent=1))
    else:
        print("\n".join(_lines(report)))


def _others() -> float:
    """Core-seconds that other processes have used so far."""
    used, _ = core_seconds()  # without this process, and without children that it has waited for
    return used - _running_children()


def _running_children() -> float:
    """CPU seconds of children that run: a forkserver has waited for its workers, and this process not for it."""
    used = 0.0
    with contextlib.suppress(ModuleNotFoundError):  # a machine with a GPU may lack it
        import psutil

        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                used += sum(child.cpu_times()[:4])  # those of its own children that have ended are the last two
    return used


def _took(start_time: float, before: float) -> dict[str, float]:
    """Seconds, and the cores that other processes used meanwhile; the machine was not idle if much above a tenth."""
    took = time.perf_counter() - start_time
    others = (_others() - before) / took
    return {"seconds": rounded(took), "cores_of_others": rounded(max(0.0, others))}


def _lines(value: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    width = max((len(name) for name, inner in value.items() if not isinstance(inner, dict | list)), default=0)
    for name, inner in value.items():
        label = name.replace("_", " ")
        if isinstance(inner, dict):
            lines += [f"{indent}{label}", *_lines(inner, indent + "  ")]
        elif isinstance(inner, list) and inner and isinstance(inner[0], dict):
            lines += [f"{indent}{label}", *_table(inner, indent + "  ")]
        else:
            lines.append(f"{indent}{label:{width}}  {f'{inner:,}' if isinstance(inner, int) else inner}")
    return lines


def _table(rows: list[dict[str, Any]], indent: str) -> list[str]:
    """The plain values of rows, a column for each name; a row may lack some."""
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, dict)))
    cells = [[name.replace("_", " ") for name in names], *([str(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [indent + "  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in cells]
