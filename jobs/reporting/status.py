"""State of runs as a table: once (``table``, ``render``), or until they have ended (``watch``).

``watch`` redraws a screen on a terminal, and prints a line per change otherwise. Ctrl-C does not stop the runs.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from flip.runs import attempts
from flip.runs.lifecycle import ENDED, UNREADABLE, RunState
from flip.runs.metric_lines import metric_file
from flip.runs.records import is_observed
from flip.runs.rundir import RunDir, read_lenient, read_record
from jobs.common.cli import INTERRUPTED, command
from jobs.common.job import record_of
from jobs.common.terminal import Display, Page, Share, TextTable, redraws, show
from jobs.common.text import count, duration, formatted, hours_text, percent, plain
from jobs.reporting.faults import IN_JOB, restart_place
from jobs.submitted_runs.clusters import poll_interval, states, worst_exit_code
from jobs.workloads import submitted

QUIET = 30.0
"""Without a terminal: seconds between lines about a run if only its progress has changed."""
FEW = 4
"""Most runs that the command to return to the screen names one by one."""
URGENCY = ("failed", "running", "unknown", "waiting", "stopped", "queued", "cancelled", "complete")
"""States in the order in which they are shown if the screen is too low for all runs."""
PROGRESS = ("stage", "samples", "step", "loss", "batch acc.", "samples/s", "ETA")
"""Columns of the progress of a training."""
OF_TRAININGS = ("stage", "batch acc.")
"""Columns that a table of programs does not have."""
DROPPED = (
    "last progress", "step", "stage", "cluster", "batch acc.", "loss", "samples/s", "GPU-hours", "wall-clock",
    "attempts", "why", "ETA",
)  # fmt: skip
"""Columns that a narrow terminal does not show; the first one disappears first."""


def table(runs: list[RunDir]) -> list[dict[str, Any]]:
    """One row per run.

    Keys: sweep, run, cluster (profile of the last submission), state, stage, samples, total, step, steps, loss,
    accuracy (within the batch), phase, samples_per_second, eta_seconds, attempts, restarts, restart (how the newest
    attempt came: "in the job", "requeue", or None for a first one), unsteady
    (``flip.monitoring.metrics_reader.is_varying``), wall_seconds (of all attempts), gpu_hours (None: on CPUs),
    progress_time (Unix time of the last progress), score (of the first test set: name, top1), reason. None: not written
    yet.
    """
    state_of = states(runs)
    return [row(run, state_of[run.path]) for run in runs]


def row(run: RunDir, state: RunState) -> dict[str, Any]:
    """The row of one run. Speed and ETA are None unless an attempt is running.

    ``reason``: of the last end, unless the run was submitted again since; it also names damaged files.
    """
    live, damage = _read_or_error(lambda: read_record(run.status))
    last, more = _read_or_error(lambda: attempts.last_end(run))
    newest = []
    if state.attempt:
        newest = [run.attempt(state.attempt) / name for name in ("start.json", "end.json")]
    records = (run.identity, run.path / "job.json", run.result, run.cancel, *newest)
    job = record_of(run)
    shape = job.get("shape", {})
    seconds = _wall_seconds(run, state, live, job.get("time"))
    gpus = shape.get("nodes", 0) * shape.get("gpus", 0)
    damaged = [_read_or_error(partial(read_record, path))[1] for path in records]
    moving = {}
    if state.state == "running" and live.get("attempt") == state.attempt:
        moving = live
    submitted_again = state.state in ("queued", "running") and last.get("attempt", 0) <= job.get("after", 0)
    stale = submitted_again or state.state == "complete"
    reason = state.reason
    if not reason and not stale:
        reason = str(last.get("reason", ""))
    gpu_hours = None
    if gpus:
        gpu_hours = gpus * seconds / 3600
    work = submitted.of_run(run, job)
    problems = [
        text
        for text in (moving.get("storage"), live.get("callbacks"), work.missing(), damage, more, *damaged)
        if text and text not in reason
    ]
    return {
        **{"sweep": run.sweep, "run": run.name, "state": state.state},
        **{key: live.get(key) for key in ("stage", "samples", "total", "step", "steps", "loss", "accuracy", "phase")},
        **_newest_checkpoint(live, last, state),
        **_between_attempts(last, state),
        "cluster": job.get("cluster"),
        **{key: moving.get(key) for key in ("samples_per_second", "eta_seconds", "unsteady")},
        **{"attempts": state.attempt, "restarts": max(0, state.attempt - 1), "restart": _restart(run, state.attempt)},
        **{"wall_seconds": seconds, "gpu_hours": gpu_hours},
        "progress_time": live.get("time"),
        "score": _score(run),
        "reason": "; ".join(filter(None, [reason, *dict.fromkeys(problems)])),
        "next": work.next_commands(state.state),
    }


def _score(run: RunDir) -> dict[str, Any] | None:
    """Name and top-1 accuracy of the first test set of a complete run; None if it has none."""
    result, _ = _read_or_error(lambda: read_record(run.result))
    tests = [each for each in result.get("evaluations", []) if each.get("role") == "test" and "top1" in each]
    if not tests:
        return None
    return {"name": tests[0]["name"], "top1": tests[0]["top1"]}


def _restart(run: RunDir, n: int) -> str | None:
    """How attempt n came: "in the job", "requeue", or None if it was the first one of a submission, or is unknown."""
    start, before = (read_lenient(run.attempt(number) / "start.json") for number in (n, n - 1))
    if not start or not before or start.get("after", 0) >= n - 1:
        return None
    return restart_place(start, before)


def _between_attempts(last: Mapping[str, Any], state: RunState) -> dict[str, Any]:
    """The phase of a run whose newest attempt has ended while its job goes on: status.json is of that attempt."""
    if state.state == "running" and last.get("attempt") == state.attempt and last.get("action") == "requeue":
        return {"phase": "restarting in the job"}
    return {}


def _newest_checkpoint(live: Mapping[str, Any], last: Mapping[str, Any], state: RunState) -> dict[str, Any]:
    """The position of the newest checkpoint at the end of the newest attempt, if status.json is older than it.

    Processes that were killed do not write their last position. The step of the checkpoint is unknown here.
    """
    saved = last.get("commits", 0)
    if state.state == "running" or last.get("attempt") != live.get("attempt") or saved <= live.get("samples", 0):
        return {}
    return {"samples": saved, "step": None}


def _read_or_error(read: Callable[[], dict[str, Any] | None]) -> tuple[dict[str, Any], str]:
    """(content of a file, ""), or ({}, error) if it is unreadable."""
    try:
        return dict(read() or {}), ""
    except UNREADABLE as error:
        if isinstance(error, OSError):
            return {}, f"{error.filename}: {error.strerror}"
        return {}, str(error)


@lru_cache(maxsize=1 << 16)
def _final_seconds(path: Path, n: int, submitted: float | None) -> float:
    """Seconds of an attempt before the newest one, kept for ``watch``: they do not change any more.

    ``submitted``: time of job.json, as a run that was restarted from zero has the same path. Raises LookupError, and
    keeps nothing, if start or end are unknown.
    """
    run = RunDir(path)
    start, end = (read_lenient(run.attempt(n) / name) for name in ("start.json", "end.json"))
    if is_observed(end):
        last = end
    else:
        last = next(metric_file(run, n).newest_first(), {})
    return max(0.0, last["time"] - start["time"])


def _wall_seconds(run: RunDir, state: RunState, live: Mapping[str, Any], submitted: float | None) -> float:
    """Seconds of all attempts together: a running one up to now, one whose end was not observed up to its last sign."""
    total = 0.0
    for n in range(1, state.attempt):
        with suppress(LookupError):
            total += _final_seconds(run.path, n, submitted)
    start, end = (read_lenient(run.attempt(state.attempt) / name) for name in ("start.json", "end.json"))
    until = None
    if is_observed(end):
        until = end.get("time")
    if until is None:
        if state.state == "running":
            until = time.time()
        else:
            until = live.get("time")
    if until is None or "time" not in start:
        return total
    return total + max(0.0, until - start["time"])


def render(rows: Sequence[Mapping[str, Any]], runs: Sequence[RunDir] = ()) -> Page:
    """One table per sweep, below its name.

    ``runs``: of the rows; a table has columns of progress only if the work of one of its runs has progress.
    """
    parts: list[str | TextTable] = []
    without = {run.sweep for run in runs} - {run.sweep for run in runs if submitted.of_run(run).has_progress}
    without_stages = {run.sweep for run in runs} - {run.sweep for run in runs if submitted.of_run(run).has_stages}
    for sweep, group in groupby(rows, key=lambda r: r["sweep"]):
        members = list(group)
        hidden = set()
        if all(r["gpu_hours"] is None for r in members):
            hidden.add("GPU-hours")
        if len({r.get("cluster") for r in members} - {None}) <= 1:
            hidden.add("cluster")
        if not any(r.get("score") for r in members):
            hidden.add("test score")
        if sweep in without:
            hidden.update(PROGRESS)
        if sweep in without_stages:
            hidden.update(OF_TRAININGS)
        shown = [{key: cell for key, cell in _shown(r).items() if key not in hidden} for r in members]
        if parts:
            parts.append("")
        parts += [sweep, TextTable(shown, cut={"why": 12}, drop=DROPPED, indent="  ")]
    return Page(*parts)


def _shown(r: Mapping[str, Any]) -> dict[str, str | None]:
    age = None
    if r["progress_time"] is not None:
        age = f"{duration(max(0, time.time() - r['progress_time']))} ago"
    samples = None
    if r["samples"] is not None and r["total"]:
        samples = f"{count(r['samples'])} / {count(r['total'])}"
    accuracy = None
    if r.get("accuracy") is not None:
        accuracy = f"{percent(r['accuracy'])} %"
    attempts_text = str(r["attempts"])
    if r.get("restart") == IN_JOB:
        attempts_text += f" ({IN_JOB})"
    return {
        "run": r["run"],
        "cluster": r.get("cluster"),
        "state": r["state"],
        "stage": r["stage"],
        "samples": samples,
        "step": count(r["step"]),
        "loss": formatted(r["loss"], ".3f"),
        "batch acc.": accuracy,
        "test score": _score_text(r),
        "samples/s": count(r["samples_per_second"]),
        "ETA": duration(r["eta_seconds"]),
        "wall-clock": duration(r["wall_seconds"]),
        "GPU-hours": hours_text(r["gpu_hours"]),
        "attempts": attempts_text,
        "last progress": age,
        "why": r["reason"] or None,
    }


def _score_text(r: Mapping[str, Any]) -> str | None:
    score = r.get("score")
    if not score:
        return None
    return f"{score['name']} {percent(score['top1'])} %"


def watch(paths: Iterable[Path], out: TextIO | None = None, poll: float = 1.0) -> int:
    """Show the runs until all have ended, then the results. Returns 0, or the worst exit code of incomplete runs."""
    runs = [RunDir(path) for path in paths]
    out = out or sys.stdout
    quiet = 0
    try:
        with _live(out) as draw:
            while True:
                rows = table(runs)
                draw(rows)
                if all(row["state"] in ENDED for row in rows):
                    quiet += 1
                else:
                    quiet = 0
                needed = 1
                if any(row["state"] == "stopped" for row in rows):
                    needed = 3  # a supervisor releases its lock shortly before it ends, and may take it again
                if quiet >= needed:
                    break
                time.sleep(max(poll, poll_interval(runs)))
    except KeyboardInterrupt:
        print(f"\nthe runs continue; to return: {_to_return(runs)}", file=out, flush=True)
        return INTERRUPTED
    from jobs.reporting.outcomes import outcomes, terminal_page

    print(file=out)
    show(terminal_page(outcomes(runs)), file=out)
    return worst_exit_code((run, row["state"]) for run, row in zip(runs, rows, strict=True))


def _to_return(runs: Sequence[RunDir]) -> str:
    """The command that watches the runs again; of many runs their sweeps."""
    paths = [run.path.absolute() for run in runs]
    if len(paths) > FEW:
        paths = list(dict.fromkeys(path.parent for path in paths))
    return command("status", *paths, "--watch")


@contextmanager
def _live(out: TextIO) -> Iterator[Callable[[Sequence[Mapping[str, Any]]], None]]:
    """A function that shows the rows: a screen on a terminal, else lines."""
    if not redraws(out):
        yield _Lines(out).draw
        return
    with Display(out) as display:
        yield lambda rows: display.draw(partial(screen, rows))


def screen(rows: Sequence[Mapping[str, Any]], width: int, height: int) -> Page:
    """What ``watch`` shows: a summary, and a line per run with its progress; the most urgent ones if not all fit."""
    # without the summary, the header, and the line of the cursor
    shown = list(rows)
    room = height - 3
    if len(shown) > room:
        shown = sorted(rows, key=lambda row: URGENCY.index(row["state"]))[: max(1, room - 1)]
    states = Counter(row["state"] for row in rows)
    sweeps = list(dict.fromkeys(row["sweep"] for row in rows))
    hidden = states - Counter(row["state"] for row in shown)
    lines = [{"run": _name(row, sweeps), **line(row)} for row in shown]
    drop = ("samples/s", "loss", "wall-clock", "attempts", "why", "samples", "left")
    more = []
    if hidden:
        more = [f"and {hidden.total()} more: {_counted(hidden)}"]
    return Page(f"{', '.join(sweeps)}: {_counted(states)}", TextTable(lines, {"why": 12, "progress": 8}, drop), *more)


def _counted(states: Counter[str]) -> str:
    """2 running, 1 failed"""
    return ", ".join(f"{states[state]} {state}" for state in URGENCY if states[state])


def _share(row: Mapping[str, Any]) -> float:
    if row["total"]:
        return (row["samples"] or 0) / row["total"]
    return float(row["state"] == "complete")


def _name(row: Mapping[str, Any], sweeps: Collection[str]) -> str:
    """The name of a run, with that of its sweep if there are several."""
    if len(sweeps) > 1:
        return f"{row['sweep']}/{row['run']}"
    return row["run"]


def line(row: Mapping[str, Any]) -> dict[str, Any]:
    """One run as cells of ``watch``, except for its name."""
    shown = _shown({**row, "samples": row["samples"] or 0})
    share = _share(row)
    state = row["state"]
    if state == "running":
        state = row["phase"] or state
    why = ""
    if row["state"] not in ("running", "complete", "queued"):
        why = row["reason"]
    return {
        "state": state,
        "progress": Share(share),
        "%": f"{100 * share:.0f}",
        **{key: shown[key] or "-" for key in ("samples", "loss", "samples/s")},
        "left": duration(row["eta_seconds"]),
        **{key: shown[key] for key in ("wall-clock", "attempts")},
        "why": why,
    }


class _Lines:
    """One line per run when its state, stage or attempt changes, else every QUIET seconds."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.printed: dict[str, tuple[Any, float]] = {}

    def draw(self, rows: Sequence[Mapping[str, Any]]) -> None:
        sweeps = {row["sweep"] for row in rows}
        for row in rows:
            summary = row["state"], row["stage"], row["attempts"]
            name = _name(row, sweeps)
            before, at = self.printed.get(name, (None, 0.0))
            moving = row["state"] == "running" and time.monotonic() - at >= QUIET
            if summary != before or moving:
                print(_sentence(name, row), file=self.out, flush=True)
                self.printed[name] = (summary, time.monotonic())


def _sentence(name: str, row: Mapping[str, Any]) -> str:
    """One run in one line, without unknown values."""
    cells = line(row)
    parts = [
        f"{name}: {cells['state']}",
        row["stage"] and f"stage {row['stage']}",
        row["total"] and f"{cells['samples']} samples",
        row["loss"] is not None and f"loss {cells['loss']}",
        row["samples_per_second"] is not None and f"{cells['samples/s']} samples/s",
        row["eta_seconds"] is not None and f"{cells['left']} left",
        cells["why"],
    ]
    return plain(", ".join(part for part in parts if part))
