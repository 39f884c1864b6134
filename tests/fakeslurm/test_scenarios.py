"""Tests that the simulated Slurm behaves as the real Slurm did in every recorded scenario."""

import itertools

import pytest

from tests.harness.simulated_scene import play
from tests.slurm import recording
from tests.slurm.scenarios import SCENARIOS

BRIEF = ("COMPLETING", "SIGNALING")
"""Short states that a poll of squeue may miss, on the real and on the simulated Slurm."""


def job_fields(record):
    """Return the job fields that the owner read at the ends. Of the preemption time, return only whether it is set."""
    rows = []
    for read in (attempt["read"] or {} for attempt in record["attempts"]):
        fields = {key: read.get(key) for key in ("JobState", "Reason", "Restarts", "TimeLimit", "SLURM_RESTART_COUNT")}
        rows.append(fields | {"preempted": "-" in (read.get("PreemptTime") or "")})
    return rows


def state_sequence(record):
    """Return the states in squeue from the first start on, without repetitions."""
    states = [state for attempt in record["attempts"] for state in attempt["states"] if state not in BRIEF]
    return [state for state, _ in itertools.groupby(states)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_simulated_slurm_replays_recorded_scenario(name, tmp_path):
    torn = SCENARIOS[name].torn
    recorded = recording.load()[name]
    played = play(name, tmp_path)
    assert recording.essence(played, torn) == recording.essence(recorded, torn), recording.text(played)
    assert state_sequence(played) == state_sequence(recorded)
    for of_real, of_simulated in list(zip(job_fields(recorded), job_fields(played), strict=True))[torn:]:
        assert of_real["JobState"] is None or of_simulated == of_real  # None: Slurm killed the owner's query, too
