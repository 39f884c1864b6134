"""Tests that pipelines take turns: while one works, the others are stopped with all their threads."""

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import psutil
import pytest

from benchmarks.lib import interleaved, results, s3_datasets
from jobs.host.processes import PR_SET_CHILD_SUBREAPER, has_ended, prctl, read_stat
from tests.harness.common import wait_until

pytestmark = pytest.mark.long

NAP = 0.2
TURNS = 10
TICK = 0.002


def busy(log, name):
    """Yield batches of one sample, each after NAP seconds of work that it logs by name, while a thread counts ticks.

    The names "fails" and "dies" raise an error or kill their process in their second turn.
    """
    if name in ("fails", "dies"):
        yield 1
        if name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("its second turn")
    count = [0]
    over = threading.Event()

    def count_ticks():
        while not over.wait(TICK):
            count[0] += 1

    thread = threading.Thread(target=count_ticks)
    thread.start()
    try:
        for _ in range(TURNS):
            start = time.monotonic()
            while time.monotonic() < start + NAP:
                pass
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{name}\n")
            before = count[0]
            yield 1
            assert count[0] < before + NAP / TICK / 2, "the thread counts while another pipeline works"
    finally:
        over.set()
        thread.join()


@pytest.fixture
def processes():
    with s3_datasets.alone() as first, s3_datasets.alone() as second:
        yield {"one": first, "two": second}


def test_interleaved_passes_alternate_and_time_each_pipeline_alone(processes, tmp_path):
    start = time.monotonic()
    log = tmp_path / "log"
    timings = interleaved.passes(processes, partial(busy, log), TURNS)
    took = time.monotonic() - start
    assert log.read_text(encoding="utf-8").split() == ["one", "two"] * TURNS and list(timings) == ["one", "two"]
    seconds = [(TURNS - interleaved.BEFORE) / timing.rate for timing in timings.values()]
    # No time counts for both pipelines.
    assert sum(seconds) < took
    assert min(seconds) >= (TURNS - interleaved.BEFORE) * NAP
    assert all(0 < timing.cpu <= 1.05e6 / timing.rate for timing in timings.values())


@pytest.mark.parametrize("name, error", [("fails", ValueError), ("dies", BrokenProcessPool)])
def test_interleaved_passes_leave_other_pipeline_usable_after_failure(processes, tmp_path, name, error):
    with pytest.raises(error):
        interleaved.passes({"one": processes["one"], name: processes["two"]}, partial(busy, tmp_path / "log"), TURNS)
    process = processes["one"].submit(os.getpid).result()  # its batches are closed and it accepts new work
    assert process in [child.pid for child in psutil.Process().children(recursive=True)]


def leave_a_note(path):
    atexit.register(path.write_text, "released")


def test_pipeline_process_runs_atexit_handlers_at_shutdown(tmp_path):
    with s3_datasets.alone() as process:
        process.submit(leave_a_note, tmp_path / "note").result()
    assert (tmp_path / "note").read_text() == "released"


def burn(seconds):
    start = time.process_time()
    while time.process_time() < start + seconds:
        pass


def test_cpu_time_of_others_excludes_pipeline_process_also_after_its_end(monkeypatch):
    """On a machine where nothing else runs: what is busy is this process and its children."""
    monkeypatch.setattr(results, "core_seconds", lambda: (1000.0 - sum(os.times()[:4]), 0.0))
    before = results._others()
    with s3_datasets.alone() as process:
        process.submit(burn, 1.1).result()  # the kernel counts in hundredths
        assert before - results._others() >= 1
    assert before - results._others() >= 1


BURNING_ORPHAN = "import os, time\nif os.fork(): os._exit(0)\nwhile time.process_time() < 1.1: pass\n"


def test_cpu_time_of_others_excludes_orphans_of_a_subreaper_also_as_zombies(monkeypatch):
    """As the steps of a Slurm that a benchmark has started."""
    monkeypatch.setattr(results, "core_seconds", lambda: (1000.0 - sum(os.times()[:4]), 0.0))
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        before = results._others()
        old = {child.pid for child in psutil.Process().children()}
        subprocess.run([sys.executable, "-c", BURNING_ORPHAN], check=True)
        (pid,) = {child.pid for child in psutil.Process().children()} - old
        wait_until(lambda: has_ended(read_stat(pid)[1]), "the end of the orphan", 60.0)
        assert before - results._others() >= 1
        os.waitpid(pid, 0)
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0)
