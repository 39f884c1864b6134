"""Writes RESULTS.md from the results of the benchmarks, and the figures that README and docs/ quote.

A quoted figure stands between two comments; the first names the benchmark and the row. ``ours`` and ``peer`` quote the
columns of that name, ``figure`` the ratio:

    <!-- figure NAME: WHAT -->...<!-- end -->
    <!-- ours NAME: WHAT -->...<!-- end -->
    <!-- peer NAME: WHAT -->...<!-- end -->

This command fills it in. `make bench` calls it at its end.

Examples:
  python benchmarks/table.py                     # update RESULTS.md, README.md and docs/*.md
  python benchmarks/table.py --results FOLDER    # print the table of other results, write nothing
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.lib import gpu_rows
from benchmarks.lib.profiles import profiles
from benchmarks.lib.table_rows import NOT_MEASURED, ROWS, Row, number
from flip.runs.rundir import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "benchmarks" / "RESULTS.md"
QUOTED = re.compile(r"(<!-- (figure|ours|peer) (\w+): (.+?) -->)(.*?)(<!-- end -->)")
HEAD = """# Results of the benchmarks

`make bench` writes this page from `benchmarks/results/*.json`; `make bench ONLY="stream loss"` measures some of them
again. Ours and the peer take turns on the same machine; a ratio is that of ours to the peer's, the median over rounds,
with the least and the most in brackets. Missed goals are reported too; [where the time
goes](#where-the-time-goes) shows why.
"""
ON_A_GPU = """## On a GPU

`make bench-gpu` measures these rows on one GPU in 25 minutes at most, and continues after an interruption. Each row has
its own process, so that one that runs out of memory costs no other.
"""
GPU_COLUMNS = ("what", "result", "card", "seconds")
COLUMNS = ("benchmark", "what", "ours", "peer", "ratio", "goal", "reached")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="a folder of other results: print their table, write nothing")
    chosen = parser.parse_args(arguments)
    results_by_name = read(chosen.results or RESULTS)
    on_gpu = gpu_rows.read((chosen.results or RESULTS) / "gpu")
    if chosen.results:
        print(page(results_by_name, on_gpu), end="")
        return 0
    quick = [name for name, entry in (results_by_name | on_gpu).items() if entry.get("quick")]
    if quick:
        print(
            f"{', '.join(quick)}: made with --quick, whose figures mean nothing; nothing was written", file=sys.stderr
        )
        return 1
    write_text(PAGE, page(results_by_name, on_gpu))
    for path in quoting():
        write_text(path, filled(path.read_text(encoding="utf-8"), results_by_name, path))
    return 0


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of a file -> its content. Other files are left out."""
    return {
        name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ROWS
        if (folder / f"{name}.json").exists()
    }


def rows(results_by_name: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Rows of every benchmark, measured or not."""
    return {
        name: of(results_by_name[name]) if name in results_by_name else [missing(name)] for name, of in ROWS.items()
    }


def missing(name: str) -> Row:
    """A row with the command that measures it."""
    return Row(f"all of benchmarks/{name}.py", NOT_MEASURED, f"`make bench ONLY={name}`")


def page(results_by_name: Mapping[str, Any], on_gpu: Mapping[str, Any]) -> str:
    """The text of RESULTS.md. ``on_gpu``: name of a row of `make bench-gpu` -> its file."""
    cells = []
    for name, some in rows(results_by_name).items():
        for row in some:
            reached = {True: "yes", False: "**no**", None: NOT_MEASURED if row.goal else ""}[row.reached]
            figure = row.figure if row.ratio is not None else ""
            cells.append([name, row.what, row.own, row.peer, figure, row.goal, reached])
    parts = [
        HEAD,
        table(COLUMNS, cells),
        ON_A_GPU,
        table(GPU_COLUMNS, gpu_rows.cells(on_gpu)),
        "## Where the time goes\n",
        *profiles(results_by_name),
        "## Measured on\n",
    ]
    return "\n".join(
        [*parts, table(("results", "on", "versions", "took", "cores that others used"), machines(results_by_name))]
    )


def machines(results_by_name: Mapping[str, Any]) -> list[list[str]]:
    """Machine and versions of each result."""
    cells = []
    for name, entry in results_by_name.items():
        facts = dict(entry["machine"]) | entry.get("versions", {})
        on = f"{facts.pop('card', '')} {facts.pop('processor')}, {facts.pop('cores')} cores".strip()
        facts.pop("load_before")
        took = entry.get("took")
        if took:
            spent = [f"{number(took['seconds'])} s", f"{took['cores_of_others']:.2f}"]
        else:
            spent = ["", "not noted"]
        cells.append([f"{name}.json", on, ", ".join(f"{key} {value}" for key, value in facts.items()), *spent])
    total = sum(entry["took"]["seconds"] for entry in results_by_name.values() if "took" in entry)
    if total:
        return [*cells, ["all that noted it", "", "", f"{total / 60:.0f} minutes", ""]]
    return cells


def table(head: Iterable[str], cells: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    lines = [list(head)]
    lines += [["---"] * len(lines[0]), *([cell.replace("|", "\\|") for cell in line] for line in cells)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def quoting() -> list[Path]:
    """Files that may quote figures."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str, results_by_name: Mapping[str, Any], path: Path) -> str:
    """The text with all quoted figures updated. Raises SystemExit if a row does not exist."""
    known = {(name, row.what): row for name, some in rows(results_by_name).items() for row in some}

    def figure(match: re.Match[str]) -> str:
        opening, column, name, what, _, end = match.groups()
        if name in ROWS and name not in results_by_name:
            return f"{opening}{NOT_MEASURED}{end}"
        if (name, what) not in known:
            raise SystemExit(
                f"{path}: no row of the table is {name}: {what}. Rows: python benchmarks/table.py --results"
            )
        row = known[name, what]
        columns = {"ours": row.own, "peer": row.peer, "figure": row.figure}
        return f"{opening}{columns[column]}{end}"

    return QUOTED.sub(figure, text)


if __name__ == "__main__":
    sys.exit(main())
