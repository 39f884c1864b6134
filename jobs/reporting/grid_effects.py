"""What each axis of a grid does to the score of a set, whatever the other settings.

The values of an axis are compared by their mean over the designs that differ in nothing else: pairs with the same seed
and the same values of the other axes (``paired.difference``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

from jobs.reporting import paired
from jobs.reporting.axes import GridAxis
from jobs.reporting.paired import Difference
from jobs.reporting.seed_groups import GroupScore


class Scored(Protocol):
    """A group and its score (``ranking.Standing``). ``index``: its position among all groups."""

    @property
    def index(self) -> int: ...

    @property
    def score(self) -> GroupScore: ...


@dataclass(frozen=True)
class Effect:
    """The value of an axis with the highest mean score, and its difference to each other value.

    Without differences, too few pairs have both values.
    """

    axis: str
    best: str
    differences: Sequence[tuple[str, Difference]]

    def __str__(self) -> str:
        """What is clear, in words."""
        lower = [value for value, difference in self.differences if difference.verdict == "more"]
        close = [value for value, difference in self.differences if difference.verdict != "more"]
        if not lower:
            return f"{self.axis} makes no clear difference"
        text = f"{self.axis} {self.best} is better than {' and '.join(lower)}"
        if close:
            text += f", not clearly than {' or '.join(close)}"
        return text


def effects(grid: Sequence[GridAxis], standings: Sequence[Scored]) -> list[Effect]:
    """The effect of each axis on one set, of the axes with enough pairs."""
    in_grid = [standing for standing in standings if all(axis.positions[standing.index] is not None for axis in grid)]
    return [effect for axis in grid if (effect := _effect(axis, grid, in_grid)) is not None]


def explanation(name: str, found: Sequence[Effect]) -> str:
    """The differences of all effects on the set ``name``, with their intervals."""
    parts = [
        f"{effect.axis} {effect.best} minus {value} {difference.mean:+.1f} points"
        f" ({difference.low:+.1f} to {difference.high:+.1f})"
        for effect in found
        for value, difference in effect.differences
    ]
    paired_by = "paired by seed and by the other settings, with 95 % intervals"
    return f"Mean differences on {name}, {paired_by}: {'; '.join(parts)}."


def _effect(axis: GridAxis, grid: Sequence[GridAxis], standings: Sequence[Scored]) -> Effect | None:
    scores = _by_value(axis, grid, standings)
    common = set.intersection(*(set(pairs) for pairs in scores.values())) if scores else set()
    if len(scores) < 2 or not common:
        return None
    means = {value: fmean(pairs[pair] for pair in common) for value, pairs in scores.items()}
    best = max(means, key=lambda value: means[value])
    compared = {value: paired.difference(scores[best], pairs) for value, pairs in scores.items() if value != best}
    differences = [(value, difference) for value, difference in compared.items() if difference is not None]
    if len(differences) < len(compared):
        return None
    differences.sort(key=lambda item: item[1].mean)
    return Effect(axis.name, axis.values[best], [(axis.values[value], difference) for value, difference in differences])


def _by_value(axis: GridAxis, grid: Sequence[GridAxis], standings: Sequence[Scored]) -> dict[int, dict[Any, float]]:
    """Position of a value -> (positions on the other axes, seed) -> score."""
    others = [other for other in grid if other is not axis]
    scores: dict[int, dict[Any, float]] = {}
    for standing in standings:
        position = axis.positions[standing.index]
        assert position is not None
        rest = tuple(other.positions[standing.index] for other in others)
        pairs = scores.setdefault(position, {})
        pairs.update({(rest, seed): score for seed, score in standing.score.by_seed.items()})
    return scores
