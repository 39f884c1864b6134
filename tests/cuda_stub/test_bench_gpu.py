"""Tests that all rows of `make bench-gpu` run, on a stub of CUDA, up to a page that says what it is."""

import json
import subprocess
import sys

import pytest

from benchmarks import table
from benchmarks.lib import gpu_rows
from jobs.planning.measurement import MEASURED
from tests.cuda_stub.test_cuda_stub import LIMIT, pytestmark  # noqa: F401
from tests.harness.common import ROOT


@pytest.mark.timeout(3 * LIMIT + 60)
def test_rows_of_bench_gpu_pass_through_to_a_page_of_a_rehearsal(tmp_path):
    words = ["benchmarks/gpu.py", "--quick", "--minutes", "170", "--folder", str(tmp_path)]
    command = [sys.executable, "-m", "tests.cuda_stub.build", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3 * LIMIT)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
    results = gpu_rows.read(tmp_path)
    ends = {name: (entry["status"], entry["detail"]) for name, entry in results.items()}
    assert ends == {row.name: (MEASURED, "") for row in gpu_rows.ROWS}
    page = table.page({}, results)
    assert page.count("(stub: a rehearsal)") == len(gpu_rows.ROWS) and f"| {gpu_rows.NOT_RUN} |" not in page
    assert results["tests"]["result"]["summary"].startswith("3 passed")
    assert results["attention"]["result"]["cases"][0]["used"] == "cudnn"


@pytest.mark.parametrize("name", ["loss_8192_65536", "loss_8192_8192_tf32"])
def test_loss_at_full_size_takes_the_memory_of_the_plan(name):
    """With ``--quick`` the rows of the loss have other sizes. Memory is what torch's allocator counts."""
    row = next(row for row in gpu_rows.ROWS if row.name == name)
    script, *options = row.words
    words = [f"benchmarks/{script}", *options, "--device", "cuda", "--json"]
    command = [sys.executable, "-m", "tests.cuda_stub.build", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-4000:]
    whole, tiles = json.loads(done.stdout)["cases"]
    assert (whole["form"], tiles["form"]) == ("whole", f"tiles of {name.split('_')[2]}")
    print(whole, tiles)
    assert tiles["extra_MB"] == pytest.approx(tiles["predicted_MB"], rel=0.02)
