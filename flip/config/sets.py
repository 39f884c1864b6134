"""The data sets of a run: several are lanes beside lanes, each set with neighbouring ones of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flip.config.schema import Data

TOLERANCE = 0.01
"""By how much of a set's weight its share of the lanes may miss it."""


class Share(NamedTuple):
    """One data set of a resolved configuration."""

    name: str
    """``""``: the only one."""
    manifest: str
    samples: int
    """N of this set."""
    chunk: int
    """R of this set."""
    sample_bytes: int
    lanes: range
    """Of the L lanes of the run, those that take their samples from this set."""


def shares(data: Data) -> list[Share]:
    """The data sets in order; with ``data.sets`` empty the one that ``data`` itself names."""
    if not data.sets:
        return [Share("", data.manifest, data.samples, data.chunk, data.sample_bytes, range(data.lanes))]
    found, first = list[Share](), 0
    for one in data.sets:
        lanes = range(first, first + one.lanes)
        found.append(Share(one.name, one.manifest, one.samples, one.chunk, one.sample_bytes, lanes))
        first = lanes.stop
    return found


def split(lanes: int, weights: Sequence[float]) -> list[int]:
    """How many of ``lanes`` each set holds: in proportion to the weights, the largest remainders rounded up."""
    wishes = [lanes * weight / sum(weights) for weight in weights]
    found = [int(wish) for wish in wishes]
    late = sorted(range(len(wishes)), key=lambda s: (found[s] - wishes[s], s))
    for s in late[: lanes - sum(found)]:
        found[s] += 1
    return found


def miss(lanes: Sequence[int], weights: Sequence[float]) -> float:
    """The largest relative difference between a set's share of the lanes and its share of the weights."""
    parts = zip(lanes, weights, strict=True)
    return max(abs(held / sum(lanes) / (weight / sum(weights)) - 1) for held, weight in parts)
