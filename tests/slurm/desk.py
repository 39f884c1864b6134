"""What a person does on a cluster, typed as they type it: a real Slurm, real training, the commands of jobs/."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from flip.runs.rundir import RunDir, read_json
from jobs.host import slurm_cli

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60


class Desk:
    """A Slurm with whole nodes for every run, a folder for runs, and the command line."""

    def __init__(self, here, folder, data, canary=0):
        self.here, self.folder, self.runs = here, folder, folder / "runs"
        self.sweep, self.cluster = folder / "demo.yaml", folder / "whole.yaml"
        own = here.profile.read_text()
        # A run of the name "crashing" gets too little address space to load torch.
        own += f"canary: {canary}\noptions: {{exclusive: ''}}\n"
        own += "setup: ['case $FLIP_RUN in *crashing) ulimit -v 700000;; esac']\n"
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
        return slurm_cli.queue([record["name"]])[record["name"], record["index"]]

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
