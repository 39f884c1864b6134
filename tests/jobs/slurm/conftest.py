"""The fixture of a run whose batch script is started."""

import pytest

from tests.jobs.slurm.batch_stage import Stage


@pytest.fixture
def stage(tmp_path, commands, monkeypatch):
    return Stage(tmp_path, commands, monkeypatch)
