"""Tests that a real Slurm behaves as recorded, and that each recorded event leads to the right end."""

import pytest

from tests.harness.slurm_scene import slurm
from tests.slurm import recording
from tests.slurm.scenarios import SCENARIOS
from tests.slurm_site import require

GROUPS = [options for i, options in enumerate(s.options for s in SCENARIOS.values()) if options not in [
    s.options for s in list(SCENARIOS.values())[:i]
]]  # fmt: skip
ORDER = sorted(SCENARIOS, key=lambda name: GROUPS.index(SCENARIOS[name].options))
"""Names of the scenarios, grouped by options: scenarios with equal options share a Slurm."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Return ``stage(options)``, which gives (cluster, squeue, folder) of a Slurm with these options."""
    running = []

    def leave():
        if running:
            running.pop().__exit__(None, None, None)
            now.clear()

    def enter(options):
        if now.get("options") != options:
            leave()
            require(options.get("accounting", False))
            folder = tmp_path_factory.mktemp("s")
            running.append(slurm(folder, **options))
            cluster, squeue = running[-1].__enter__()
            now.update(options=options, stage=(cluster, squeue, folder))
        return now["stage"]

    now = {}
    yield enter
    leave()


@pytest.mark.slurm
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if SCENARIOS[name].ci else [pytest.mark.slow]) for name in ORDER]
)
def test_real_slurm_replays_recorded_scenario(name, stage):
    replayed = recording.perform(name, *stage(SCENARIOS[name].options))
    torn = SCENARIOS[name].torn
    recorded = recording.load()[name]
    assert recording.essence(replayed, torn) == recording.essence(recorded, torn), recording.text(replayed)


def test_recording_holds_every_scenario_with_expected_end():
    records = recording.load()
    assert list(records) == list(SCENARIOS)
    ends = {name: (len(record["attempts"]), record["end"]["state"]) for name, record in records.items()}
    assert ends == {name: scenario.ends for name, scenario in SCENARIOS.items()}


def test_recording_shows_array_siblings_unaffected():
    siblings = [record["sibling"] for record in recording.load().values() if "sibling" in record]
    assert siblings and all(len(s["attempts"]) == 1 and s["end"]["state"] == "complete" for s in siblings)
    assert {record["own_id"] for record in recording.load().values()} == {True, False}
