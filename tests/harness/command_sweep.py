"""Sweeps of programs (`command:`) as a user submits them on this machine."""

import hashlib
import json
import shutil
from pathlib import Path

import yaml

from flip.runs.rundir import RunDir
from jobs.host import processes
from jobs.local.supervisor import is_served
from tests.harness.common import ROOT, run_script, wait_until

PROGRAMS = ROOT / "tests" / "programs"


class CommandSweep:
    """A folder with programs and a sweep file ``demo.yaml``; its runs are below ``runs/demo``."""

    def __init__(self, folder):
        self.folder = folder
        self.runs = folder / "runs"
        self.code = folder / "code"
        self.code.mkdir(parents=True)
        self.table = {
            "command": ["python3", "count.py", "--lr", "{lr}", "--steps", "60"],
            "code": "code",
            "set": {"lr": 0.1},
            "resume": {"folder": "out", "pattern": "step-*.json", "arguments": ["--resume", "{checkpoint}"]},
            "metrics": {"file": "metrics.jsonl", "total": 60},
            "resources": {"cpus": 1},
        }
        self.add("count.py")

    def add(self, name):
        shutil.copy(PROGRAMS / name, self.code / name)

    def write(self, name, text):
        """Make ``text`` the program ``name`` of the sweep."""
        (self.code / name).write_text(text)

    def type(self, command, *arguments, code=0):
        """Run ``flip COMMAND`` and return its output. The command must exit with ``code``."""
        done = run_script("jobs", command, *arguments, cwd=self.folder, runs=self.runs, timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *arguments, code=0):
        (self.folder / "demo.yaml").write_text(yaml.safe_dump(self.table, sort_keys=False))
        return self.type("submit", "demo.yaml", "--yes", *arguments, code=code)

    def run(self, name="demo"):
        return RunDir(self.runs / "demo" / name)

    def state(self, name="demo"):
        rows = json.loads(self.type("status", "demo", "--json"))
        return next(row for row in rows if row["run"] == name)

    def until(self, condition, event, seconds=300.0):
        return wait_until(condition, event, seconds, 0.05, lambda: self.type("status", "demo") + self.logs())

    def until_over(self):
        self.until(lambda: not is_served(self.runs / "demo"), "the end of the supervisor")

    def until_saved(self, n, name="demo"):
        """Wait until attempt ``n`` has a recorded checkpoint."""
        saved = self.run(name).checkpoints / "command"
        self.until(lambda: list(saved.glob(f"*-{n}/commit.json")), f"a checkpoint of attempt {n}")

    def rank(self, n, name="demo", rank=0):
        """The pid of a rank of an attempt."""
        path = self.run(name).attempt(n) / "pids.json"

        def pid():
            rows = json.loads(path.read_text()) if path.exists() else []
            return next((row["pid"] for row in rows if row["rank"] == rank), None)

        return self.until(pid, f"rank {rank} of attempt {n}")

    def program(self, n, name="demo", rank=0):
        """The pid of the program of a rank of an attempt."""
        parent = str(self.rank(n, name, rank))

        def child():
            numbers = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
            return next((pid for pid in numbers if processes.read_stat(pid)[1][1:2] == [parent]), None)

        return self.until(child, f"the program of attempt {n}")

    def final(self, name="demo"):
        return (self.run(name).path / "work" / "out" / "final").read_text()

    def ends(self, name="demo"):
        """(cause, S of the newest checkpoint) of each attempt that has ended."""
        run = self.run(name)
        records = [run.attempt(n) / "end.json" for n in run.attempt_numbers()]
        rows = [json.loads(path.read_text()) for path in records if path.exists()]
        return [(row["cause"], row["commits"]) for row in rows]

    def reason(self, n, name="demo"):
        return json.loads((self.run(name).attempt(n) / "end.json").read_text())["reason"]

    def logs(self):
        files = sorted(self.runs.glob("demo/*/logs/[0-9]*/*"))
        return "".join(f"\n{file}:\n{file.read_text(errors='replace')[-2000:]}" for file in files)


def count_result(steps, lr):
    """What count.py writes at its end."""
    state = str(lr)
    for step in range(1, steps + 1):
        state = hashlib.sha256(f"{state} {step}".encode()).hexdigest()
    return state
