"""Killed at every write of a save, a run has a checkpoint that can be loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.kill


@pytest.mark.parametrize("world, least", [(1, 10), (2, 12)])
def test_a_kill_at_every_write_leaves_a_loadable_checkpoint(world, least, tmp_path):
    """``least``: folders, shards opened and half written, commit.json opened and renamed, and the old commit
    deleted."""
    command = [sys.executable, "-m", "tests.flip.checkpoint.save_worker", str(tmp_path / "sweep" / "run"), str(world)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= least, done.stdout
