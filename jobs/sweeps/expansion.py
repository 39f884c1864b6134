"""Expands the entries of a sweep to points: settings with short, distinct names (docs/sweeps.md).

entry = mapping of fields, "set": fields, "where": lines, and any of
        "runs": {NAME: entry}      the entries, by their names
        "list": [entry + "name"]   the entries, one after the other
        "zip":  {AXIS: values}     the axes in step
        "grid": {AXIS: values}     every combination of the axes
values = [value, ...] of the field AXIS  |  entry: then AXIS is only a label

Parts of an entry are multiplied, in the order above. The name of a point joins the names of its parts by "-"; an axis
with one value adds no name.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flip.common.typed import unknown_key
from flip.common.yaml_io import LocatedDict, SourceLocation
from flip.config.schema import Config
from flip.runs.errors import nearest
from jobs.sweeps.constraints import Condition, parse

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
"""A name of a folder and a job, without characters that are special in shells."""
NAME_RULE = "A name consists of a-z, 0-9, ., _ and -, starts with a letter or digit, and has at most 100 characters."
MAX_POINTS = 10_000
"""Most points of a sweep."""
_UNITS = (("b", 10**9), ("m", 10**6), ("k", 10**3))

Layer = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Point:
    name: str = ""
    layers: tuple[Layer, ...] = ()
    """Settings; later layers override earlier ones."""
    where: tuple[Condition, ...] = ()

    def __add__(self, other: Point) -> Point:
        name = "-".join(part for part in (self.name, other.name) if part)
        return Point(name, self.layers + other.layers, self.where + other.where)


def points(entry: LocatedDict, place: SourceLocation) -> list[Point]:
    """The points of an entry, at least one. Raises ConfigError."""
    fields = {key: value for key, value in entry.items() if key not in KEYS}
    for key in fields:
        here = place.child(key, entry.lines.get(key, 0))
        _no_label(key, here)
        if nearest(key, KEYS) and key not in Config.__dataclass_fields__:
            raise unknown_key(key, KEYS, here)
    below = entry.get("set", LocatedDict())
    if not isinstance(below, LocatedDict):
        raise place.child("set", entry.lines.get("set", 0)).error("needs a mapping of fields", below)
    layers = tuple((place.where, layer) for layer in (below, LocatedDict(fields, entry.lines)) if layer)
    here = place.child("where", entry.lines.get("where", 0))
    parts = [[Point("", layers, parse(entry["where"], here) if "where" in entry else ())]]
    parts += [
        read(entry[key], place.child(key, entry.lines.get(key, 0))) for key, read in _AXES.items() if key in entry
    ]
    return product(parts, place)


def product(parts: Sequence[Sequence[Point]], place: SourceLocation) -> list[Point]:
    """Every combination; the last part varies fastest."""
    total = math.prod(map(len, parts))
    if total > MAX_POINTS:
        raise place.error(f"makes {total:,} runs, more than {MAX_POINTS:,}", remedy="Vary less at once.")
    return distinct([sum(combination, Point()) for combination in itertools.product(*parts)], place)


def distinct(result: list[Point], place: SourceLocation, remedy: str = "") -> list[Point]:
    seen: set[str] = set()
    for point in result:
        if point.name in seen:
            remedy = remedy or "Remove the repeated value, or name the runs under runs."
            raise place.error("two runs have the same name", point.name, remedy)
        seen.add(point.name)
    return result


def check_name(name: Any, what: str, place: SourceLocation) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise place.error(f"not a valid name of a {what}", name, NAME_RULE)
    return name


def _runs(value: Any, place: SourceLocation) -> list[Point]:
    table = _table(value, place)
    result: list[Point] = []
    for name, entry in table.items():
        here = place.child(name, table.lines.get(name, 0))
        check_name(name, "run", here)
        if not isinstance(entry, (LocatedDict, type(None))):
            raise here.error("needs a mapping of fields", entry)
        result += [Point(name) + point for point in points(entry or LocatedDict(), here)]
    return distinct(result, place)


def _list(value: Any, place: SourceLocation) -> list[Point]:
    if not isinstance(value, list) or not value:
        raise place.error("needs a list of entries" if value else "is empty", value)
    result: list[Point] = []
    for i, entry in enumerate(value):
        if not isinstance(entry, LocatedDict):
            raise place.child(i).error("needs a mapping with a name and settings", entry)
        here = place.child(i, min(entry.lines.values(), default=0))
        if "name" in entry:
            head = Point(check_name(entry["name"], "run", here))
        else:
            head = Point()
        rest = LocatedDict({key: item for key, item in entry.items() if key != "name"}, entry.lines)
        members = [head + point for point in points(rest, here)]
        if any(not point.name for point in members):
            raise here.error("has no name", remedy="Name it: {name: ..., set: ...}")
        result += members
    return distinct(result, place)


def _grid(value: Any, place: SourceLocation) -> list[Point]:
    return product([distinct(axis, here) for here, axis in _axes(value, place)], place)


def _zip(value: Any, place: SourceLocation) -> list[Point]:
    """The axes in step, named after the first: adding a point does not change other names."""
    axes = _axes(value, place)
    lengths = {len(axis) for _, axis in axes}
    if len(lengths) > 1:
        lengths_text = ", ".join(f"{here.key.removeprefix(place.key + '.')} {len(axis)}" for here, axis in axes)
        raise place.error("its axes have different lengths", lengths_text, "Give each the same number of values.")
    rows = zip(*(axis for _, axis in axes), strict=True)
    result = [sum((Point("", point.layers, point.where) for point in rest), first) for first, *rest in rows]
    return distinct(result, place, "The first axis of a zip names its points: its values must differ.")


def _axes(value: Any, place: SourceLocation) -> list[tuple[SourceLocation, list[Point]]]:
    table = _table(value, place)
    places = [place.child(key, table.lines.get(key, 0)) for key in table]
    return [(here, _axis(key, table[key], here)) for key, here in zip(table, places, strict=True)]


def _axis(key: str, values: Any, place: SourceLocation) -> list[Point]:
    if isinstance(values, LocatedDict):
        if not values.keys() & _AXES.keys() or values.keys() - KEYS:
            raise place.error("needs a list of values, or an entry", dict(values), f"An entry has {', '.join(_AXES)}.")
        return points(values, place)
    if not isinstance(values, list) or not values:
        raise place.error("needs a list of at least one value", values)
    return [_value(key, value, len(values) > 1, place) for value in values]


def _no_label(key: str, place: SourceLocation) -> None:
    if key in ("recipe", "schema"):
        raise place.error("a label, not a setting of a run", remedy="Name recipes at the top of the sweep.")


def _value(key: str, value: Any, named: bool, place: SourceLocation) -> Point:
    _no_label(key, place)
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, Mapping) for item in items):
        remedy = f"Name it: {{{key}: {{list: [{{name: ..., set: ...}}, ...]}}}}."
        raise place.error("a mapping has no short name", remedy=remedy)
    name = slug(key, value)
    if not name:
        raise place.error("cannot be part of a name", value, "Name it under runs or list.")
    if not named:
        name = ""
    return Point(name, ((place.where, LocatedDict({key: value}, {key: place.line})),))


def _table(value: Any, place: SourceLocation) -> LocatedDict:
    if not isinstance(value, LocatedDict) or not value:
        raise place.error("needs a mapping" if value else "is empty", value)
    return value


_AXES: dict[str, Callable[[Any, SourceLocation], list[Point]]] = {
    "runs": _runs,
    "list": _list,
    "zip": _zip,
    "grid": _grid,
}
KEYS = ("set", "where", *_AXES)
"""Keys of an entry other than fields."""


def slug(key: str, value: Any) -> str:
    """A value as part of a name: text itself (L/16: l16), other values after the last part of the key (mask0.5)."""
    last = key.rpartition(".")[2]
    if isinstance(value, str):
        return re.sub(r"[^a-z0-9._-]+", "-", value.lower().replace("/", "")).strip("-.")
    if isinstance(value, list):
        return "-".join([last, *(slug("", item) for item in value)])
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return last + _short(value)
    return f"{last}-{str(value).lower()}"


def _short(number: int | float) -> str:
    """12.8b for 12.8e9 if two decimals are enough, else the number itself."""
    for unit, size in _UNITS:
        if size <= number < 10**300 and number * 100 % size == 0:
            return f"{number / size:g}{unit}"
    if isinstance(number, float):
        text = f"{number:g}"
    else:
        text = str(number)
    if "+" not in text:
        return text
    if number % 1 == 0:
        return str(int(number))
    return repr(number)
