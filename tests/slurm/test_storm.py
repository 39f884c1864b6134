"""Tests the short storm of `make storm`: twelve faults over four runs leave no trace in the results."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm_site import require

pytestmark = [pytest.mark.slurm, pytest.mark.s3, pytest.mark.kill]
ROOT = Path(__file__).resolve().parents[2]
SEED = 1
"""This seed gives twelve of the longest kinds of faults, including time limit, straggler and node loss."""


@pytest.mark.timeout(1200)
def test_short_storm_of_12_faults_violates_no_property(tmp_path):
    require()
    command = [sys.executable, "-m", "tests.storm", "--seed", str(SEED), "--out", str(tmp_path / "storm.md")]
    command += ["--folder", str(tmp_path / "s")]  # Slurm's sockets need a short path
    storm = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = storm.communicate(timeout=1100)
    finally:
        storm.terminate()  # this also stops its Slurm
        storm.wait(60)
    assert storm.returncode == 0, output
    page = (tmp_path / "storm.md").read_text()
    assert "12 faults of 12 kinds" in page and "All properties hold" in page
    assert not (tmp_path / "s").exists(), "a successful storm deletes its files"
