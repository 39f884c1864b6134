"""Tests that simulate a year of a sweep on a faulty cluster in seconds; ``verdicts.py`` defines what must hold."""

import tempfile
from collections import Counter
from pathlib import Path

import pytest

from tests.fakeslurm import verdicts
from tests.fakeslurm.faulty_cluster import HOUR, MINUTE, Weather, World
from tests.fakeslurm.trainer import BATCH, Run

pytestmark = pytest.mark.long

MEMORY = Path("/dev/shm")
AGENTS = pytest.mark.parametrize("agents", [False, True], ids=["srun", "agents"])
"""What starts the ranks."""


@pytest.fixture
def folder(tmp_path):
    """Return a folder in memory if /dev/shm exists: every file is synced, thousands of times."""
    with tempfile.TemporaryDirectory(prefix="year", dir=MEMORY if MEMORY.is_dir() else tmp_path) as temporary:
        yield Path(temporary) / "sweep"


def simulate_year(folder, seed, runs, nodes, weather=None, agents=False):
    world = World(folder, seed, runs, nodes, weather=weather, agents=agents)
    states = world.pass_year()
    violations = verdicts.violations(world, states)
    shown = [
        *violations[:30],
        "errors that the user saw:",
        *(f"{time:.0f}: {text}" for time, text in world.errors[:10]),
    ]
    assert not violations, f"seed {seed}, {world.controller.site}: {len(violations)} violations\n" + "\n".join(shown)
    return world, states


RARE = {"cancelled", "limit", "permission", "config", "data", "diverged", "batch step"}
OF_AGENTS = {"agent", "task", "killed", "frozen"}
"""Events that happen to runs with node agents alone."""


@pytest.mark.slow
@AGENTS
def test_year_of_200_runs_meets_common_causes_and_violates_nothing(agents, folder):
    """The faults produce almost every cause and every final state; otherwise the test would prove little."""
    world, states = simulate_year(folder, 0, runs=200, nodes=40, agents=agents)
    ends = Counter(state.state for state in states.values())
    assert set(ends) == {"complete", "failed", "cancelled"} and ends["complete"] > 150
    attempts = [attempt for run_attempts in verdicts.attempts(world).values() for attempt in run_attempts]
    happened = {event for attempt in attempts for event in attempt.happened}
    common = set(verdicts.MAY_BE) - RARE
    if not agents:
        common -= OF_AGENTS
    assert happened >= common
    causes = {attempt.cause for attempt in attempts}
    assert causes >= {"complete", "stopped", "storage", "crash", "hang", "node", "port", "cancelled"}
    stops = {attempt.cause for attempt in attempts if attempt.action == "stop"}
    assert stops >= {"crash", "node", "cancelled"}


def many_faults():
    """Of nodes and agents."""
    return Weather(node_lost=0.5, node_cut_off=2.0, agent_killed=0.5, task_killed=1.0, owner_killed=1.0)


def causes_of(attempts, event):
    """The causes of attempts to which nothing else happened."""
    return {attempt.cause for attempt in attempts if attempt.happened == {event}}


@pytest.mark.slow
def test_year_with_agents_meets_each_way_to_go_on_and_violates_nothing(folder):
    world, states = simulate_year(folder, 0, runs=50, nodes=16, weather=many_faults(), agents=True)
    assert {state.state for state in states.values()} == {"complete", "failed", "cancelled"}
    attempts = [attempt for run_attempts in verdicts.attempts(world).values() for attempt in run_attempts]
    for event, cause in {"killed": "crash", "frozen": "hang", "agent": "node", "owner": "stopped"}.items():
        assert cause in causes_of(attempts, event), event
    counts = [len(life.won_attempts) for life in world.lives]
    assert max(counts) > 3 and sum(count > 1 for count in counts) > 50, "restarts in the job"
    elastic = [attempt for attempt in attempts if world.likes[attempt.run].least_nodes]
    assert {attempt.won.world for attempt in elastic} >= {8, 16}, "a range of nodes"
    notes = [process.out.getvalue() for life in world.lives for process in life.processes_of("task")]
    assert any("has lost its first node: requeued" in note for note in notes)


@AGENTS
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 5))])
def test_year_of_30_runs_violates_nothing_for_random_seed(seed, agents, folder):
    simulate_year(folder, seed, runs=30, nodes=8, agents=agents)


@AGENTS
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 7))])
def test_year_violates_nothing_if_owners_are_killed_with_their_guards(seed, agents, folder):
    """Owner, guard and srun at once, and owners alone. Many ranks save for longer than KillWait."""
    weather = Weather(batch_step_killed=1.0, owner_killed=2.0)
    world, _ = simulate_year(folder, seed, runs=30, nodes=8, weather=weather, agents=agents)
    killed = [life for life in world.lives if any(event == "batch step" for _, event in life.events)]
    assert len(killed) > 5
    if not agents:
        return
    notes = [process.out.getvalue() for life in killed for process in life.processes_of("task")]
    assert sum("has lost its batch script (FAILED): requeued" in note for note in notes) > 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200, 215))
def test_year_violates_nothing_under_many_faults_of_nodes_and_agents(seed, folder):
    simulate_year(folder, seed, runs=60, nodes=16, weather=many_faults(), agents=True)


def test_straggler_exits_at_first_step_after_newer_attempt_started(folder):
    """The node is cut off before its first step, and the next attempt starts. Nothing kills the straggler for hours."""
    world = World(folder, 0, runs=1, nodes=2, calm=0.0)
    world.likes["run000"] = Run(total=1000 * BATCH, startup=500.0)
    world.clock.at(MINUTE, lambda: world.controller.cut_off(world.lives[0].host.name))
    states = world.pass_year()
    older, newer = (life.won_attempts[0] for life in world.lives)
    assert newer.began < older.ended and older.events[0] == "node"
    assert verdicts.violations(world, states) == []


@pytest.mark.slow
@AGENTS
@pytest.mark.parametrize("seed", range(100, 115))
def test_year_violates_nothing_under_day_long_storage_outages(seed, agents, folder):
    """Storage outages last up to 40 hours, and many nodes are lost."""
    weather = Weather(outages=(2 * MINUTE, HOUR, 12 * HOUR, 40 * HOUR), node_lost=1.0, node_cut_off=2.0, reset=60.0)
    simulate_year(folder, seed, runs=60, nodes=12, weather=weather, agents=agents)
