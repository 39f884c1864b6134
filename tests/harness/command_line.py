"""The commands of jobs/ as a user types them, on small real data: a folder for runs, a sweep file, a command line."""

import json
import subprocess

from flip.runs.rundir import RunDir, read_json
from jobs.host import slurm_cli
from jobs.local.supervisor import is_served
from tests.harness.common import run_script, wait_until

STEPS = 60
"""Steps of a run of SlurmCommandLine."""


class SubmitCommandLine:
    """A folder with data and a sweep file, and the command line."""

    def __init__(self, folder, data):
        self.folder = folder
        self.runs = folder / "runs"
        self.sweep = folder / "demo.yaml"
        self.text = f"""
title: A demonstration
set:
  model: {{size: tiny}}
  data: {{manifest: {data}, tokenizer: {data}/tokenizer.json, workers: 0, block: 1}}
  stages: [{{name: pretrain, samples: 48, batch: 16}}]
  compute: {{threads: 1}}
  evaluate:
    sets: [{{name: small, manifest: {data}, classes: {data}/classes.json}}]
runs:
  half: {{stages.pretrain.mask: 0.5}}
  whole: {{stages.pretrain.mask: 0}}
"""
        self.sweep.write_text(self.text)

    def submit(self, *arguments, sweep=None, env=None):
        words = ("--sweep", sweep or self.sweep, *arguments)
        done = run_script("jobs/submit.py", *words, cwd=self.folder, runs=self.runs, env=env)
        if "--watch" in arguments:  # runs are complete before their supervisor has recorded that
            for folder in self.runs.glob("[!.]*"):
                wait_until(lambda folder=folder: not is_served(folder), "the end of the supervisor")
        return done

    def refuses(self, code, message, *arguments):
        done = self.submit(*arguments)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not list(self.runs.glob("*/[!.]*"))


class JobsCommandLine:
    """Any command of jobs/ or tools/ on a local sweep of a tiny model."""

    def __init__(self, folder, data):
        self.folder = folder
        self.runs = folder / "runs"
        self.head = f"""
set:
  model: {{size: tiny}}
  data: {{manifest: {data}, tokenizer: {data}/tokenizer.json, workers: 0, block: 1, lanes: 8}}
  stages: [{{name: pretrain, samples: 48, batch: 16, base_lr: 0.01}}]
  checkpoint: {{samples: 16, keep: 9}}
  compute: {{threads: 1}}
"""

    def type(self, command, *arguments, runs="runs:\n  base: {}\n", code=0):
        (self.folder / "demo.yaml").write_text(self.head + runs)
        output = self.call(command, "--sweep", self.folder / "demo.yaml", *arguments, code=code)
        if "--watch" in arguments:  # runs are complete before their supervisor has recorded that
            wait_until(lambda: not is_served(self.runs / "demo"), "the end of the supervisor")
        return output

    def call(self, command, *arguments, code=0):
        env = {"TMPDIR": str(self.folder)}
        done = run_script("jobs", command, *arguments, cwd=self.folder, runs=self.runs, env=env)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def run(self, name):
        return RunDir(self.runs / "demo" / name)

    def tree(self):
        return {path: path.stat().st_mtime_ns for path in self.runs.rglob("*")}


class SlurmCommandLine:
    """A Slurm with whole nodes for every run, a folder for runs, and the command line."""

    def __init__(self, sandbox, folder, data, canary=0):
        self.here = sandbox
        self.folder = folder
        self.runs = folder / "runs"
        self.sweep = folder / "demo.yaml"
        self.cluster = folder / "whole.yaml"
        own = sandbox.profile.read_text()
        # A run of the name "crashing" gets too little address space to load torch.
        own += f"canary: {canary}\noptions: {{exclusive: ''}}\n"
        own += "setup: ['case $FLIP_RUN in *crashing) ulimit -v 700000;; esac']\n"
        self.cluster.write_text(own)
        vocabulary_size = len(json.loads((data / "tokenizer.json").read_text())["model"]["vocab"])
        self.text = f"""
title: Three runs
set:
  model: {{size: tiny, text: {{vocabulary: {vocabulary_size}}}}}
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

    def type(self, command, *arguments, code=0):
        """Run ``flip COMMAND`` and return its output. The command must exit with ``code``."""
        done = run_script("jobs", command, *arguments, cwd=self.folder, runs=self.runs, timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *arguments, code=0):
        self.sweep.write_text(self.text)
        return self.type("submit", "--sweep", self.sweep, "--cluster", self.cluster, *arguments, code=code)

    def status(self):
        """Return run -> row of ``status --json``."""
        return {row["run"]: row for row in json.loads(self.type("status", "demo", "--json"))}

    def run(self, name):
        return RunDir(self.runs / "demo" / name)

    def job(self, name):
        record = read_json(self.run(name).path / "job.json")
        return slurm_cli.queue([record["name"]])[record["name"], record["index"]]

    def until(self, condition, event, seconds=150):
        wait_until(condition, event, seconds, 0.2, lambda: f"{self.type('status', 'demo')}\n{self.logs()}")

    def until_step(self, name, step, attempt=1):
        def reached():
            live = read_json(self.run(name).status) or {}
            return live.get("attempt", 0) >= attempt and live.get("step", 0) >= step

        self.until(reached, f"step {step} of {name}")

    def until_idle(self):
        self.until(lambda: not self.here.call("squeue", "-h").strip(), "an empty queue")

    def logs(self):
        return "\n".join(f"--- {p}\n{p.read_text()[-800:]}" for p in sorted(self.runs.glob("demo/*/logs/*/*.err")))

    def processes(self):
        lines = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        return [line for line in lines.splitlines() if str(self.runs) in line]
