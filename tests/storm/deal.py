"""Which fault hits which run at which step: a pure function of the seed and the number of faults."""

import random
from dataclasses import dataclass

from tests.storm import agent_faults, foreign_faults, owner_faults  # noqa: F401 - register the kinds of these sites
from tests.storm.faults import COMMON, EVERY, HOME

FIRST = 2
GAP = 12
TAIL = 10
"""Minimum step of the first fault, steps per fault of a run, and steps after the last."""
MASKED = 0.7
"""Share of a run's steps in its masked stage."""


@dataclass(frozen=True)
class Layout:
    """Properties in which the runs of the storm's sweep differ."""

    nodes: int
    processes: int
    """Ranks per node."""
    bucket: bool
    """Whether checkpoints are on S3."""
    background: bool

    @property
    def world(self):
        return self.nodes * self.processes


RUNS = {
    "alone-disk": Layout(1, 1, bucket=False, background=False),
    "alone-bucket": Layout(1, 1, bucket=True, background=True),
    "pair-disk": Layout(1, 2, bucket=False, background=True),
    "pair-bucket": Layout(2, 1, bucket=True, background=True),
}
"""Runs with two ranks are sharded (FSDP)."""


@dataclass(frozen=True)
class Strike:
    """One fault, injected when the newest attempt of ``run`` has logged ``step``."""

    kind: str
    run: str
    step: int


@dataclass(frozen=True)
class Deal:
    strikes: dict
    """Run -> its strikes in order."""
    steps: dict
    """Run -> (masked steps, unmasked steps)."""
    warned: bool
    """Whether this cluster's preemption sends the warning signal; else TERM."""


def kinds_of(site):
    """All kinds of faults of a site."""
    return [kind for kind in EVERY.values() if site in kind.sites]


def first_kinds(site):
    """Lists of kinds that a storm injects first, in the order of the lists, each kind once."""
    if site == HOME:
        return [COMMON]
    own = [kind for kind in kinds_of(site) if HOME not in kind.sites]
    return [own, [kind for kind in kinds_of(site) if HOME in kind.sites]]


def deal(seed, count, site=HOME):
    """Draw ``count`` faults: first those of ``first_kinds``, then rounds of all kinds, each kind once per round.

    Long faults are distributed so that all runs have a similar load."""
    rng = random.Random(seed)
    every = kinds_of(site)
    kinds = []
    for first in first_kinds(site):
        kinds += rng.sample(first, min(count - len(kinds), len(first)))
    while len(kinds) < count:
        kinds += rng.sample(every, min(count - len(kinds), len(every)))
    load = dict.fromkeys(RUNS, 0.0)
    assigned = {run: [] for run in RUNS}
    for kind in sorted(kinds, key=lambda kind: -kind.seconds):
        suitable = [run for run, layout in RUNS.items() if kind.fits(layout)]
        run = min(rng.sample(suitable, len(suitable)), key=load.get)
        load[run] += kind.seconds
        assigned[run].append(kind.name)
    strikes = {}
    steps = {}
    for run, names in assigned.items():
        rng.shuffle(names)
        strikes[run] = [Strike(name, run, FIRST + GAP * i + rng.randrange(GAP)) for i, name in enumerate(names)]
        total = FIRST + GAP * len(names) + TAIL
        steps[run] = (round(MASKED * total), total - round(MASKED * total))
    return Deal(strikes, steps, warned=rng.random() < 0.5)
