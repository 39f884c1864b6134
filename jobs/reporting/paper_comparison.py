"""Our results against the paper's, row by row: the gap, what it means, and why a row cannot be compared yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flip.monitoring.results import Outcome, read_run
from jobs.reporting import seed_groups
from jobs.reporting.seed_groups import Arm
from jobs.sweeps.published import Published, obstacles, published, rows

SHOWN = 3
"""Reasons that a table spells out; the others are counted."""


@dataclass(frozen=True)
class Line:
    """One row of the paper beside ours. ``ours``, ``low``, ``high``: per cent; None where there is none."""

    row: Published
    set: str
    run: str
    paper: float
    ours: float | None
    low: float | None
    high: float | None
    obstacles: list[str]

    @property
    def gap(self) -> float | None:
        return None if self.ours is None else self.ours - self.paper

    @property
    def verdict(self) -> str:
        """What the gap means, in words."""
        if self.obstacles or self.gap is None:
            return "not comparable yet" if self.gap is None else "not comparable"
        if self.row.within is None:
            return "no tolerance given"
        if abs(self.gap) <= self.row.within + 1e-9:
            return f"agrees within {self.row.within:g}"
        return f"{'above' if self.gap > 0 else 'below'} by more than {self.row.within:g}"


def compare(grouped: Sequence[Arm], outcomes: Sequence[Outcome], table: str = "") -> list[Line]:
    """A line for every published number of an arm, and of the rows of the sweep's table that other sweeps have.

    ``table``: the rows of that one in their place. Raises ConfigError where there is no such table.
    """
    entries = list(rows(table).values()) if table else seed_groups.about(outcomes).get("rows", [])
    order = {entry.get("row", ""): i for i, entry in enumerate(entries)}
    mine = {arm.published.row: arm for arm in grouped if arm.published}
    found = []
    for name, arm in mine.items():
        if arm.published and (not table or name in order):
            found += _lines(arm.published, arm.name, arm)
    for row in map(published, entries):
        if row.row not in mine:
            found += _lines(row, row.run, _elsewhere(row, outcomes[0].run.path.parent.parent))
    return sorted(found, key=lambda line: order.get(line.row.row, len(order)))


def _lines(row: Published, name: str, arm: Arm | None) -> list[Line]:
    lines = []
    for which, number in row.top1.items():
        why = obstacles(row, arm.outcomes if arm else [], which)
        score = arm.score(which) if arm else None
        mean, low, high = (None if score is None else 100 * getattr(score, key) for key in ("mean", "low", "high"))
        lines.append(Line(row, which, name, number, mean, low, high, why))
    return lines


def _elsewhere(row: Published, root: Path) -> Arm | None:
    """The arm of another sweep that has the row: its run, and those of more seeds."""
    if not row.run:
        return None
    sweep, _, name = row.run.partition("/")
    folders = [root / sweep / name, *sorted((root / sweep).glob(f"{name}-s[0-9]*"))]
    runs = [read_run(folder) for folder in folders if (folder / "config.yaml").is_file()]
    return Arm(row.run, runs) if runs else None


def cells(lines: Sequence[Line]) -> list[dict[str, str]]:
    """The rows of the table, as text."""
    made = []
    for line in lines:
        interval = "" if line.low is None else f" ({line.low:.1f}-{line.high:.1f})"
        more = len(line.obstacles) - SHOWN
        why = "; ".join(line.obstacles[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
        made.append(
            {
                "row of the paper": line.row.row or "-",
                "run": line.run or "-",
                "test": line.set,
                "paper": f"{line.paper:.1f}",
                "ours": "-" if line.ours is None else f"{line.ours:.1f}{interval}",
                "gap": "-" if line.gap is None else f"{line.gap:+.1f}",
                "verdict": line.verdict,
                "why": why,
            }
        )
    return made
