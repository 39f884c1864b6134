"""A run on two nodes of a real Slurm, hit by all that a cluster does; what is left is bit for bit an undisturbed run's.

The undisturbed one runs without Slurm: where a run lives must not show either.
"""

import json
from collections import Counter

import pytest

from tests.arena import INTERVAL, Arena, configuration, decoded_hashes
from tests.s3.proxy import COUNTED_AS, FAULTS
from tests.s3.servers import SECRET
from tests.s3.store import Store
from tests.slurm import storm as storms
from tests.slurm.arena import NODES, PROCESSES, SlurmArena
from tests.slurm.storm import hit, rage
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
def bucket(emoji, tmp_path, monkeypatch):
    """The same data in object storage; this process's environment leads there."""
    store = Store(tmp_path, emoji).start()
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    store.index(chunk=4)
    yield store
    store.stop()


@pytest.fixture
def storm(emoji, tmp_path):
    def make(here, pause=0.05, store=None, **fields):
        config = settings(store.manifest if store else emoji, NODES, PROCESSES)
        config.data.deadline, config.data.timeout = 20, 3
        return SlurmArena(here, tmp_path, "storm", config, pause, store=store, **fields)

    return make


def judge(calm, run, emoji):
    run.wait_over()
    run.wait_gone()
    assert_no_secret(run)
    check_equal(calm, run)
    check_attempts(run)
    check_data(run, decoded_hashes(emoji))
    check_status(run)
    *before, last = causes(run)
    assert last == ("complete", "done") and all(action in AGAIN for _, action in before)


def assert_no_secret(run):
    """What jobs were given of the environment stands in none of the files of the sweep."""
    for path in run.run.path.parent.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def assert_felt(run):
    """Storage did all that it can, and the ranks' readers have counted it."""
    told = sum((run.retries(n) for n in run.run.attempt_numbers()), Counter())
    assert not {fault for fault in (*FAULTS, "away") if not run.store.done[fault]}
    assert not {COUNTED_AS[fault] for fault in FAULTS} - set(told)


def causes(arena):
    return [(end["cause"], end["action"]) for end in ends(arena, arena.run.newest_attempt())]


def test_warned_preempted_and_killed(start_slurm, storm, bucket, calm, emoji):
    """Preemption sends the warning signal. Each stage is hit twice, and between the hits by a storage that ails."""
    run = storm(start_slurm(), store=bucket)
    run.submit()
    hit(run, "storage_breaks_off", step=2)
    hit(run, "warned", step=7)
    hit(run, "storage_flips", step=9)
    hit(run, "preempted", step=17)
    hit(run, "storage_throttles", step=19)
    hit(run, "storage_stalls", step=24)
    hit(run, "storage_away", step=29)
    hit(run, "rank_killed", step=BORDER + 2)
    hit(run, "storage_restarts", step=BORDER + 3)
    hit(run, "preempted_in_grace", step=BORDER + 7)
    judge(calm, run, emoji)
    assert_felt(run)
    assert causes(run) == [
        ("stopped", "requeue"),
        ("stopped", "nothing"),
        ("storage", "requeue"),
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


MATRIX = [(name, True) for name in storms.FAULTS] + [("preempted", False), ("preempted_in_grace", False)]


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
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [2, 5])
def test_storm_with_the_data_in_a_bucket(seed, start_slurm, storm, bucket, calm, emoji):
    """Close upon each other; two of three are the storage's."""
    run = storm(start_slurm(user_signal=seed % 2 == 0, node_timeout=10), store=bucket)
    run.submit()
    rage(run, seed, (*storms.FAULTS, *2 * tuple(storms.STORAGE)), most=8, gap=INTERVAL)
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
