"""Tests of the commands of ``make quickstart``, which run in order with a small data set and few samples."""

import os
import shutil
import subprocess
import sys

import pytest

from flip.runs.rundir import write_json
from tests.harness.common import ROOT
from tests.synthetic import make_dataset, make_tokenizer
from tools.demo_datasets.emoji.build import DATA

FEW = ["stages.pretrain.samples=512", "stages.pretrain.warmup=0", "evaluate.every=0", "data.workers=0"]


def lines(*make_arguments):
    """Return the flip commands of the target, without installation, pipes and echo."""
    done = subprocess.run(
        ["make", "-n", "quickstart", *make_arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    shown = [line.partition("|")[0].split() for line in done.stdout.splitlines()]
    return [argv[1:] for argv in shown if argv and argv[0] == ".venv/bin/flip"]


@pytest.fixture
def environment(tmp_path):
    """Create a cache with small demonstration sets that ``flip demo_data`` accepts as complete."""
    folder = tmp_path / "cache" / "emoji"
    for name, samples in (("train", 512), ("noto-v1", 16), ("twemoji", 16), ("openmoji", 16), ("unseen", 16)):
        dataset = make_dataset(folder / name, samples=samples, shards=1, classes=16, seed=samples)
    for name in ("classes.json", "classes-unseen.json"):
        shutil.copyfile(dataset / "classes.json", folder / name)
    make_tokenizer(folder / "tokenizer.json")
    counts = dict.fromkeys(("named", "drawn", "distinct", "training", "unseen"), 16)
    write_json(folder / "done.json", DATA.source | {"counts": counts, "sets": {}})
    return os.environ | {"FLIP_CACHE": str(tmp_path / "cache"), "FLIP_RUNS": str(tmp_path / "runs")}


def test_full_quickstart_submits_three_seeds():
    submit = next(argv for argv in lines("FULL=1") if argv[0] == "submit")
    assert submit[1] == "quickstart_full" and submit[-3:] == ["0", "1", "2"]


@pytest.mark.long
def test_quickstart_commands_run_from_data_to_report(environment, tmp_path):
    shown = {}
    for argv in lines():
        overrides = FEW if argv[0] == "submit" else []
        done = subprocess.run(
            [sys.executable, "-m", "jobs", *argv, *overrides], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        shown.setdefault(argv[0], []).append(done.stdout)
    assert list(shown) == ["demo_data", "submit", "predict", "report"]
    assert shown["demo_data"][0].startswith("ready: ") and "1 run on local" in shown["submit"][0]
    (predicted,) = shown["predict"]
    images = predicted.split("\n\n")[1:]
    assert len(images) == 12 and all(len(text.strip().splitlines()) == 1 + 5 for text in images)
    assert "unmasked" in shown["report"][-1] and (tmp_path / "runs" / "quickstart" / "report.html").exists()
