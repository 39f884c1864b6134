"""Tests that a run keeps a loadable checkpoint if it is killed at any write of a save."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.kill


@pytest.mark.parametrize("world, least", [(1, 10), (2, 12)])
def test_save_leaves_loadable_checkpoint_if_killed_at_any_write(world, least, tmp_path):
    """``least`` is the minimum number of kills. The writes are: folders created, shards opened and half written,
    commit.json opened and renamed, and the old checkpoint deleted."""
    command = [sys.executable, "-m", "tests.flip.checkpoint.save_worker", str(tmp_path / "sweep" / "run"), str(world)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= least, done.stdout
