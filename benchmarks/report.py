"""A report of many long runs: seconds and memory of a new process; compared with parsing the same lines as JSON.

Run directories are written to a temporary folder: a grid of model, data and batch with seeds, each with metric lines,
evaluations and a result as the trainer writes them. Their numbers are random. Files are in the page cache.
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
from typing import Any, NamedTuple

import numpy as np

from benchmarks.lib import results
from benchmarks.lib.results import rounded
from flip.config.derived import stage_spans
from flip.config.merge import dump, merge
from flip.model_costs import parameters, training_flops
from flip.runs.formats import RUN_NUMBER
from flip.runs.rundir import RunDir, write_json

ROOT = Path(__file__).resolve().parents[1]
SEEDS = 3
PLAIN = """
import json, sys
from pathlib import Path
lines = 0
for path in sorted(Path(sys.argv[1]).glob("*/metrics/*.jsonl")):
    with open(path, encoding="utf-8") as file:
        lines += len([record["loss"] for record in map(json.loads, file)])
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--lines", type=int, default=10_000, help="logged steps of a run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="medians are over these (default: %(default)s)")
    results.options(parser, "report")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.runs = 7
        chosen.lines = 60
        chosen.repeats = 1
    results.publish(measure(chosen.runs, chosen.lines, chosen.repeats, chosen.seed), chosen)
    return 0


def measure(runs: int, lines: int, repeats: int, seed: int) -> dict[str, Any]:
    facts = results.machine() | results.versions(["pyarrow"])
    with tempfile.TemporaryDirectory(prefix="flip-report-") as root:
        folder = Path(root) / "many"
        written = write(folder, runs, lines, seed)
        command = [sys.executable, str(ROOT / "jobs"), "report", "many", "--root", root]
        commands = {"report": command, "plain_json": [sys.executable, "-c", PLAIN, str(folder)]}
        ended = {name: [] for name in commands}
        for _ in range(repeats):
            for name, argv in commands.items():
                ended[name].append(once(argv))
        rows = {name: report_row(each) for name, each in ended.items()}
        rows["report"] |= {"page_bytes": (folder / "report.html").stat().st_size}
        times = {name: [outcome.seconds for outcome in each] for name, each in ended.items()}
        return {
            "benchmark": "report",
            "machine": facts,
            "data": {"runs": runs, "lines_per_run": lines, "metrics_bytes": written},
            "beside": results.ratio(times["plain_json"], times["report"], "plain_json_to_report"),
        } | rows


class Ended(NamedTuple):
    """A finished process: wall-clock and CPU seconds, peak bytes."""

    seconds: float
    cpu: float
    peak: int


def once(command: list[str]) -> Ended:
    start_time = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start_time
    process.returncode = status
    if status:
        raise SystemExit(f"{command[1]} ended with {status}")
    return Ended(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def report_row(ended: list[Ended]) -> dict[str, Any]:
    cpu = float(np.median([outcome.cpu for outcome in ended]))
    times = results.spread([outcome.seconds for outcome in ended], "seconds")
    return times | {"cpu_seconds": rounded(cpu), "peak_bytes": max(outcome.peak for outcome in ended)}


def write(folder: Path, runs: int, lines: int, seed: int) -> int:
    """The run directories, and the bytes of their metric lines."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    total = 0
    names = []
    for i in range(runs):
        arm, number = divmod(i, SEEDS)
        size = ("B/16", "L/16", "H/14")[arm % 3]
        data = (40e6, 400e6, 1.92e9)[arm // 3 % 3]
        batch = 4096 << (arm % 4)
        lr = 4e-6 * (1 + arm // 36)
        names.append(f"{size.lower().replace('/', '')}-{data:.0e}-{batch}-{arm}-s{number}".replace("+", ""))
        total += _run(RunDir(folder / names[-1]), size, data, batch, lr, number, lines, random)
    write_json(folder / "sweep.json", {"name": "many", "title": f"{runs} runs", "runs": names, "paper": {}})
    return total


def _run(
    run: RunDir, size: str, data: float, batch: int, lr: float, seed: int, lines: int, random: np.random.Generator
) -> int:  # fmt: skip
    config = merge([("benchmark", {
        "seed": seed, "model": {"size": size}, "data": {"manifest": f"/data/{data:g}", "samples": int(data)},
        "stages": [{"name": "pretrain", "samples": lines * 10 * batch, "batch": batch, "base_lr": lr}],
        "resources": {"nodes": 1, "processes": 8, "gpus": 8},
        "evaluate": {"sets": [
            {"name": "val", "manifest": "/v", "classes": "/c", "role": "validation"},
            {"name": "imagenet", "manifest": "/i", "classes": "/c"},
        ]},
    })])  # fmt: skip
    total = stage_spans(config)[-1].end
    cost = training_flops(config.model, "0.5")["total"]
    speed = 8 * 0.4 * 989e12 / cost
    run.path.mkdir()
    run.config.write_text(dump(config), encoding="utf-8")
    write_json(run.identity, {"hash": run.name, "schema": RUN_NUMBER, "code": "", "config": {}})
    n = run.start_attempt({"host": "n", "resumes_from": 0})
    start_time = time.time() - 1e6
    steps = np.arange(10, lines * 10 + 1, 10)
    losses = 8 * np.exp(-5 * steps / steps[-1]) + 1 + random.normal(0, 0.05, lines)
    run.metrics.mkdir()
    with open(run.metrics / f"{n}.jsonl", "w", encoding="utf-8") as file:
        for step, loss in zip(steps.tolist(), losses.tolist(), strict=True):
            file.write(_line(step, step * batch, loss, speed, start_time))
    error = 0.9 * (cost * total / 1e18) ** -0.08 + random.normal(0, 0.002)
    interval = [0.996 - error, 1.004 - error]
    common = {"task": "zeroshot", "precision": "fp32", "top1": 1 - error, "n": 50_000, "chance": 0.001}
    common["interval"] = interval
    scores = [{"name": "val", "role": "validation", **common}, {"name": "imagenet", "role": "test", **common}]
    run.eval.mkdir()
    for i in range(1, 11):
        record = {"stage": "pretrain", "samples": total * i // 10, "seconds": total * i / 10 / speed}
        part = [{**scores[0], "top1": scores[0]["top1"] * i / 10, "interval": None}]
        write_json(run.eval / f"pretrain-{record['samples']}.json", record | {"evaluations": part})
    end = {"attempt": n, "action": "done", "cause": "complete", "reason": "", "code": 0, "commits": total}
    write_json(run.attempt(n) / "end.json", end | {"time": start_time + total / speed})
    write_json(run.result, {
        "run": run.name, "stage": "pretrain", "samples": total, "steps": stage_spans(config)[-1].steps, "world": 8,
        "seconds": total / speed, "samples_per_second": speed, "parameters": parameters(config.model),
        "flops": cost * total, "evaluations": scores, "attempts": 1,
    })  # fmt: skip
    return (run.metrics / f"{n}.jsonl").stat().st_size


def _line(step: int, samples: int, loss: float, speed: float, start_time: float) -> str:
    """A metric line as flip.training.trainer writes it."""
    seconds = samples / speed
    return json.dumps({
        "step": step, "samples": samples, "stage": "pretrain", "attempt": 1, "loss": loss, "accuracy": 1 / (1 + loss),
        "lr": 0.001024 / (1 + step), "logit_scale": 14.285714149475098, "grad_norm": 0.7351902723312378,
        "samples_per_second": speed, "data_wait": 0.012345678901234567, "mfu": 0.4, "replaced": 0, "seconds": seconds,
        "time": start_time + seconds, "storage": {"requests": 120.0, "bytes": 123456789.0, "retries": 0.0, "held": 1e9},
        "saves": step // 1000, "saving": 0.01 * step,
    }) + "\n"  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
