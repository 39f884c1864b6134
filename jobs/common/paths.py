"""Paths inside the repository, or inside the snapshot of it from which this code runs."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = REPOSITORY / "jobs"
SWEEPS = REPOSITORY / "sweeps"
PROFILES = SWEEPS / "clusters"
"""Cluster profiles."""
