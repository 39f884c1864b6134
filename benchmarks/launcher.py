"""The launcher: planning and submitting 50 runs, `status` of 200, every `--help`, beside submitit and Hydra.

Slurm's commands are stand-ins in a temporary folder that answer at once, so that the time is the launchers' own. Peers:
a loop of `submitit.submit`, and a Hydra multirun by its submitit launcher, which would wait for its jobs' results (here
it is told that they have come). Limits are judged in what is printed (ok, missed).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import os
import subprocess
import tempfile
import time
from importlib import metadata
from typing import Any

from benchmarks import results
from benchmarks.results import median, rounded
from flip.rundir import RunDir, write_json
from jobs.cluster import Job, Shape
from jobs.profile import Profile
from jobs.slurm import SlurmCluster

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"plan": 2.0, "status": 1.0, "help": 0.3}
"""Seconds."""
SHAPES = (Shape(1, 8, 8, 12, 24.0), Shape(4, 8, 8, 12, 24.0))
NO_COMMANDS = ("supervisor", "worker", "evaluator", "rank")
"""Files that can be run, but that nobody types."""
PEERS = ("submitit", "hydra-core", "hydra-submitit-launcher")

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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few runs, once: to see that it works")
    parser.add_argument("--repeats", type=int, default=5, help="medians are over these (default: %(default)s)")
    results.options(parser, "launcher")
    chosen = parser.parse_args(arguments)
    runs, many, repeats = (4, 6, 1) if chosen.quick else (50, 200, chosen.repeats)
    results.publish(measure(runs, many, repeats), chosen)
    return 0


def measure(runs: int, many: int, repeats: int) -> dict[str, Any]:
    """All figures. ``runs`` are planned and submitted, ``many`` are looked at."""
    facts = results.machine()
    with tempfile.TemporaryDirectory(prefix="flip-launcher-") as name:
        site = Site(Path(name))
        return {
            "benchmark": "launcher",
            "machine": facts,
            "plan": {"runs": runs} | judged("plan", median(lambda: site.plan(runs), repeats)),
            "submit": {"runs": runs, "shapes": len(SHAPES)} | site.counted(lambda: site.submit(runs), repeats),
            "status": {"runs": many} | status(site, many, repeats),
            "help": help_(site, repeats),
            "peers": {
                "versions": {name: version(name) for name in PEERS},
                "submitit_loop": site.counted(lambda: site.submitit(runs), repeats),
                "hydra_multirun": site.hydra(runs, repeats),
            },
        }


def judged(limit: str, seconds: float) -> dict[str, Any]:
    reach = LIMITS[limit]
    return {"seconds": rounded(seconds), "limit": reach, "verdict": "ok" if seconds < reach else "missed"}


def version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


class Site:
    """A temporary folder with Slurm's commands, which note every call and answer at once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls, self.rows = folder, folder / "calls", folder / "rows"
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
        """A folder of its own for each repetition."""
        self.number += 1
        made = self.folder / f"s{self.number}"
        made.mkdir()
        return made

    def called(self, name: str) -> int:
        return self.calls.read_text().split().count(name) if self.calls.exists() else 0

    def counted(self, do: Any, repeats: int) -> dict[str, Any]:
        """Median seconds, and how often one repetition called sbatch."""
        before = self.called("sbatch")
        seconds = median(do, repeats)
        return {"seconds": rounded(seconds), "sbatch_calls": (self.called("sbatch") - before) // repeats}

    def command(self, *words: object, cwd: Path | None = None) -> str:
        line = [sys.executable, *map(str, words)]
        done = subprocess.run(line, capture_output=True, text=True, env=self.environment, cwd=cwd or self.folder)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(line)}: exit code {done.returncode}\n{done.stderr}")
        return done.stdout

    # -- ours ----------------------------------------------------------------------------------------------------------

    def plan(self, runs: int) -> None:
        """The dry run of a sweep as a person types it: resolved, validated, costed; its data are nominal."""
        sweep = self.folder / "bench.yaml"
        grid = ", ".join(f"{(i + 1) / 100:g}" for i in range(runs))
        base = (ROOT / "sweeps" / "data_scaling.yaml").read_text(encoding="utf-8").split("\nruns:")[0]
        sweep.write_text(f"{base}\ngrid:\n  optim.weight_decay: [{grid}]\n", encoding="utf-8")
        text = self.command(ROOT / "jobs" / "submit.py", "--sweep", sweep, "--cluster", "h100", "--dry-run", "--json")
        found = len(json.loads(text)["runs"])
        if found != runs:
            raise SystemExit(f"{found} runs were planned in place of {runs}")

    def submit(self, runs: int) -> None:
        """Run directories of two shapes, handed to the Slurm cluster."""
        folder = self.fresh() / "bench"
        jobs = []
        for i in range(runs):
            run = RunDir(folder / f"run{i}")
            run.path.mkdir(parents=True)
            jobs.append(Job(run, ROOT, SHAPES[i % len(SHAPES)]))
        SlurmCluster(Profile(name="bench", kind="slurm")).submit(jobs)

    # -- peers ---------------------------------------------------------------------------------------------------------

    def submitit(self, runs: int) -> None:
        """One job after the other, as its documentation begins."""
        import submitit

        executor = submitit.SlurmExecutor(self.fresh())
        for i in range(runs):
            executor.submit(time.sleep, i)

    def hydra(self, runs: int, repeats: int) -> dict[str, Any]:
        if version("hydra-submitit-launcher") == "not installed":
            return {"verdict": "not installed: pip install -r requirements-bench.txt"}
        script = self.folder / "app.py"
        script.write_text(HYDRA, encoding="utf-8")
        axis = f"+run=range(0,{runs})"

        def once() -> None:
            folder = self.fresh()
            self.command(script, "-m", "hydra/launcher=submitit_slurm", axis, f"hydra.sweep.dir={folder}", cwd=folder)

        return self.counted(once, repeats)


# -- status and help ---------------------------------------------------------------------------------------------------


def status(site: Site, many: int, repeats: int) -> dict[str, Any]:
    """Seconds of the command over ``many`` runs in Slurm, a third of them after a requeue, and its calls of squeue."""
    folder, rows = site.folder / "runs" / "many", []
    for i in range(many):
        run = RunDir(folder / f"run{i}")
        run.path.mkdir(parents=True)
        run.config.write_text("schema: 1\n")
        job = {"kind": "slurm", "site": "bench", "name": "many.0f", "token": "0f", "index": i, "after": 0}
        write_json(run.path / "job.json", job)
        for n in range(1, 3 if i % 3 == 0 else 2):
            if n > 1:
                end = {"attempt": n - 1, "action": "requeue", "cause": "stopped", "reason": "preempted", "delay": 0.0}
                write_json(run.attempt(n - 1) / "end.json", end)
            run.begin_attempt({"resumes_from": 0})
        live = {"attempt": n, "samples": 5, "total": 10, "step": 5, "steps": 10, "loss": 2.0, "stage": "pretrain"}
        write_json(run.status, live | {"samples_per_second": 9.0, "eta_seconds": 9, "phase": "training", "time": 0.0})
        rows.append(f"many.0f|{i}|57_{i}|RUNNING|n1|None|N/A\n")
    site.rows.write_text("".join(rows))
    before = site.called("squeue")
    words = (ROOT / "jobs" / "status.py", "many", "--json")
    seconds = median(lambda: site.command(*words), repeats)
    found = {row["state"] for row in json.loads(site.command(*words))}
    if found != {"running"}:
        raise SystemExit(f"the runs are taken as {found}")
    return judged("status", seconds) | {"squeue_calls": (site.called("squeue") - before) // (repeats + 1)}


def help_(site: Site, repeats: int) -> list[dict[str, Any]]:
    """A row per command that a person types."""
    files = [path for room in ("jobs", "tools") for path in sorted((ROOT / room).glob("*.py"))]
    typed = [path for path in files if "__main__" in path.read_text(encoding="utf-8") and path.stem not in NO_COMMANDS]
    return [
        {"command": str(path.relative_to(ROOT))}
        | judged("help", median(lambda path=path: site.command(path, "--help"), repeats))
        for path in typed
    ]


if __name__ == "__main__":
    sys.exit(main())
