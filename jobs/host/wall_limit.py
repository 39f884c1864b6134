"""The wall limit of a job as Slurm has it, against what a start and a save of the run take.

Administrators change limits of running jobs, so the limit is read from Slurm and not from the run's configuration.
Standard library, Python >= 3.6: the exit trap on the host uses it.
"""

from typing import Dict

from flip.runs import commit
from flip.runs.rundir import RunDir, read_record, write_json
from jobs.host import slurm_cli

#: Seconds by which the warning may come earlier than asked for, and a few for the ranks to leave.
EARLY = 75


def record_limit(run: RunDir, n: int, limit: int) -> None:
    """Record the limit of attempt n, in seconds."""
    write_json(run.attempt(n) / "wall.json", {"limit": limit})


def recorded_limit(run: RunDir, n: int) -> int:
    """The limit of attempt n in seconds, 0 where none is recorded."""
    return int((read_record(run.attempt(n) / "wall.json") or {}).get("limit", 0))


def startup_seconds(run: RunDir) -> float:
    """Seconds from the newest start to its first step, 0.0 where nothing is known. Where no start got that far, the
    longest of them, as a start takes at least that."""
    cut = [0.0]
    for n in reversed(run.attempt_numbers()):
        start, ready, end = (read_record(run.attempt(n) / (name + ".json")) or {} for name in ("start", "ready", "end"))
        if "time" in start and "time" in ready:  # both are written on the first node
            return max(0.0, float(ready["time"]) - float(start["time"]))
        if "time" in start and "time" in end and end.get("code") is not None:
            cut.append(float(end["time"]) - float(start["time"]))
    return max(cut)


def save_seconds(run: RunDir) -> float:
    """Seconds of the longest save, 0.0 where nothing is known."""
    return max([0.0] + [float(one.record.get("saving", 0.0)) for one in commit.commits(run)])


def measured(run: RunDir) -> str:
    """What is known of starts and saves, in words; empty: nothing."""
    start, kept = startup_seconds(run), save_seconds(run)
    parts = ["a start takes %s" % format_seconds(start)] if start else []
    return " and ".join(parts + (["a save %s" % format_seconds(kept)] if kept else []))


def too_short(run: RunDir, limit: int) -> str:
    """Why no attempt gets on within a limit of so many seconds, in words; empty where one may."""
    if not limit or startup_seconds(run) + save_seconds(run) < limit:
        return ""
    return "no attempt gets on within the wall limit of %s: %s" % (format_seconds(limit), measured(run))


def limit_reached(run: RunDir, fields: Dict[str, str]) -> str:
    """That a job whose attempt ends has used up its limit but for the time to save, in words; empty where it has not,
    or was preempted. ``fields``: of ``scontrol show job``."""
    ran, limit = (
        slurm_cli.parse_duration(fields.get("RunTime", "")),
        slurm_cli.parse_duration(fields.get("TimeLimit", "")),
    )
    if ran is None or limit is None or slurm_cli.timestamp(fields.get("PreemptTime", "")) is not None:
        return ""
    lead = (read_record(run.path / "job.json") or {}).get("signal_seconds", 0)
    over = fields.get("Reason") == "TimeLimit"  # of one that is requeued already RunTime is 0
    return no_progress(run, limit) if over or ran >= limit - lead - EARLY else ""


def no_progress(run: RunDir, limit: int) -> str:
    """That the limit, in seconds, passed for nothing, in words."""
    known = measured(run)
    return "the wall limit of %s passed, and nothing new was kept%s" % (
        format_seconds(limit),
        " (%s)" % known if known else "",
    )


def format_seconds(seconds: float) -> str:
    """``48 s``, ``30 min``, ``8.3 h``."""
    if seconds < 120:
        return "%.0f s" % seconds
    return "%.0f min" % (seconds / 60) if seconds < 7200 else "%.3g h" % (seconds / 3600)
