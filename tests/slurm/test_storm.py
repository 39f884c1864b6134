"""Tests storms: faults over four runs leave no trace in the results, on the home site and on the foreign one."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm_site import require

pytestmark = [pytest.mark.slurm, pytest.mark.s3, pytest.mark.kill]
ROOT = Path(__file__).resolve().parents[2]
SEED = 1
"""This seed gives twelve of the longest kinds of faults, including time limit, straggler and node loss."""
SEED_OF_AGENTS = 6
"""This one gives a killed rank, agent, owner, guard and batch step, and a lost node of the run with a spare."""


@pytest.mark.timeout(1200)
def test_short_storm_of_12_faults_violates_no_property(tmp_path_factory):
    assert "12 faults of 12 kinds" in storm(tmp_path_factory, 1100)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_storm_of_12_faults_with_node_agents_violates_no_property(tmp_path_factory):
    page = storm(tmp_path_factory, 1100, "--site", "agents", "--seed", str(SEED_OF_AGENTS))
    assert "12 faults of 12 kinds" in page and "| node lost |" in page and "| rank killed |" in page


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_storm_of_30_faults_on_foreign_site_violates_no_property(tmp_path_factory):
    assert "30 faults of 30 kinds" in storm(tmp_path_factory, 2300, "--site", "foreign", "--faults", "30")


def storm(tmp_path_factory, seconds, *options):
    """Run a storm, and return its page."""
    require()
    parent = tmp_path_factory.mktemp("s")  # Slurm's sockets need a short path
    command = [sys.executable, "-m", "tests.storm", "--seed", str(SEED), "--out", str(parent / "storm.md"), *options]
    command += ["--folder", str(parent / "s")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        process.terminate()  # this also stops its Slurm
        process.wait(60)
    assert process.returncode == 0, output
    page = (parent / "storm.md").read_text()
    assert "All properties hold" in page
    assert not (parent / "s").exists(), "a successful storm deletes its files"
    return page
