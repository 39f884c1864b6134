"""Run directories as the trainer and the launcher leave them, written by hand: complete, failed, half done, queued."""

import json
import math

from flip.config.derived import stage_spans
from flip.config.identity import identity
from flip.config.merge import dump, merge
from flip.runs.rundir import RunDir, write_json
from jobs.common.cluster_profile import ClusterProfile
from jobs.planning.run_cost import estimate
from jobs.workloads.training import TrainingWorkload

SETS = [
    {"name": "validation", "manifest": "/data/noto", "classes": "/data/classes.json", "role": "validation"},
    {"name": "twemoji", "manifest": "/data/twemoji", "classes": "/data/classes.json", "role": "test"},
    {"name": "openmoji", "manifest": "/data/openmoji", "classes": "/data/classes.json", "role": "test"},
]


def config(mask="0.5", seed=0, samples=12_800, data="train", rate=None):
    stage = {"name": "pretrain", "samples": samples, "batch": 128, "mask": mask}
    if rate is not None:
        stage["base_lr"] = rate
    layer = {
        "seed": seed,
        "model": {"size": "tiny"},
        "data": {"manifest": f"/data/{data}", "samples": 5000, "chunk": 1, "lanes": 8, "workers": 1, "buffer": 1 << 30},
        "stages": [stage],
        "compute": {"device": "cpu", "precision": "fp32", "attention": "sdpa", "threads": 1, "deterministic": "yes"},
        "evaluate": {"every": 3200, "sets": SETS},
    }
    return merge([("test", layer)])


def wanted(name="a", **fields):
    """A resolved run, as the planner receives it."""
    resolved = config(**fields)
    return TrainingWorkload(name, resolved, identity(resolved, ""), estimate(resolved, ClusterProfile()))


def make(folder, name, mask="0.5", seed=0, top1=0.2, steps=None, end=None, complete=True, speed=400.0, rate=None):
    """Write a run directory below ``folder`` with ``steps`` logged steps; ``end`` is end.json of the only attempt."""
    run = RunDir(folder / name)
    resolved = config(mask, seed, rate=rate)
    total = stage_spans(resolved)[-1].steps
    steps = total if steps is None else steps
    run.path.mkdir(parents=True)
    run.config.write_text(dump(resolved), encoding="utf-8")
    write_json(run.identity, {"hash": "x", "schema": 2, "code": "c0de", "config": {}})
    if steps:
        run.start_attempt({"host": "here", "resumes_from": 0})
        run.metrics.mkdir()
        lines = [_line(step, speed) for step in range(10, steps + 1, 10)]
        (run.metrics / "1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        for samples in range(3200, 128 * steps + 1, 3200):
            _evaluation(run, samples, top1 * samples / 12_800)
    if end is not None:
        write_json(run.attempt(1) / "end.json", {"attempt": 1, "commits": 0, "committed": False, "delay": 0.0, **end})
    if complete:
        _complete(run, total, top1, speed)
    return run


def write_result(run, result):
    """Replace result.json, and the scores of its position in eval/, as training writes both."""
    write_json(run.result, result)
    point = {key: result[key] for key in ("stage", "samples", "seconds", "evaluations")}
    write_json(run.eval / f"{result['stage']}-{result['samples']}.json", point)


def score(name, role, top1, n=1172):
    half = 1.96 * math.sqrt(top1 * (1 - top1) / n)
    interval = [top1 - half, top1 + half]
    return {
        "name": name,
        "task": "zeroshot",
        "role": role,
        "top1": top1,
        "top5": top1,
        "n": n,
        "interval": interval,
        "chance": 1 / n,
        "precision": "fp32",
    }


def _line(step, speed):
    return {
        "step": step, "samples": 128 * step, "stage": "pretrain", "attempt": 1, "loss": 5 - step / 50,
        "accuracy": step / 200, "lr": 1e-3, "samples_per_second": speed, "seconds": 128 * step / speed,
        "data_wait": 0.1, "mfu": 0.3,
    }  # fmt: skip


def _evaluation(run, samples, top1):
    run.eval.mkdir(exist_ok=True)
    record = {"stage": "pretrain", "samples": samples, "evaluations": [score("validation", "validation", top1)]}
    write_json(run.eval / f"pretrain-{samples}.json", record)


def _complete(run, steps, top1, speed):
    samples = 128 * steps
    """The scores of openmoji are one point lower, so that sets differ."""
    evaluations = [score(i["name"], i["role"], top1 - 0.01 * (i["name"] == "openmoji")) for i in SETS]
    write_json(
        run.eval / f"pretrain-{samples}.json", {"stage": "pretrain", "samples": samples, "evaluations": evaluations}
    )
    write_json(
        run.attempt(1) / "end.json",
        {
            "attempt": 1,
            "action": "done",
            "cause": "complete",
            "reason": "",
            "commits": samples,
            "committed": True,
            "delay": 0.0,
        },
    )
    write_json(run.result, {
        "run": run.name, "stage": "pretrain", "samples": samples, "steps": steps, "seconds": samples / speed,
        "samples_per_second": speed, "world": 1, "parameters": {"image": 1, "text": 1, "total": 3}, "flops": 1e12,
        "evaluations": evaluations, "attempts": 1, "peak_memory": 1,
    })  # fmt: skip
