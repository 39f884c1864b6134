"""What all benchmarks share: timing, the machine's facts, and a file of results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from flip.rundir import write_json


def median(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def machine() -> dict[str, Any]:
    """What numbers depend on, and no name of a host."""
    text = Path("/proc/cpuinfo").read_text(errors="replace") if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = round(os.getloadavg()[0], 2)
    return {
        "processor": model or platform.machine(),
        "cores": cores,
        "load_before": load,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Package -> its version here, "not installed" where it is not."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def options(parser: argparse.ArgumentParser, name: str) -> None:
    """The options of every benchmark."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--out", type=Path, help=f"write the results there as JSON (ours: benchmarks/results/{name}.json)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (default: %(default)s)")


def publish(report: dict[str, Any], chosen: argparse.Namespace) -> None:
    """Print the report, and write it where ``--out`` says."""
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(chosen.out, report)
    if chosen.json:
        print(json.dumps(report, indent=1))
    else:
        print("\n".join(_lines(report)))


def rounded(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")


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
    names = list(rows[0])
    cells = [[name.replace("_", " ") for name in names], *([str(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [indent + "  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in cells]
