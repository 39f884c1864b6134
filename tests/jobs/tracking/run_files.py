"""Writes the files of a run as ranks do: attempts, metric lines, checkpoints, scores."""

import json

from flip.runs import checkpoint_folder
from flip.runs.rundir import write_json

BATCH = 8


def attempt(run, resumes, steps):
    """Start an attempt that resumes after step ``resumes`` and logs ``steps``. Its losses contain its number."""
    n = run.start_attempt({})
    run.record_ready(n, resumes * BATCH)
    log(run, n, steps)
    return n


def log(run, n, steps, **fields):
    run.metrics.mkdir(exist_ok=True)
    with open(run.metrics / f"{n}.jsonl", "a") as file:
        for step in steps:
            line = {"step": step, "samples": step * BATCH, "stage": "pretrain", "loss": n + step / 100, "time": 1e9}
            file.write(json.dumps(line | fields) + "\n")


def save(run, n, step):
    folder = checkpoint_folder.folder(run, "pretrain", step * BATCH, n)
    folder.mkdir(parents=True)
    checkpoint_folder.complete_checkpoint(folder, {"stage": "pretrain", "samples": step * BATCH, "attempt": n})


def score(run, step, top1):
    run.eval.mkdir(exist_ok=True)
    item = {"name": "val", "precision": "fp32", "task": "zeroshot", "top1": top1}
    write_json(run.eval / f"pretrain-{step * BATCH}.json", {
        "stage": "pretrain", "samples": step * BATCH, "evaluations": [item],
    })  # fmt: skip


def complete(run, step):
    write_json(run.result, {"stage": "pretrain", "samples": step * BATCH, "steps": step, "seconds": 1.0})
