"""Which design is better on an evaluation set, as far as seeds and test images show.

Two designs with ``paired.LEAST`` common seeds are compared by their paired differences, as the studies do. All others
are compared by their intervals: of one run that of its test images, of several the range.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from flip.evaluation.metrics.score import TOP_1
from flip.monitoring.results import Outcome
from jobs.common.text import level_percent, percent
from jobs.reporting import paired, seed_groups
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


def headlines(groups: Sequence[SeedGroup], outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """(sentence, explanation) for the first ``MAX_HEADLINES`` test sets: scores of complete groups, best first.

    The explanation has the paired differences of neighbours, and names neighbours that are not distinguishable.
    """
    roles = seed_groups.sets(outcomes)
    tests = [name for name, role in roles.items() if role == "test"] or list(roles)
    ranked = {name: standings for name in tests if (standings := rank(groups, name))}
    sentences = []
    for name, standings in list(ranked.items())[:MAX_HEADLINES]:
        others = [standing for standing in _standings(groups, name) if standing not in standings]
        sentence = "; ".join([_sentence(name, standings), *map(_named, others[:MAX_RANKED])])
        sentences.append((sentence, _explanation(name, standings)))
    return sentences


def _named(standing: Standing) -> str:
    return f"{standing.label} {percent(standing.score.mean)} %"


def _sentence(name: str, ranked: Sequence[Standing]) -> str:
    parts = [_named(standing) for standing in ranked[:MAX_RANKED]]
    if len(ranked) > MAX_RANKED:
        parts.append(f"and {len(ranked) - MAX_RANKED} more")
    label = ranked[0].score.label
    where = name if label == TOP_1 else f"{name}, {label}"
    about = _about(ranked)
    if len(ranked) == 1:
        return f"{parts[0]} on {where}{about}"
    if _clear_best(ranked) is None:
        return f"No clear winner on {where}: {', '.join(parts)}{about}"
    by_seeds = compare(ranked[0], ranked[1]).difference is not None
    return f"{'Best' if by_seeds else 'Highest'} on {where}: {', '.join(parts)}{about}"


def _about(ranked: Sequence[Standing]) -> str:
    """In brackets: the number of seeds, and the chance level if it is known."""
    facts = []
    seeds = sorted({standing.score.runs for standing in ranked if not standing.group.is_published})
    if seeds == [1]:
        facts.append("one seed each" if len(ranked) > 1 else "one seed")
    elif seeds:
        facts.append(f"{seeds[0]} seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds")
    chance = next((standing.score.chance for standing in ranked if standing.score.chance), None)
    if chance is not None:
        facts.append(f"chance {level_percent(chance)}")
    if facts:
        return f" ({', '.join(facts)})"
    return ""


def _explanation(name: str, ranked: Sequence[Standing]) -> str:
    neighbours = [compare(first, second) for first, second in pairwise(ranked[:MAX_RANKED])]
    differences = [str(comparison) for comparison in neighbours if comparison.difference is not None]
    close = [comparison for comparison in neighbours if comparison.difference is None and not comparison.is_clear]
    sentences = []
    if differences:
        sentences.append(f"Paired by seed on {name}, with 95 % intervals: {'; '.join(differences)}.")
    if close:
        known = all(standing.score.low is not None for standing in ranked[:MAX_RANKED])
        if known:
            why = "their intervals overlap"
        else:
            why = "not all have intervals"
        if len(ranked) == 2:
            return f"{why[0].upper()}{why[1:]}."
        pairs = "; ".join(f"{comparison.first.label} and {comparison.second.label}" for comparison in close)
        sentences.append(f"Not distinguishable on {name}, as {why}: {pairs}.")
    return " ".join(sentences)
