"""Sweeps with runs in every state, to inspect reports. The configurations are real. The numbers come from a formula and
a seed; they are not results."""

import json
import math
import random

from flip.common.host import Host
from flip.config.derived import stage_spans
from flip.config.identity import identity
from flip.config.merge import dump
from flip.config.resolve import dataset_facts, resolve_auto
from flip.model_costs import parameters
from flip.runs.rundir import RunDir, write_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.paths import SWEEPS
from jobs.planning.run_cost import estimate
from jobs.sweeps.sweep_file import read_sweep
from tests.jobs.outcomes import score, write_result

NODE = Host(cores=96, memory=10**12, bf16=True, cuda=True)
START_TIME = 1_790_000_000.0
CRASH = "CUDA error: device-side assert triggered; three crashes without a checkpoint"


def sweep(root, name, progress=None, seeds=None, lines=200, more=()):
    """Runs of sweeps/NAME.yaml below ``root``. ``progress``: run -> (share done, state), default (1.0, "complete");
    states: complete, running, failed, preempted (complete, after several attempts), queued."""
    loaded = read_sweep(SWEEPS / f"{name}.yaml", list(more), seeds=seeds)
    about = {"name": name, "title": loaded.title, "notes": loaded.notes, "runs": [run.name for run in loaded.runs]}
    folder = root / name
    folder.mkdir(parents=True)
    write_json(folder / "sweep.json", {**about, "paper": loaded.paper, "rows": loaded.rows})
    for run in loaded.runs:
        config = resolve_auto(run.config, NODE, dataset_facts(run.config))
        share, state = (progress or {}).get(run.name, (1.0, "complete"))
        RunWriter(RunDir(folder / run.name), config, loaded.paper.get(run.arm), lines).write(share, state)
    return folder


class RunWriter:
    def __init__(self, run, config, row, lines):
        self.run = run
        self.config = config
        self.row = row
        self.lines = lines
        self.rng = random.Random(f"{run.name} {config.seed}")
        self.total = stage_spans(config)[-1].end
        self.cost = estimate(config, ClusterProfile()).cost.flops
        gpus = config.resources.nodes * config.resources.gpus
        self.seconds = self.cost / (gpus * 0.4 * 989e12 if gpus else 2.2e11)
        run.path.mkdir()
        run.config.write_text(dump(config), encoding="utf-8")
        write_json(run.identity, identity(config, "c0de"))

    def write(self, share, state):
        if state in ("complete", "preempted", "queued"):  # for others, reports would query a scheduler
            write_json(self.run.path / "job.json", {"after": 0, "time": START_TIME - 900})
        if state == "queued":
            return
        cuts = {"preempted": [0.21, 0.34, 0.34, 0.71], "failed": [share * 0.9, share * 0.9], "running": [share / 2]}
        edges = [0.0, *cuts.get(state, []), share]
        for first, last in zip(edges, edges[1:], strict=False):
            self.attempt(first, last, state, last is edges[-1])
        self.evaluations(share)
        if share == 1.0 and state in ("complete", "preempted"):
            self.result(len(edges) - 1)

    def attempt(self, first, last, state, final):
        samples = int(first * self.total)
        n = self.run.start_attempt({"host": "n1", "resumes_from": samples, "world": 1})
        start = START_TIME + (first + 0.03 * n) * self.seconds * 1.05
        end = int(last * self.total)
        write_json(self.run.attempt(n) / "start.json", {"attempt": n, "resumes_from": samples, "time": start})
        write_json(self.run.attempt(n) / "ready.json", {"samples": samples, "time": start + 60})
        self.run.metrics.mkdir(exist_ok=True)
        speed = self.total / self.seconds
        batch = self.config.stages[0].batch
        stages = stage_spans(self.config)
        with open(self.run.metrics / f"{n}.jsonl", "w", encoding="utf-8") as file:
            for i in range(int(first * self.lines), int(last * self.lines)):
                s = (i + 1) * self.total / self.lines
                stage = next((span.stage.name for span in stages if s <= span.end), stages[-1].stage.name)
                loss = 0.7 + 8.5 * math.exp(-6 * s / self.total) + self.rng.gauss(0, 0.06)
                record = {
                    "step": round(s / batch), "samples": round(s), "stage": stage, "attempt": n, "loss": loss,
                    "accuracy": min(0.95, 0.8 * s / self.total), "lr": 1e-3, "samples_per_second": speed,
                    "seconds": s / speed, "time": start + 60 + (s - samples) / speed, "data_wait": 0.02, "saves": 1,
                    "saving": 3.0, "storage": {"requests": 12.0},
                }  # fmt: skip
                file.write(json.dumps(record) + "\n")
        if not final or state != "running":
            if final:
                action = {"complete": "done", "preempted": "done", "failed": "stop"}.get(state)
            else:
                action = "requeue"
            if final:
                cause = {"complete": "complete", "preempted": "complete", "failed": "crash"}[state]
            else:
                cause = "crash" if state == "failed" else "stopped"
            if cause == "crash":
                reason = CRASH
            else:
                reason = ""
                if cause != "complete":
                    reason = "preempted by the scheduler"
            write_json(self.run.attempt(n) / "end.json", {
                "attempt": n, "action": action, "cause": cause, "reason": reason,
                "code": 70 if cause == "crash" else 75, "commits": end, "committed": True,
                "time": start + 60 + (last - first) * self.seconds + 20, "delay": 0,
            })  # fmt: skip

    def top1(self, name, share):
        """A formula of cost and data that resembles a scaling law, with noise."""
        if self.row:
            best = self.row["imagenet"] / 100 + self.rng.gauss(0, 0.003)
        else:
            flops = self.cost / 1e13
            mask = float(self.config.stages[0].mask)
            best = 1 - 0.86 * flops**-0.085 * (1 - 0.06 * (mask == 0.5)) + self.rng.gauss(0, 0.008)
            if name == "openmoji":
                best *= 0.15
            else:
                if name == "validation":
                    best *= 0.9
                else:
                    best *= 1.0
        return max(0.002, best * (1 - math.exp(-6 * share)))

    def scores(self, share, roles):
        counts = {"imagenet": 50_000}
        return [
            score(item.name, item.role, self.top1(item.name, share), counts.get(item.name, 1172))
            for item in self.config.evaluate.sets
            if item.role in roles
        ]

    def evaluations(self, share):
        self.run.eval.mkdir(exist_ok=True)
        every = self.config.evaluate.every
        for samples in range(every, int(share * self.total) + 1, every) if every else ():
            record = {"stage": "pretrain", "samples": samples, "seconds": samples / self.total * self.seconds}
            scores = self.scores(samples / self.total, ("validation",))
            write_json(self.run.eval / f"pretrain-{samples}.json", record | {"evaluations": scores})

    def result(self, attempts):
        write_result(self.run, {
            "run": self.run.name, "stage": self.config.stages[-1].name, "samples": self.total,
            "steps": stage_spans(self.config)[-1].steps, "seconds": self.seconds,
            "samples_per_second": self.total / self.seconds, "world": 1, "parameters": parameters(self.config.model),
            "flops": self.cost, "evaluations": self.scores(1.0, ("validation", "test")), "attempts": attempts,
        })  # fmt: skip


def build(root):
    """The gallery: name -> folder."""
    half = {
        "s-half-113k": (1.0, "complete"), "s-half-225k": (1.0, "preempted"), "s-all-113k": (1.0, "complete"),
        "s-all-225k": (0.7, "running"), "l-half-113k": (0.3, "running"), "l-half-225k": (0.0, "queued"),
        "l-all-113k": (0.0, "queued"), "l-all-225k": (0.0, "queued"),
    }  # fmt: skip
    failed = {"mask0": (0.4, "failed"), "mask50": (1.0, "preempted"), "mask75": (0.1, "failed")}
    return {
        "paper": sweep(root, "masking"),
        "table": sweep(root, "batch", {"mask75-16k": (0.55, "running")}),
        "half": sweep(root, "grid_small", half),
        "failed": sweep(root, "masking_small", failed),
        "seeds": sweep(root, "batch_small", seeds=[0, 1, 2]),
    }
