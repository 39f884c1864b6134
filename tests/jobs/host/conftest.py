"""Fixtures of the tests of jobs/host."""

import time

import pytest


@pytest.fixture
def naps(monkeypatch):
    """The requested sleeps in seconds, without waiting; short waits for the end of a command are omitted."""
    naps = []
    monkeypatch.setattr(time, "sleep", lambda seconds: naps.append(seconds) if seconds >= 1 else None)
    return naps
