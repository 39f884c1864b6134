"""Details of one run for ``flip explain``, from its files and its cluster."""

import os
import re
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from flip.environment import changes_in
from flip.monitoring.results import Outcome, read_run
from flip.runs import attempts
from flip.runs.checkpoint_folder import checkpoints
from flip.runs.errors import FlipError
from flip.runs.lifecycle import UNREADABLE, RunState
from flip.runs.metric_lines import newest_line
from flip.runs.next_step import next_step
from flip.runs.records import is_observed
from flip.runs.remote_owner import inherited
from flip.runs.restart_policy import FAILURES, FINAL, OWN_LIMITS, Limits
from flip.runs.rundir import RunDir, parse_file_number, read_lenient, sorted_glob
from flip.runs.side_jobs import sweep_folder
from jobs.common.cli import command
from jobs.common.job import record_of
from jobs.reporting import goodput
from jobs.reporting.status import row
from jobs.slurm.start_problems import start_logs
from jobs.submitted_runs.clusters import states
from jobs.workloads import submitted

LINES = 5
"""Lines shown of the log of the root cause."""
MAX_LINE = 1000
"""Characters shown of a line."""
ERROR = re.compile(r"^(\S+: )?([\w.]*(Error|Exception|Interrupt|Exit)\b|[\w./-]+: error: )|\b(ERROR|FATAL|CRITICAL)\b")
"""A line that names an error: the last line of a traceback, or of a log."""
TAIL = 1 << 16
"""Bytes read from the end of a log."""


def explain(run: RunDir) -> dict[str, Any]:
    """Everything that the page shows.

    Keys: sweep, run, folder, about, evaluation (of an evaluation job, else None), code, state, evidence, start (of a
    batch script that failed since), attempts, next, incidents, goodput, verdict (of the newest metric line), inherited
    (remote folders whose checkpoints the run only reads), anomalies (files, in the order of their steps), damaged (a
    sentence per file). Slurm is asked once.
    """
    state = states([run])[run.path]
    outcome = read_run(run.path, state)
    now = time.time()
    account = goodput.of_run(outcome, now if state.state == "running" else None)
    return {
        "sweep": run.sweep,
        "run": run.name,
        "folder": str(run.path),
        **submitted.of_run(run).details(outcome),
        "code": _code(run),
        "state": row(run, state),
        "evidence": _evidence(outcome, state),
        "start": _failed_start(run),
        "attempts": [_attempt(outcome, i, state) for i in range(len(outcome.attempts))],
        "next": _next(run, outcome, state, now),
        "incidents": _incidents(outcome),
        "goodput": goodput.as_dict([account])[0],
        "verdict": newest_line(run).get("verdict"),
        "inherited": _inherited(outcome),
        "anomalies": _anomalies(run),
        "damaged": outcome.damage,
    }


def _inherited(outcome: Outcome) -> list[dict[str, Any]]:
    """The remote folders with checkpoints that the run has inherited; none if its records cannot be read."""
    run = outcome.run
    try:
        folders = inherited(run, str(outcome.settings.get("checkpoint.url") or ""), checkpoints(run))
    except (FlipError, *UNREADABLE):  # `damaged` and the state report that
        return []
    return [folder.as_dict() for folder in folders]


def _anomalies(run: RunDir) -> list[str]:
    """The file of the first rank, for every recorded step."""
    files: dict[tuple[int, int], str] = {}
    for path in sorted_glob(run.anomalies, "*-*.json"):
        n, _, step = map(parse_file_number, path.name.split(".")[0].partition("-"))
        if n is not None and step is not None:
            files.setdefault((step, n), f"{path.parent.name}/{path.name}")
    return [files[key] for key in sorted(files)]


def _code(run: RunDir) -> dict[str, Any]:
    digest = read_lenient(run.identity).get("code")
    job = record_of(run)
    folder = Path(job.get("snapshot") or run.path.parent / ".code" / str(digest))
    return {"digest": digest, "folder": str(folder), "present": os.path.isdir(folder), "cluster": job.get("cluster")}


def _unrecorded(outcome: Outcome, state: RunState) -> Mapping[str, Any]:
    """The end of a newest attempt without end.json (the owner of its job was killed), as the next start would decide
    and record it."""
    attempt = None
    if outcome.attempts:
        attempt = outcome.attempts[-1]
    if attempt is None or attempt.end or state.state in ("running", "unknown"):
        return {}
    run = outcome.run
    try:
        step = next_step(attempts.evidence_of(run, attempt.number, attempts.unseen_end(run, attempt.number)))
    except (OSError, ValueError) as error:  # a file of the run is not readable, or damaged
        return {"reason": f"its end was not recorded: {error}"}
    codes = [cause.get("code") for cause in attempt.causes if cause.get("cause") == step.cause]
    return {"cause": step.cause, "reason": step.reason, "code": codes[0] if codes else None, "expected": step.action}


def _evidence(outcome: Outcome, state: RunState) -> dict[str, Any] | None:
    """The basis of the newest decision, or what the ranks recorded; None if no attempt has ended."""
    unrecorded = _unrecorded(outcome, state)
    attempt = next((a for a in reversed(outcome.attempts) if a.end or unrecorded), None)
    if attempt is None:
        return None
    end = attempt.end or unrecorded
    rank = next((c["rank"] for c in attempt.causes if c["cause"] == end.get("cause")), 0)
    processes = record_of(outcome.run).get("shape", {}).get("processes") or 1
    log = _log(outcome.run, attempt.number, rank // processes)
    keys = ("action", "expected", "cause", "reason", "code", "state")
    details = {"attempt": attempt.number, **{key: end.get(key) for key in keys}, "rank": rank}
    if log is None:
        return {**details, "log": None, "lines": []}
    return {**details, "log": str(log), "lines": last_lines(log)}


def _failed_start(run: RunDir) -> dict[str, Any] | None:
    """The newest log of a batch script that no attempt has followed, and its last lines."""
    logs = start_logs(run, "err")
    if logs:
        return {"log": str(logs[-1]), "lines": last_lines(logs[-1])}
    return None


def _log(run: RunDir, n: int, node: int) -> Path | None:
    """The log with the best evidence of how attempt n ended on a node; None if all are empty."""
    folder = run.logs / str(n)
    names = (f"node{node}.err", "job.err", f"node{node}.out", "job.out")
    return next((folder / n for n in names if (folder / n).is_file() and (folder / n).stat().st_size), None)


def last_lines(path: Path, count: int = LINES) -> list[str]:
    """The lines up to the last one that names an error, or else the last lines; none of them blank.

    What libraries print while a process ends, such as statistics and warnings about resources, follows its error.
    """
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        text = file.read().decode("utf-8", "replace")
    lines = [line.rstrip()[:MAX_LINE] for line in text.splitlines() if line.strip()]
    named = [i for i, line in enumerate(lines, 1) if ERROR.search(line)]
    end = max(named, default=len(lines))
    return lines[max(0, end - count) : end]


def _attempt(outcome: Outcome, i: int, state: RunState) -> dict[str, Any]:
    attempt = outcome.attempts[i]
    start = attempt.start
    end: Mapping[str, Any] = attempt.end
    if not end and i == len(outcome.attempts) - 1:
        end = _unrecorded(outcome, state)
    seconds = None
    if is_observed(end) and end.get("time") is not None and start.get("time") is not None:
        seconds = max(0.0, end["time"] - start["time"])
    return {
        "attempt": attempt.number,
        "time": start.get("time"),
        "where": start.get("nodes") or start.get("host"),
        "job": start.get("job") or None,
        "seconds": seconds,
        "from": start.get("resumes_from"),
        "to": end.get("commits"),
        "cause": end.get("cause"),
        "reason": end.get("reason"),
        "action": end.get("action"),
        "delay": end.get("delay"),
        "environment": changes_in(outcome.run, attempt.number),
    }


def _next(run: RunDir, outcome: Outcome, state: RunState, now: float) -> dict[str, Any]:
    """What happens next and when, and the command to type, if any."""
    end: Mapping[str, Any] = {}
    if outcome.attempts:
        end = outcome.attempts[-1].end
    until = None
    if state.state == "waiting" and end.get("delay"):
        until = end["time"] + end["delay"]
        if until <= now:
            until = None
    work = submitted.of_run(run)
    sweep = sweep_folder(run)
    steps: dict[str, tuple[str, str | None]] = {
        "complete": ("nothing: it has finished", command("report", sweep)),
        "running": ("it continues", None),
        "queued": ("it starts when resources are free", None),
        "waiting": ("it restarts automatically", None),
        "failed": ("nothing automatically: fix the cause", None),
        "cancelled": ("nothing automatically", None),
        "stopped": ("nothing automatically: no process supervises it", None),
        "unknown": ("unknown: ask again when its cluster answers", None),
    }
    step, typed = steps[state.state]
    if state.needs:
        step = f"nothing until a person acts: {state.needs}"
    if state.state in ("failed", "cancelled", "stopped"):
        diverged = state.state == "failed" and end.get("cause") == "diverged"
        more, typed = work.again(retry=state.state != "stopped", diverged=diverged)
        step += f"; {more}"
    estimate = state.starts or None
    of_state = work.next_commands(state.state)
    own = command("explain", run.path.absolute())
    more_commands = [line for line in of_state if line not in (own, typed)]
    return {
        "what": step,
        "command": typed,
        "not_before": until,
        "estimate": estimate,
        "commands": [*filter(None, [typed]), *more_commands],
    }


def _incidents(outcome: Outcome) -> list[dict[str, Any]]:
    """Ends by cause: total, since the newest checkpoint or submission, and the limit that stops the run."""
    after = record_of(outcome.run).get("after", 0)
    ends = [attempt.end for attempt in outcome.attempts if attempt.end and attempt.end.get("cause") != "complete"]
    since: list[Mapping[str, Any]] = []
    for end in ends:
        if end.get("attempt", 0) <= after:
            continue
        if end.get("committed"):
            since.clear()
        else:
            since.append(end)
    limits = Limits()
    incidents = []
    for cause in dict.fromkeys(end.get("cause", "?") for end in ends):
        alike: Collection[str] = (cause,)
        if cause in FAILURES:
            alike = FAILURES
        limit = (dict.fromkeys(FAILURES, limits.failures) | dict.fromkeys(FINAL, 1)).get(cause)
        if cause in OWN_LIMITS:
            limit = getattr(limits, OWN_LIMITS[cause])
        counted = sum(end.get("cause") in alike for end in since)
        total = sum(end.get("cause") == cause for end in ends)
        incidents.append({"cause": cause, "total": total, "without_commit": counted, "limit": limit})
    return incidents
