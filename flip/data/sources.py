"""The data sets of a run, each with its lanes, its manifest, and the order of its samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from flip.config.derived import dataset_lanes
from flip.config.schema import Data
from flip.config.weights import check_facts
from flip.data.manifest.manifest import Manifest
from flip.data.order import IDS, SampleOrder
from flip.data.weighted_order import WeightedOrder, Weights
from flip.runs.formats import ORDER_NUMBER, WEIGHTED_ORDER_NUMBER


@dataclass(frozen=True)
class DatasetSource:
    """One data set of a run. Inside it, lanes and samples are numbered from 0."""

    number: int
    """s, its index among the data sets."""
    manifest: Manifest
    lanes: range
    """Its lanes among the L lanes of the run."""
    weights: Weights | None = None
    """``data.weights``."""

    @property
    def first_id(self) -> int:
        """Offset of its sample ids in batches."""
        return self.number * IDS

    def order(self, seed: int, block: int) -> SampleOrder:
        """The order of its lanes in a run with this seed and Q = ``block``."""
        manifest = self.manifest
        if self.weights:
            weights = self.weights
            return WeightedOrder(seed, weights.facts, weights.weights, weights.sums, block, len(self.lanes))
        return SampleOrder.of_set(self.number, seed, manifest.samples, manifest.chunk, block, len(self.lanes))

    def own_lanes(self, lanes: range) -> range:
        """Those of the run's ``lanes`` that belong to it, by their numbers inside it."""
        first = max(lanes.start, self.lanes.start)
        return range(first - self.lanes.start, max(first, min(lanes.stop, self.lanes.stop)) - self.lanes.start)


def load_sources(data: Data, lanes: range | None = None, check: bool = True) -> list[DatasetSource]:
    """The data sets of a resolved configuration, or only those with some of ``lanes``.

    Raises as ``Manifest.load`` and ``Weights``, and ConfigError if the weights belong to another manifest.
    """
    weights = None
    if data.weights:
        weights = Weights(data.weights)
    sources = [
        DatasetSource(number, Manifest.load(share.manifest, check), share.lanes, weights)
        for number, share in enumerate(dataset_lanes(data))
        if lanes is None or range(max(lanes[0], share.lanes[0]), min(lanes[-1], share.lanes[-1]) + 1)
    ]
    for source in sources:
        if weights:
            manifest = source.manifest
            check_facts(weights.facts, data.weights, manifest.samples, manifest.chunk, manifest.digest)
    return sources


def order_number(data: Data) -> int:
    """The version of the order of samples: another one continues no state."""
    if data.weights:
        return WEIGHTED_ORDER_NUMBER
    return ORDER_NUMBER


def datasets_digest(sources: Sequence[DatasetSource]) -> str:
    """The manifest's digest of a single data set; of several, a digest over their digests and numbers of lanes.

    With weights it covers them, too.
    """
    if len(sources) == 1 and sources[0].weights:
        text = json.dumps([sources[0].manifest.digest, sources[0].weights.facts.digest])
        return hashlib.sha256(text.encode()).hexdigest()
    if len(sources) == 1:
        return sources[0].manifest.digest
    text = json.dumps([[source.manifest.digest, len(source.lanes)] for source in sources])
    return hashlib.sha256(text.encode()).hexdigest()
