"""The wall limit of a job, compared with the measured times of start-up and saves of its run.

Administrators change limits of running jobs, so the limit comes from Slurm and not from the run's configuration.
"""

import math
import time
from typing import Any, Dict, NamedTuple, Optional

from flip.runs import checkpoint_folder
from flip.runs.records import COUNT, is_observed
from flip.runs.rundir import RunDir, read_record, write_json

EARLY = 75  # seconds by which the warning may come earlier than requested, and a few for the ranks to exit


class TimeUsed(NamedTuple):
    """How long a job has run, as its scheduler reports it."""

    elapsed: Optional[float]
    """Seconds; None if unknown."""
    limit: Optional[float]
    """Seconds; None if unknown or unlimited."""
    over: bool
    """Whether the scheduler ended the job at its limit."""
    preempted: bool


def record_limit(run: RunDir, n: int, limit: int) -> None:
    """Record the limit of attempt n, in seconds."""
    write_json(run.attempt(n) / "wall.json", {"limit": limit})


def recorded_limit(run: RunDir, n: int) -> int:
    """The limit of attempt n in seconds, 0 if none is recorded."""
    return int((read_record(run.attempt(n) / "wall.json") or {}).get("limit", 0))


def startup_seconds(run: RunDir) -> float:
    """Seconds from the newest start to its first step, or a lower bound: the longest start; 0.0 if unknown."""
    cut_short = [0.0]
    for n in reversed(run.attempt_numbers()):
        start, ready, end = (read_record(run.attempt(n) / (name + ".json")) or {} for name in ("start", "ready", "end"))
        if "time" in start and "time" in ready:  # both are written on the first node
            return max(0.0, float(ready["time"]) - float(start["time"]))
        if "time" in start and "time" in end and is_observed(end):
            cut_short.append(float(end["time"]) - float(start["time"]))
    return max(cut_short)


def save_seconds(run: RunDir) -> float:
    """Seconds of the longest save, 0.0 if unknown."""
    return max([0.0] + [float(entry.record.get("saving", 0.0)) for entry in checkpoint_folder.checkpoints(run)])


def measured(run: RunDir) -> str:
    """The measured times in words; "" if there are none."""
    times = (("a start takes", startup_seconds(run)), ("a save", save_seconds(run)))
    return " and ".join("%s %s" % (label, format_seconds(seconds)) for label, seconds in times if seconds)


def why_too_short(run: RunDir, limit: int) -> str:
    """Why no attempt can make progress within ``limit`` seconds, in words; "" if one can."""
    if not limit or startup_seconds(run) + save_seconds(run) < limit:
        return ""
    return "no attempt can make progress within the wall limit of %s: %s" % (format_seconds(limit), measured(run))


def why_lowered(run: RunDir, limit: int) -> str:
    """Where the wall limit of an attempt, in seconds, was lowered since its submission, in words; "" if it was not, or
    if that is unknown. A person did that, and may raise it again: the run is not given up for it."""
    job = read_record(run.path / "job.json") or {}
    submitted: Dict[str, Any] = {}
    try:
        path = run.path.parent / ".slurm" / job.get("token", "") / "submitted.json"
        submitted = read_record(path, {"limit": COUNT}) or {}
    except PermissionError:  # the folder of another user
        pass
    asked = submitted.get("limit") or math.ceil(3600 * job.get("shape", {}).get("hours", 0.0))
    if not 0 < limit < asked:
        return ""
    return "its wall limit was lowered from %s to %s" % (format_seconds(asked), format_seconds(limit))


def limit_reason(run: RunDir, n: int, used: Optional[TimeUsed]) -> str:
    """Why attempt n, which ends, counts as one that used its wall limit, except for the time to save; "" if it does
    not. A preempted one does not.

    ``used``: None if the scheduler does not answer: then the recorded limit and this host's clock count.
    """
    if used is None:
        start = read_record(run.attempt(n) / "start.json") or {}
        elapsed = time.time() - float(start.get("time", time.time()))
        used = TimeUsed(elapsed, recorded_limit(run, n) or None, over=False, preempted=False)
    if used.elapsed is None or used.limit is None or used.preempted:
        return ""
    lead = (read_record(run.path / "job.json") or {}).get("signal_seconds", 0)
    if used.over or used.elapsed >= used.limit - lead - EARLY:
        return why_no_progress(run, used.limit)
    return ""


def why_no_progress(run: RunDir, limit: float) -> str:
    """The reason of an end at the wall limit, in seconds, without a new checkpoint."""
    in_words = measured(run)
    suffix = " (%s)" % in_words if in_words else ""
    return "the wall limit of %s passed, and nothing new was kept%s" % (format_seconds(limit), suffix)


def format_seconds(seconds: float) -> str:
    """``48 s``, ``30 min``, ``8.3 h``."""
    if seconds < 120:
        return "%.0f s" % seconds
    if seconds < 7200:
        return "%.0f min" % (seconds / 60)
    return "%.3g h" % (seconds / 3600)
