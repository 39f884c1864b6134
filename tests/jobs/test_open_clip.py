"""open_clip's trainer by the files of sweeps/open_clip.yaml: killed within an epoch, it ends with the same tensors."""

import json
import os
import re
import signal
import sys

import pytest
import torch
import yaml

from tests.harness.command_sweep import CommandSweep
from tests.harness.common import ROOT
from tests.synthetic import make_dataset

SAMPLES = 96
EPOCHS = 3
POSITION = re.compile(r"Train Epoch: (\d+) \[ *(\d+)/")


@pytest.fixture
def sweep(tmp_path):
    """Two runs of the program that is shipped, with smaller numbers."""
    make_dataset(tmp_path / "data", samples=SAMPLES, shards=2, chunk=4, classes=8)
    sweep = CommandSweep(tmp_path)
    shipped = yaml.safe_load((ROOT / "sweeps" / "open_clip.yaml").read_text())["commands"]["open_clip"]
    words = [{"python3": sys.executable, "128": "8", "5": "1"}.get(word, word) for word in shipped["command"]]
    sweep.table = {
        **shipped,
        "command": words,
        "code": str(ROOT / "sweeps" / shipped["code"]),
        "set": {"shards": str(tmp_path / "data"), "epochs": EPOCHS},
        "runs": {"killed": {}, "whole": {}},
        "resume": {**shipped["resume"], "unit": SAMPLES},
        "metrics": {**shipped["metrics"], "batch": 8, "per_epoch": SAMPLES, "total": SAMPLES * EPOCHS},
    }
    return sweep


def stop_within_an_epoch(pid, log):
    """Stop the process; whether its last line is neither the first nor the last of an epoch. If not, it goes on."""
    os.kill(pid, signal.SIGSTOP)
    positions = POSITION.findall(log.read_text()) if log.exists() else []
    if positions and int(positions[-1][0]) >= 1 and 0 < int(positions[-1][1]) < SAMPLES:
        return True
    os.kill(pid, signal.SIGCONT)
    return False


@pytest.mark.long
def test_open_clip_killed_within_an_epoch_ends_with_the_same_tensors(sweep):
    sweep.submit("--no-canary")
    pid = sweep.program(1, "killed")
    log = sweep.run("killed").path / "work" / "out" / "1" / "out.log"
    sweep.until(lambda: stop_within_an_epoch(pid, log), "a step of the second epoch")
    sweep.until_saved(1, "killed")
    os.kill(pid, signal.SIGKILL)
    sweep.until_over()
    assert sweep.ends("killed") == [("crash", SAMPLES), ("complete", EPOCHS * SAMPLES)]
    attempts = {"killed": 2, "whole": 1}
    last = f"checkpoints/epoch_{EPOCHS}.pt"
    states = [torch.load(sweep.run(name).path / "work" / "out" / str(n) / last) for name, n in attempts.items()]
    killed, whole = (dict(tensors({key: state[key] for key in ("state_dict", "optimizer")})) for state in states)
    assert killed.keys() == whole.keys() and all(torch.equal(killed[key], whole[key]) for key in killed)
    rows = [json.loads(row) for row in (sweep.run("whole").metrics / "1.jsonl").read_text().splitlines()]
    assert rows[-1]["samples"] == 8 * rows[-1]["step"] == EPOCHS * SAMPLES
    assert rows[-1]["loss"] < rows[0]["loss"]


def tensors(value, path=()):
    """(path, tensor) of all tensors of a state."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from tensors(each, (*path, key))
    elif isinstance(value, list):
        for i, each in enumerate(value):
            yield from tensors(each, (*path, i))
