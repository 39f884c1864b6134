"""Tests that this checkout trains small runs to the same weights, bit for bit, as an earlier commit.

Its checkout is a git worktree. Without the history, as in a source archive, the tests are skipped.
"""

import json
import os
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.synthetic import make_dataset, make_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
#: The last commit before the packages were rearranged and their defects fixed.
EARLIER = "f634574"
BASE = """
title: Bits
cluster: local
recipe: portable
set:
  model: {size: tiny}
  data: {manifest: "@DATA@", tokenizer: "@DATA@/tokenizer.json", workers: 1, chunk: 4, block: 2, lanes: 8,
         buffer: 268_435_456, decoder: pillow, resize: pillow}
  compute: {device: cpu, precision: fp32, threads: 1, deterministic: "yes", attention: explicit}
  stages:
    - {name: pretrain, batch: 16, mask: 0.5, samples: 640, warmup: 32, base_lr: 1e-2}
    - {name: unmasked, batch: 16, mask: 0, samples: 128, base_lr: 1e-3}
  checkpoint: {samples: 160}
  monitor: {log_every: 10}
  resources: {nodes: 1, processes: 1, cpus: 1, hours: 1}
runs:
"""
#: JPEG files, by the decoder and resize that a machine chooses by itself.
AUTO = {"manifest": "@DATA@-jpeg", "decoder": "auto", "resize": "auto"}
VARIANTS = {
    "fp32": {},
    "fp32-two-ranks": {"resources": {"processes": 2}},
    "bf16": {"compute": {"precision": "bf16"}},
    "bf16-two-ranks": {"compute": {"precision": "bf16"}, "resources": {"processes": 2}},
    "siglip": {"model": {"objective": "siglip", "temperature": 0.1, "logit_bias": -10.0}},
    "siglip-two-ranks": {
        "model": {"objective": "siglip", "temperature": 0.1, "logit_bias": -10.0},
        "resources": {"processes": 2},
    },
    "packed": {"model": {"text": {"padding": "mask"}}},
    "accumulate": {"compute": {"accumulate": 2}},
    "auto": {"data": AUTO},
    "auto-mask-0.75": {"data": AUTO, "stages": {"pretrain": {"mask": 0.75}}},
}
WITHOUT_KERNEL = "auto*"
"""Runs that this checkout also trains without the visible-patch kernel, which the earlier commit does not have."""


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier") / "checkout"
    done = git("worktree", "add", "--detach", str(folder), EARLIER)
    if done.returncode:
        pytest.skip(f"this copy of the repository does not have the history: {done.stderr.strip()}")
    yield folder
    git("worktree", "remove", "--force", str(folder))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bits")
    data = make_dataset(folder / "data", samples=200, shards=3, chunk=4, classes=8)
    make_dataset(folder / "data-jpeg", samples=200, shards=3, chunk=4, classes=8, fmt="jpg")
    make_tokenizer(data / "tokenizer.json")
    runs = "".join(f"  {name}: {json.dumps(settings)}\n" for name, settings in VARIANTS.items())
    (folder / "bits.yaml").write_text((BASE + runs).replace("@DATA@", str(data)))
    return folder / "bits.yaml"


def call(checkout, runs, *arguments, kernel=True):
    environment = {**os.environ, "FLIP_RUNS": str(runs), "OMP_NUM_THREADS": "1"}
    if not kernel:
        environment["FLIP_KERNEL"] = "0"
    done = subprocess.run([sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"


def wait(condition, event):
    limit = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < limit, f"timeout while waiting for {event}"
        time.sleep(0.1)


def weights(run):
    """Return (file, tensor) -> bytes of the last checkpoint. Step counts are equal on all ranks: their file is
    ignored."""
    (checkpoint,) = run.glob("checkpoints/unmasked/768-*")
    tensors = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118
                place = "" if name.startswith("optim.step.") else path.name
                tensors[place, name] = file.get_tensor(name).tobytes()
    return tensors


@pytest.fixture(scope="module")
def trained(earlier, sweep, tmp_path_factory):
    """Train in both checkouts and return the runs folders."""
    folders = []
    for checkout in (earlier, ROOT):
        runs = tmp_path_factory.mktemp("runs")
        call(checkout, runs, "jobs/submit.py", "--sweep", str(sweep), "--yes")
        wait(lambda runs=runs: len(list(runs.glob("bits/*/result.json"))) == len(VARIANTS), "the runs")
        folders.append(runs / "bits")
    return folders


@pytest.fixture(scope="module")
def trained_without_kernel(sweep, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    call(ROOT, runs, "jobs/submit.py", "--sweep", str(sweep), "--yes", "--only", WITHOUT_KERNEL, kernel=False)
    count = sum(fnmatch(name, WITHOUT_KERNEL) for name in VARIANTS)
    wait(lambda: len(list(runs.glob("bits/*/result.json"))) == count, "the runs without the kernel")
    return runs / "bits"


def kernel_of(run):
    return json.loads((run / "attempts" / "1" / "ready.json").read_text())["environment"]["kernel"]


@pytest.mark.parametrize("name", VARIANTS)
def test_training_gives_same_weights_as_earlier_commit(trained, name):
    before, after = (weights(folder / name) for folder in trained)
    assert before and before == after


@pytest.mark.parametrize("name", [name for name in VARIANTS if fnmatch(name, WITHOUT_KERNEL)])
def test_training_without_kernel_gives_same_weights(trained, trained_without_kernel, name):
    with_kernel = trained[1] / name
    without = trained_without_kernel / name
    assert kernel_of(with_kernel).startswith("yes (visible-jpeg")
    assert kernel_of(without) == "no, because FLIP_KERNEL=0"
    assert weights(with_kernel) == weights(without)
