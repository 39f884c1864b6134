"""Fixtures of a run whose batch script is started."""

import pytest

from tests.jobs.slurm.batch_stage import OwnedStage, Stage


@pytest.fixture
def stage(tmp_path, commands, monkeypatch):
    return Stage(tmp_path, commands, monkeypatch)


@pytest.fixture
def owned(tmp_path, commands, monkeypatch):
    return OwnedStage(tmp_path, commands, monkeypatch)
