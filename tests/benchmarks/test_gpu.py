"""Tests `make bench-gpu` on a CPU: its rows at small sizes, out of memory, and an interrupted run."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import metadata
from types import SimpleNamespace

import pytest

from benchmarks import gpu, table
from benchmarks.lib import gpu_rows
from benchmarks.lib.gpu_rows import ROWS, GpuRow
from jobs.measuring.functions.trace import device_rows
from jobs.measuring.functions.training_step import LEFT_OUT, OURS
from jobs.planning import measurement

pytestmark = pytest.mark.long

QUICK = "matmul", "attention"


def command(folder, *options):
    script = str(table.ROOT / "benchmarks" / "gpu.py")
    return [sys.executable, script, "--device", "cpu", "--quick", "--folder", str(folder), *options]


def test_gpu_benchmark_continues_after_sigterm_and_fills_table(tmp_path):
    tmp_path /= "absent"
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
    results = gpu_rows.read(tmp_path)
    assert results.keys() == set(QUICK) and {entry["status"] for entry in results.values()} == {measurement.MEASURED}
    page = table.page({}, results)
    assert page.count("| not run |") == len(ROWS) - len(QUICK) and page.count("| CPU |") == len(QUICK)


def test_gpu_row_records_out_of_memory_as_result(tmp_path):
    """The script really runs out of memory: it allocates 8 TB of features."""
    row = GpuRow("large", "", ("loss.py", "--local", "64", "--batch", str(2**32), "--tiles", "64"), gpu_rows._loss)
    entry = gpu.measure(row, "cpu", False, gpu.QUICK_LIMIT, tmp_path)
    assert (entry["status"], entry["result"]) == (measurement.OUT_OF_MEMORY, {}) and "memory" in entry["detail"]


def test_gpu_row_records_time_limit_if_script_takes_too_long(tmp_path):
    row = next(row for row in ROWS if row.name == "step_b16")
    entry = gpu.measure(row, "cpu", True, 1.0, tmp_path)
    assert entry["status"] == measurement.TIME_LIMIT


def test_gpu_row_records_error_of_failed_script(tmp_path):
    row = GpuRow("wrong", "", ("loss.py", "--wrong"), gpu_rows._loss)
    entry = gpu.measure(row, "cpu", False, gpu.QUICK_LIMIT, tmp_path)
    assert entry["status"] == measurement.FAILED and "--wrong" in entry["detail"]


def test_profile_on_cuda_counts_kernels_alone():
    def row(key, device, annotation=False):
        return SimpleNamespace(key=key, device_type=SimpleNamespace(name=device), is_user_annotation=annotation)

    rows = [row("aten::mm", "CPU"), row("gemm", "CUDA"), row("Optimizer.step", "CUDA", annotation=True)]
    assert [each.key for each in device_rows(rows, cuda=True)] == ["gemm"] and device_rows(rows, cuda=False) == rows


def test_share_of_peak_of_packed_captions_counts_their_tokens():
    row = {"pairs_per_second": 1e4, "peak_MB": 1, "mask": "0.5"}
    result = {"size": "B/16", "precision": "bf16", "tokens_of_a_caption": 12.6}
    whole, packed = (
        gpu_rows._step(result | {"beside_the_peer": [row | {"form": form}]}, "NVIDIA H100 80GB HBM3")
        for form in (OURS, LEFT_OUT)
    )
    shares = [float(re.search(r"([\d.]+) % of the datasheet peak", text)[1]) for text in (whole, packed)]
    assert 1.05 < shares[0] / shares[1] < 1.11


def test_kernel_of_attention_that_runs_use_is_named():
    """On a CPU no kernel is chosen."""
    case = {"tokens": 129, "head": 80, "math": 3.1, "flash": 0.5, "cudnn": "no kernel"}
    words = "129 tokens, head size 80: math 3.1, flash 0.5, cudnn no kernel"
    assert gpu_rows._attention({"cases": [case | {"used": "flash"}]}, "") == f"{words}, runs use flash"
    assert gpu_rows._attention({"cases": [case | {"used": ""}]}, "") == words


def test_step_of_absent_peer_has_words_in_table():
    assert gpu_rows._step({"beside_the_peer": []}, "CPU") == "the peer is not installed"


def test_gpu_benchmark_runs_no_row_without_time_left(tmp_path):
    subprocess.run(command(tmp_path, "--minutes", "0"), check=True, capture_output=True)
    assert not list(tmp_path.iterdir())


BARE = """
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target)
        place = str(spec and (spec.origin or spec.submodule_search_locations))
        hidden = "site-packages" in place and "_vendor" not in place  # setuptools has copies of its own
        return None if path is None and name not in {known} and hidden else spec

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""
"""A sitecustomize.py that hides all installed modules except ``known``."""


def _normal(name):
    """Return the name of a distribution, normalised as in PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """Provide an environment with torch, timm, numpy and their dependencies."""
    known = set()
    queue = ["torch", "timm", "numpy"]
    while queue:
        name = queue.pop()
        with contextlib.suppress(metadata.PackageNotFoundError):
            if name not in known:
                known.add(name)
                requirements = [
                    requirement for requirement in metadata.requires(name) or [] if "extra ==" not in requirement
                ]
                queue += [re.split(r"[^\w.-]", requirement)[0] for requirement in requirements]
    known = {_normal(name) for name in known}
    modules = [
        module for module, names in metadata.packages_distributions().items() if known & set(map(_normal, names))
    ]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(BARE.format(known=sorted(modules)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "bare"))


def test_gpu_rows_run_with_torch_timm_and_numpy_alone(tmp_path, bare):
    """The rows need no further library: a machine without a network cannot install any."""
    rows = "loss_128_1024", "save", "trace"
    subprocess.run(command(tmp_path, "--only", *rows), check=True)
    results = gpu_rows.read(tmp_path)
    assert {name: (entry["status"], entry["detail"]) for name, entry in results.items()} == {
        name: (measurement.MEASURED, "") for name in rows
    }
    assert (tmp_path / "trace.json.gz").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # compiles twelve steps
def test_gpu_benchmark_measures_every_row_at_quick_size(tmp_path, bare):
    """The first row, FLIP's own tests, needs all packages. The others continue without them."""
    every = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command(tmp_path, "--only", "tests"), env=every, check=True)
    subprocess.run(command(tmp_path, "--minutes", "300"), check=True)
    results = gpu_rows.read(tmp_path)
    statuses = {name: entry["status"] for name, entry in results.items()}
    assert statuses == {row.name: measurement.MEASURED for row in ROWS}
    assert all(json.loads((tmp_path / f"{name}.json").read_text())["quick"] for name in results)
    assert all(figure for _, figure, *_ in gpu_rows.cells(results))
