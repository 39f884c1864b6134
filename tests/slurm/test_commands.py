"""A program of two ranks on two nodes of a real Slurm, with and without node agents: killed, preempted, cancelled."""

import json
import os
import signal
import sys

import pytest
import torch

from jobs.host import processes
from tests.harness.command_sweep import CommandSweep
from tests.harness.common import wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.kill]
STEPS = 120


@pytest.fixture(params=[False, True], ids=["srun", "agents"])
def sweep(request, start_slurm, tmp_path):
    sweep = CommandSweep(tmp_path)
    sweep.here = start_slurm(nodes=3, gpus=0, cpus=2)
    text = sweep.here.profile.read_text() + f"canary: 0\nagents: {str(request.param).lower()}\n"
    (tmp_path / "own.yaml").write_text(text)
    sweep.add("ddp.py")
    sweep.table |= {
        "cluster": "own.yaml",
        "command": [sys.executable, "ddp.py", "--steps", str(STEPS), "--seconds", "{seconds}"],
        "set": {"seconds": 0.15},
        "resume": {"folder": "out", "pattern": "step-*.pt", "arguments": ["--resume", "{checkpoint}"]},
        "metrics": {"pattern": r"step (?P<step>\d+) loss (?P<loss>\S+)", "total": STEPS},
        "resources": {"nodes": 2, "processes": 1, "cpus": 1, "hours": 0.5},
    }
    return sweep


def programs(sweep):
    """The pids of the programs of both ranks, by rank."""
    found = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        environ = processes.environment(pid)
        if processes.arguments(pid)[1:2] == ["ddp.py"] and environ.get("RUN_DIR") == str(sweep.run().path):
            found[environ["RANK"]] = pid
    return found


def wait(sweep, condition, event, seconds=150):
    return wait_until(condition, event, seconds, 0.3, lambda: sweep.type("status", "demo") + sweep.logs())


def saved_in(sweep, n):
    return lambda: list((sweep.run().checkpoints / "command").glob(f"*-{n}/commit.json"))


def test_program_survives_faults_of_a_cluster(sweep):
    sweep.submit()
    wait(sweep, saved_in(sweep, 1), "a checkpoint of attempt 1")
    os.kill(programs(sweep)["1"], signal.SIGKILL)
    wait(sweep, saved_in(sweep, 2), "a checkpoint after a killed program")
    nodes = json.loads((sweep.run().attempt(2) / "start.json").read_text())["nodes"]
    sweep.here.preempt(nodes=2, nodelist=nodes, seconds=3)
    wait(sweep, saved_in(sweep, 3), "a checkpoint after a preemption")
    sweep.type("cancel", "demo", "--yes")
    wait(sweep, lambda: sweep.state()["state"] == "cancelled", "the cancel")
    sweep.submit("--retry")
    wait(sweep, lambda: sweep.state()["state"] == "complete", "the end")
    causes = [cause for cause, _ in sweep.ends()]
    assert causes == ["crash", "stopped", "cancelled", "complete"]
    saved = [samples for _, samples in sweep.ends()]
    assert saved == sorted(set(saved)) and saved[-1] == STEPS, "each attempt went on from the one before"
    undisturbed = CommandSweep(sweep.folder / "alone")
    undisturbed.add("ddp.py")
    undisturbed.table |= {**sweep.table, "cluster": "local", "set": {"seconds": 0.0}}
    undisturbed.table["resources"] = {"processes": 2, "cpus": 1}
    undisturbed.submit()
    undisturbed.until_over()
    last = [torch.load(each.run().path / f"work/out/step-{STEPS}.pt") for each in (sweep, undisturbed)]
    assert all(torch.equal(last[0]["model"][key], value) for key, value in last[1]["model"].items())
