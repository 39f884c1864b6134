"""Tests of the commands that documents name as the next ones."""

import shlex

import pytest

from flip.runs.lifecycle import STATES
from jobs.__main__ import PACKAGES
from jobs.common import next_commands


@pytest.mark.parametrize("state", STATES)
def test_each_state_of_a_run_has_commands_and_a_complete_one_those_of_its_kind(state, tmp_path):
    lines = next_commands.of_run(tmp_path, state, ("export",))
    assert all(shlex.split(line)[-1] == str(tmp_path) for line in lines)
    names = [shlex.split(line)[-2] for line in lines]
    assert names and set(names) <= set(PACKAGES)
    assert ("export" in names) == (state == "complete")
