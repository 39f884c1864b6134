"""`make bench-gpu` on a CPU: its rows at small sizes, running out of memory, and a run that was interrupted."""

import json
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import gpu, table
from benchmarks.lib import gpu_rows
from benchmarks.lib.gpu_rows import ROWS, GpuRow

pytestmark = pytest.mark.long

QUICK = "matmul", "attention"


def command(folder, *options):
    script = str(table.ROOT / "benchmarks" / "gpu.py")
    return [sys.executable, script, "--device", "cpu", "--quick", "--folder", str(folder), *options]


def test_an_interrupted_run_continues_and_becomes_a_table(tmp_path):
    first = subprocess.Popen(command(tmp_path, "--only", *QUICK), stdout=subprocess.DEVNULL, start_new_session=True)
    names = [row.name for row in ROWS if row.name in QUICK]
    written = tmp_path / f"{names[0]}.json"
    while not written.exists():
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 128 + signal.SIGTERM
    before = written.stat().st_mtime_ns
    assert not (tmp_path / f"{names[-1]}.json").exists()
    again = subprocess.run(command(tmp_path, "--only", *QUICK), capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in again.stdout.splitlines()] == names[1:]
    assert written.stat().st_mtime_ns == before
    found = gpu_rows.read(tmp_path)
    assert found.keys() == set(QUICK) and {entry["status"] for entry in found.values()} == {gpu_rows.MEASURED}
    page = table.page({}, found)
    assert page.count("| not run |") == len(ROWS) - len(QUICK) and page.count("| CPU |") == len(QUICK)


def test_a_row_that_runs_out_of_memory_is_a_result():
    """A real one: 8 TB of features."""
    row = GpuRow("large", "", ("loss.py", "--local", "64", "--batch", str(2**32), "--tiles", "64"), gpu_rows._loss)
    found = gpu.measure(row, "cpu", False, gpu.QUICK_LIMIT)
    assert (found["status"], found["result"]) == (gpu_rows.OUT_OF_MEMORY, {}) and "memory" in found["detail"]


def test_a_row_that_takes_too_long_ends_with_its_processes():
    row = next(row for row in ROWS if row.name == "step_b16")
    found = gpu.measure(row, "cpu", True, 1.0)
    assert found["status"] == gpu_rows.TIME_LIMIT


def test_a_row_that_fails_has_its_error():
    found = gpu.measure(GpuRow("wrong", "", ("loss.py", "--wrong"), gpu_rows._loss), "cpu", False, gpu.QUICK_LIMIT)
    assert found["status"] == gpu_rows.FAILED and "--wrong" in found["detail"]


def test_rows_without_time_are_not_run(tmp_path):
    subprocess.run(command(tmp_path, "--minutes", "0"), check=True, capture_output=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_row_at_a_small_size(tmp_path):
    subprocess.run(command(tmp_path, "--minutes", "300"), check=True)
    found = gpu_rows.read(tmp_path)
    assert {name: entry["status"] for name, entry in found.items()} == {row.name: gpu_rows.MEASURED for row in ROWS}
    assert all(json.loads((tmp_path / f"{name}.json").read_text())["quick"] for name in found)
    assert all(words for _, words, *_ in gpu_rows.cells(found))
