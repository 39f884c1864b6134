"""Paths in the repository or snapshot from which this code runs, and the folder of runs."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
"""The folder that contains flip/, jobs/ and sweeps/."""
JOBS = REPOSITORY / "jobs"
SWEEPS = REPOSITORY / "sweeps"
PROFILES = SWEEPS / "clusters"
"""Cluster profiles."""


def runs_root(of_profile: str = "") -> Path:
    """RUNS_ROOT: ``runs_root`` of the cluster profile, else FLIP_RUNS, else ./runs."""
    chosen = of_profile or os.environ.get("FLIP_RUNS", "") or "runs"
    return Path(chosen).expanduser().absolute()
