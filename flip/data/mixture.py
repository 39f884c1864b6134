"""The data sets of a run as its lanes see them (docs/contracts.md, Several data sets): lanes beside lanes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from flip.config.derived import shares
from flip.config.schema import Data
from flip.data.manifest.manifest import Manifest
from flip.data.order import Order
from flip.rng import key

IDS = 1 << 48
"""Sample ids of set s begin at s times this."""
_SETS = (1 << 63) + 2


@dataclass(frozen=True)
class Source:
    """One data set of a run. Inside it lanes and samples are numbered from 0."""

    number: int
    """s, its place among the data sets."""
    manifest: Manifest
    lanes: range
    """Of the L lanes of the run, its own."""

    @property
    def first_id(self) -> int:
        """What its ids have more in a batch than in its manifest."""
        return self.number * IDS

    def order(self, seed: int, block: int) -> Order:
        """Of its own lanes; ``seed`` is the run's, ``block`` Q."""
        return order(self.number, seed, self.manifest.samples, self.manifest.chunk, block, len(self.lanes))

    def part(self, lanes: range) -> range:
        """Those of the run's ``lanes`` that are its own, by their numbers inside it."""
        first = max(lanes.start, self.lanes.start)
        return range(first - self.lanes.start, max(first, min(lanes.stop, self.lanes.stop)) - self.lanes.start)


def order(number: int, seed: int, samples: int, chunk: int, block: int, lanes: int) -> Order:
    """The order of set ``number`` in a run with this ``seed``: of its own N, R and lanes."""
    return Order(int(key(seed, _SETS, number)) if number else seed, samples, chunk, block, lanes)


def sources(data: Data, lanes: range | None = None, check: bool = True) -> list[Source]:
    """The data sets of a resolved configuration, or those that hold some of ``lanes``. Raises as ``Manifest.load``."""
    found = list(enumerate(shares(data)))
    if lanes is not None:
        found = [(s, one) for s, one in found if range(max(lanes[0], one.lanes[0]), min(lanes[-1], one.lanes[-1]) + 1)]
    return [Source(s, Manifest.load(one.manifest, check), one.lanes) for s, one in found]


def digest(sources: Sequence[Source]) -> str:
    """Of one data set its manifest's digest; of several one over all of them and their lanes."""
    if len(sources) == 1:
        return sources[0].manifest.digest
    text = json.dumps([[one.manifest.digest, len(one.lanes)] for one in sources])
    return hashlib.sha256(text.encode()).hexdigest()
