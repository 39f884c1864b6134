"""Tests of the temporary folders that killed processes leave, with real processes."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from flip.runs import temporary_folders
from flip.runs.rundir import OWNER, RunDir, read_json, write_json
from jobs.local import stores
from tests.harness.common import ROOT

PROGRAM = """
import os, sys
from flip.concurrency import prepare_forkserver
prepare_forkserver()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def place(tmp_path, monkeypatch):  # tmp_path first: pytest creates it in TMPDIR
    """A folder for temporary files with a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield Path(folder)


def start(place, **environ):
    """A process with multiprocessing's folder in ``place``."""
    named = {"TMPDIR": str(place), "PYTHONPATH": str(ROOT), **environ}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **named}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    return process


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)


def test_folders_of_ended_attempts_of_a_run_are_deleted(place, tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    for path, n in ((run.path, 1), (run.path, 2), (tmp_path / "other", 1)):
        kill(start(place, FLIP_RUN=str(path), FLIP_ATTEMPT=str(n)))
    (place / "pymp-unowned").mkdir()
    temporary_folders.delete_left(run, 1)
    left = sorted((owner["run"], owner["attempt"]) for owner in map(read_json, place.glob(f"pymp-*/{OWNER}")))
    assert left == sorted([(str(run.path), 2), (str(tmp_path / "other"), 1)]) and (place / "pymp-unowned").exists()


def test_folder_of_a_command_is_deleted_by_the_next_one_once_it_is_killed(place):
    """Without a run, as in `shards make`: nothing but the process itself shows that it lives."""
    living = start(place)
    dead = start(place)
    assert len(list(place.glob("pymp-*"))) == 2
    kill(dead)
    kill(start(place))
    assert len(list(place.glob("pymp-*"))) == 2, "its own, and that of the living one"
    assert living.poll() is None
    kill(living)
    until = time.monotonic() + 30  # its fork server ends by itself
    while list(place.glob("pymp-*")) and time.monotonic() < until:
        temporary_folders.delete_left()
    assert not list(place.iterdir())


def test_folders_with_damaged_records_stay(place, tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    damaged = [[], {"run": str(run.path)}, {"run": str(run.path), "attempt": "1"}, {"run": "", "attempt": 0}]
    for i, record in enumerate(damaged):
        (place / f"pymp-{i}").mkdir()
        write_json(place / f"pymp-{i}" / OWNER, record)
    temporary_folders.delete_left(run, 2)
    assert len(list(place.glob("pymp-*"))) == 4


def test_store_of_an_ended_attempt_is_deleted(place, tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    store = stores.make_store(run, 1)
    other = stores.make_store(RunDir(tmp_path / "sweep" / "other"), 1)
    assert read_json(store / OWNER) == {"run": str(run.path), "attempt": 1}
    temporary_folders.delete_left(run, 0)
    assert store.exists()
    temporary_folders.delete_left(run, 1)
    assert not store.exists() and other.exists()
