"""Fixtures of the tests of jobs/host."""

import time

import pytest


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """An owner in this process sets the number of its attempt for its children; the next test has none."""
    monkeypatch.setenv("FLIP_ATTEMPT", "")
    monkeypatch.delenv("FLIP_ATTEMPT")


@pytest.fixture
def naps(monkeypatch):
    """The requested sleeps in seconds, without waiting; short waits for the end of a command are omitted."""
    naps = []
    monkeypatch.setattr(time, "sleep", lambda seconds: naps.append(seconds) if seconds >= 1 else None)
    return naps


@pytest.fixture
def clock(monkeypatch):
    """A simulated clock, of the wall and monotonic, that only sleeps advance; returns the time after each sleep of a
    second or more. Shorter ones are also real: a command may have to end."""
    ends = [1000.0]
    now = [1000.0]
    real_sleep = time.sleep

    def sleep(seconds):
        now[0] += seconds
        if seconds >= 1:
            ends.append(now[0])
        else:
            real_sleep(min(seconds, 0.01))

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return ends
