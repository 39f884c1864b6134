"""A sweep folder whose runs are done by the fake worker, under the real supervisor."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from flip.runs.rundir import RunDir, read_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job, JobResources
from jobs.local import backend, rank_processes
from tests.synthetic import make_dataset, make_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """128 labelled pictures in two shards, with their tokenizer, for sweeps that are submitted; no test changes it."""
    folder = make_dataset(tmp_path_factory.mktemp("data"), samples=128, shards=2, size=64, classes=4)
    make_tokenizer(folder / "tokenizer.json")
    return folder


class Field:
    """Runs of one sweep, and what a test wants to do to them."""

    def __init__(self, folder: Path) -> None:
        self.sweep = folder / "runs" / "sweep"
        self.sweep.mkdir(parents=True)
        self.snapshot = folder / "snapshot"
        self.snapshot.mkdir()
        for room in ("flip", "jobs"):
            (self.snapshot / room).symlink_to(ROOT / room)
        shutil.copy(Path(__file__).with_name("fake_worker.py"), self.snapshot)
        self.cluster = backend.LocalBackend(ClusterProfile(name="local", signal_seconds=5), peer_grace=0.5)
        self.worlds: dict[str, int] = {}

    def run(self, name="run", world=1, total=6, step=0.05, every=2, **play) -> RunDir:
        run = RunDir(self.sweep / name)
        run.path.mkdir()
        run.config.write_text("schema: 1\n")
        (run.path / "play.json").write_text(json.dumps({"total": total, "step": step, "every": every, **play}))
        self.worlds[name] = world
        return run

    def submit(self, *runs: RunDir, parallel=1, **fields) -> None:
        self.cluster.profile.parallel = parallel
        shapes = [JobResources(processes=self.worlds[r.name]) for r in runs]
        self.cluster.submit(
            [Job(r, self.snapshot, s, module="fake_worker", **fields) for r, s in zip(runs, shapes, strict=True)]
        )

    def state(self, run: RunDir) -> str:
        return self.cluster.states([run])[run.path].state

    def until(self, condition, seconds=40.0):
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, self.journal()
            time.sleep(0.02)

    def until_state(self, run: RunDir, *states: str) -> None:
        self.until(lambda: self.state(run) in states)

    def until_moving(self, run: RunDir, n: int, step: int = 1) -> None:
        """Until attempt n has done some steps."""
        self.until(lambda: run.newest_attempt() == n and (read_json(run.status) or {}).get("attempt") == n)
        self.until(lambda: (read_json(run.status) or {})["step"] >= step)

    def supervisor(self) -> int:
        return (read_json(self.sweep / ".supervisor" / "pid.json") or {})["pid"]

    def pids(self, run: RunDir) -> list[int]:
        return [row["pid"] for row in backend.live_ranks(run)]

    def journal(self) -> str:
        log = self.sweep / ".supervisor" / "log"
        return log.read_text() if log.exists() else "no journal"

    def left(self) -> list[int]:
        """Living processes that name this sweep."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            pid = int(entry.name)
            if str(self.sweep).encode() in words and rank_processes.alive(pid, rank_processes.start_time(pid)):
                found.append(pid)
        return found


@pytest.fixture
def field(tmp_path):
    made = Field(tmp_path)
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
