"""Writes the metric lines, TensorBoard events, status.json and progress bar of a run (rank 0), and a log of samples."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams
from tqdm import tqdm

from flip.config.identity import flatten
from flip.config.merge import to_dict
from flip.config.schema import Config
from flip.data.loader import Batch
from flip.evaluation.task import COLUMNS, curve
from flip.monitoring import metrics_reader
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
"""Groups whose curves start with their first count: most counters of most runs stay 0."""
NO_HPARAMS = ("schema", "checkpoint", "evaluate", "monitor")
"""Sections of the configuration that affect neither the model nor its speed."""


def _score_tags(config: Config) -> list[str]:
    return [curve(item.name + suffix, item.task) for item in config.evaluate.sets for suffix in COLUMNS[item.task]]


def layout(config: Config) -> dict[str, dict[str, list[Any]]]:
    """Categories and charts of TensorBoard's tab CUSTOM SCALARS, training and scores first.

    The other tabs sort groups by name, and renaming a tag would break dashboards that exist.
    """

    def charts(*tags: str) -> dict[str, list[Any]]:
        return {tag: ["Multiline", [f"^{re.escape(tag)}$"]] for tag in tags}

    def group(name: str) -> dict[str, list[Any]]:
        return charts(*(tag for tag in TENSORBOARD.values() if tag.startswith(name)))

    return {
        "Training": group("train/"),
        "Scores": charts(*_score_tags(config)),
        "Speed": group("speed/"),
        "Where the time goes": {"shares": ["Multiline", ["^time/"]]},
        "Memory": group("memory/"),
        "Data": group("data/") | {"storage": ["Multiline", ["^storage/"]]},
    }


def hparams_summaries(config: Config) -> list[Any]:
    """Summaries for TensorBoard's hparams plugin: the hyperparameters, the metrics, and the values of the run.

    ``SummaryWriter.add_hparams`` would create another run in a subfolder. These summaries go to the run's own event
    file, so that the run is one row of the table and the metrics are its newest scalars.
    """
    metrics = [*_score_tags(config), "train/loss", "speed/samples_per_second"]
    experiment, session, _ = hparams(hparams_values(config), dict.fromkeys(metrics))
    return [experiment, session]


def hparams_values(config: Config) -> dict[str, Any]:
    """Dotted key -> value; lists as text. Stages and data sets go by their names."""
    tree = {section: value for section, value in to_dict(config).items() if section not in NO_HPARAMS}
    values = {key: value for key, value in flatten(tree).items() if value != ""}
    return {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in values.items()}


class MetricsWriter:
    """Writes metrics and status of an attempt: status.json only while it is the run's newest attempt."""

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

    def start(self, samples: int, step: int, config: Config) -> None:
        """Training starts at S = ``samples``, after ``step`` steps. Later points of older attempts leave the curves."""
        self._run.record_ready(self._attempt, samples)
        self._events = SummaryWriter(
            str(self._run.tensorboard), purge_step=samples + 1, filename_suffix=f".{self._attempt}"
        )
        for summary in (*hparams_summaries(config), custom_scalars(layout(config))):
            self._events.file_writer.add_summary(summary, samples)  # type: ignore[attr-defined]
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self._status["total"], initial=samples, unit="pair", unit_scale=True, desc=self._run.name
            )
        self.status(samples=samples, step=step, phase="training", **self._logged_before(samples))

    def _logged_before(self, samples: int) -> dict[str, Any]:
        """Stage and loss of the newest metric line, unless its step will be repeated."""
        line = metrics_reader.newest(self._run)
        logged = line.get("samples")
        known = isinstance(logged, int) and logged <= samples
        return {key: line[key] for key in ("stage", "loss") if known and key in line}

    def step(self, record: Mapping[str, Any]) -> None:
        """Write a logged step: a line in metrics/<n>.jsonl, a point of every curve, the bar and the status."""
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
        remaining = (self._status["total"] - record["samples"]) / speed if speed else None
        keys = ("stage", "step", "samples", "loss", "samples_per_second", "verdict")
        self.status(every=self._seconds, eta_seconds=remaining, **{key: record.get(key) for key in keys})

    def evaluation(self, stage: str, samples: int, seconds: float, evaluations: list[dict[str, Any]]) -> None:
        """Write eval/<stage>-<S>.json and its points in TensorBoard. ``seconds``: of training up to S."""
        record = {"stage": stage, "samples": samples, "seconds": seconds, "attempt": self._attempt}
        self._run.eval.mkdir(exist_ok=True)
        write_json(self._run.eval / f"{stage}-{samples}.json", record | {"evaluations": evaluations})
        assert self._events is not None
        for item in evaluations:
            self._events.add_scalar(curve(item["name"], item["task"]), item["top1"], samples)
        self._events.flush()

    def status(self, every: float = 0.0, **fields: Any) -> None:
        """Update status.json, at most every ``every`` seconds, unless a newer attempt exists."""
        with self._lock:  # threads that read from storage report its outages
            self._status.update(fields)
            now = time.monotonic()
            if now - self._written < every or not self._run.is_current_attempt(self._attempt):
                return
            self._written = now
            write_json(self._run.status, self._status | {"time": time.time()})

    def close(self, phase: str, reason: str = "") -> None:
        """End the attempt. ``phase``: complete, interrupted, cancelled or failed; ``reason``: why, unless complete."""
        self.status(phase=phase, reason=reason)
        self._lines.close()
        if self._events is not None:
            if phase == "complete":
                self._events.file_writer.add_summary(hparams({}, {})[2], self._status["samples"])  # type: ignore[attr-defined]
            self._events.close()
        if self._bar is not None:
            self._bar.close()


class NullMetricsWriter(MetricsWriter):
    """Writes nothing, on all ranks but rank 0."""

    def __init__(self) -> None:
        pass

    def _ignore(self, *args: Any, **fields: Any) -> None:
        pass

    start = step = evaluation = status = close = _ignore


class SampleLog:
    """For tests (FLIP_WITNESS=1): the samples that each rank trained on, independent of the sample order.

    witness/<attempt>.<rank>.jsonl has, per step, S, the ids, and a hash of each decoded image before its crop.
    """

    def __init__(self, run: RunDir, attempt: int, rank: int) -> None:
        folder = run.path / "witness"
        folder.mkdir(exist_ok=True)
        self._file = open(folder / f"{attempt}.{rank}.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def log(self, samples: int, batch: Batch) -> None:
        """``samples``: S at the start of the batch."""
        assert batch.witness is not None
        line = {"samples": samples, "ids": batch.ids.tolist(), "seen": batch.witness.tolist()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
