"""The metric lines, curves and status of an attempt, as a callback."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch

from flip.checkpoint.manager import CheckpointManager
from flip.config.derived import stage_spans
from flip.config.schema import Config
from flip.distributed.parallel import World
from flip.monitoring.collector import MetricsCollector
from flip.monitoring.metrics_writer import MetricsWriter, NullMetricsWriter
from flip.monitoring.profiler import Profiler
from flip.runs.rundir import RunDir
from flip.training import grad_cache, parameter_groups
from flip.training.callbacks import Callback, Training
from flip.training.user_callbacks import UserCallbacks

log = logging.getLogger(__name__)


class MetricLines(Callback):
    """Measures the steps of this rank, and writes a line every ``monitor.log_every`` steps and at the end of a stage.

    Args:
        profiler: knows the share of a step that waits for other ranks.
        user_callbacks: their values join the all-reduce of a line, and are written with it.
    """

    def __init__(
        self, run: RunDir, attempt: int, config: Config, world: World, checkpoints: CheckpointManager,
        profiler: Profiler, user_callbacks: UserCallbacks,
    ) -> None:  # fmt: skip
        self._attempt = attempt
        self._config = config
        self._world = world
        self._checkpoints = checkpoints
        self._profiler = profiler
        self._user_callbacks = user_callbacks
        spans = stage_spans(config)
        self._total = spans[-1].end
        self._steps = sum(span.steps for span in spans)
        self._counted_seconds = 0.0
        """Training time of the run that the window has counted."""
        self.writer: MetricsWriter = NullMetricsWriter()
        if world.is_rank0:
            self.writer = MetricsWriter(run, attempt, self._total, self._steps, config.monitor.status_seconds)

    def start(self, training: Training) -> None:
        training.loader.outages.show = lambda text: self.writer.status(storage=text)
        self._collector = MetricsCollector(
            self._config, self._world, training.model, training.counters, self._checkpoints, self._profiler
        )
        if self._world.is_rank0:
            values = self._attempt, training.samples_seen, self._total, self._world.size
            log.info("attempt %d: S = %d of %d, %d ranks", *values)
        on_gpu = self._world.device.type == "cuda"
        gpu = ""
        if on_gpu:
            gpu = torch.cuda.get_device_name(self._world.device)
        restoring = self._checkpoints.restore_seconds
        self.writer.start(training.samples_seen, training.step, self._config, gpu, restoring)
        self._show_disabled()

    def start_stage(self, training: Training) -> None:
        self._collector.use_model(training.model)
        self._reset(training)

    def step(self, training: Training) -> None:
        self._collector.window.add(training.span.stage.batch, training.waited, self._uncounted_seconds(training))
        if training.step % self._config.monitor.log_every == 0 or training.samples_seen >= training.span.end:
            self._report(training)

    def end(self, training: Training, phase: str, reason: str) -> None:
        with contextlib.suppress(OSError):  # must not hide the error that ended the attempt
            self.writer.close(phase, reason, {"samples": training.samples_seen, "step": training.step})

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around an evaluation: steps pause."""
        start_time = time.perf_counter()
        self.writer.status(phase="evaluating")
        yield
        self.writer.status(phase="training")
        self._collector.window.add_paused("evaluation", time.perf_counter() - start_time)

    def _report(self, training: Training) -> None:
        """Write a metric line. Collective; waits for the device."""
        training.wait_for_device()
        self._collector.window.seconds += self._uncounted_seconds(training)
        assert training.optimizer is not None and training.batch is not None
        record: dict[str, Any] = {
            "step": training.step, "samples": training.samples_seen, "stage": training.span.stage.name,
            "attempt": self._attempt,
        }  # fmt: skip
        norms = training.gradient_norm, *parameter_groups.weight_norms(training.optimizer, self._world.size)
        tokens = grad_cache.mean_text_tokens(training.model, training.batch.tokens)
        decoded = training.loader.decoded().vector()
        replaced, storage, sums = training.counters.totals([*decoded, *self._user_callbacks.pending()])
        record |= self._collector.collect(
            training.span, training.optimizer, training.loss, training.accuracy, norms, tokens, replaced, storage
        )
        if training.classification_loss is not None:
            record["classification_loss"] = float(training.classification_loss)
        images, by_kernel, fallbacks = sums[: len(decoded)]
        record["kernel_share"] = by_kernel / max(images, 1)
        record["decoder_fallbacks"] = int(fallbacks)
        record |= self._user_callbacks.reduced(sums[len(decoded) :], training)
        record["seconds"] = training.seconds
        self._reset(training)
        self.writer.step(record)
        self._show_disabled()
        if self._world.is_rank0:
            values = training.step, self._steps, record["loss"], record["samples_per_second"]
            log.info("step %d of %d, loss %.3f, %.0f samples/s", *values)

    def _show_disabled(self) -> None:
        if self._user_callbacks.disabled:
            self.writer.status(callbacks="; ".join(self._user_callbacks.disabled))

    def _reset(self, training: Training) -> None:
        self._collector.reset()
        self._counted_seconds = training.seconds

    def _uncounted_seconds(self, training: Training) -> float:
        """Training time since the last call."""
        seconds = training.seconds - self._counted_seconds
        self._counted_seconds = training.seconds
        return seconds
