"""The short storm, as `make storm` runs it: twelve faults over four runs, and nothing tells afterwards."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm_site import require

pytestmark = [pytest.mark.slurm, pytest.mark.s3, pytest.mark.kill]
ROOT = Path(__file__).resolve().parents[2]
SEED = 1
"""Its twelve kinds are among the longest; time limit, straggler and node loss are among them."""


def test_short_storm(tmp_path):
    require()
    words = [sys.executable, "-m", "tests.storm", "--seed", str(SEED), "--out", str(tmp_path / "storm.md")]
    words += ["--folder", str(tmp_path / "s")]  # Slurm's sockets want it short
    storm = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = storm.communicate(timeout=540)
    finally:
        storm.terminate()  # it takes its Slurm with it
        storm.wait(60)
    assert storm.returncode == 0, said
    page = (tmp_path / "storm.md").read_text()
    assert "12 faults of 12 kinds" in page and "All properties hold" in page
    assert not (tmp_path / "s").exists(), "nothing is kept of a storm that went well"
