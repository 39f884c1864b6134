"""``python -m benchmarks.counts``: counts the mechanisms of this checkout, or compares two results."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.counts import answers, code, compare, first_step, imports, rows, surface

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="compare two such files")
    parser.add_argument("--names", metavar="ROW", help="list what this row counts")
    parser.add_argument("--no-trace", action="store_true", help="leave out the traced run, which takes a minute")
    chosen = parser.parse_args(arguments)
    if chosen.compare:
        (first, before), (second, after) = (rows.read(path) for path in chosen.compare)
        print(compare.compared(before, after, (first, second)), end="")
        return 0
    counted = count(not chosen.no_trace)
    if chosen.json:
        rows.write(counted, revision(), chosen.json)
    if chosen.names:
        (named,) = (row.names for row in counted if row.name == chosen.names)
        print("\n".join(named))
    else:
        print(compare.table(counted), end="")
    return 0


def count(trace: bool = True) -> list[rows.Row]:
    """All rows of this checkout. ``trace``: also those of a traced run."""
    modules = code.read_modules(ROOT)
    lab = code.read_modules(ROOT, code.LAB)
    counted = surface.rows(modules, ROOT) + code.requirement_rows(ROOT)
    counted += rows.with_lab(code.rows(modules), code.rows(lab), code.rows([*modules, *lab]))
    counted += imports.rows([*modules, *lab])
    counted += answers.rows([*modules, *lab], ROOT, counted)
    if trace:
        with tempfile.TemporaryDirectory(prefix="flip-counts-") as folder:
            counted += first_step.rows(ROOT, Path(folder).resolve())
    return counted


def revision() -> str:
    """The commit of this checkout, with a plus sign if files have changed since."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
