"""Paths in the repository or snapshot from which this code runs, and the folder of runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs.common.cluster_profile import ClusterProfile

REPOSITORY = Path(__file__).resolve().parents[2]
"""The folder that contains flip/, jobs/ and sweeps/."""
JOBS = REPOSITORY / "jobs"
SWEEPS = REPOSITORY / "sweeps"
PROFILES = SWEEPS / "clusters"
"""Cluster profiles."""


def runs_root(profile: ClusterProfile | None = None) -> Path:
    """RUNS_ROOT: the profile's, else FLIP_RUNS, else ./runs."""
    chosen = (profile.runs_root if profile else "") or os.environ.get("FLIP_RUNS", "") or "runs"
    return Path(chosen).expanduser().absolute()
