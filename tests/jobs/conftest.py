"""Fixtures of the tests of jobs/: a sweep of fake rank processes, small data, a small disk and simulated time."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from flip.runs import temporary_folders
from flip.runs.rundir import RunDir
from jobs.commands.submit import main as submit_main
from jobs.submission import start_runs
from jobs.submission.snapshot import Snapshot
from tests.harness.command_line import SubmitCommandLine
from tests.harness.local_sweep import LocalSweep
from tests.synthetic import make_dataset, make_tokenizer


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """128 labelled images in two shards, with a tokenizer, for submitted sweeps; no test changes the folder."""
    folder = make_dataset(tmp_path_factory.mktemp("data"), samples=128, shards=2, size=64, classes=4)
    make_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture
def field(tmp_path):
    sweep = LocalSweep(tmp_path)
    yield sweep
    for pid in sweep.left():
        with contextlib.suppress(ProcessLookupError):  # it may be ending by itself
            os.kill(pid, signal.SIGKILL)
    for name in sweep.worlds:  # of supervisors that a test killed, and that have no successor
        run = RunDir(sweep.sweep / name)
        with contextlib.suppress(NotADirectoryError):  # a test has replaced its folder of attempts
            temporary_folders.delete_left(run, run.newest_attempt())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB; the test is skipped if this user may not mount one."""
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
    """A simulated clock that only sleeps advance; returns the time after each sleep. Sleeps below 1 s are real."""
    ends = [0.0]
    real_sleep = time.sleep
    monkeypatch.setattr(
        time, "sleep", lambda seconds: ends.append(ends[-1] + seconds) if seconds >= 1 else real_sleep(seconds)
    )
    monkeypatch.setattr(time, "time", lambda: ends[-1])
    return ends


@pytest.fixture
def desk(tmp_path, data):
    return SubmitCommandLine(tmp_path, data)


class Typed:
    """``submit`` in this process, with a backend that starts nothing; returns (exit code, stdout, stderr)."""

    def __init__(self, desk, capsys, monkeypatch):
        self.desk = desk
        self.capsys = capsys
        self.started = []
        monkeypatch.setenv("FLIP_RUNS", str(desk.runs))
        monkeypatch.setattr(start_runs, "MultiBackend", lambda _: self)
        monkeypatch.setattr(start_runs, "take", lambda _, into, *rest: Snapshot("c0de", into / "c0de", ()))
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))

    def submit(self, jobs):
        self.started = [job.run.name for job in jobs]

    def __call__(self, *argv, sweep=None):
        self.started = []
        self.desk.sweep.write_text(sweep or self.desk.text)
        code = submit_main(["--sweep", str(self.desk.sweep), *argv])
        return (code, *self.capsys.readouterr())

    def there(self):
        return sorted(path.parent.name for path in (self.desk.runs / "demo").glob("[!.]*/config.yaml"))

    def trashed(self):
        return sorted(path.name for path in (self.desk.runs / ".trash").glob("*/demo/*"))


@pytest.fixture
def typed(desk, capsys, monkeypatch):
    return Typed(desk, capsys, monkeypatch)
