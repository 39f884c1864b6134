"""Progress of runs while somebody looks: a table that redraws itself on a terminal, quiet lines elsewhere.

It only reads. Leaving it, by Ctrl-C or a lost connection, leaves the runs going.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from flip.runs.errors import CAUSES, COMPLETE, CRASH, STOPPED
from flip.runs.rundir import RunDir
from jobs.common.job import UNREADABLE
from jobs.common.text import count, duration, plain, table
from jobs.host import attempts
from jobs.runs.clusters import interval
from jobs.status import table as read_table

INTERRUPTED = 130
"""What a shell expects of a command that Ctrl-C ended: a script that waits for results must not go on."""

ENDED = ("complete", "failed", "cancelled", "stopped")

QUIET = 30.0
"""Seconds between lines of a run where nothing changed but its progress, without a terminal."""


def watch(paths: Iterable[Path], out: TextIO | None = None, again: str = "", poll: float = 1.0) -> int:
    """Show the runs until all have ended, then the results. 0, or the worst exit code of those that did not complete.

    ``again``: the command that comes back here after Ctrl-C.
    """
    runs, out = [RunDir(path) for path in paths], out or sys.stdout
    screen = _Terminal(out) if out.isatty() else _Lines(out)
    quiet = 0
    try:
        while True:
            rows = read_table(runs)
            screen.draw(rows)
            quiet = quiet + 1 if all(row["state"] in ENDED for row in rows) else 0
            # a supervisor lets go of its lock for an instant before it ends, and may take it again
            if quiet >= (3 if any(row["state"] == "stopped" for row in rows) else 1):
                break
            time.sleep(max(poll, interval(runs)))
    except KeyboardInterrupt:
        print(f"\nthe runs go on without you; to come back: {again}", file=out, flush=True)
        return INTERRUPTED
    _results(runs, out)
    return _code(runs, rows)


def _results(runs: Sequence[RunDir], out: TextIO) -> None:
    from jobs.report import outcomes, text

    print("\n" + text(outcomes(runs)), file=out, flush=True)


def _code(runs: Sequence[RunDir], rows: Sequence[dict[str, Any]]) -> int:
    """The exit code that says most: a real failure before a stop."""
    codes = []
    for run, row in zip(runs, rows, strict=True):
        if row["state"] == "failed":
            codes.append(code_of(run))
        elif row["state"] != "complete":
            codes.append(STOPPED)
    return max(codes, key=lambda code: (code != STOPPED, code), default=COMPLETE)


def code_of(run: RunDir) -> int:
    """The exit code of a run that has failed: of its cause, or that of a crash where nobody can read one."""
    try:
        return CAUSES.get((attempts.last(run) or {}).get("cause", "")) or CRASH  # "complete", with a damaged result
    except UNREADABLE:  # its row says so
        return CRASH


def bar(share: float, width: int = 20) -> str:
    done = round(width * min(1.0, max(0.0, share)))
    return "#" * done + "." * (width - done)


def line(row: dict[str, Any]) -> dict[str, str]:
    """One run as cells of the live table."""
    samples, total = row["samples"] or 0, row["total"]
    speed, eta = row["samples_per_second"], row["eta_seconds"]
    return {
        "run": row["run"],
        "state": row["phase"] if row["state"] == "running" and row["phase"] else row["state"],
        "": bar(samples / total) if total else bar(1.0 if row["state"] == "complete" else 0.0),
        "samples": f"{count(samples)} / {count(total)}" if total else "-",
        "loss": "-" if row["loss"] is None else f"{row['loss']:.3f}",
        "samples/s": "-" if speed is None else f"{speed:,.0f}",
        "left": duration(eta),
        "attempts": str(row["attempts"]),
        " ": row["reason"] if row["state"] not in ("running", "complete", "queued") else "",
    }


class _Terminal:
    """Redraws in place. Lines are cut to the terminal's width: one that wraps would be counted as one and stay."""

    def __init__(self, out: TextIO) -> None:
        self.out, self.height = out, 0

    def draw(self, rows: Sequence[dict[str, Any]]) -> None:
        import shutil

        width = shutil.get_terminal_size().columns - 1
        lines = [text[:width] for text in table([line(row) for row in rows]).split("\n")]
        up = f"\x1b[{self.height}A" if self.height else ""
        print(up + "\n".join(f"\x1b[2K{text}" for text in lines), file=self.out, flush=True)
        self.height = len(lines)


class _Lines:
    """One line per run when its state, stage or attempt changes, else every QUIET seconds."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.said: dict[str, tuple[Any, float]] = {}

    def draw(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            facts = (row["state"], row["stage"], row["attempts"])
            before, at = self.said.get(row["run"], (None, 0.0))
            moving = row["state"] == "running" and time.monotonic() - at >= QUIET
            if facts != before or moving:
                print(_sentence(row), file=self.out, flush=True)
                self.said[row["run"]] = (facts, time.monotonic())


def _sentence(row: dict[str, Any]) -> str:
    """One run in one line: what is known of it, nothing else."""
    cells = line(row)
    parts = [
        f"{row['run']}: {cells['state']}",
        row["stage"] and f"stage {row['stage']}",
        row["total"] and f"{cells['samples']} samples",
        row["loss"] is not None and f"loss {cells['loss']}",
        row["samples_per_second"] is not None and f"{cells['samples/s']} samples/s",
        row["eta_seconds"] is not None and f"{cells['left']} left",
        cells[" "],
    ]
    return plain(", ".join(part for part in parts if part))
