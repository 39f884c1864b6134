"""Compares results with those of the paper, row by row: the gap, a verdict, and what prevents a comparison."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from flip.common.plain_data import flatten
from flip.common.yaml_io import read_yaml
from flip.config.schema import MODEL_PRESETS
from flip.monitoring.results import Outcome, read_run
from jobs.common.text import count, formatted, shortened
from jobs.reporting import seed_groups
from jobs.reporting.seed_groups import SeedGroup
from jobs.sweeps.published import RESULTS, Published, published, rows

SHOWN = 3
"""Reasons that a table lists; further ones are counted."""


@dataclass(frozen=True)
class Line:
    """A published number and the result. ``result``, ``low``, ``high``: per cent, None if absent."""

    row: Published
    set: str
    run: str
    paper: float
    result: float | None
    low: float | None
    high: float | None
    obstacles: list[str]

    @property
    def gap(self) -> float | None:
        if self.result is None:
            return None
        return self.result - self.paper

    @property
    def verdict(self) -> str:
        """The gap in words."""
        if self.obstacles or self.gap is None:
            if self.gap is None:
                return "not comparable yet"
            return "not comparable"
        if self.row.within is None:
            return "no tolerance given"
        if abs(self.gap) <= self.row.within + 1e-9:
            return f"agrees within {self.row.within:g}"
        return f"{'above' if self.gap > 0 else 'below'} by more than {self.row.within:g}"


def compare(grouped: Sequence[SeedGroup], outcomes: Sequence[Outcome], table: str = "") -> list[Line]:
    """A line for every published number of a group, and of the other rows of the sweep's table.

    ``table``: use the rows of this table instead. Raises ConfigError if it does not exist.
    """
    if table:
        entries = list(rows(table).values())
    else:
        entries = seed_groups.sweep_record(outcomes).get("rows", [])
    order = {entry.get("row", ""): i for i, entry in enumerate(entries)}
    lines = []
    reproduced = set()
    for group in grouped:
        if group.published and (not table or group.published.row in order):
            lines += _lines(group.published, group.name, group)
            reproduced.add(group.published.row)
    for row in map(published, entries):
        if row.row not in reproduced:
            lines += _lines(row, row.run, _group_of_other_sweep(row, outcomes[0].run.path.parent.parent))
    return sorted(lines, key=lambda line: order.get(line.row.row, len(order)))


def _lines(row: Published, name: str, group: SeedGroup | None) -> list[Line]:
    lines = []
    outcomes: Sequence[Outcome] = []
    if group:
        outcomes = group.outcomes
    for which, number in row.top1.items():
        why = obstacles(row, outcomes, which)
        score = None
        if group:
            score = group.score(which)
        numbers: Sequence[float | None] = (None, None, None)
        if score:
            numbers = (score.mean, score.low, score.high)
        mean, low, high = (None if number is None else 100 * number for number in numbers)
        lines.append(Line(row, which, name, number, mean, low, high, why))
    return lines


def _group_of_other_sweep(row: Published, root: Path) -> SeedGroup | None:
    """The group of another sweep that reproduces the row: its run, and further seeds."""
    if not row.run:
        return None
    sweep, _, name = row.run.partition("/")
    folders = [root / sweep / name, *sorted((root / sweep).glob(f"{name}-s[0-9]*"))]
    runs = [read_run(folder) for folder in folders if (folder / "config.yaml").is_file()]
    if runs:
        return SeedGroup(row.run, runs)
    return None


def cells(lines: Sequence[Line]) -> list[dict[str, str]]:
    """The rows of the table, as text."""
    table = []
    for line in lines:
        interval = ""
        if line.low is not None:
            interval = f" ({line.low:.1f}-{line.high:.1f})"
        result = "-"
        if line.result is not None:
            result = f"{line.result:.1f}{interval}"
        table.append(
            {
                "row of the paper": line.row.row or "-",
                "run": line.run or "-",
                "test": line.set,
                "paper": f"{line.paper:.1f}",
                "ours": result,
                "gap": formatted(line.gap, "+.1f") or "-",
                "verdict": line.verdict,
                "why": shortened(line.obstacles, SHOWN, "; "),
            }
        )
    return table


def obstacles(row: Published, outcomes: Sequence[Outcome], test: str) -> list[str]:
    """Reasons why the runs are not comparable with the row on a test set; empty: they are."""
    if row.not_yet:
        return [row.not_yet]
    if not outcomes:
        return ["no run yet"]
    return list(dict.fromkeys(reason for outcome in outcomes for reason in _obstacles(row, outcome, test)))


def _obstacles(row: Published, outcome: Outcome, test: str) -> Iterator[str]:
    if outcome.state != "complete":
        yield f"{outcome.run.name} is {outcome.state}"
    if outcome.settings:
        yield from differences(row, outcome.settings)
    if outcome.state != "complete":
        return
    if protocol := _other_protocols().get(test):
        yield f"another protocol: published with {protocol}"
    scored = {item["name"]: item.get("n") for item in outcome.evaluations}
    wanted = next((n for name, n in row.images.items() if test == name or test.startswith(f"{name}-")), None)
    if test not in scored:
        yield f"not scored on {test}{_scoring_command(outcome, test)}"
    elif scored[test] is not None and wanted not in (None, scored[test]):
        yield f"scored on {scored[test]:,} images of {test}, published on {wanted:,}"


@lru_cache
def _other_protocols() -> dict[str, str]:
    """Test -> how the paper scores it, if evaluations here do it in another way."""
    return dict(read_yaml(RESULTS)["other_protocol"])


def _scoring_command(outcome: Outcome, test: str) -> str:
    """The command that scores masked images; empty for other tests."""
    masked = re.search(r"-(?:mask|ensemble)([0-9.]+)$", test)
    run = f"{outcome.run.sweep}/{outcome.run.name}"
    if masked:
        return f": flip evaluate {run} --mask {masked[1]} --ensemble"
    return ""


def differences(row: Published, settings: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each key whose value in the flat ``settings`` differs from what the row needs."""
    size = row.needs.get("model.size")
    filled = {}
    if size in MODEL_PRESETS and settings.get("model.size") != size:
        filled = flatten(MODEL_PRESETS[size], "model")
    for key, wanted in row.needs.items():
        if key in filled:  # the difference in size is reported
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
        left = float(value)
        right = float(wanted)
    except (TypeError, ValueError):
        return str(value) == str(wanted)
    return abs(left - right) <= max(near, 1e-9) * abs(right)


def _word(value: Any) -> str:
    if value is None:
        return "absent"
    if isinstance(value, (int, float)) and value >= 1000:
        return count(value)
    return str(value)
