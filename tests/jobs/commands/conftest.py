"""Fixtures of the tests of evaluations: a run with checkpoints, and data sets to score it on."""

import pytest


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    from tests.harness.evaluation_place import make_place  # imports torch

    return make_place(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture
def environment(place, monkeypatch):
    """The run and the data are found without options."""
    monkeypatch.setenv("FLIP_RUNS", str(place / "runs"))
    monkeypatch.setenv("FLIP_CACHE", str(place / "cache"))
    monkeypatch.setenv("FLIP_DATA", str(place / "data"))
