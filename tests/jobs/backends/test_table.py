"""Tests of the table of backends: it has all kinds of profiles, and refuses others."""

import pytest

from flip.runs.errors import ConfigError
from flip.runs.rundir import RunDir, write_json
from jobs.backends.table import BACKENDS, open_backend
from jobs.common.cluster_profile import KINDS, ClusterProfile
from jobs.local.backend import LocalBackend
from jobs.slurm.backend import SlurmBackend
from jobs.submitted_runs import clusters


def test_each_kind_of_a_profile_has_its_backend():
    assert tuple(BACKENDS) == KINDS
    assert isinstance(open_backend(ClusterProfile(kind="local")), LocalBackend)
    assert isinstance(open_backend(ClusterProfile(kind="slurm")), SlurmBackend)


def test_unknown_kind_is_refused_with_a_remedy():
    with pytest.raises(ConfigError, match="no backend pbs, only local and slurm.*Use the version that"):
        open_backend(ClusterProfile(kind="pbs"))


def test_run_of_unknown_backend_has_unknown_state_and_hides_no_other_run(tmp_path):
    """Another version may have submitted it. As a local run it would count as ended, and would be started twice."""
    runs = [RunDir(tmp_path / name) for name in ("foreign", "own")]
    for run, kind in zip(runs, ("pbs", "local"), strict=True):
        run.path.mkdir()
        write_json(run.path / "job.json", {"kind": kind, "folder": str(run.path), "after": 0})
    states = clusters.states(runs)
    assert states[runs[0].path].state == "unknown"
    assert "there is no backend pbs" in states[runs[0].path].reason
    assert states[runs[1].path].state != "unknown"
    assert clusters.poll_interval(runs) == BACKENDS["local"].poll_seconds
    with pytest.raises(ConfigError, match="no backend pbs"):
        clusters.request_cancel(runs, "test")
    assert all(run.cancel.exists() for run in runs)
