"""What a run tells while it trains: metric lines, TensorBoard, status.json, a progress bar (rank 0 only)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from flip.rundir import RunDir, write_json

TENSORBOARD = {
    "loss": "train/loss",
    "accuracy": "train/batch_accuracy",
    "lr": "train/learning_rate",
    "logit_scale": "train/logit_scale",
    "logit_bias": "train/logit_bias",
    "grad_norm": "train/grad_norm",
    "samples_per_second": "speed/samples_per_second",
    "data_wait": "speed/data_wait_share",
    "mfu": "speed/model_flops_utilisation",
    "replaced": "data/replaced_samples",
}
"""Field of a metric line -> tag. The x axis is S, samples seen, so that batch sizes can be compared."""


def measure_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Floating-point operations per second of a large matrix product here and now: what MFU is measured against."""
    side = 4096 if device.type == "cuda" else 1024
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    left @ right
    begin, count = clock(), 0
    while (now := clock()) - begin < seconds:
        left @ right
        count += 1
    return count * 2 * side**3 / (now - begin)


class Window:
    """Sums over the steps since the last metric line: samples, seconds, and seconds of them spent waiting for data."""

    def __init__(self) -> None:
        self.samples, self.waited, self.seconds = 0, 0.0, 1e-9

    def add(self, samples: int, waited: float, seconds: float) -> None:
        self.samples, self.waited, self.seconds = self.samples + samples, self.waited + waited, self.seconds + seconds


class Monitor:
    """Writes under names that carry the attempt's number, and status.json only while the attempt holds the run."""

    def __init__(self, run: RunDir, attempt: int, total: int, steps: int, seconds: float) -> None:
        self._run, self._attempt, self._seconds = run, attempt, seconds
        self._status: dict[str, Any] = {
            "attempt": attempt, "total": total, "steps": steps, "samples": 0, "step": 0, "stage": "",
            "phase": "starting", "loss": None, "samples_per_second": None, "eta_seconds": None,
        }  # fmt: skip
        self._written = 0.0
        run.metrics.mkdir(exist_ok=True)
        self._lines = open(run.metrics / f"{attempt}.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._events: SummaryWriter | None = None
        self._bar: tqdm | None = None
        self.status()

    def begin(self, samples: int) -> None:
        """Training starts at S = ``samples``: what older attempts wrote beyond it vanishes from the curves."""
        self._run.note_ready(self._attempt, samples)
        self._events = SummaryWriter(
            str(self._run.tensorboard), purge_step=samples + 1, filename_suffix=f".{self._attempt}"
        )
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self._status["total"], initial=samples, unit="pair", unit_scale=True, desc=self._run.name
            )
        self.status(samples=samples, phase="training")

    def step(self, record: Mapping[str, Any]) -> None:
        """One logged step: a line in metrics/<n>.jsonl, a point of every curve, the bar and the status."""
        self._lines.write(json.dumps(record, allow_nan=False) + "\n")
        self._lines.flush()
        assert self._events is not None
        for name, tag in TENSORBOARD.items():
            if record.get(name) is not None:
                self._events.add_scalar(tag, record[name], record["samples"])
        for name, count in record.get("storage", {}).items():
            self._events.add_scalar(f"storage/{name}", count, record["samples"])
        if self._bar is not None:
            self._bar.set_postfix(stage=record["stage"], loss=f"{record['loss']:.3f}", acc=f"{record['accuracy']:.2f}")
            self._bar.update(record["samples"] - self._bar.n)
        speed = record["samples_per_second"]
        left = (self._status["total"] - record["samples"]) / speed if speed else None
        keys = ("stage", "step", "samples", "loss", "samples_per_second")
        self.status(every=self._seconds, eta_seconds=left, **{key: record[key] for key in keys})

    def evaluation(self, stage: str, samples: int, seconds: float, evaluations: list[dict[str, Any]]) -> None:
        """eval/<stage>-<S>.json and its points in TensorBoard. ``seconds``: of training up to S."""
        record = {"stage": stage, "samples": samples, "seconds": seconds, "attempt": self._attempt}
        self._run.eval.mkdir(exist_ok=True)
        write_json(self._run.eval / f"{stage}-{samples}.json", record | {"evaluations": evaluations})
        assert self._events is not None
        for item in evaluations:
            self._events.add_scalar(f"zeroshot/{item['name']}_top1", item["top1"], samples)
        self._events.flush()

    def status(self, every: float = 0.0, **fields: Any) -> None:
        """Replace status.json, at most every ``every`` seconds; a newer attempt's is left alone."""
        self._status.update(fields)
        now = time.monotonic()
        if now - self._written < every or not self._run.holds(self._attempt):
            return
        self._written = now
        write_json(self._run.status, self._status | {"time": time.time()})

    def close(self, phase: str) -> None:
        self.status(phase=phase)
        self._lines.close()
        if self._events is not None:
            self._events.close()
        if self._bar is not None:
            self._bar.close()


class Silent(Monitor):
    """The monitor of every other rank: tells nothing."""

    def __init__(self) -> None:
        pass

    def begin(self, samples: int) -> None:
        pass

    def step(self, record: Mapping[str, Any]) -> None:
        pass

    def evaluation(self, stage: str, samples: int, seconds: float, evaluations: list[dict[str, Any]]) -> None:
        pass

    def status(self, every: float = 0.0, **fields: Any) -> None:
        pass

    def close(self, phase: str) -> None:
        pass
