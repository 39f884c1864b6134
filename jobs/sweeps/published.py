"""The paper's results: which row of which table a run stands for, and what makes the two differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flip.config.identity import flatten
from flip.config.sizes import SIZES
from flip.config.yaml_io import read_yaml
from flip.monitoring.results import Outcome
from flip.runs.errors import ConfigError
from jobs.common.paths import SWEEPS
from jobs.common.text import count

RESULTS = SWEEPS / "paper.yaml"

RESERVED = ("row", "title", "run", "not_yet", "needs", "near", "images", "within")
"""Keys of a row that are no evaluation set."""


@dataclass(frozen=True)
class Published:
    """One row of the paper, as it stands in sweep.json."""

    row: str
    top1: Mapping[str, float]
    """Evaluation set -> per cent."""
    run: str = ""
    """SWEEP/RUN that has it where the sweep itself has none."""
    not_yet: str = ""
    """Why no run can have it."""
    within: float | None = None
    """Points that a gap may have and count as the same."""
    needs: Mapping[str, Any] = field(default_factory=dict)
    """Configuration key -> value without which the numbers do not mean the same; None: absent."""
    near: Mapping[str, float] = field(default_factory=dict)
    """Configuration key -> share by which its value may miss."""
    images: Mapping[str, int] = field(default_factory=dict)
    """Evaluation set -> images that are scored."""


# -- the file ----------------------------------------------------------------------------------------------------------


def rows(table: str) -> dict[str, dict[str, Any]]:
    """Rows of a table of sweeps/paper.yaml by their full names (``1a, mask 50 %``), each with all that it needs.

    Raises ConfigError where there is no such table.
    """
    paper = read_yaml(RESULTS)
    tables = paper["tables"]
    if table not in tables:
        raise ConfigError("no such table of the paper", str(RESULTS), table, f"There are: {', '.join(tables)}.")
    base = _recipe(paper["recipe"])
    found = {}
    for name, row in tables[table]["rows"].items():
        needs = {**base, **flatten(tables[table]["needs"]), **flatten(row.get("needs", {}))}
        needs |= flatten(SIZES[needs["model.size"]], "model") if "model.size" in needs else {}
        gone = [key for key, value in needs.items() if value is None]
        needs = {
            key: value
            for key, value in needs.items()
            if value != "any" and not any(key.startswith(f"{absent}.") for absent in gone)
        }
        row = {**{key: paper[key] for key in ("within", "images", "near")}, **row, "needs": needs}
        found[f"{table}, {name}"] = {"row": f"{table}, {name}", "title": tables[table]["title"], **row}
    return found


def row(name: str) -> dict[str, Any]:
    """The row of that full name. Raises ConfigError that lists the table's where there is none."""
    table = rows(name.partition(",")[0])
    if name not in table:
        raise ConfigError("no such row of the paper", str(RESULTS), name, f"There are: {'; '.join(table)}.")
    return table[name]


def _recipe(name: str) -> dict[str, Any]:
    return flatten(read_yaml(SWEEPS / "recipes" / f"{name}.yaml"))


def published(entry: Mapping[str, Any]) -> Published:
    """A row as sweep.json has it; one of numbers alone is a row that needs nothing."""
    top1 = {key: value for key, value in entry.items() if key not in RESERVED}
    known = {key: entry[key] for key in RESERVED if key in entry and key != "title"}
    return Published(**{"row": "", **known}, top1=top1)


# -- a run against its row ---------------------------------------------------------------------------------------------


def obstacles(row: Published, outcomes: Sequence[Outcome], test: str) -> list[str]:
    """Why the runs' number on a test set does not mean what the row's means; empty: they are comparable."""
    if row.not_yet:
        return [row.not_yet]
    if not outcomes:
        return ["no run yet"]
    found = dict.fromkeys(reason for outcome in outcomes for reason in _obstacles(row, outcome, test))
    return list(found)


def _obstacles(row: Published, outcome: Outcome, test: str) -> Iterator[str]:
    if outcome.state != "complete":
        yield f"{outcome.run.name} is {outcome.state}"
    if outcome.settings:
        yield from differences(row, outcome.settings)
    if outcome.state != "complete":
        return
    scored = {item["name"]: item.get("n") for item in outcome.evaluations}
    wanted = next((n for name, n in row.images.items() if test == name or test.startswith(f"{name}-")), None)
    if test not in scored:
        yield f"not scored on {test}"
    elif wanted not in (None, scored[test]):
        yield f"scored on {scored[test]:,} images of {test}, published on {wanted:,}"


def differences(row: Published, settings: Mapping[str, Any]) -> Iterator[str]:
    """Each key whose value in the flat ``settings`` is not what the row needs, in words."""
    size = row.needs.get("model.size")
    filled = flatten(SIZES[size], "model") if size in SIZES and settings.get("model.size") != size else {}
    for key, wanted in row.needs.items():
        if key in filled:  # the other size says it
            continue
        if wanted is None:
            if any(other == key or other.startswith(f"{key}.") for other in settings):
                yield f"has {key}, the published run has none"
            continue
        is_ = settings.get(key)
        if not _same(is_, wanted, row.near.get(key, 0.0)):
            yield f"{key} is {_word(is_)}, published {_word(wanted)}"


def _same(value: Any, wanted: Any, near: float) -> bool:
    if isinstance(value, list) and isinstance(wanted, list):
        return len(value) == len(wanted) and all(_same(a, b, near) for a, b in zip(value, wanted, strict=True))
    try:
        left, right = float(value), float(wanted)
    except (TypeError, ValueError):
        return str(value) == str(wanted)
    return abs(left - right) <= max(near, 1e-9) * abs(right)


def _word(value: Any) -> str:
    if value is None:
        return "absent"
    return count(value) if isinstance(value, (int, float)) and value >= 1000 else str(value)
