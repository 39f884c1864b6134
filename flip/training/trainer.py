"""The training loop of one run: restore, stages of steps, evaluations, result.

The position is one integer, S, the samples seen, counted after the optimiser step. Stage, batch and learning rate
follow from it and the configuration.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from flip import costs
from flip.checkpoint import saver
from flip.checkpoint.manager import CheckpointManager
from flip.checkpoint.restorer import CheckpointRestorer
from flip.config import derived, merge
from flip.config.derived import StageSpan, stage_spans
from flip.config.schema import Config, EvaluationSet, Stage
from flip.data import order
from flip.data.loader import Batch, Loader
from flip.data.storage.retry import RetryPolicy
from flip.data.view import EvaluationView
from flip.data.worker import WorkerConfig
from flip.distributed import parallel
from flip.distributed.collectives import RankGroup, run_on_first
from flip.distributed.shutdown import (
    CANCELLED,
    LONG_OPERATION_FACTOR,
    CoordinatedStop,
    EndCallback,
    PeerWatcher,
    RunWatcher,
    StopFlag,
    Watchdog,
)
from flip.evaluation.datasets.catalog import ResolvedDataset
from flip.evaluation.encoding.encoders import ModelEncoder
from flip.evaluation.evaluator import Evaluator
from flip.evaluation.label_check import check_labels
from flip.evaluation.metrics.measures import format_result
from flip.evaluation.metrics.predictions import Predictions, path_of
from flip.models import clip
from flip.monitoring.collector import MetricsCollector, RankCounters
from flip.monitoring.metrics_writer import MetricsWriter, NullMetricsWriter, SampleLog
from flip.runs import commit, deletion
from flip.runs.errors import FlipError
from flip.runs.rundir import RunDir, create_json
from flip.tokenizer import Tokenizer
from flip.training import anomaly, conversion, grad_cache, warm_start
from flip.training import optimizer as optim

log = logging.getLogger(__name__)


class TrainingStopped(Exception):
    """All ranks agreed to stop, and the position is saved."""


def train(run: RunDir, attempt: int, flag: StopFlag, on_end: EndCallback) -> None:
    """Train the run from its newest commit to its end and write result.json.

    ``on_end`` is called before the process exits because no progress is made within ``monitor.hang_minutes`` (code 71),
    or because another rank has ended and this one cannot (code 70). Raises TrainingStopped after all ranks have agreed
    to stop, FlipError for expected failures.
    """
    config = merge.read_config(run.config)
    watchdog = Watchdog(60 * config.monitor.hang_minutes, on_end)
    world = parallel.start(config.compute, config.monitor.hang_minutes, run.compiled)
    peers = PeerWatcher(world.control_group, world.rank, world.size, on_end)
    trainer = Trainer(run, attempt, flag, config, world, watchdog)
    phase, reason = "complete", ""
    try:
        trainer.run_stages()
    except BaseException as error:
        phase, reason = ending(error)
        raise
    finally:
        trainer.close(phase, reason)
        if phase != "failed":
            peers.close()


def ending(error: BaseException) -> tuple[str, str]:
    """(phase, reason) for the status.json of an attempt that ``error`` ended."""
    if isinstance(error, TrainingStopped):
        return "cancelled" if str(error) == CANCELLED else "interrupted", str(error)
    return "failed", str(error) if isinstance(error, FlipError) else f"{type(error).__name__}: {error}"


def worker_config(config: Config, witness: bool) -> WorkerConfig:
    """What loader processes need to know of the configuration of a stage."""
    return WorkerConfig(config.data, config.augment, config.model.image, config.model.text, config.seed, witness)


class Trainer:
    """One rank's training in one attempt."""

    def __init__(
        self, run: RunDir, attempt: int, flag: StopFlag, config: Config, world: parallel.World, watchdog: Watchdog
    ) -> None:
        self.run, self.attempt, self.flag, self.watchdog = run, attempt, flag, watchdog
        self.config, self.world = config, world
        self.spans = stage_spans(config)
        self.total, self.steps = self.spans[-1].end, sum(span.steps for span in self.spans)
        self.samples, self.step, self.seconds = 0, 0, 0.0
        self.coordinated_stop = CoordinatedStop(world.control_group, world.size, world.device.type == "cuda")
        self.watcher = RunWatcher(run, attempt, flag) if world.is_rank0 else None
        self.checkpoints = CheckpointManager(run, attempt, world, config, watchdog)
        section = config.monitor
        self.guard = anomaly.NonFiniteGuard(run, attempt, world.rank, section.spike, section.spike_window)
        self.monitor: MetricsWriter = NullMetricsWriter()
        if world.is_rank0:
            self.monitor = MetricsWriter(run, attempt, self.total, self.steps, section.status_seconds)
        witness = os.environ.get("FLIP_WITNESS") == "1"
        self.stage_config = derived.for_stage(config, config.stages[0])
        """The configuration of the present model: with the image size and text length of its stage."""
        batches = worker_config(self.stage_config, witness)
        self.loader = Loader(batches, world.rank, world.size, pinned=world.device.type == "cuda")
        self.loader.outages.show = lambda text: self.monitor.status(storage=text)
        self.witness = SampleLog(run, attempt, world.rank) if witness else None

    # -- position ----------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Build the model and resume from the newest commit, or initialise the weights."""
        if self.watcher is not None:
            self.watcher.start()
        source = self.checkpoints.find(partial(warm_start.extended_commit, self.config.init))
        if source is not None:
            self.samples, self.step, self.seconds = source.samples, source.record["step"], source.record["seconds"]
        self.stage_config = derived.for_stage(self.config, derived.stage_at(self.config, self.samples))
        self.model = self.allocate(self.stage_config)
        self.checkpoints.load_weights(self.model, self.initialise)
        parallel.check_initialised(self.model)
        self.counters = RankCounters(self.world, self.loader, source)
        self.collector = MetricsCollector(
            self.run, self.attempt, self.config, self.world, self.model, self.counters, self.checkpoints
        )
        self.log_rank0("attempt %d: S = %d of %d, %d ranks", self.attempt, self.samples, self.total, self.world.size)
        gpu = torch.cuda.get_device_name(self.world.device) if self.world.device.type == "cuda" else ""
        self.monitor.start(self.samples, self.step, self.config, gpu)

    def initialise(self, restorer: CheckpointRestorer) -> None:
        """Fill the weights of a run without commits: from its seed, or from the source that ``init`` names."""
        clip.init_weights(self.model, self.config.seed)
        warm_start.apply(self.model, self.stage_config, restorer, self.watchdog)

    def allocate(self, config: Config, like: clip.CLIPModel | None = None) -> clip.CLIPModel:
        """A compiled and sharded model without values. ``like``: a model whose process groups it uses."""
        compute, mesh = config.compute, getattr(next(like.parameters()), "device_mesh", None) if like else None
        with torch.device("meta"):
            model = clip.CLIPModel(config.model, config.augment, compute.attention, compute.recompute)
        parallel.apply_parallelism(model, self.world, compute, mesh)
        parallel.separate_reductions(model, self.world, like)
        return model

    def enter(self, stage: Stage) -> None:
        """Convert the model if a stage has another image size, patch, text length or normalisation. Collective.

        The checkpoint at the border has the old model, so an attempt that resumes there converts the same weights.
        """
        before, self.stage_config = self.stage_config, derived.for_stage(self.config, stage)
        shapes = [(config.model, config.augment.mean, config.augment.std) for config in (before, self.stage_config)]
        if shapes[0] == shapes[1]:
            self.model.set_recompute(self.stage_config.compute.recompute)
            return
        self.checkpoints.wait()  # a save in the background reads the old weights
        self.watchdog.heartbeat(f"converting the model for stage {stage.name}", times=LONG_OPERATION_FACTOR)
        model = self.allocate(self.stage_config, self.model)
        conversion.copy_weights(self.model, model)
        parallel.check_initialised(model)
        self.model = model
        self.collector.use_model(model)
        image, text = self.stage_config.model.image, self.stage_config.model.text
        values = stage.name, image.size, image.patch, text.length
        self.log_rank0("stage %s: images of %d px, patches of %d px, captions of %d tokens", *values)

    def save(self, span: StageSpan, optimizer: torch.optim.Optimizer) -> None:
        """Start a save of the present position, unless it is saved or being saved."""
        if not self.checkpoints.is_unsaved(self.samples):
            return
        self.finish_step()
        self.watchdog.heartbeat(f"committing S = {self.samples}", times=LONG_OPERATION_FACTOR)
        state = saver.model_state(self.model) | saver.optimizer_state(self.model, optimizer)
        self.checkpoints.save(
            state, span.stage.name, self.samples,
            step=self.step, seconds=self.seconds, manifest=self.loader.digest, order=order.VERSION,
            replaced=self.counters.totals()[0], peak_memory=self.counters.peak_memory(),
        )  # fmt: skip

    def run_stages(self) -> None:
        """Restore, train the remaining stages, evaluate and write the result.

        Raises TrainingStopped after the last save is committed.
        """
        try:
            self.restore()
            if self.samples == 0:
                self.check_labels()
            for span in self.spans:
                if self.samples < span.end:
                    self.run_stage(span)
                if self.samples == span.end < self.total:
                    self.validate(span)
            self.collector.profiler.close()
            self.finish()
        except TrainingStopped:
            self.checkpoints.wait()
            self.collector.profiler.close()
            raise

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run_stage(self, span: StageSpan) -> None:
        """Train one stage from the present position to its end, and save."""
        self.enter(span.stage)
        optimizer = optim.build(self.model.named_parameters(), self.config.optim)
        if span.start < self.samples:
            self.checkpoints.load_optimizer(self.model, optimizer, span.stage.name)
        if span.start < self.samples and self.passed_multiple(self.config.evaluate.every, span):
            self.validate(span)  # the process was killed between a commit and its score
        stage = span.stage
        batches = self.loader.batches(
            self.samples, stage.batch, stage.mask, stage.text_mask, stage.text_masking,
            worker_config(self.stage_config, self.witness is not None),
        )  # fmt: skip
        self.collector.reset()
        try:
            while self.samples < span.end:
                self.watchdog.heartbeat(f"a step from S = {self.samples}")
                self.save_or_stop_if_requested(span, optimizer)
                self.timed_step(span, optimizer, batches)
                scored = self.samples < span.end and self.passed_multiple(self.config.evaluate.every, span)
                if scored or self.is_save_due(span):
                    self.coordinated_stop.flush()
                    self.save(span, optimizer)
                if scored:
                    with self.collector.evaluating():
                        self.validate(span)
            self.coordinated_stop.flush()
            self.save(span, optimizer)
        finally:
            self.loader.close()

    def save_or_stop_if_requested(self, span: StageSpan, optimizer: torch.optim.Optimizer) -> None:
        """Save if a rank requests it. Raises TrainingStopped, after a save, if a rank requests a stop. Collective."""
        stop, save = self.coordinated_stop.poll(*self.poll_requests())
        if stop or save:
            self.coordinated_stop.flush()
            self.save(span, optimizer)
        if stop:
            raise TrainingStopped(self.stop_reason())

    def timed_step(self, span: StageSpan, optimizer: torch.optim.Optimizer, batches: Iterator[Batch]) -> None:
        """Train on the next batch, advance the position, count the time, and write the metric line if one is due."""
        start_time, stage = time.perf_counter(), span.stage
        batch = next(batches)
        # while the device computes the step before, a wait for the batch costs nothing
        waited = 0.0 if self.guard.is_device_busy else time.perf_counter() - start_time
        with self.collector.profiler.step(self.step + 1, self.samples, stage.batch):
            loss, accuracy, norm = self.train_step(span, optimizer, batch)
        self.collector.window.add(stage.batch, waited, time.perf_counter() - start_time)
        self.samples, self.step = self.samples + stage.batch, self.step + 1
        self.seconds += time.perf_counter() - start_time
        self.counters.replaced += batch.replaced
        if self.witness is not None:
            self.witness.log(self.samples - stage.batch, batch)
        if self.step % self.config.monitor.log_every == 0 or self.samples >= span.end:
            text_tokens = grad_cache.mean_text_tokens(self.model, batch.tokens)
            self.report(span, optimizer, loss, accuracy, norm, text_tokens)

    def is_save_due(self, span: StageSpan) -> bool:
        """Whether the configuration asks for a save at this position."""
        section = self.config.checkpoint
        due = self.samples in section.keep_at or self.passed_multiple(section.samples, span)
        return due or self.checkpoints.save_after_first_step

    def train_step(self, span: StageSpan, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[Any, Any, Any]:
        """One optimiser step on the local batch (b, K, p*p*3). Returns loss, accuracy (global batch), gradient norm."""
        compute = self.config.compute
        fields = (batch.patches, batch.keep_indices, batch.tokens, batch.position_ids)
        inputs = tuple(field for field in fields if field is not None)
        rate = optim.set_learning_rate(optimizer, span.stage, self.samples - span.start)
        optimizer.zero_grad(set_to_none=True)
        autocast = parallel.autocast(compute, self.world)
        requests = self.coordinated_stop.requests(self.world.device)
        loss, accuracy = grad_cache.grad_cache_backward(
            self.model, inputs, compute.accumulate, self.world.device, autocast, compute.loss_tile,
            compute.loss_tf32 == "yes", requests,
        )  # fmt: skip
        self.coordinated_stop.submit(requests)
        norm = optim.gradient_norm(self.model)
        after = self.samples + span.stage.batch
        step = anomaly.Step(self.step + 1, after, span.stage.name, rate, batch.ids)
        self.guard.check_step(optimizer, step, loss, norm)
        if self.config.optim.clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.optim.clip, norm)
        optimizer.step()
        return loss, accuracy, norm

    def finish_step(self) -> None:
        """Wait for the device, which may still compute the newest step, and count this time as the step's."""
        start_time = time.perf_counter()
        self.guard.flush()
        waited = time.perf_counter() - start_time
        self.collector.window.seconds += waited
        self.seconds += waited

    def poll_requests(self) -> tuple[bool, bool]:
        """(stop, save) as this rank requests them for this step.

        A failed save in the background is a request to stop, so that all ranks raise its error at the same step.
        """
        return bool(self.flag) or self.checkpoints.checkpointer.failed, self.checkpoints.is_due()

    def stop_reason(self) -> str:
        return self.flag.reason or "another rank requested the stop"

    def passed_multiple(self, interval: int, span: StageSpan) -> bool:
        """Whether the last step passed a multiple of ``interval`` samples; 0: never."""
        return bool(interval) and self.samples // interval > (self.samples - span.stage.batch) // interval

    def report(self, span: StageSpan, optimizer: Any, loss: Any, accuracy: Any, norm: Any, positions: float) -> None:
        """Write a metric line; waits for the device. ``positions``: tokens per caption of the last batch."""
        self.finish_step()
        position = {"step": self.step, "samples": self.samples, "stage": span.stage.name, "attempt": self.attempt}
        norms = norm, *optim.weight_norms(optimizer, self.world.size)
        record = position | self.collector.collect(span, optimizer, loss, accuracy, norms, positions)
        record["seconds"] = self.seconds
        self.collector.reset()
        self.monitor.step(record)
        values = self.step, self.steps, record["loss"], record["samples_per_second"]
        self.log_rank0("step %d of %d, loss %.3f, %.0f samples/s", *values)

    def log_rank0(self, text: str, *values: Any) -> None:
        if self.world.is_rank0:
            log.info(text, *values)

    # -- evaluation and the end --------------------------------------------------------------------------------------

    def check_labels(self) -> None:
        """Compare labels and class names of evaluation sets now, not after all steps. Collective."""
        data = self.config.data
        ranks = RankGroup(self.world.rank, self.world.size, self.world.control_group)
        retry_policy = RetryPolicy(data.deadline, data.timeout, absent_is_outage=True)
        heartbeat = partial(self.watchdog.heartbeat, "comparing labels with class names")
        check_labels(self.config.evaluate.sets, ranks, retry_policy, heartbeat)

    def validate(self, span: StageSpan) -> None:
        """Evaluate the saved position on the validation sets, unless an earlier attempt has done so."""
        scores = self.run.eval / f"{span.stage.name}-{self.samples}.json"
        if not run_on_first(scores.exists, self.world.control_group):
            self.evaluate(span, "validation")

    def evaluate(self, span: StageSpan, role: str) -> list[dict[str, Any]]:
        """Evaluate on the sets with this role (``""``: all); write the results to eval/ and TensorBoard. Collective.

        The fp32 weights are scored in fp32, as exported, whatever the precision of training. The position must be
        saved or being saved, because a stop between two sets does not save.
        """
        items = [item for item in self.config.evaluate.sets if not role or item.role == role]
        if not items:
            return []
        self.monitor.status(phase="evaluating")
        results, predictions = self.score(span, items)
        if self.world.size > 1:
            gc.collect()  # frees the fp32 copy, whose modules refer to each other
        self.checkpoints.wait()  # otherwise the results might belong to weights that are lost
        results = self.record_scores(span, results, {} if role else predictions)  # those along the way take much space
        self.monitor.status(phase="training")
        return results

    def score(
        self, span: StageSpan, items: Sequence[EvaluationSet]
    ) -> tuple[list[dict[str, Any]], dict[str, Predictions]]:
        """Results of the present weights, and on rank 0 the predictions for each image. Raises TrainingStopped if the
        ranks agree to stop between two sets."""
        encoder, data = self.encoder(), self.config.data
        retry_policy = RetryPolicy(data.deadline, data.timeout, absent_is_outage=True)
        ranks = RankGroup(self.world.rank, self.world.size, self.world.control_group)
        results, predictions = list[dict[str, Any]](), dict[str, Predictions]()
        for item in items:
            if self.coordinated_stop.poll_blocking(bool(self.flag)):
                raise TrainingStopped(self.stop_reason())
            heartbeat = partial(self.watchdog.heartbeat, f"evaluating {item.name}")
            heartbeat()
            batch, device = self.config.evaluate.batch, self.world.device
            evaluator = Evaluator(
                encoder, batch, ranks, heartbeat, device=device, predictions=predictions, retry_policy=retry_policy
            )
            with torch.compiler.set_stance("force_eager"):  # as in jobs/evaluate.py; shapes rarely repeat
                scored = evaluator.score(ResolvedDataset.from_config(item), item.role)
            parallel.reshard(encoder.model)
            for result in scored:
                results.append(result | {"stage": span.stage.name, "samples": self.samples})
                self.log_rank0("%s", format_result(result))
        return results, predictions

    def record_scores(
        self, span: StageSpan, results: list[dict[str, Any]], predictions: Mapping[str, Predictions]
    ) -> list[dict[str, Any]]:
        """Write the results with the commit of their position, and the predictions. Only rank 0 reads and writes, and
        only while no newer attempt does: the commit could be that one's."""
        if not self.world.is_rank0 or not self.run.is_current_attempt(self.attempt):
            return results
        record = commit.summary_at(self.run, self.samples)
        results = [result | {"commit": record} for result in results]
        self.monitor.evaluation(span.stage.name, self.samples, self.seconds, results)
        for name, prediction in predictions.items():
            prediction.write(path_of(self.run, span.stage.name, self.samples, name))
        return results

    def encoder(self) -> ModelEncoder:
        """The present weights as an encoder that computes in fp32."""
        config = self.stage_config

        def build() -> clip.CLIPModel:
            with torch.device("meta"):
                return clip.CLIPModel(config.model, config.augment, config.compute.attention)

        model = parallel.in_fp32(self.model, build, self.world, config.compute)
        view = EvaluationView.of(config)
        tokenizer = Tokenizer.of(config.data.tokenizer, config.model.text)
        return ModelEncoder(model, tokenizer, config.model.image, self.world.device, view=view)

    def finish(self) -> None:
        """Evaluate on all sets and write result.json, which completes the run."""
        evaluations = self.evaluate(self.spans[-1], "")
        self.checkpoints.wait()
        replaced, _ = self.counters.totals()
        if not self.world.is_rank0 or not self.run.is_current_attempt(self.attempt):
            return
        last = commit.commits(self.run)[-1]
        cost = sum((span.end - span.start) * costs.stage_flops(self.config, span.stage) for span in self.spans)
        create_json(self.run.result, {
            "run": self.run.name, "stage": last.stage, "samples": self.samples, "steps": self.step,
            "seconds": self.seconds, "samples_per_second": self.samples / self.seconds, "world": self.world.size,
            "parameters": costs.parameters(self.config.model), "flops": cost, "evaluations": evaluations,
            "commit": {"path": str(last.path.relative_to(self.run.path)), "samples": last.samples},
            "attempts": self.attempt, "replaced": replaced, "manifest": self.loader.digest,
            "peak_memory": self.counters.peak_memory(), "time": time.time(),
        })  # fmt: skip
        deletion.discard_own_folder(self.run.compiled)

    def close(self, phase: str, reason: str) -> None:
        self.watchdog.close()
        if self.watcher is not None:
            self.watcher.close()
        self.loader.close()
        with contextlib.suppress(OSError):  # must not hide the error that ended the attempt
            self.monitor.close(phase, reason, {"samples": self.samples, "step": self.step})
