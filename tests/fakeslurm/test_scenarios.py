"""What the Slurm that does not exist does is what the real one was seen to do: every recorded scenario."""

import itertools

import pytest

from tests.harness.simulated_scene import play
from tests.slurm import recording
from tests.slurm.scenarios import SCENARIOS

BRIEF = ("COMPLETING", "SIGNALING")
"""States that a poll of squeue may miss, on either."""


def looks(record):
    """What the exit traps saw of the job: the fields that they read; of the time of a preemption that there is one."""
    found = []
    for read in (attempt["read"] or {} for attempt in record["attempts"]):
        fields = {key: read.get(key) for key in ("JobState", "Reason", "Restarts", "TimeLimit", "SLURM_RESTART_COUNT")}
        found.append(fields | {"preempted": "-" in (read.get("PreemptTime") or "")})
    return found


def course(record):
    """States in squeue from the first start on."""
    states = [state for attempt in record["attempts"] for state in attempt["states"] if state not in BRIEF]
    return [state for state, _ in itertools.groupby(states)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_as_recorded(name, tmp_path):
    torn, recorded = SCENARIOS[name].torn, recording.load()[name]
    played = play(name, tmp_path)
    assert recording.essence(played, torn) == recording.essence(recorded, torn), recording.text(played)
    assert course(played) == course(recorded)
    assert looks(played)[torn:] == looks(recorded)[torn:]
