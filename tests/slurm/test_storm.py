"""A run on two nodes of a real Slurm, hit by all that a cluster does; what is left is bit for bit an undisturbed run's.

The undisturbed one runs without Slurm: where a run lives must not show either.
"""

import json

import pytest

from tests.arena import Arena, configuration, decoded_hashes
from tests.slurm.arena import NODES, PROCESSES, SlurmArena
from tests.slurm.storm import FAULTS, hit, rage
from tests.verdicts import check_attempts, check_data, check_equal, check_status, ends

pytestmark = [pytest.mark.slurm, pytest.mark.kill]
BORDER = 44
"""The step with which the masked stage ends."""
AGAIN = ("requeue", "nothing")


def settings(data, nodes, processes):
    config = configuration(data, processes)
    config.resources.nodes = nodes
    config.model.text.vocabulary = len(json.loads((data / "tokenizer.json").read_text())["model"]["vocab"])
    return config


@pytest.fixture(scope="module")
def calm(emoji, tmp_path_factory):
    """The run left alone, with the same number of ranks."""
    arena = Arena(tmp_path_factory.mktemp("calm"), "calm", settings(emoji, 1, NODES * PROCESSES), pause=0)
    arena.submit()
    arena.wait_over()
    assert arena.run.result.exists(), arena.story()
    return arena


@pytest.fixture
def storm(emoji, tmp_path):
    def make(here, pause=0.05, **fields):
        return SlurmArena(here, tmp_path, "storm", settings(emoji, NODES, PROCESSES), pause, **fields)

    return make


def judge(calm, run, emoji):
    run.wait_over()
    run.wait_gone()
    check_equal(calm, run)
    check_attempts(run)
    check_data(run, decoded_hashes(emoji))
    check_status(run)
    *before, last = causes(run)
    assert last == ("complete", "done") and all(action in AGAIN for _, action in before)


def causes(arena):
    return [(end["cause"], end["action"]) for end in ends(arena, arena.run.newest_attempt())]


def test_warned_preempted_and_killed(start_slurm, storm, calm, emoji):
    """Preemption sends the warning signal. Each stage is hit twice."""
    run = storm(start_slurm())
    run.submit()
    hit(run, "warned", step=7)
    hit(run, "preempted", step=17)
    hit(run, "rank_killed", step=BORDER + 2)
    hit(run, "preempted_in_grace", step=BORDER + 7)
    judge(calm, run, emoji)
    assert causes(run) == [
        ("stopped", "requeue"),
        ("stopped", "nothing"),
        ("crash", "requeue"),
        ("stopped", "requeue"),
        ("complete", "done"),
    ]


def test_preempted_without_a_warning_and_a_node_lost(start_slurm, storm, calm, emoji):
    """TERM is all that comes with a preemption."""
    run = storm(start_slurm(user_signal=False, node_timeout=10))
    run.submit()
    hit(run, "preempted_in_grace", step=7)
    hit(run, "node_lost", step=17)
    hit(run, "preempted", step=BORDER + 2)
    judge(calm, run, emoji)
    assert causes(run)[0] == ("stopped", "requeue") and causes(run)[2] == ("stopped", "nothing")


MATRIX = [(name, True) for name in FAULTS] + [("preempted", False), ("preempted_in_grace", False)]


@pytest.mark.slow
@pytest.mark.parametrize("name, user_signal", MATRIX)
def test_each_fault_in_both_stages(name, user_signal, start_slurm, storm, calm, emoji):
    run = storm(start_slurm(user_signal=user_signal, node_timeout=10))
    run.submit()
    hit(run, name, step=17)
    hit(run, name, step=BORDER + 3)
    judge(calm, run, emoji)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(4))
def test_storm(seed, start_slurm, storm, calm, emoji):
    """The same by chance, with the warning signal and without."""
    run = storm(start_slurm(user_signal=seed % 2 == 0, node_timeout=10))
    run.submit()
    rage(run, seed)
    judge(calm, run, emoji)


@pytest.mark.slow
def test_longer_than_the_wall_limit(start_slurm, storm, calm, emoji):
    """One minute per attempt, which is the least that Slurm knows: warned before it, saved, started again."""
    run = storm(start_slurm(), pause=1.2, hours=1 / 60, signal_seconds=20)
    run.submit()
    run.wait_attempt(2)
    run.wait_over(seconds=400)
    judge(calm, run, emoji)
    assert causes(run)[0] == ("stopped", "requeue") and "SIGUSR2" in ends(run, 1)[0]["reason"]
