"""Fixtures of the tests of jobs/: a sweep of fake workers, small data, a small disk, bent time, stub commands."""

import os
import signal
import subprocess
import time

import pytest

from tests.harness.local_sweep import LocalSweep
from tests.synthetic import make_dataset, make_tokenizer


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """128 labelled pictures in two shards, with their tokenizer, for sweeps that are submitted; no test changes it."""
    folder = make_dataset(tmp_path_factory.mktemp("data"), samples=128, shards=2, size=64, classes=4)
    make_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture
def field(tmp_path):
    made = LocalSweep(tmp_path)
    yield made
    for pid in made.left():  # only after a failed test
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def slept(monkeypatch):
    """Time by naps alone, which take none: the last one's end. Short ones are those of who waits for a process."""
    ends, really = [0.0], time.sleep
    monkeypatch.setattr(
        time, "sleep", lambda seconds: ends.append(ends[-1] + seconds) if seconds >= 1 else really(seconds)
    )
    monkeypatch.setattr(time, "time", lambda: ends[-1])
    return ends


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """``commands(name, script)`` puts a shell script of this name in front; all calls are noted in .calls."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    calls = tmp_path / "calls"

    def put(name, script):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {calls}\n{script}\n')
        (tmp_path / name).chmod(0o755)

    put.calls = lambda: calls.read_text().splitlines() if calls.exists() else []
    return put
