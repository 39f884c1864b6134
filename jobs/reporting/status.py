"""State of runs as a table: once (``table``, ``render``), or until they have ended (``watch``).

``watch`` redraws a table on a terminal, and prints a line per change otherwise. Ctrl-C does not stop the runs.
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
"""Without a terminal: seconds between lines about a run if only its progress has changed."""


def table(runs: list[RunDir]) -> list[dict[str, Any]]:
    """One row per run.

    Keys: sweep, run, cluster (profile of the last submission), state, stage, samples, total, step, steps, loss, phase,
    samples_per_second, eta_seconds, unsteady (``flip.monitoring.metrics_reader.is_unsteady``), attempts, restarts,
    progress_time (Unix time of the last progress), reason. None: not written yet.
    """
    state_of = states(runs)
    return [row(run, state_of[run.path]) for run in runs]


def row(run: RunDir, state: JobState) -> dict[str, Any]:
    """The row of one run. Speed and ETA are None unless an attempt is running; ``reason`` names damaged files."""
    live, damage = _read_or_error(lambda: read_record(run.status))
    last, more = _read_or_error(lambda: attempts.last_end(run))
    newest = [run.attempt(state.attempt) / name for name in ("start.json", "end.json")] if state.attempt else []
    records = (run.identity, run.path / "job.json", run.result, run.cancel, *newest)
    damaged = [_read_or_error(partial(read_record, path))[1] for path in records]
    moving = live if state.state == "running" and live.get("attempt") == state.attempt else {}
    reason = state.detail or (str(last.get("reason", "")) if state.state != "complete" else "")
    problems = [text for text in (moving.get("storage"), damage, more, *damaged) if text and text not in reason]
    return {
        **{"sweep": run.sweep, "run": run.name, "state": state.state},
        **{key: live.get(key) for key in ("stage", "samples", "total", "step", "steps", "loss", "phase")},
        "cluster": cluster_of(run),
        **{key: moving.get(key) for key in ("samples_per_second", "eta_seconds", "unsteady")},
        **{"attempts": state.attempt, "restarts": max(0, state.attempt - 1), "progress_time": live.get("time")},
        "reason": "; ".join(filter(None, [reason, *dict.fromkeys(problems)])),
    }


def _read_or_error(read: Callable[[], dict[str, Any] | None]) -> tuple[dict[str, Any], str]:
    """(content of a file, ""), or ({}, error) if it is unreadable."""
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
    age = None if r["progress_time"] is None else max(0, time.time() - r["progress_time"])
    return {
        "run": r["run"],
        "state": r["state"],
        "stage": r["stage"],
        "samples": None if r["samples"] is None or not r["total"] else f"{count(r['samples'])} / {count(r['total'])}",
        "step": count(r["step"]),
        "loss": None if r["loss"] is None else f"{r['loss']:.3f}",
        "samples/s": count(r["samples_per_second"]),
        "ETA": duration(r["eta_seconds"]),
        "attempt": str(r["attempts"]),
        "restarts": str(r["restarts"]),
        "last progress": age if age is None else f"{duration(age)} ago",
        "why": r["reason"] or None,
    }


def watch(paths: Iterable[Path], out: TextIO | None = None, again: str = "", poll: float = 1.0) -> int:
    """Show the runs until all have ended, then the results. Returns 0, or the worst exit code of incomplete runs.

    ``again``: the command to return after Ctrl-C.
    """
    runs, out = [RunDir(path) for path in paths], out or sys.stdout
    screen = _Terminal(out) if out.isatty() else _Lines(out)
    quiet = 0
    try:
        while True:
            rows = table(runs)
            screen.draw(rows)
            quiet = quiet + 1 if all(row["state"] in ENDED for row in rows) else 0
            # a supervisor releases its lock shortly before it ends, and may take it again
            if quiet >= (3 if any(row["state"] == "stopped" for row in rows) else 1):
                break
            time.sleep(max(poll, poll_interval(runs)))
    except KeyboardInterrupt:
        print(f"\nthe runs continue; to return: {again}", file=out, flush=True)
        return INTERRUPTED
    from jobs.reporting.outcomes import outcomes, text

    print("\n" + text(outcomes(runs)), file=out, flush=True)
    return _code(runs, rows)


def _code(runs: Sequence[RunDir], rows: Sequence[dict[str, Any]]) -> int:
    """The worst exit code: a failure counts more than a stop."""
    codes = []
    for run, row in zip(runs, rows, strict=True):
        if row["state"] == "failed":
            codes.append(exit_code_of(run))
        elif row["state"] != "complete":
            codes.append(STOPPED)
    return max(codes, key=lambda code: (code != STOPPED, code), default=COMPLETE)


def line(row: dict[str, Any]) -> dict[str, str]:
    """One run as cells of the live table."""
    total, shown = row["total"], _shown({**row, "samples": row["samples"] or 0})
    done = round(20 * min(1.0, max(0.0, (row["samples"] or 0) / total if total else row["state"] == "complete")))
    return {
        "run": row["run"],
        "state": row["phase"] if row["state"] == "running" and row["phase"] else row["state"],
        "": "#" * done + "." * (20 - done),
        **{key: shown[key] or "-" for key in ("samples", "loss", "samples/s")},
        "left": duration(row["eta_seconds"]),
        "attempts": str(row["attempts"]),
        " ": row["reason"] if row["state"] not in ("running", "complete", "queued") else "",
    }


class _Terminal:
    """Redraws in place. Lines are cut to the width of the terminal, as a wrapped line would not be erased."""

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
        self.printed: dict[str, tuple[Any, float]] = {}

    def draw(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            summary = (row["state"], row["stage"], row["attempts"])
            before, at = self.printed.get(row["run"], (None, 0.0))
            moving = row["state"] == "running" and time.monotonic() - at >= QUIET
            if summary != before or moving:
                print(_sentence(row), file=self.out, flush=True)
                self.printed[row["run"]] = (summary, time.monotonic())


def _sentence(row: dict[str, Any]) -> str:
    """One run in one line, without unknown values."""
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
