"""Which design is better on an evaluation set, as far as seeds and test images show.

Two designs with ``paired.LEAST`` common seeds are compared by their paired differences, as the studies do. All others
are compared by their intervals: of one run that of its test images, of several the range. The values of each axis of a
grid are compared over all other settings (``grid_effects``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from flip.evaluation.metrics.score import TOP_1
from flip.monitoring.results import Outcome
from jobs.common.text import level_percent, percent, shortened
from jobs.reporting import axes, grid_effects, paired, seed_groups
from jobs.reporting.axes import GridAxis
from jobs.reporting.paired import Difference
from jobs.reporting.seed_groups import GroupScore, SeedGroup

MAX_HEADLINES = 3
"""Most sentences on top of a report."""
MAX_RANKED = 5
"""Most groups that a sentence names."""


@dataclass(frozen=True)
class Standing:
    """A complete group and its score on the set. ``index``: its position among all groups."""

    index: int
    label: str
    group: SeedGroup
    score: GroupScore


@dataclass(frozen=True)
class Comparison:
    """Whether the first of two groups is better. ``difference``: None without enough common seeds."""

    first: Standing
    second: Standing
    difference: Difference | None

    @property
    def is_clear(self) -> bool:
        """Whether the interval of the difference excludes 0, or else whether the two intervals do not overlap."""
        if self.difference is not None:
            return self.difference.verdict == "more"
        low = self.first.score.low
        high = self.second.score.high
        return low is not None and high is not None and low > high

    def __str__(self) -> str:
        """The difference in words. Only if there is one."""
        assert self.difference is not None
        interval = f"{self.difference.low:+.1f} to {self.difference.high:+.1f}"
        return f"{self.first.label} minus {self.second.label} {self.difference.mean:+.1f} points ({interval})"


@dataclass(frozen=True)
class Headline:
    """A sentence on top of a report, its numbers with intervals, and those of further sets with the same verdict."""

    sentence: str
    explanation: str
    further: Sequence[str] = ()


@dataclass(frozen=True)
class _Verdict:
    """What one set shows. ``kind``: equal for sets that agree. ``ranked``: groups that the sentence ranks."""

    name: str
    kind: str
    sentence: str
    explanation: str
    ranked: Sequence[Standing] = field(default=())


def rank(groups: Sequence[SeedGroup], name: str) -> list[Standing]:
    """Complete groups with a score on the set, best first.

    Models of others are ranked only if there is no other group. Groups that were scored by another metric are left out.
    """
    standings = _standings(groups, name)
    return [standing for standing in standings if not standing.group.is_published] or standings


def _standings(groups: Sequence[SeedGroup], name: str) -> list[Standing]:
    standings = [
        Standing(i, label, group, score)
        for i, (label, group) in enumerate(zip(seed_groups.labels(groups), groups, strict=True))
        if group.complete and (score := group.score(name)) is not None
    ]
    alike = [standing for standing in standings if standing.score.label == standings[0].score.label]
    return sorted(alike, key=lambda standing: -standing.score.mean)


def compare(first: Standing, second: Standing) -> Comparison:
    return Comparison(first, second, paired.difference(first.score.by_seed, second.score.by_seed))


def clear_best(groups: Sequence[SeedGroup], name: str) -> Standing | None:
    """The group that is distinguishable on the set from each other one; None if there is no such group."""
    return _clear_best(rank(groups, name))


def _clear_best(ranked: Sequence[Standing]) -> Standing | None:
    if len(ranked) < 2 or not all(compare(ranked[0], other).is_clear for other in ranked[1:]):
        return None
    return ranked[0]


def headlines(groups: Sequence[SeedGroup], outcomes: Sequence[Outcome]) -> list[Headline]:
    """What the test sets show, in their order: one headline per verdict, at most MAX_HEADLINES."""
    roles = seed_groups.sets(outcomes)
    tests = [name for name, role in roles.items() if role == "test"] or list(roles)
    grid = axes.axes(groups)
    verdicts = [verdict for name in tests if (verdict := _verdict(name, groups, grid)) is not None]
    alike: dict[str, list[_Verdict]] = {}
    for verdict in verdicts:
        alike.setdefault(verdict.kind, []).append(verdict)
    return [_headline(*members) for members in list(alike.values())[:MAX_HEADLINES]]


def _verdict(name: str, groups: Sequence[SeedGroup], grid: Sequence[GridAxis]) -> _Verdict | None:
    """The verdict of one test set; None without a score."""
    ranked = rank(groups, name)
    if not ranked:
        return None
    published = [standing for standing in _standings(groups, name) if standing not in ranked]
    tail = "".join(f"; {_named(standing)}" for standing in published[:MAX_RANKED])
    effects = grid_effects.effects(grid, ranked)
    if any(effect.differences for effect in effects):
        words = "; ".join(map(str, effects))
        best = _clear_best(ranked)
        lead = "Best" if best is not None else "Highest"
        sentence = f"On {_where(name, ranked)}: {words}. {lead}: {_named(ranked[0])}{_about(ranked)}{tail}"
        kind = f"{words}. {_kind(ranked)}"
        return _Verdict(name, kind, sentence, grid_effects.explanation(name, effects))
    return _Verdict(name, _kind(ranked), _sentence(name, ranked) + tail, _explanation(name, ranked), ranked)


def _kind(ranked: Sequence[Standing]) -> str:
    """Equal for sets with the same verdict."""
    if len(ranked) == 1:
        return f"only {ranked[0].label}"
    best = _clear_best(ranked)
    if best is None:
        return "no clear winner"
    return f"best {best.label}"


def _headline(first: _Verdict, *others: _Verdict) -> Headline:
    """The headline of sets with the same verdict; the sentence is that of the first."""
    sentence = first.sentence
    texts = dict.fromkeys(verdict.explanation for verdict in others)
    further = [text for text in texts if text not in ("", first.explanation)]
    if len(first.ranked) == 1:
        sentence += "".join(f"; {verdict.name} {percent(verdict.ranked[0].score.mean)} %" for verdict in others)
    elif others:
        names = [verdict.name for verdict in others]
        agree = "agrees" if len(names) == 1 else "agree"
        sentence += f"; {shortened(names, MAX_RANKED)} {agree}"
    return Headline(sentence, first.explanation, further)


def _named(standing: Standing) -> str:
    return f"{standing.label} {percent(standing.score.mean)} %"


def _where(name: str, ranked: Sequence[Standing]) -> str:
    """The set, with the metric unless it is top-1."""
    label = ranked[0].score.label
    if label == TOP_1:
        return name
    return f"{name}, {label}"


def _sentence(name: str, ranked: Sequence[Standing]) -> str:
    parts = [_named(standing) for standing in ranked[:MAX_RANKED]]
    if len(ranked) > MAX_RANKED:
        parts.append(f"and {len(ranked) - MAX_RANKED} more")
    where = _where(name, ranked)
    remarks = _about(ranked)
    if len(ranked) == 1:
        return f"{parts[0]} on {where}{remarks}"
    if _clear_best(ranked) is None:
        return f"No clear winner on {where}: {', '.join(parts)}{remarks}"
    by_seeds = compare(ranked[0], ranked[1]).difference is not None
    return f"{'Best' if by_seeds else 'Highest'} on {where}: {', '.join(parts)}{remarks}"


def _about(ranked: Sequence[Standing]) -> str:
    """In brackets: the number of seeds, and the chance level if it is known."""
    remarks = []
    seeds = sorted({standing.score.runs for standing in ranked if not standing.group.is_published})
    if seeds == [1]:
        remarks.append("one seed each" if len(ranked) > 1 else "one seed")
    elif seeds:
        remarks.append(f"{seeds[0]} seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds")
    chance = next((standing.score.chance for standing in ranked if standing.score.chance), None)
    if chance is not None:
        remarks.append(f"chance {level_percent(chance)}")
    if remarks:
        return f" ({', '.join(remarks)})"
    return ""


def _explanation(name: str, ranked: Sequence[Standing]) -> str:
    neighbours = [compare(first, second) for first, second in pairwise(ranked[:MAX_RANKED])]
    differences = [str(comparison) for comparison in neighbours if comparison.difference is not None]
    close = [comparison for comparison in neighbours if comparison.difference is None and not comparison.is_clear]
    sentences = []
    if differences:
        sentences.append(f"Paired by seed on {name}, with 95 % intervals: {'; '.join(differences)}.")
    if close:
        has_intervals = all(standing.score.low is not None for standing in ranked[:MAX_RANKED])
        if has_intervals:
            why = "their intervals overlap"
        else:
            why = "not all have intervals"
        if len(ranked) == 2:
            return f"{why[0].upper()}{why[1:]}."
        pairs = "; ".join(f"{comparison.first.label} and {comparison.second.label}" for comparison in close)
        sentences.append(f"Not distinguishable on {name}, as {why}: {pairs}.")
    return " ".join(sentences)
