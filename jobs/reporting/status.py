"""The state of runs as a table, once (``table``, ``render``) or until they have ended (``watch``).

``watch`` redraws its table on a terminal and prints a line per change elsewhere. It only reads: Ctrl-C or a lost
connection leaves the runs going.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from flip.runs.errors import COMPLETE, STOPPED
from flip.runs.rundir import RunDir, read_record
from jobs.common.job import UNREADABLE, JobState
from jobs.common.text import count, duration, plain
from jobs.common.text import table as aligned
from jobs.host import attempts
from jobs.runs.clusters import ENDED, INTERRUPTED, cluster_of, exit_code_of, poll_interval, states

QUIET = 30.0
"""Seconds between lines of a run where nothing changed but its progress, without a terminal."""


def table(runs: list[RunDir]) -> list[dict[str, Any]]:
    """One row per run: sweep, run, cluster (the profile that it was submitted with), state, stage, samples, total,
    step, steps, loss, phase, samples_per_second, eta_seconds, attempts, restarts, progress_time (Unix time of the last
    progress that was written), reason. Null is what the run has not written yet.
    """
    known = states(runs)
    return [row(run, known[run.path]) for run in runs]


def row(run: RunDir, state: JobState) -> dict[str, Any]:
    """One run's row. Speed and ETA are those of a running attempt only. What a damaged file would say is None; the
    reason names it."""
    live, damage = _said(lambda: read_record(run.status))
    last, more = _said(lambda: attempts.last_end(run))
    newest = [run.attempt(state.attempt) / name for name in ("start.json", "end.json")] if state.attempt else []
    records = (run.identity, run.path / "job.json", run.result, run.cancel, *newest)
    damaged = [_said(partial(read_record, path))[1] for path in records]
    keys = ["stage", "samples", "total", "step", "steps", "loss", "phase"]
    found = {"sweep": run.sweep, "run": run.name, "state": state.state, **{key: live.get(key) for key in keys}}
    found["cluster"] = cluster_of(run)
    moving = state.state == "running" and live.get("attempt") == state.attempt
    for key in ("samples_per_second", "eta_seconds"):
        found[key] = live.get(key) if moving else None
    found["attempts"] = state.attempt
    found["restarts"] = max(0, state.attempt - 1)
    found["progress_time"] = live.get("time")
    reason = state.detail or (str(last.get("reason", "")) if state.state != "complete" else "")
    outage = str(live.get("storage") or "") if moving else ""
    troubles = [words for words in (outage, damage, more, *damaged) if words and words not in reason]
    found["reason"] = "; ".join(filter(None, [reason, *dict.fromkeys(troubles)]))
    return found


def _said(read: Callable[[], dict[str, Any] | None]) -> tuple[dict[str, Any], str]:
    """(what a file of a run says, ""), of one that cannot be read ({}, why): it must not hide the other runs."""
    try:
        return dict(read() or {}), ""
    except UNREADABLE as error:
        return {}, f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)


def render(rows: list[dict[str, Any]]) -> str:
    """The table as text, one block per sweep."""
    blocks = []
    for sweep, group in groupby(rows, key=lambda r: r["sweep"]):
        several = len({r.get("cluster") for r in rows if r["sweep"] == sweep} - {None}) > 1
        shown = [{**({"cluster": r["cluster"]} if several else {}), **_shown(r)} for r in group]
        order = ["run", *(key for key in shown[0] if key != "run")]
        blocks.append(f"{plain(sweep)}\n{aligned([{key: s[key] for key in order} for s in shown], indent='  ')}")
    return "\n\n".join(blocks)


def _shown(r: dict[str, Any]) -> dict[str, str | None]:
    done = None if r["samples"] is None or not r["total"] else f"{count(r['samples'])} / {count(r['total'])}"
    return {
        "run": r["run"],
        "state": r["state"],
        "stage": r["stage"],
        "samples": done,
        "step": count(r["step"]),
        "loss": None if r["loss"] is None else f"{r['loss']:.3f}",
        "samples/s": count(r["samples_per_second"]),
        "ETA": duration(r["eta_seconds"]),
        "attempt": str(r["attempts"]),
        "restarts": str(r["restarts"]),
        "last progress": None
        if r["progress_time"] is None
        else f"{duration(max(0, time.time() - r['progress_time']))} ago",
        "why": r["reason"] or None,
    }


def watch(paths: Iterable[Path], out: TextIO | None = None, again: str = "", poll: float = 1.0) -> int:
    """Show the runs until all have ended, then the results. 0, or the worst exit code of those that did not complete.

    ``again``: the command that comes back here after Ctrl-C.
    """
    runs, out = [RunDir(path) for path in paths], out or sys.stdout
    screen = _Terminal(out) if out.isatty() else _Lines(out)
    quiet = 0
    try:
        while True:
            rows = table(runs)
            screen.draw(rows)
            quiet = quiet + 1 if all(row["state"] in ENDED for row in rows) else 0
            # a supervisor lets go of its lock for an instant before it ends, and may take it again
            if quiet >= (3 if any(row["state"] == "stopped" for row in rows) else 1):
                break
            time.sleep(max(poll, poll_interval(runs)))
    except KeyboardInterrupt:
        print(f"\nthe runs go on without you; to come back: {again}", file=out, flush=True)
        return INTERRUPTED
    _results(runs, out)
    return _code(runs, rows)


def _results(runs: Sequence[RunDir], out: TextIO) -> None:
    from jobs.reporting.outcomes import outcomes, text

    print("\n" + text(outcomes(runs)), file=out, flush=True)


def _code(runs: Sequence[RunDir], rows: Sequence[dict[str, Any]]) -> int:
    """The exit code that says most: a real failure before a stop."""
    codes = []
    for run, row in zip(runs, rows, strict=True):
        if row["state"] == "failed":
            codes.append(exit_code_of(run))
        elif row["state"] != "complete":
            codes.append(STOPPED)
    return max(codes, key=lambda code: (code != STOPPED, code), default=COMPLETE)


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
        lines = [text[:width] for text in aligned([line(row) for row in rows]).split("\n")]
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
