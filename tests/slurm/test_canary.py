"""Tests of canary runs, and of flip debug in an existing allocation, on a real Slurm."""

import os
import subprocess
import sys

import pytest

from flip.runs.rundir import RunDir, read_json
from tests.harness.command_line import STEPS, SlurmCommandLine
from tests.harness.common import ROOT, attempt_lines

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.kill]
CANARY = 20


@pytest.fixture
def desk(start_slurm, tmp_path, emoji):
    command_line = SlurmCommandLine(start_slurm(nodes=4, gpus=0, cpus=2), tmp_path, emoji, canary=CANARY)
    command_line.text = command_line.text.partition("runs:")[0] + "runs: {ahead: {}, second: {}, other: {}}\n"
    return command_line


def reasons(desk):
    return {name: (row["state"], row["reason"]) for name, row in desk.status().items()}


def test_canary_holds_other_runs_until_first_run_passes(desk):
    desk.text = desk.text.replace(f"samples: {STEPS * 16}", "samples: 160000")
    assert f"canary: ahead starts first; after {CANARY} steps: second, other" in desk.submit()
    desk.until_step("ahead", 1)
    assert desk.job("other").state == "PENDING" and desk.job("other").reason == "JobHeldUser"
    assert reasons(desk)["other"] == ("queued", "waits for its canary ahead")
    desk.until_step("other", 1)
    first = attempt_lines(desk.run("ahead"), 1)
    start = read_json(desk.run("other").attempt(1) / "start.json")["time"]
    assert [line["step"] for line in first if line["time"] < start][-1] > CANARY
    assert desk.status()["ahead"]["state"] == "running", "the canary continues"
    assert len(list((desk.runs / "demo" / ".slurm").glob("*/released.json"))) == 1
    assert "running" in desk.submit(), "the second submit starts no jobs"
    assert len(list((desk.runs / "demo" / ".slurm").iterdir())) == 2
    desk.type("cancel", "demo", "--yes")
    desk.until_idle()
    assert desk.processes() == []


def test_canary_failure_stops_held_runs_until_next_submission(desk):
    desk.text = desk.text.replace("ahead", "crashing")
    desk.submit()
    desk.until(lambda: desk.status()["crashing"]["state"] == "failed", "the canary's end")
    desk.until_idle()
    rows = reasons(desk)
    for name in ("second", "other"):
        assert rows[name][0] == "stopped" and rows[name][1].startswith("its canary crashing is failed (")
        assert "3 failed attempts" in rows[name][1]
        assert desk.run(name).newest_attempt() == 0
    assert "submit again" in desk.type("explain", "demo/other")
    assert "canary: second starts first" in desk.submit()
    desk.until(lambda: all(desk.status()[name]["state"] == "complete" for name in ("second", "other")), "the others")
    desk.until_idle()
    assert desk.processes() == []


def test_debug_uses_all_tasks_of_existing_allocation(desk):
    desk.sweep.write_text(desk.text)
    debug = [sys.executable, ROOT / "jobs", "debug", "--sweep", desk.sweep, "--run", "ahead", "--out", desk.folder]
    command = ["salloc", "-p", "low", "-N", "2", "--ntasks-per-node=1", *debug, "stages.pretrain.samples=160"]
    environment = {**os.environ, "FLIP_RUNS": str(desk.runs), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=desk.folder, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    copy = RunDir(done.stdout.split("a scratch copy: ")[1].splitlines()[0])
    assert read_json(copy.result)["world"] == 2 and not desk.runs.exists()
    desk.until_idle()
