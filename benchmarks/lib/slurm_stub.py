"""Slurm commands that answer at once, and timings of the launcher and its peers against them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.lib import results
from flip.runs.rundir import RunDir, write_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job, JobResources
from jobs.slurm.backend import SlurmBackend

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"plan": 2.0, "status": 1.0, "help": 0.3}
"""Seconds."""
SHAPES = (JobResources(1, 8, 8, 12, 24.0), JobResources(4, 8, 8, 12, 24.0))

HYDRA = """
import hydra, submitit
from hydra.core.utils import JobReturn, JobStatus

# else it stays until its jobs have ended
submitit.Job.results = lambda job: [JobReturn(_return_value=None, status=JobStatus.COMPLETED)]

@hydra.main(version_base=None, config_path=None)
def main(config) -> None:
    pass

main()
"""


def judged(limit: str, run: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Seconds of a call, median, least and most, and its limit."""
    result = results.spread([results.seconds(run) for _ in range(repeats)], "seconds")
    reach = LIMITS[limit]
    return result | {"limit": reach, "verdict": "ok" if result["seconds"] < reach else "missed"}


class Site:
    """A temporary folder with Slurm's commands, which record every call and answer at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        self.rows = folder / "rows"
        self.number = 0
        (folder / "bin").mkdir()
        answers = {
            "sbatch": "echo Submitted batch job 57",
            "squeue": f"cat {self.rows}",
            "scontrol": "echo ClusterName = bench",
            "srun": ":",
        }
        for name, answer in answers.items():
            path = folder / "bin" / name
            path.write_text(f"#!/bin/sh\necho {name} >>{self.calls}\n{answer}\n")
            path.chmod(0o755)
        self.rows.touch()
        os.environ["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
        self.environment = {**os.environ, "FLIP_RUNS": str(folder / "runs")}

    def fresh(self) -> Path:
        """A new folder for each repetition."""
        self.number += 1
        made = self.folder / f"s{self.number}"
        made.mkdir()
        return made

    def called(self, name: str) -> int:
        if self.calls.exists():
            return self.calls.read_text().split().count(name)
        return 0

    def command(self, *argv: object, cwd: Path | None = None, code: int = 0) -> str:
        """The output of a Python program that ends with this exit code. Raises SystemExit."""
        line = [sys.executable, *map(str, argv)]
        done = subprocess.run(line, capture_output=True, text=True, env=self.environment, cwd=cwd or self.folder)
        if done.returncode != code:
            raise SystemExit(f"{' '.join(line)}: exit code {done.returncode}\n{done.stderr}")
        return done.stdout

    # -- ours ----------------------------------------------------------------------------------------------------------

    def plan(self, runs: int) -> None:
        """The dry run of a sweep: resolved, validated, costed; its data are nominal."""
        sweep = self.folder / "bench.yaml"
        grid = ", ".join(f"{(i + 1) / 100:g}" for i in range(runs))
        base = (ROOT / "sweeps" / "data_scaling.yaml").read_text(encoding="utf-8").split("\nruns:")[0]
        sweep.write_text(f"{base}\ngrid:\n  optim.weight_decay: [{grid}]\n", encoding="utf-8")
        text = self.command(ROOT / "jobs" / "submit.py", "--sweep", sweep, "--cluster", "h100", "--dry-run", "--json")
        count = len(json.loads(text)["runs"])
        if count != runs:
            raise SystemExit(f"{count} runs were planned in place of {runs}")

    def submit(self, runs: int) -> None:
        """Run directories with two kinds of resources, submitted to the Slurm stub."""
        folder = self.fresh() / "bench"
        jobs = []
        for i in range(runs):
            run = RunDir(folder / f"run{i}")
            run.path.mkdir(parents=True)
            jobs.append(Job(run, ROOT, SHAPES[i % len(SHAPES)]))
        SlurmBackend(ClusterProfile(name="bench", kind="slurm")).submit(jobs)

    # -- peers ---------------------------------------------------------------------------------------------------------

    def submitit(self, runs: int) -> None:
        """One job after the other, as in the first example of its documentation."""
        import submitit

        executor = submitit.SlurmExecutor(self.fresh())
        for i in range(runs):
            executor.submit(time.sleep, i)

    def hydra(self, runs: int) -> None:
        """A multirun over a range, as in the documentation of its launcher; interpreter and imports included."""
        script = self.folder / "app.py"
        folder = self.fresh()
        script.write_text(HYDRA, encoding="utf-8")
        axis = f"+run=range(0,{runs})"
        self.command(script, "-m", "hydra/launcher=submitit_slurm", axis, f"hydra.sweep.dir={folder}", cwd=folder)


def status(site: Site, many: int, repeats: int) -> dict[str, Any]:
    """Seconds of the command over ``many`` runs in Slurm, a third of them after a requeue, and its calls of squeue."""
    folder = site.folder / "runs" / "many"
    rows = []
    for i in range(many):
        run = RunDir(folder / f"run{i}")
        run.path.mkdir(parents=True)
        run.config.write_text("schema: 1\n")
        job = {"kind": "slurm", "site": "bench", "name": "many.0f", "token": "0f", "index": i, "after": 0}
        write_json(run.path / "job.json", job)
        for n in range(1, 3 if i % 3 == 0 else 2):
            if n > 1:
                end = {"attempt": n - 1, "action": "requeue", "cause": "stopped", "reason": "preempted", "delay": 0.0}
                write_json(run.attempt(n - 1) / "end.json", end | {"committed": True})
            run.start_attempt({"resumes_from": 0})
        live = {"attempt": n, "samples": 5, "total": 10, "step": 5, "steps": 10, "loss": 2.0, "stage": "pretrain"}
        write_json(run.status, live | {"samples_per_second": 9.0, "eta_seconds": 9, "phase": "training", "time": 0.0})
        rows.append(f"many.0f|{i}|57_{i}|RUNNING|n1|None|N/A\n")
    site.rows.write_text("".join(rows))
    before = site.called("squeue")
    argv = (ROOT / "jobs", "status", "many", "--json")
    judgement = judged("status", lambda: site.command(*argv), repeats)
    states = {row["state"] for row in json.loads(site.command(*argv))}
    if states != {"running"}:
        raise SystemExit(f"the runs are taken as {states}")
    return judgement | {"squeue_calls": (site.called("squeue") - before) // (repeats + 1)}
