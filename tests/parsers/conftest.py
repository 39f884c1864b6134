"""Fixtures of the tests that index many small tars."""

import os

import pytest


@pytest.fixture
def unsynced(monkeypatch):
    """Manifests are not flushed to disk, which takes most of the time of an index of a small tar."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
