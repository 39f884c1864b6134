"""Where the time of runs went, and the one setting whose change would save most of it.

Every second is counted once. ``useful``: steps whose result stands. ``repeated``: steps that the next attempt did
again. ``starting``: from the start of the attempt until it could train. ``saving``: steps were blocked by a save.
``other``: between and after steps, for example evaluation. ``lost``: attempts that saved no checkpoint, the steps after
the last checkpoint of one that has no next attempt, and the time after the last line of one that was killed.
``unknown``: the files do not say. ``waiting`` occupies nothing: from the submission, or the end of the attempt before,
to the start. It compares clocks of two hosts.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flip.monitoring.metrics_reader import Columns
from flip.monitoring.results import Attempt, Outcome, read_run
from flip.runs.records import is_observed
from flip.runs.rundir import RunDir, read_lenient
from jobs.common.job import record_of
from jobs.common.terminal import Page, TextTable
from jobs.common.text import duration, hours_text, percent
from jobs.reporting import faults
from jobs.reporting.faults import Fault

PARTS = ("useful", "repeated", "starting", "saving", "other", "lost", "unknown")
"""Where the seconds of an attempt went."""
MIN_GAIN = 0.02
"""Share of the time that an advised change must save."""


@dataclass
class Times:
    """Seconds of one attempt, and of its wait for the start (None: unknown)."""

    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    waiting: float | None = None

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass
class Account:
    """Hours of one run, or the sum of a sweep."""

    name: str
    hours: dict[str, float]
    """Part -> core-hours or GPU-hours."""
    unit: str
    """``core`` or ``GPU``."""
    waiting_hours: float | None
    """Wall clock; None: unknown."""
    attempts: int = 0
    interruptions: int = 0
    """Attempts whose steps were lost or are repeated."""
    advice: str = ""
    gain: float = 0.0
    """Share of the hours that the advice would save."""
    runs: int = 1
    """Above 1: the sum of a sweep."""
    faults: list[Fault] = field(default_factory=list)
    """Ends of attempts that were followed by a restart, oldest first."""

    @property
    def total(self) -> float:
        return sum(self.hours.values())

    @property
    def shares(self) -> dict[str, float | None]:
        """Part -> its share of the total; None if there are no hours."""
        total = self.total
        if not total:
            return dict.fromkeys(self.hours)
        return {part: hours / total for part, hours in self.hours.items()}


# -- attempts ----------------------------------------------------------------------------------------------------------


def attempt_times(
    attempt: Attempt, lines: Columns, ready: Mapping[str, Any] | None, resumed: int | None, status: Mapping[str, Any],
    now: float | None = None,
) -> Times:  # fmt: skip
    """Seconds of one attempt.

    ``lines``: its metric lines, by field. ``ready``: its ready.json. ``resumed``: S at which the next attempt resumed;
    None: there is no next attempt. ``now``: the time, for an attempt that still runs.
    """
    times = Times()
    start_time = attempt.start.get("time")
    ended, is_known = _end(attempt, lines, ready, status, now)
    if start_time is None or ended is None or ended < start_time:
        return times
    parts = times.parts
    from_ = attempt.start.get("resumes_from", 0)
    is_timed = np.isfinite(lines["time"]) & (lines["samples_per_second"] > 0)
    timed = {name: column[is_timed] for name, column in lines.items()}
    if not is_timed.any():
        if ready:
            parts["starting"] = max(0.0, min(ready["time"], ended) - start_time)
        rest = ended - start_time - parts["starting"]
        if attempt.end.get("committed") or not attempt.end:
            parts["unknown"] += rest
        else:
            parts["lost"] += rest
        return times
    if resumed is None:
        saved = attempt.end.get("commits")
    else:
        saved = resumed
    steps = _steps(parts, timed, (ready or attempt.start).get("samples", from_), saved)
    if resumed is None:  # no attempt has repeated them yet
        parts["lost"] = parts["repeated"]
        parts["repeated"] = 0.0
    first, last = ({name: float(column[i]) for name, column in timed.items()} for i in (0, -1))
    # without a readable ready.json everything before the first step is the start
    if ready:
        until = ready["time"]
    else:
        until = first["time"] - (first["samples"] - from_) / first["samples_per_second"]
    parts["starting"] = max(0.0, min(until, first["time"]) - start_time)
    between = max(0.0, last["time"] - start_time - parts["starting"] - steps)
    if not math.isnan(last["saving"]):
        parts["saving"] = min(between, last["saving"])
    parts["other"] = between - parts["saving"]
    _tail(parts, attempt, ended - last["time"], last, is_known)
    return times


def _steps(parts: dict[str, float], timed: Columns, before: float, saved: int | None) -> float:
    """Add useful steps and those after S = ``saved``, which are repeated; returns the seconds of all steps.

    Without ``saved`` all are useful.
    """
    samples_seen = timed["samples"]
    starts = np.concatenate([[before], samples_seen[:-1]])
    windows = (samples_seen - starts) / timed["samples_per_second"]
    if saved is None:
        useful_until = samples_seen
    else:
        useful_until = np.minimum(samples_seen, np.maximum(starts, saved))
    counts = samples_seen > starts
    shares = np.where(counts, (useful_until - starts) / np.where(counts, samples_seen - starts, 1.0), 1.0)
    parts["useful"] += float((windows * shares).sum())
    parts["repeated"] += float((windows * (1 - shares)).sum())
    return float(windows.sum())


def _tail(parts: dict[str, float], attempt: Attempt, seconds: float, last: Mapping[str, Any], is_known: bool) -> None:
    """Add the time after the last line: steps without a line, the last save, the evaluation of a complete run."""
    seconds = max(0.0, seconds)
    saved = attempt.end.get("commits", 0)
    if not attempt.end or not is_known:
        parts["unknown"] += seconds
    elif saved < last["samples"]:
        parts["lost"] += seconds
    else:
        steps = min(seconds, (saved - last["samples"]) / last["samples_per_second"])
        parts["useful"] += steps
        parts["other"] += seconds - steps


def _end(
    attempt: Attempt, lines: Columns, ready: Mapping[str, Any] | None, status: Mapping[str, Any], now: float | None,
) -> tuple[float | None, bool]:  # fmt: skip
    """(time of the end, whether it was observed); else the last time that any of its files has."""
    if is_observed(attempt.end):
        return attempt.end.get("time"), True
    if not attempt.end and now is not None:
        return now, True
    signs = [attempt.start.get("time"), *(cause.get("time") for cause in attempt.causes), (ready or {}).get("time")]
    signs += lines["time"][-1:].tolist()
    if status.get("attempt") == attempt.number:
        signs += [status.get("time")]
    finite_signs = [sign for sign in signs if sign is not None and not math.isnan(sign)]
    return max(finite_signs, default=None), False


# -- a run -------------------------------------------------------------------------------------------------------------


def of_run(outcome: Outcome, now: float | None = None) -> Account:
    """The account of one run, with its advice. ``now``: the time if its newest attempt still runs, else None."""
    ready = [read_lenient(outcome.run.attempt(attempt.number) / "ready.json") for attempt in outcome.attempts]
    times = _attempts(outcome, ready, now)
    width, unit = resources(outcome.settings)
    shares = [_share_of_nodes(outcome.settings, attempt) for attempt in outcome.attempts]
    hours = {
        part: width * sum(share * t.parts[part] for share, t in zip(shares, times, strict=True)) / 3600
        for part in PARTS
    }
    waits = [t.waiting for t in times if t.waiting is not None]
    waited = None
    if waits:
        waited = sum(waits) / 3600
    account = Account(outcome.run.name, hours, unit, waited, len(times))
    account.interruptions = sum(t.parts["repeated"] > 0 or t.parts["lost"] > 0 for t in times)
    account.advice, account.gain = advise(outcome, times)
    first_wait = times[0].waiting if times else None
    account.faults = faults.of_run(outcome, ready, [t.parts["repeated"] for t in times], first_wait)
    return account


def resources(settings: Mapping[str, Any]) -> tuple[int, str]:
    """(GPUs or cores that a run occupies, name of the unit), from its resolved configuration.

    Defines GPU-hours and core-hours in reports. Spare nodes count. Cores: ``resources.cpus`` of every rank, as
    reserved, or if that is 0 its threads and loader processes.
    """
    nodes = int(settings.get("resources.nodes") or 1) + int(settings.get("resources.spares") or 0)
    gpus = int(settings.get("resources.gpus") or 0)
    if gpus:
        return nodes * gpus, "GPU"
    threads = int(settings.get("compute.threads") or 1) + int(settings.get("data.workers") or 0)
    cores = int(settings.get("resources.cpus") or 0) or threads
    return nodes * int(settings.get("resources.processes") or 1) * cores, "core"


def _share_of_nodes(settings: Mapping[str, Any], attempt: Attempt) -> float:
    """What an attempt occupied of the nodes of its run, if their number is a range; else 1."""
    if not settings.get("resources.least_nodes") or "world" not in attempt.start:
        return 1.0
    nodes = int(settings["resources.nodes"])
    spares = int(settings.get("resources.spares") or 0)
    used = attempt.start["world"] / int(settings.get("resources.processes") or 1)
    return (used + spares) / (nodes + spares)


def _attempts(outcome: Outcome, ready: Sequence[Mapping[str, Any]], now: float | None) -> list[Times]:
    run = outcome.run
    all_times = []
    job = record_of(run)
    for i, attempt in enumerate(outcome.attempts):
        resumed = None
        # ready.json counts: a corrupt checkpoint may have been skipped
        for following in outcome.attempts[i + 1 : i + 2]:
            resumed = ready[i + 1].get("samples", following.start.get("resumes_from"))
        until = None
        if not attempt.end and i == len(outcome.attempts) - 1:
            until = now
        timed = None
        if "time" in ready[i]:
            timed = ready[i]
        lines = outcome.metrics.attempt(attempt.number)
        times = attempt_times(attempt, lines, timed, resumed, outcome.status, until)
        times.waiting = _waited(outcome.attempts, i, job)
        all_times.append(times)
    return all_times


def _waited(attempts: Sequence[Attempt], i: int, job: Mapping[str, Any]) -> float | None:
    """Seconds before attempt i: since the submission, or since the attempt before it was seen to end."""
    start_time = attempts[i].start.get("time")
    if attempts[i].number == job.get("after", -1) + 1:
        since = job.get("time")
    elif i and attempts[i].start.get("after") != attempts[i - 1].number:  # else the first of an earlier submission
        since = None
        if is_observed(attempts[i - 1].end):
            since = attempts[i - 1].end.get("time")
    else:
        since = None
    if start_time is None or since is None:
        return None
    return max(0.0, start_time - since)


# -- several runs -------------------------------------------------------------------------------------------


def of_runs(runs: Iterable[RunDir]) -> list[Account]:
    """One account per run, then one per sweep that has several; running attempts count up to now."""
    import time

    from jobs.submitted_runs.clusters import states

    state_by_run = states(runs := list(runs))
    now = time.time()
    running = {path for path, state in state_by_run.items() if state.state == "running"}
    return with_sums([read_run(run.path, state_by_run[run.path]) for run in runs], running, now)


def with_sums(outcomes: Sequence[Outcome], running: Iterable[Any] = (), now: float | None = None) -> list[Account]:
    """Accounts of the outcomes, then the sum per sweep and unit; ``running``: paths of runs that count up to now."""
    running = set(running)
    accounts = []
    sums: dict[tuple[str, str], list[Account]] = {}
    for outcome in outcomes:
        until = None
        if outcome.run.path in running:
            until = now
        account = of_run(outcome, until)
        accounts.append(account)
        sums.setdefault((outcome.run.sweep, account.unit), []).append(account)
    return accounts + [_sum(sweep, unit, members) for (sweep, unit), members in sums.items() if len(members) > 1]


def is_member(outcome: Outcome, total: Account) -> bool:
    """Whether a run is part of the sum of a sweep and unit."""
    return (f"all of {outcome.run.sweep}", resources(outcome.settings)[1]) == (total.name, total.unit)


def _sum(sweep: str, unit: str, members: Sequence[Account]) -> Account:
    waits = [account.waiting_hours for account in members if account.waiting_hours is not None]
    waited = None
    if waits:
        waited = sum(waits)
    total = Account(
        f"all of {sweep}",
        {part: sum(account.hours[part] for account in members) for part in PARTS},
        unit,
        waited,
        sum(account.attempts for account in members),
        sum(account.interruptions for account in members),
        runs=len(members),
    )
    best = max(members, key=lambda account: account.gain * account.total)
    if best.advice:
        total.advice = f"{best.name}: {best.advice}"
        total.gain = best.gain * best.total / (total.total or 1.0)
    return total


def as_dict(accounts: Iterable[Account]) -> list[dict[str, Any]]:
    return [
        {
            "name": account.name, "unit": f"{account.unit}-hours", "hours": account.hours, "total": account.total,
            "share": account.shares,
            "waiting_hours": account.waiting_hours, "attempts": account.attempts,
            "interruptions": account.interruptions, "advice": account.advice or None, "gain": account.gain or None,
            "faults": [faults.as_dict(fault) for fault in account.faults],
        }
        for account in accounts
    ]  # fmt: skip


def cells(accounts: Sequence[Account]) -> list[dict[str, Any]]:
    """Rows of a table: the sum in hours, its parts in per cent."""
    rows = []
    for account in accounts:
        shares = {part: percent(account.shares[part]) for part in PARTS}
        if account.waiting_hours is None:
            waited = "unknown"
        else:
            waited = duration(3600 * account.waiting_hours)
        if account.total:
            spent = f"{hours_text(account.total)} {account.unit}-hours"
        else:
            spent = "-"
        parts = {f"{part} %": share for part, share in shares.items()}
        rows.append({"run": account.name, "spent": spent, **parts, "waited": waited})
    return rows


def advice(accounts: Sequence[Account]) -> list[str]:
    """A sentence per run that has advice."""
    return [
        f"{account.name}: {account.advice} (about {percent(account.gain, 0)} % of its time)"
        for account in accounts
        if account.advice and account.runs == 1
    ]


def render(accounts: Sequence[Account]) -> Page:
    drop = ("unknown %", "other %", "starting %", "saving %", "waited", "lost %", "repeated %", "useful %")
    named = [(account.name, fault) for account in accounts for fault in account.faults]
    return Page(TextTable(cells(accounts), drop=drop), *advice(accounts), *faults.table(named))


def advise(outcome: Outcome, times: Sequence[Times]) -> tuple[str, float]:
    """(the change of one setting that would save most, share of the time that it saves); ("", 0) for little gain."""
    total = sum(t.total for t in times)
    if not total:
        return "", 0.0
    best = max(_longer(outcome, times, total), _workers(outcome, times, total), key=lambda change: change[1])
    if best[1] >= MIN_GAIN:
        return best
    return "", 0.0


def _longer(outcome: Outcome, times: Sequence[Times], total: float) -> tuple[str, float]:
    """resources.hours, if attempts end at that limit."""
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
    """data.workers, if steps wait for data."""
    waits = outcome.metrics["data_wait"]
    waits = waits[np.isfinite(waits)]
    if len(waits) < 5:
        return "", 0.0
    share = float(waits.mean())
    workers = int(outcome.settings.get("data.workers") or 0)
    gain = 0.0
    if share > 0.1:
        gain = share * sum(t.parts["useful"] for t in times) / total / 2
    return f"data.workers={max(1, 2 * workers)} in place of {workers}: steps wait {percent(share)} % for data", gain
