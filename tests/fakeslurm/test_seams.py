"""Tests that the code of jobs/ uses the simulation in place of the machine."""

import time

from jobs.host import end_evidence
from tests.fakeslurm import seams
from tests.harness.simulated_scene import staged


def test_all_code_on_hosts_has_simulated_clock(tmp_path):
    with staged("clock", tmp_path) as scene:
        assert end_evidence.time is scene.clock.module and seams.clocked_modules() == []
    assert end_evidence.time is time
