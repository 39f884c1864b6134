"""A year of a sweep under all that a cluster does, in seconds; what must hold at its end is in ``verdicts.py``."""

import tempfile
from collections import Counter
from pathlib import Path

import pytest

from tests.fakeslurm import verdicts
from tests.fakeslurm.trainer import BATCH, Run
from tests.fakeslurm.year import HOUR, MINUTE, Weather, World

pytestmark = pytest.mark.long

MEMORY = Path("/dev/shm")


@pytest.fixture
def folder(tmp_path):
    """In memory where there is such a place: every file is synced, thousands of times."""
    with tempfile.TemporaryDirectory(prefix="year", dir=MEMORY if MEMORY.is_dir() else tmp_path) as made:
        yield Path(made) / "sweep"


def live(folder, seed, runs, nodes, weather=None):
    world = World(folder, seed, runs, nodes, weather=weather)
    states = world.pass_year()
    found = verdicts.violations(world, states)
    assert not found, f"seed {seed}, {world.controller.site}: {len(found)} broken promises\n" + "\n".join(found[:30])
    return world, states


@pytest.mark.slow
def test_two_hundred_runs(folder):
    """Enough weather that every cause and every way to end is there; without it this test would prove little."""
    world, states = live(folder, 0, runs=200, nodes=40)
    ends = Counter(state.state for state in states.values())
    assert set(ends) == {"complete", "failed", "cancelled"} and ends["complete"] > 150
    attempts = [one for ones in verdicts.attempts(world).values() for one in ones]
    happened = {what for one in attempts for what in one.happened}
    rare = {"cancelled", "limit", "permission", "config", "data", "diverged"}
    assert happened >= set(verdicts.MAY_BE) - rare
    causes = {one.cause for one in attempts}
    assert causes >= {"complete", "stopped", "storage", "crash", "hang", "node", "port", "cancelled"}
    stops = {one.cause for one in attempts if one.action == "stop"}
    assert stops >= {"crash", "node", "cancelled"}


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 5))])
def test_by_chance(seed, folder):
    live(folder, seed, runs=30, nodes=8)


def test_a_straggler_that_was_still_starting_leaves_with_its_first_step(folder):
    """Its node is cut off before it trains; when it does, the next attempt has begun. Nobody kills it for hours."""
    world = World(folder, 0, runs=1, nodes=2, calm=0.0)
    world.likes["run000"] = Run(total=1000 * BATCH, startup=500.0)
    world.clock.at(MINUTE, lambda: world.controller.cut_off(world.lives[0].host.name))
    states = world.pass_year()
    older, newer = world.lives
    assert newer.began < older.ended and older.events[0][1] == "node"
    assert verdicts.violations(world, states) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 130))
def test_many_more_years(seed, folder):
    """With outages of storage that last more than a day, and many nodes that are lost."""
    weather = Weather(outages=(2 * MINUTE, HOUR, 12 * HOUR, 40 * HOUR), node_lost=1.0, node_cut_off=2.0, reset=60.0)
    live(folder, seed, runs=60, nodes=12, weather=weather)
