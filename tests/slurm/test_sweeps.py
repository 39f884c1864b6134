"""What a person does on a cluster, typed as they type it: a real Slurm, real training, the commands of jobs/."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flip.rundir import RunDir, create_json, read_json
from jobs import scheduler

pytestmark = [pytest.mark.slurm, pytest.mark.kill]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 60


class Desk:
    """A Slurm with whole nodes for every run, a folder for runs, and the command line."""

    def __init__(self, here, folder, data):
        self.here, self.folder, self.runs = here, folder, folder / "runs"
        self.sweep, self.cluster = folder / "demo.yaml", folder / "whole.yaml"
        own = here.profile.read_text()
        # A run of the name "crashing" gets too little address space to load torch.
        own += "options: {exclusive: ''}\nsetup: ['case $FLIP_RUN in *crashing) ulimit -v 700000;; esac']\n"
        self.cluster.write_text(own)
        words = len(json.loads((data / "tokenizer.json").read_text())["model"]["vocab"])
        self.text = f"""
title: Three runs
set:
  model: {{size: tiny, text: {{vocabulary: {words}}}}}
  data: {{manifest: {data}, tokenizer: {data}/tokenizer.json, workers: 0, block: 1}}
  stages: [{{name: pretrain, samples: {STEPS * 16}, batch: 16, mask: 0.5}}]
  compute: {{device: cpu, threads: 1}}
  checkpoint: {{samples: 80}}
  monitor: {{log_every: 1, status_seconds: 0.1}}
  resources: {{nodes: 1, processes: 1, cpus: 1, hours: 0.5}}
runs:
  preempted: {{}}
  crashing: {{}}
  clean: {{}}
"""

    def type(self, command, *words, code=0):
        """Standard output of ``python jobs/COMMAND.py``, which must end with this code."""
        line = [sys.executable, ROOT / "jobs" / f"{command}.py", *words]
        environment = {**os.environ, "FLIP_RUNS": str(self.runs), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, capture_output=True, text=True, cwd=self.folder, env=environment, timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *words, code=0):
        self.sweep.write_text(self.text)
        return self.type("submit", "--sweep", self.sweep, "--cluster", self.cluster, *words, code=code)

    def status(self):
        """Run -> row of ``status --json``."""
        return {row["run"]: row for row in json.loads(self.type("status", "demo", "--json"))}

    def run(self, name):
        return RunDir(self.runs / "demo" / name)

    def job(self, name):
        record = read_json(self.run(name).path / "job.json")
        return scheduler.queue([record["name"]])[record["name"], record["index"]]

    def until(self, condition, what, seconds=150):
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, f"waited in vain for {what}\n{self.type('status', 'demo')}\n{self.logs()}"
            time.sleep(0.2)

    def until_step(self, name, step, attempt=1):
        def there():
            live = read_json(self.run(name).status) or {}
            return live.get("attempt", 0) >= attempt and live.get("step", 0) >= step

        self.until(there, f"step {step} of {name}")

    def until_idle(self):
        self.until(lambda: not self.here.call("squeue", "-h").strip(), "an empty queue")

    def logs(self):
        return "\n".join(f"--- {p}\n{p.read_text()[-800:]}" for p in sorted(self.runs.glob("demo/*/logs/*/*.err")))

    def processes(self):
        lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        return [line for line in lines.splitlines() if str(self.runs) in line]


@pytest.fixture
def desk(start_slurm, tmp_path, emoji):
    return Desk(start_slurm(nodes=4, gpus=0, cpus=2), tmp_path, emoji)


def test_an_array_of_three_one_preempted_one_crashing_one_clean(desk):
    desk.submit()
    arrays = list((desk.runs / "demo" / ".slurm").iterdir())
    assert len(arrays) == 1 and len((arrays[0] / "runs").read_text().splitlines()) == 3
    desk.until_step("preempted", 7)
    node = desk.job("preempted").nodes
    desk.here.preempt(nodes=1, nodelist=node, seconds=3)
    ended = ("complete", "failed")
    desk.until(lambda: all(row["state"] in ended for row in desk.status().values()), "the end of all")
    rows = desk.status()
    assert {name: (row["state"], row["attempts"]) for name, row in rows.items()} == {
        "preempted": ("complete", 2),
        "crashing": ("failed", 3),
        "clean": ("complete", 1),
    }
    assert "3 failed attempts without a new commit" in rows["crashing"]["reason"]
    assert "read the logs" in desk.type("status", "demo/crashing")
    assert "Traceback" in desk.type("logs", "demo/crashing", "--err")
    assert [row["step"] for row in (rows["preempted"], rows["clean"])] == [STEPS, STEPS]
    desk.until_idle()
    assert desk.processes() == []
    assert "--retry" in desk.submit()
    assert len(list((desk.runs / "demo" / ".slurm").iterdir())) == 1, "a second submit starts nothing"


def test_cancelled_by_us_and_by_hand_for_good_until_retried(desk):
    desk.text = desk.text.replace(f"samples: {STEPS * 16}", "samples: 160000").replace("crashing", "by_hand")
    desk.submit("--only", "[pb]*")
    for name in ("preempted", "by_hand"):
        desk.until_step(name, 7)
    assert desk.type("cancel", "demo/preempted", "--yes", "--why", "wrong rate").strip() == "cancelled: preempted"
    desk.here.call("scancel", desk.job("by_hand").id)
    desk.until(lambda: all(row["state"] == "cancelled" for row in desk.status().values()), "both cancelled")
    assert desk.status()["preempted"]["reason"].endswith("wrong rate")
    desk.until_idle()
    time.sleep(10)  # longer than a requeue takes
    assert {name: (row["state"], row["attempts"]) for name, row in desk.status().items()} == {
        "preempted": ("cancelled", 1),
        "by_hand": ("cancelled", 1),
    }
    assert desk.here.call("squeue", "-h").strip() == "" and desk.processes() == []
    saved = {name: read_json(desk.run(name).attempt(1) / "end.json")["commits"] for name in ("preempted", "by_hand")}
    assert all(saved.values()), "both saved before they left"
    desk.submit("--only", "[pb]*", code=0)
    assert desk.job("by_hand").state != "PENDING", "a cancelled run is not taken up without --retry"
    desk.submit("--only", "[pb]*", "--retry")
    for name in ("preempted", "by_hand"):
        desk.until_step(name, 1, attempt=2)
        assert read_json(desk.run(name).attempt(2) / "start.json")["resumes_from"] == saved[name]
    create_json(desk.run("by_hand").cancel, {"who": "ann", "why": "the signal came before anybody listened"})
    desk.until(lambda: desk.status()["by_hand"]["state"] == "cancelled", "a run that only saw cancel.json")
    for _ in range(2):  # the second time it is not waited for
        desk.type("cancel", "demo/preempted", "--yes")
    desk.until(lambda: desk.status()["preempted"]["state"] == "cancelled", "its end")
    desk.until_idle()
    assert desk.processes() == []
