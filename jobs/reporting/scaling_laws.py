"""Scaling curves: runs that differ along one axis, and the laws (``laws.py``) of their accuracy."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from flip.config.derived import model_label
from flip.config.identity import UNHASHED, generic_key
from flip.evaluation.metrics.score import score_of
from flip.monitoring.results import Outcome, stages_of
from jobs.common.text import count
from jobs.reporting import laws
from jobs.reporting.laws import Law
from jobs.reporting.seed_groups import source

MIN_RUNS = 1 + 1 + laws.SPARE
"""Fewest runs of a law along one axis, with at least three values of x."""

DERIVED = re.compile(
    r"seed|model\.size|schema|resources\..*|evaluate\..*|compute\.(accumulate|threads)|data\.(lanes|block|chunk)"
    r"|stages\..*\.warmup"
)
"""Settings that follow from others or from the machine, or do not affect what is compared here."""


@cache
def ignored(key: str) -> bool:
    """Whether runs are compared without regard to a setting: it follows from others or does not change results."""
    return generic_key(key) in UNHASHED or bool(DERIVED.fullmatch(key))


def compared(outcome: Outcome) -> dict[str, Any]:
    """The settings by which runs are compared. The checkpoint that an extended run continues from follows from its
    stable phase."""
    settings = {key: value for key, value in outcome.settings.items() if not ignored(key)}
    if "init.commit" in settings:
        if outcome.settings.get("init.extend"):
            settings["init.commit"] = None
        else:
            settings["init.commit"] = source(outcome)
    return settings


@dataclass(frozen=True)
class Axis:
    """One way to scale: its name, the settings that change along it, and the position of a run."""

    name: str
    settings: re.Pattern[str]
    position: Callable[[Outcome], float | None]


def _batch(outcome: Outcome) -> float | None:
    """The batch of the first stage."""
    return next((float(fields["batch"]) for fields in stages_of(outcome.settings).values() if "batch" in fields), None)


SIZE = re.compile(r"model\.(embed|image\.patch|(image|text)\.(width|layers|heads))")
"""Settings by which sizes of a model differ. The other settings of the section are methods."""
_LENGTH = r"stages\..*\.(samples|cooldown)"
"""The cooldown of a longer run is usually longer."""
_DATA = r"data\.(manifest|samples|sets\..*)"

AXES = (
    Axis("training FLOPs", re.compile(f"{SIZE.pattern}|{_LENGTH}"), lambda o: o.result.get("flops")),
    Axis("parameters", SIZE, lambda o: (o.result.get("parameters") or {}).get("total")),
    Axis("samples in the data set", re.compile(_DATA), lambda o: o.settings.get("data.samples")),
    Axis("samples seen", re.compile(_LENGTH), lambda o: o.progress["samples"]),
    Axis("batch", re.compile(r"stages\..*\.(batch|base_lr)"), _batch),
)


@dataclass(frozen=True)
class Trial:
    """One complete run on an axis. ``error``, ``low``, ``high``: 0..1."""

    name: str
    x: float
    error: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """Runs of one design along one axis. ``name``: settings by which it differs from other curves of the axis."""

    axis: str
    name: str
    trials: list[Trial]
    law: Law | None


def law_of(trials: Sequence[Trial]) -> Law | None:
    """The law of runs along one axis; None if they are too few or at less than three values of x, or if one is perfect
    or always wrong."""
    if len(trials) < MIN_RUNS or len({trial.x for trial in trials}) < 3:
        return None
    if not all(0 < trial.error < 1 for trial in trials):
        return None
    return laws.fit([[trial.x] for trial in trials], [1 - trial.error for trial in trials])


def curves(outcomes: Sequence[Outcome], test: str) -> list[Curve]:
    """Curves of complete runs scored on ``test``: along every axis, one per design.

    A curve has at least two positions, over FLOPs three: any two runs differ in cost.
    """
    scored = [(outcome, item) for outcome in outcomes for item in outcome.evaluations if item["name"] == test]
    result = []
    for axis in AXES:
        placed = [
            (float(x), outcome, item) for outcome, item in scored if (x := axis.position(outcome)) is not None and x > 0
        ]
        groups = [
            part
            for group in _grouped(placed, lambda key, axis=axis: not axis.settings.fullmatch(key))  # type: ignore[misc]
            for part in _grouped(group, _ambiguous(group).__contains__)
        ]
        least = 3 if axis is AXES[0] else 2
        groups = [group for group in groups if len({x for x, _, _ in group}) >= least]
        varied = _varied([group[-1][1] for group in groups])
        for group in groups:
            trials = sorted((_trial(outcome, item, x) for x, outcome, item in group), key=lambda trial: trial.x)
            result.append(Curve(axis.name, _name(group[-1][1].settings, varied) or "all runs", trials, law_of(trials)))
    return result


Placed = tuple[float, Outcome, Mapping[str, Any]]
"""A run on an axis: x, the run, its score."""


def _grouped(placed: Sequence[Placed], fixed: Callable[[str], bool]) -> list[list[Placed]]:
    """Groups of runs with equal settings among those that are ``fixed`` and compared."""
    groups: dict[str, list[Placed]] = {}
    for item in placed:
        settings = sorted((k, v) for k, v in compared(item[1]).items() if fixed(k))
        groups.setdefault(repr(settings), []).append(item)
    return list(groups.values())


def _ambiguous(group: Sequence[Placed]) -> set[str]:
    """Settings in which runs at the same position differ: they must be fixed along that axis, too."""
    places: dict[float, list[Mapping[str, Any]]] = {}
    for x, outcome, _ in group:
        places.setdefault(x, []).append(compared(outcome))
    return {
        key for tables in places.values() for key in tables[0] if len({repr(table.get(key)) for table in tables}) > 1
    }


def _trial(outcome: Outcome, item: Mapping[str, Any], x: float) -> Trial:
    score = score_of(item)
    low, high = score.interval or (score.value, score.value)
    return Trial(outcome.run.name, x, 1 - score.value, 1 - high, 1 - low)


def _varied(outcomes: Sequence[Outcome]) -> list[str]:
    """Settings by which runs differ; a named size or a data set counts as one."""
    tables = [compared(outcome) for outcome in outcomes]
    keys = dict.fromkeys(key for table in tables for key in table)
    varied = [key for key in keys if len({repr(table.get(key)) for table in tables}) > 1]
    shapes = {repr([table.get(key) for key in varied if key.startswith("model.")]) for table in tables}
    sizes = {outcome.settings.get("model.size") for outcome in outcomes}
    if len(shapes) == len(sizes) > 1:
        varied = ["model.size", *(key for key in varied if not key.startswith("model."))]
    return [key for key in varied if key != "data.manifest" or "data.samples" not in varied]


def _name(settings: Mapping[str, Any], keys: Sequence[str]) -> str:
    shown = {**settings, "model.size": model_label(settings)}
    return ", ".join(f"{short_name(key)} {value_text(shown.get(key))}".strip() for key in keys)


def short_name(key: str) -> str:
    """Name of a dotted key in a legend."""
    called = {"model.size": "", "data.samples": "data", "data.manifest": "data"}
    if key.startswith("stages."):
        if key.endswith(".samples"):
            return "seen"
        return key.rpartition(".")[2]
    return called.get(key, key.removeprefix("model."))


def value_text(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return count(value)
    return str(value)
