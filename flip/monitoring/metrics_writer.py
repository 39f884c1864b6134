"""Writes the metric lines, TensorBoard events, status.json and progress bar of a run (rank 0)."""

import json
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from flip import environment, model_costs
from flip.common.plain_data import flatten
from flip.config.derived import stage_spans
from flip.config.merge import to_dict
from flip.config.schema import Config
from flip.data import kernel
from flip.files.creation import open_append, run_folder
from flip.monitoring import metrics_reader
from flip.monitoring.curves import CurvePoints, describe, scores
from flip.runs.metric_lines import newest_line
from flip.runs.rundir import RunDir, read_lenient, write_json

log = logging.getLogger(__name__)

RECENT = 1000
"""Logged windows by which the status judges whether the throughput varies."""


def hparams_summary(config: Config, varied: Collection[str]) -> Any:
    """Summary for TensorBoard's hparams plugin: the hyperparameters of the run (``hparams_values``).

    ``SummaryWriter.add_hparams`` would create another run in a subfolder. This summary goes to the run's own event
    file, so that the run is one row of the table. A summary of the experiment, which names columns, is left out:
    TensorBoard collects the hyperparameters of the runs that it shows.
    """
    _, session, _ = hparams(hparams_values(config, varied), {})
    return session


def hparams_values(config: Config, varied: Collection[str]) -> dict[str, Any]:
    """Dotted key -> value of the settings that are ``varied`` in the sweep, and of the masks; lists as text.

    Stages and data sets go by their names.
    """
    values = {
        key: value
        for key, value in flatten(to_dict(config)).items()
        if key in varied or re.fullmatch(r"stages\..*\.mask", key)
    }
    return {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in values.items()}


def _metadata(tag: str) -> SummaryMetadata:
    """The description of a curve. TensorBoard's fast data server reads it only from metadata with plugin and class."""
    plugin = SummaryMetadata.PluginData(plugin_name="scalars")
    text = {"display_name": tag, "summary_description": describe(tag)}
    return SummaryMetadata(plugin_data=plugin, data_class="DATA_CLASS_SCALAR", **text)


class MetricsWriter:
    """Writes metrics and status of an attempt: status.json only while it is the run's newest attempt."""

    def __init__(self, run: RunDir, attempt: int, total: int, steps: int, seconds: float) -> None:
        self._run = run
        self._attempt = attempt
        self._seconds = seconds
        self._status: dict[str, Any] = {
            "attempt": attempt, "total": total, "steps": steps, "samples": 0, "step": 0, "stage": "",
            "phase": "starting", "loss": None, "accuracy": None, "samples_per_second": None, "eta_seconds": None,
            "verdict": None, "reason": "", "storage": None, "callbacks": None, "unsteady": None,
        }  # fmt: skip
        self._written = 0.0
        self._failing = False
        self._lock = threading.Lock()
        self._lines = open_append(run_folder(run.metrics) / f"{attempt}.jsonl", "utf-8")
        self._events: SummaryWriter | None = None
        self._points = CurvePoints()
        self._described = set[str]()
        self._stages: list[tuple[str, int, int, float]] = []
        """(name, S at its start, S at its end, FLOPs per sample) of each stage."""
        self._stage = ""
        self._speeds = deque[float](maxlen=RECENT)
        self.status()

    def start(self, samples_seen: int, step: int, config: Config, gpu: str = "", restoring: float = 0.0) -> None:
        """Training starts at S = ``samples_seen``, after ``step`` steps. Later points of older attempts are dropped.

        ``gpu``: the model of this rank's GPU, for the record of the environment; empty: none. ``restoring``: seconds
        since it looked for a checkpoint.
        """
        self._record_environment(samples_seen, gpu, config, restoring)
        spans = stage_spans(config)
        self._stages = [(s.stage.name, s.start, s.end, model_costs.stage_flops(config, s.stage)) for s in spans]
        self._events = SummaryWriter(
            str(run_folder(self._run.tensorboard)), purge_step=samples_seen + 1, filename_suffix=f".{self._attempt}"
        )
        varied = read_lenient(self._run.path.parent / "sweep.json").get("varied", [])
        summary = hparams_summary(config, varied)
        self._events.file_writer.add_summary(summary, samples_seen)  # type: ignore[attr-defined]
        self.status(samples=samples_seen, step=step, phase="training", **self._logged_before(samples_seen))

    def _record_environment(self, samples_seen: int, gpu: str, config: Config, restoring: float) -> None:
        """Record that training starts, and in which environment; warn if the attempt before had another one."""
        use = kernel.use_in_attempt(config)
        log.info("visible-patch kernel: %s", use)
        now = environment.of_attempt(gpu, use)
        changed = environment.changes_in(self._run, self._attempt, now)
        if changed:
            log.warning(
                "the environment has changed since the attempt before: %s; last bits of weights may differ from an"
                " uninterrupted run", "; ".join(changed),
            )  # fmt: skip
        self._run.record_ready(self._attempt, samples_seen, now, restoring, config.compute.accumulate)

    def _logged_before(self, samples_seen: int) -> dict[str, Any]:
        """Stage, loss and accuracy of the newest metric line, unless its step will be repeated."""
        line = newest_line(self._run)
        logged = line.get("samples")
        known = isinstance(logged, int) and logged <= samples_seen
        return {key: line[key] for key in ("stage", "loss", "accuracy") if known and key in line}

    def step(self, record: Mapping[str, Any]) -> None:
        """Write a logged step: a line in metrics/<n>.jsonl, a point of every curve, the bar and the status."""
        self._lines.write(json.dumps(record, allow_nan=False) + "\n")
        self._lines.flush()
        self._add(self._points.of(record), record["samples"])
        speed = record["samples_per_second"]
        if record["stage"] != self._stage:
            self._stage = record["stage"]
            self._speeds.clear()
        elif speed:  # the first window of a stage is warm-up
            self._speeds.append(speed)
        throughput_varies = metrics_reader.is_varying(np.array(self._speeds))
        remaining = None
        if speed:
            remaining = self._remaining(record["samples"], record["stage"]) / speed
        keys = ("stage", "step", "samples", "loss", "accuracy", "samples_per_second", "verdict")
        values = {key: record.get(key) for key in keys}
        self.status(every=self._seconds, eta_seconds=remaining, unsteady=throughput_varies, **values)

    def _remaining(self, samples_seen: int, stage: str) -> float:
        """The samples that are left, in samples of this stage with as many FLOPs: stages differ in their masks."""
        here = next(cost for name, _, _, cost in self._stages if name == stage)
        return sum(max(0, end - max(start, samples_seen)) * cost / here for _, start, end, cost in self._stages)

    def add_scores(self, samples_seen: int, evaluations: list[dict[str, Any]]) -> None:
        """Add the points of scores to TensorBoard."""
        self._add(scores(evaluations), samples_seen)
        assert self._events is not None
        self._events.flush()

    def _add(self, points: Mapping[str, float], samples_seen: int) -> None:
        """Add a point to each curve; the first has the description of the curve."""
        assert self._events is not None
        for tag, value in points.items():
            tag_metadata = None if tag in self._described else _metadata(tag)
            self._described.add(tag)
            point = Summary.Value(tag=tag, simple_value=value, metadata=tag_metadata)
            self._events.file_writer.add_summary(Summary(value=[point]), samples_seen)  # type: ignore[attr-defined]

    def status(self, every: float = 0.0, **fields: Any) -> None:
        """Update status.json, at most every ``every`` seconds, unless a newer attempt exists.

        An error of the file system is logged, and the next call tries again: what matters is saved elsewhere, and an
        outage of storage, which this file reports, may be one of the run directory, too.
        """
        with self._lock:  # threads that read from storage report its outages
            self._status.update(fields)
            now = time.monotonic()
            if now - self._written < every:
                return
            try:
                if not self._run.is_current_attempt(self._attempt):
                    return
                write_json(self._run.status, self._status | {"time": time.time()})
            except OSError as error:
                if not self._failing:
                    log.warning("status.json cannot be written, tried again later: %s", error)
                self._failing = True
            else:
                self._written = now
                self._failing = False

    def close(self, phase: str, reason: str = "", position: Mapping[str, int] | None = None) -> None:
        """End the attempt. ``phase``: complete, interrupted, cancelled or failed; ``reason``: why, unless complete.

        ``position``: ``samples`` and ``step`` of the training, whose last steps may not have been logged.
        """
        reached: Mapping[str, int] = {}
        if position and self._events is not None:
            reached = position
        self.status(phase=phase, reason=reason, **reached)
        self._lines.close()
        if self._events is not None:
            if phase == "complete":
                self._events.file_writer.add_summary(hparams({}, {})[2], self._status["samples"])  # type: ignore[attr-defined]
            self._events.close()


class NullMetricsWriter(MetricsWriter):
    """Writes nothing, on all ranks but rank 0."""

    def __init__(self) -> None:
        pass

    def _ignore(self, *args: Any, **fields: Any) -> None:
        pass

    start = step = add_scores = status = close = _ignore
