"""The axes of a grid: settings that designs vary independently of each other.

They are read from the settings of the runs, so a sweep of any form has them: settings that change together are one
axis, and the axes of a grid together identify each design.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod
from typing import Any

from flip.config.derived import model_label
from flip.monitoring.results import Outcome
from jobs.reporting import scaling_laws
from jobs.reporting.seed_groups import SeedGroup

MAX_AXES = 4
"""Most axes of a grid."""
LEAST_DESIGNS = 4
LEAST_SHARE = 0.75
"""A grid has at least this share of all combinations: some may be left out, or not submitted yet."""
LEADING = ("mask", "batch", "base_lr", "samples")
"""Of settings that change together, the one that names the axis, by the last part of its key."""


@dataclass(frozen=True)
class GridAxis:
    """One axis of a grid. ``values``: its values in words, in order. ``positions``: per group the index of its value,
    None outside of the grid."""

    name: str
    values: Sequence[str]
    positions: Sequence[int | None]

    def value(self, group: int) -> str:
        """The value of a group in words; ``-`` outside of the grid."""
        position = self.positions[group]
        if position is None:
            return "-"
        return self.values[position]


def axes(groups: Sequence[SeedGroup]) -> list[GridAxis]:
    """The axes of the grid that the groups form, in the order of the schema; empty if they form none."""
    members = [i for i, group in enumerate(groups) if group.outcomes[0].settings and not group.is_published]
    if len(members) < LEAST_DESIGNS:
        return []
    tables = {i: scaling_laws.compared(groups[i].outcomes[0]) for i in members}
    columns = _columns(tables)
    chosen = _grid(list(columns), len(members))
    outcomes = {i: groups[i].outcomes[0] for i in members}
    named = [_axis(columns[column], column, outcomes, len(groups)) for column in chosen]
    if len({axis.name for axis in named}) < len(named):
        return []
    return named


def in_order(groups: Sequence[SeedGroup]) -> list[SeedGroup]:
    """The groups of a grid sorted by its axes, the first slowest; others keep their order, after them."""
    along = axes(groups)

    def place(i: int) -> list[tuple[bool, int]]:
        positions = [axis.positions[i] for axis in along]
        return [(position is None, position or 0) for position in positions]

    return [groups[i] for i in sorted(range(len(groups)), key=place)]


Column = tuple[int, ...]
"""Of each design the number of its value, in order of appearance. Settings with equal columns change together."""


def _columns(tables: Mapping[int, Mapping[str, Any]]) -> dict[Column, list[str]]:
    """The settings in which designs differ, by their columns."""
    columns: dict[Column, list[str]] = {}
    for key in dict.fromkeys(key for table in tables.values() for key in table):
        column = _numbered(repr(table.get(key)) for table in tables.values())
        if max(column) > 0:
            columns.setdefault(column, []).append(key)
    return columns


def _numbered(values: Iterable[Hashable]) -> Column:
    numbers: dict[Hashable, int] = {}
    return tuple(numbers.setdefault(value, len(numbers)) for value in values)


def _grid(columns: Sequence[Column], designs: int) -> Sequence[Column]:
    """The fewest columns, at least two, that identify every design and of which most combinations occur."""
    for count in range(2, MAX_AXES + 1):
        for chosen in combinations(columns, count):
            places = prod(max(column) + 1 for column in chosen)
            if not LEAST_SHARE * places <= designs <= places:
                continue
            if len(set(zip(*chosen, strict=True))) == designs:
                return chosen
    return ()


def _axis(keys: Sequence[str], column: Column, outcomes: Mapping[int, Outcome], groups: int) -> GridAxis:
    """The axis of settings that change together. ``column``: of each design the number of its value."""
    examples: dict[int, Outcome] = {}
    for number, outcome in zip(column, outcomes.values(), strict=True):
        examples.setdefault(number, outcome)
    name, values = _named(keys, list(examples.values()))
    order = sorted(examples, key=lambda number: _rank(values[number]))
    positions: list[int | None] = [None] * groups
    for i, number in zip(outcomes, column, strict=True):
        positions[i] = order.index(number)
    return GridAxis(name, [_words(values[number]) for number in order], positions)


def _named(keys: Sequence[str], examples: Sequence[Outcome]) -> tuple[str, list[Any]]:
    """The name of an axis, and its value in each example."""
    sizes = [model_label(outcome.settings) for outcome in examples]
    if any(scaling_laws.SIZE.fullmatch(key) for key in keys) and len(set(sizes)) == len(sizes):
        return "model", sizes
    stage = _optional_stage(keys, examples)
    if stage:
        return f"stage {stage}", [_has_stage(outcome, stage) for outcome in examples]
    leading = _leading(keys)
    return scaling_laws.short_name(leading), [outcome.settings.get(leading) for outcome in examples]


def _leading(keys: Sequence[str]) -> str:
    for name in LEADING:
        for key in keys:
            if key.rpartition(".")[2] == name:
                return key
    return keys[0]


def _has_stage(outcome: Outcome, stage: str) -> str:
    if any(key.startswith(f"stages.{stage}.") for key in outcome.settings):
        return "yes"
    return "no"


def _optional_stage(keys: Sequence[str], examples: Sequence[Outcome]) -> str:
    """The stage that some runs have and others lack, if all the settings are its; else empty."""
    stages = {".".join(key.split(".")[:2]) for key in keys}
    stage = stages.pop()
    if stages or not stage.startswith("stages."):
        return ""
    name = stage.removeprefix("stages.")
    if len(examples) == 2 and len({_has_stage(outcome, name) for outcome in examples}) == 2:
        return name
    return ""


def _rank(value: Any) -> tuple[int, float]:
    """Absent values first, then numbers by size, then texts, which keep the order of the sweep."""
    if value is None:
        return 0, 0.0
    try:
        return 1, float(value)
    except (TypeError, ValueError):
        return 2, 0.0


def _words(value: Any) -> str:
    if value is None:
        return "-"
    return scaling_laws.value_text(value)
