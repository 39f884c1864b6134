"""Tests of the commands that documents name as the next ones."""

import shlex

import pytest

from flip.runs.lifecycle import STATES
from jobs.__main__ import PACKAGES
from jobs.common import next_commands


@pytest.mark.parametrize("state", STATES)
def test_each_state_of_a_run_has_commands_and_jobs_that_evaluate_have_no_model(state, tmp_path):
    names = {}
    for trains in (True, False):
        lines = next_commands.of_run(tmp_path, state, trains)
        assert all(shlex.split(line)[-1] == str(tmp_path) for line in lines)
        names[trains] = [shlex.split(line)[-2] for line in lines]
    assert names[True] and set(names[True]) <= set(PACKAGES)
    assert names[False] == [name for name in names[True] if name not in ("evaluate", "export")]
