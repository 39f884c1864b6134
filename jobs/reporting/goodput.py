"""What the time of runs went to, and the one setting whose change would save most of it (``advise``).

Pure functions over what ``flip.monitoring.results`` reads, except for ``of_runs``, which asks for states.

A second is counted once. ``useful``: steps whose result stands. ``repeated``: steps that the next attempt did again.
``starting``: from the attempt's begin until it could train. ``saving``: commits that steps waited for. ``other``: what
lies between and after steps, as evaluation. ``lost``: of attempts of which nothing was kept, and after the last line of
one that was cut off. What the files do not tell is ``unknown``, never guessed. ``waiting`` occupies nothing: from the
submission, or the end before, to the next begin; it compares clocks of two hosts, so that seconds of it mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from flip.monitoring.metrics_reader import Columns
from flip.monitoring.results import Attempt, Outcome, read_run
from flip.runs.rundir import RunDir, read_record
from jobs.common.text import duration, percent, table

PARTS = ("useful", "repeated", "starting", "saving", "other", "lost", "unknown")
"""Where the seconds of an attempt went."""


@dataclass
class Times:
    """Seconds of one attempt, and those that it waited for its start (None: not known)."""

    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    waiting: float | None = None

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def cut(self) -> bool:
        """Whether steps were lost or are done again."""
        return self.parts["repeated"] > 0 or self.parts["lost"] > 0


@dataclass
class Account:
    """One run's, or one sweep's."""

    name: str
    hours: dict[str, float]
    """Part -> core-hours or GPU-hours."""
    unit: str
    """``core`` or ``GPU``."""
    waiting_hours: float | None
    """By the clock; None where no wait is known."""
    attempts: int = 0
    interruptions: int = 0
    """Attempts that left steps to be done again."""
    advice: str = ""
    gain: float = 0.0
    """Share of the hours that the advice promises."""
    runs: int = 1
    """More than one: the sum of a sweep."""

    @property
    def total(self) -> float:
        return sum(self.hours.values())


# -- one attempt -------------------------------------------------------------------------------------------------------


def attempt_times(
    attempt: Attempt, lines: Columns, ready: Mapping[str, Any] | None, resumed: int | None, status: Mapping[str, Any],
    now: float | None = None,
) -> Times:  # fmt: skip
    """Seconds of one attempt.

    ``lines``: its metric lines, by field. ``ready``: its ready.json. ``resumed``: S from which the next attempt went
    on, None where there is none yet. ``now``: the time, for an attempt that still runs.
    """
    times, begin = Times(), attempt.start.get("time")
    ended, seen = _end(attempt, lines, ready, status, now)
    if begin is None or ended is None or ended < begin:
        return times
    parts, from_ = times.parts, attempt.start.get("resumes_from", 0)
    known = np.isfinite(lines["time"]) & (lines["samples_per_second"] > 0)
    timed = {name: column[known] for name, column in lines.items()}
    if not known.any():
        until = min(ready["time"], ended) if ready else begin
        parts["starting"] = max(0.0, until - begin)
        kept = attempt.end.get("committed") or not attempt.end
        parts["unknown" if kept else "lost"] += ended - begin - parts["starting"]
        return times
    steps = _steps(parts, timed, (ready or attempt.start).get("samples", from_), resumed)
    first, last = ({name: float(column[i]) for name, column in timed.items()} for i in (0, -1))
    # in older run directories the first line tells it: until its first step there was nothing but the start
    until = ready["time"] if ready else first["time"] - (first["samples"] - from_) / first["samples_per_second"]
    parts["starting"] = max(0.0, min(until, first["time"]) - begin)
    between = max(0.0, last["time"] - begin - parts["starting"] - steps)
    parts["saving"] = min(between, 0.0 if math.isnan(last["saving"]) else last["saving"])
    parts["other"] = between - parts["saving"]
    _tail(parts, attempt, ended - last["time"], last, resumed, seen)
    return times


def _steps(parts: dict[str, float], timed: Columns, before: float, resumed: int | None) -> float:
    """Seconds of all steps; those that stand are useful, those behind ``resumed`` are done again."""
    samples = timed["samples"]
    starts = np.concatenate([[before], samples[:-1]])
    windows = (samples - starts) / timed["samples_per_second"]
    stands = samples if resumed is None else np.minimum(samples, np.maximum(starts, resumed))
    counts = samples > starts
    shares = np.where(counts, (stands - starts) / np.where(counts, samples - starts, 1.0), 1.0)
    parts["useful"] += float((windows * shares).sum())
    parts["repeated"] += float((windows * (1 - shares)).sum())
    return float(windows.sum())


def _tail(
    parts: dict[str, float], attempt: Attempt, seconds: float, last: Mapping[str, Any], resumed: int | None, seen: bool
) -> None:
    """What came after the last line: steps of which no line tells, the last save, the scores of a complete run."""
    seconds, commits = max(0.0, seconds), attempt.end.get("commits", 0)
    if not attempt.end or not seen:
        parts["unknown"] += seconds
    elif commits < last["samples"]:
        parts["lost"] += seconds
    else:
        steps = min(seconds, (commits - last["samples"]) / last["samples_per_second"])
        parts["useful"] += steps
        parts["other"] += seconds - steps


def _end(
    attempt: Attempt, lines: Columns, ready: Mapping[str, Any] | None, status: Mapping[str, Any], now: float | None,
) -> tuple[float | None, bool]:  # fmt: skip
    """(when it ended, whether somebody saw it): the end of one that nobody saw is its last sign of life."""
    if attempt.end and attempt.end.get("code") is not None:
        return attempt.end.get("time"), True
    if not attempt.end and now is not None:
        return now, True
    signs = [attempt.start.get("time"), *(cause.get("time") for cause in attempt.causes), (ready or {}).get("time")]
    signs += lines["time"][-1:].tolist()
    signs += [status.get("time")] if status.get("attempt") == attempt.number else []
    known = [sign for sign in signs if sign is not None and not math.isnan(sign)]
    return (max(known) if known else None), False


# -- a run -------------------------------------------------------------------------------------------------------------


def of_run(outcome: Outcome, now: float | None = None) -> Account:
    """The account of one run, with its advice. ``now``: the time where its newest attempt still runs, else None."""
    times = _attempts(outcome, now)
    width, unit = resources(outcome.settings)
    hours = {part: width * sum(t.parts[part] for t in times) / 3600 for part in PARTS}
    waits = [t.waiting for t in times if t.waiting is not None]
    account = Account(outcome.run.name, hours, unit, sum(waits) / 3600 if waits else None, len(times))
    account.interruptions = sum(t.cut for t in times)
    account.advice, account.gain = advise(outcome, times)
    return account


def resources(settings: Mapping[str, Any]) -> tuple[int, str]:
    """(GPUs or cores that a run occupies, the unit's name), from its resolved configuration.

    The only definition of GPU-hours and core-hours in reports. Cores: ``resources.cpus`` of every rank, as reserved, or
    if that is 0 its threads and loader processes.
    """

    def number(key: str, default: int) -> int:
        return int(settings.get(key) or default)

    nodes, gpus = number("resources.nodes", 1), number("resources.gpus", 0)
    if gpus:
        return nodes * gpus, "GPU"
    each = number("resources.cpus", 0) or number("compute.threads", 1) + number("data.workers", 0)
    return nodes * number("resources.processes", 1) * each, "core"


def _attempts(outcome: Outcome, now: float | None) -> list[Times]:
    run, found = outcome.run, []
    job = _json(run, "job.json")
    for i, attempt in enumerate(outcome.attempts):
        following = outcome.attempts[i + 1 : i + 2]
        mine = None if attempt.end or following else now
        noted = _json(run, f"attempts/{attempt.number}/ready.json")
        ready = noted if "time" in noted else None
        resumed = None
        for after in following:  # a damaged commit makes it go on from an older one than its start.json says
            found_there = _json(run, f"attempts/{after.number}/ready.json")
            resumed = found_there.get("samples", after.start.get("resumes_from"))
        lines = outcome.metrics.attempt(attempt.number)
        times = attempt_times(attempt, lines, ready, resumed, outcome.status, mine)
        times.waiting = _waited(outcome.attempts, i, job)
        found.append(times)
    return found


def _waited(attempts: Sequence[Attempt], i: int, job: Mapping[str, Any]) -> float | None:
    """Seconds before attempt i: since the submission, or since the attempt before it was seen to end."""
    begin = attempts[i].start.get("time")
    if attempts[i].number == job.get("after", -1) + 1:
        since = job.get("time")
    elif i:
        since = attempts[i - 1].end.get("time") if attempts[i - 1].end.get("code") is not None else None
    else:
        since = None
    return None if begin is None or since is None else max(0.0, begin - since)


def _json(run: RunDir, name: str) -> dict[str, Any]:
    try:
        return read_record(run.path / name) or {}
    except (OSError, ValueError):  # damaged: its times are not known
        return {}


# -- several runs, and words -------------------------------------------------------------------------------------------


def of_runs(runs: Iterable[RunDir]) -> list[Account]:
    """One account per run and, of several runs, one per sweep after them; attempts that run count up to now."""
    import time

    from jobs.runs.clusters import states

    known = states(runs := list(runs))
    now = time.time()
    return with_sums([read_run(run.path) for run in runs], {p for p, s in known.items() if s.state == "running"}, now)


def with_sums(outcomes: Sequence[Outcome], running: Iterable[Any] = (), now: float | None = None) -> list[Account]:
    """Accounts of the outcomes, and of each sweep and unit their sum; ``running``: paths of runs that count to now."""
    running, found = set(running), []
    sums: dict[tuple[str, str], list[Account]] = {}
    for outcome in outcomes:
        account = of_run(outcome, now if outcome.run.path in running else None)
        found.append(account)
        sums.setdefault((outcome.run.sweep, account.unit), []).append(account)
    return found + [_sum(sweep, unit, members) for (sweep, unit), members in sums.items() if len(members) > 1]


def _sum(sweep: str, unit: str, members: Sequence[Account]) -> Account:
    waits = [one.waiting_hours for one in members if one.waiting_hours is not None]
    hours = {part: sum(one.hours[part] for one in members) for part in PARTS}
    best = max(members, key=lambda one: one.gain * one.total)
    made = Account(f"all of {sweep}", hours, unit, sum(waits) if waits else None, runs=len(members))
    made.attempts, made.interruptions = (
        sum(getattr(one, key) for one in members) for key in ("attempts", "interruptions")
    )
    if best.advice:
        made = replace(made, advice=f"{best.name}: {best.advice}", gain=best.gain * best.total / (made.total or 1.0))
    return made


def as_dict(accounts: Iterable[Account]) -> list[dict[str, Any]]:
    return [
        {
            "name": one.name, "unit": f"{one.unit}-hours", "hours": one.hours, "total": one.total,
            "share": {part: hours / one.total if one.total else None for part, hours in one.hours.items()},
            "waiting_hours": one.waiting_hours, "attempts": one.attempts, "interruptions": one.interruptions,
            "advice": one.advice or None, "gain": one.gain or None,
        }
        for one in accounts
    ]  # fmt: skip


def cells(accounts: Sequence[Account]) -> list[dict[str, Any]]:
    """Rows of a table: the sum in hours, its parts in per cent."""
    rows = []
    for one in accounts:
        shares = {part: percent(one.hours[part] / one.total if one.total else None) for part in PARTS}
        shares["not known"] = shares.pop("unknown")
        waited = "not known" if one.waiting_hours is None else duration(3600 * one.waiting_hours)
        spent = f"{one.total:,.3g}" if one.total < 1000 else f"{one.total:,.0f}"
        spent = f"{spent} {one.unit}-hours" if one.total else "-"
        rows.append({"run": one.name, "spent": spent, **{f"{p} %": v for p, v in shares.items()}, "waited": waited})
    return rows


def advice(accounts: Sequence[Account]) -> list[str]:
    """A sentence per run that has one."""
    single = [one for one in accounts if one.advice and one.runs == 1]
    return [f"{one.name}: {one.advice} (about {percent(one.gain, 0)} % of its time)" for one in single]


def render(accounts: Sequence[Account]) -> str:
    from jobs.common.text import plain

    return "\n".join([table(cells(accounts)), *map(plain, advice(accounts))])


INTERRUPTIONS = 3
"""From so many attempts that lost steps on, their rate is worth an advice."""
WORTH = 0.02
"""Share of the time that a change must promise."""


def advise(outcome: Outcome, times: Sequence[Times]) -> tuple[str, float]:
    """(the change of one setting that promises most, share of the time it promises); ("", 0) where none is worth it."""
    total = sum(t.total for t in times)
    if not total:
        return "", 0.0
    found = [_interval(outcome, times, total), _longer(outcome, times, total), _workers(outcome, times, total)]
    best = max(found, key=lambda advice: advice[1])
    return best if best[1] >= WORTH else ("", 0.0)


def _interval(outcome: Outcome, times: Sequence[Times], total: float) -> tuple[str, float]:
    """checkpoint.minutes by Young: sqrt(2 * cost of a save * time between interruptions)."""
    lines = outcome.metrics.ends()
    saves, saving = (sum(line[key] for line in lines if line[key] == line[key]) for key in ("saves", "saving"))
    cut = sum(t.cut for t in times)
    minutes = outcome.settings.get("checkpoint.minutes")
    if not saves or not saving or cut < INTERRUPTIONS or not minutes or outcome.settings.get("checkpoint.samples"):
        return "", 0.0
    cost, between, now = saving / saves, total / cut, 60 * float(minutes)
    best = math.sqrt(2 * cost * between)
    gain = young(now, cost, between) - young(best, cost, between)
    if 2 / 3 < best / now < 3 / 2:
        return "", 0.0
    words = f"checkpoint.minutes={best / 60:.2g} in place of {float(minutes):g}: a save costs {duration(cost)},"
    return f"{words} an interruption came every {duration(between)}", gain


def young(interval: float, cost: float, between: float) -> float:
    """Share of the time that saves and repeated steps take together, in first order."""
    return min(1.0, cost / interval + interval / (2 * between))


def _longer(outcome: Outcome, times: Sequence[Times], total: float) -> tuple[str, float]:
    """resources.hours where attempts end by it, and much of each is its start."""
    hours = float(outcome.settings.get("resources.hours") or 0)
    at_limit = [
        t for attempt, t in zip(outcome.attempts, times, strict=True)
        if attempt.end and attempt.end.get("cause") in ("stopped", "timeout") and 0.9 * 3600 * hours <= t.total
    ]  # fmt: skip
    if not hours or len(at_limit) < 2:
        return "", 0.0
    gain = sum(t.parts["starting"] for t in at_limit) / total / 2
    return f"resources.hours={2 * hours:g} in place of {hours:g}: {len(at_limit)} attempts ended by it", gain


def _workers(outcome: Outcome, times: Sequence[Times], total: float) -> tuple[str, float]:
    """data.workers where steps wait for data."""
    waits = outcome.metrics["data_wait"]
    waits = waits[np.isfinite(waits)]
    if len(waits) < 5:
        return "", 0.0
    share = float(waits.mean())
    workers = int(outcome.settings.get("data.workers") or 0)
    gain = share * sum(t.parts["useful"] for t in times) / total / 2 if share > 0.1 else 0.0
    return f"data.workers={max(1, 2 * workers)} in place of {workers}: steps wait {percent(share)} % for data", gain
