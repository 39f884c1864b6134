"""What a run tells while it trains: metric lines, TensorBoard, status.json, a progress bar (rank 0 only)."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars
from tqdm import tqdm

from flip.config.schema import Config
from flip.evaluation.task import COLUMNS, curve
from flip.monitoring import hparams, metrics_reader
from flip.runs.rundir import RunDir, write_json

TENSORBOARD = {
    "loss": "train/loss",
    "accuracy": "train/batch_accuracy",
    "lr": "train/learning_rate",
    "logit_scale": "train/logit_scale",
    "logit_bias": "train/logit_bias",
    "grad_norm": "train/grad_norm",
    "param_norm": "train/param_norm",
    "update_norm": "train/update_norm",
    "samples_per_second": "speed/samples_per_second",
    "data_wait": "speed/data_wait_share",
    "mfu": "speed/model_flops_utilisation",
    "matmul_utilisation": "speed/matmul_utilisation",
    "masking_speedup": "speed/masking_speedup",
    "memory": "memory/host_peak_bytes",
    "device_memory": "memory/device_peak_bytes",
    "replaced": "data/replaced_samples",
}
"""Field of a metric line -> tag. The x axis is S, samples seen, so that batch sizes can be compared."""


COUNTERS = ("data/", "storage/")
"""Groups whose curves begin with their first count: most runs have none of most of them."""


def layout(config: Config) -> dict[str, dict[str, list[Any]]]:
    """Categories and charts of TensorBoard's tab CUSTOM SCALARS, training and scores first.

    The other tabs sort groups by name, and renaming a tag would break dashboards that exist.
    """

    def charts(*tags: str) -> dict[str, list[Any]]:
        return {tag: ["Multiline", [f"^{re.escape(tag)}$"]] for tag in tags}

    def group(name: str) -> dict[str, list[Any]]:
        return charts(*(tag for tag in TENSORBOARD.values() if tag.startswith(name)))

    scores = [curve(item.name + end, item.task) for item in config.evaluate.sets for end in COLUMNS[item.task]]
    return {
        "Training": group("train/"),
        "Scores": charts(*scores),
        "Speed": group("speed/"),
        "Where the time goes": {"shares": ["Multiline", ["^time/"]]},
        "Memory": group("memory/"),
        "Data": group("data/") | {"storage": ["Multiline", ["^storage/"]]},
    }


class Monitor:
    """Writes under names that carry the attempt's number, and status.json only while the attempt holds the run."""

    def __init__(self, run: RunDir, attempt: int, total: int, steps: int, seconds: float) -> None:
        self._run, self._attempt, self._seconds = run, attempt, seconds
        self._status: dict[str, Any] = {
            "attempt": attempt, "total": total, "steps": steps, "samples": 0, "step": 0, "stage": "",
            "phase": "starting", "loss": None, "samples_per_second": None, "eta_seconds": None, "verdict": None,
            "reason": "", "storage": None,
        }  # fmt: skip
        self._written, self._lock = 0.0, threading.Lock()
        run.metrics.mkdir(exist_ok=True)
        self._lines = open(run.metrics / f"{attempt}.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._events: SummaryWriter | None = None
        self._counted: set[str] = set()
        self._bar: tqdm | None = None
        self.status()

    def begin(self, samples: int, step: int, config: Config) -> None:
        """Training starts at S = ``samples``, after ``step`` steps: later points of older attempts leave the curves.

        The hyperparameters go into the same file: TensorBoard's table of runs has a row per run, and no run of its own.
        """
        self._run.note_ready(self._attempt, samples)
        self._events = SummaryWriter(
            str(self._run.tensorboard), purge_step=samples + 1, filename_suffix=f".{self._attempt}"
        )
        for summary in (*hparams.start(config), custom_scalars(layout(config))):
            self._events.file_writer.add_summary(summary, samples)  # type: ignore[attr-defined]
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self._status["total"], initial=samples, unit="pair", unit_scale=True, desc=self._run.name
            )
        self.status(samples=samples, step=step, phase="training", **self._logged_before(samples))

    def _logged_before(self, samples: int) -> dict[str, Any]:
        """Stage and loss at the newest metric line, unless it lies beyond ``samples``: those steps are done again."""
        line = metrics_reader.newest(self._run)
        at = line.get("samples")
        known = isinstance(at, int) and at <= samples
        return {key: line[key] for key in ("stage", "loss") if known and key in line}

    def step(self, record: Mapping[str, Any]) -> None:
        """One logged step: a line in metrics/<n>.jsonl, a point of every curve, the bar and the status."""
        self._lines.write(json.dumps(record, allow_nan=False) + "\n")
        self._lines.flush()
        assert self._events is not None
        points = {tag: record.get(name) for name, tag in TENSORBOARD.items()}
        points |= {f"storage/{name}": count for name, count in record.get("storage", {}).items()}
        points |= {f"time/{part}_share": share for part, share in record.get("shares", {}).items()}
        for tag, value in points.items():
            if value is not None and (value or tag in self._counted or not tag.startswith(COUNTERS)):
                self._counted.add(tag)
                self._events.add_scalar(tag, value, record["samples"])
        if self._bar is not None:
            self._bar.set_postfix(stage=record["stage"], loss=f"{record['loss']:.3f}", acc=f"{record['accuracy']:.2f}")
            self._bar.update(record["samples"] - self._bar.n)
        speed = record["samples_per_second"]
        left = (self._status["total"] - record["samples"]) / speed if speed else None
        keys = ("stage", "step", "samples", "loss", "samples_per_second", "verdict")
        self.status(every=self._seconds, eta_seconds=left, **{key: record.get(key) for key in keys})

    def evaluation(self, stage: str, samples: int, seconds: float, evaluations: list[dict[str, Any]]) -> None:
        """eval/<stage>-<S>.json and its points in TensorBoard. ``seconds``: of training up to S."""
        record = {"stage": stage, "samples": samples, "seconds": seconds, "attempt": self._attempt}
        self._run.eval.mkdir(exist_ok=True)
        write_json(self._run.eval / f"{stage}-{samples}.json", record | {"evaluations": evaluations})
        assert self._events is not None
        for item in evaluations:
            self._events.add_scalar(curve(item["name"], item["task"]), item["top1"], samples)
        self._events.flush()

    def status(self, every: float = 0.0, **fields: Any) -> None:
        """Replace status.json, at most every ``every`` seconds; a newer attempt's is left alone."""
        with self._lock:  # an outage of storage is shown by the thread that meets it
            self._status.update(fields)
            now = time.monotonic()
            if now - self._written < every or not self._run.holds(self._attempt):
                return
            self._written = now
            write_json(self._run.status, self._status | {"time": time.time()})

    def close(self, phase: str, reason: str = "") -> None:
        """The attempt ends. ``phase``: complete, interrupted, cancelled or failed; ``reason``: why, unless complete."""
        self.status(phase=phase, reason=reason)
        self._lines.close()
        if self._events is not None:
            if phase == "complete":
                self._events.file_writer.add_summary(hparams.end(), self._status["samples"])  # type: ignore[attr-defined]
            self._events.close()
        if self._bar is not None:
            self._bar.close()


class Silent(Monitor):
    """The monitor of every other rank: tells nothing."""

    def __init__(self) -> None:
        pass

    def begin(self, samples: int, step: int, config: Config) -> None:
        pass

    def step(self, record: Mapping[str, Any]) -> None:
        pass

    def evaluation(self, stage: str, samples: int, seconds: float, evaluations: list[dict[str, Any]]) -> None:
        pass

    def status(self, every: float = 0.0, **fields: Any) -> None:
        pass

    def close(self, phase: str, reason: str = "") -> None:
        pass
