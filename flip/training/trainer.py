"""The training loop of one run, readable from top to bottom: restore, stages of steps, evaluate, result.

The whole position is one integer, S, the samples seen, counted after the optimiser step. Everything else follows from
the configuration: the stage, the step's number, the batch, the learning rate.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from flip import costs
from flip.checkpoint import saver
from flip.checkpoint.manager import CheckpointManager
from flip.config import derived, merge
from flip.config.derived import StageSpan, stage_spans
from flip.config.schema import Config, EvaluationSet
from flip.data import order
from flip.data.loader import Batch, Loader
from flip.data.storage.retry import RetryPolicy
from flip.data.view import EvaluationView
from flip.data.worker import WorkerConfig
from flip.distributed import parallel
from flip.distributed.collectives import RankGroup, run_on_first
from flip.distributed.shutdown import CANCELLED, LONG_OPERATION_FACTOR, CoordinatedStop, RunWatcher, StopFlag, Watchdog
from flip.evaluation.encoders import PairEncoder
from flip.evaluation.evaluator import Evaluator, LoadedDataset
from flip.evaluation.metrics import format_result
from flip.models import clip
from flip.monitoring.collector import MetricsCollector, RankCounters
from flip.monitoring.metrics_writer import MetricsWriter, NullMetricsWriter, SampleLog
from flip.runs import commit
from flip.runs.errors import FlipError
from flip.runs.rundir import RunDir, create_json
from flip.tokenizer import Tokenizer
from flip.training import anomaly, grad_cache, warm_start
from flip.training import optimizer as optim

log = logging.getLogger(__name__)


class TrainingStopped(Exception):
    """All ranks agreed to stop, and what was to be saved is saved."""


def train(run: RunDir, attempt: int, flag: StopFlag, hung: Callable[[str], None]) -> None:
    """Train the run from its newest commit to its end and write result.json.

    Raises Stopped when a stop was agreed, FlipError for what can be named. Where nothing moves any more, ``hung`` is
    called with what is known of it, and the process ends.
    """
    config = merge.read_config(run.config)
    watchdog = Watchdog(60 * config.monitor.hang_minutes, hung)
    world = parallel.start(config.compute, config.monitor.hang_minutes)
    trainer = Trainer(run, attempt, flag, config, world, watchdog)
    phase, reason = "complete", ""
    try:
        trainer.run_stages()
    except BaseException as error:
        phase, reason = ending(error)
        raise
    finally:
        trainer.close(phase, reason)


def ending(error: BaseException) -> tuple[str, str]:
    """(phase, reason) that status.json shows of an attempt that ``error`` ended; its cause file has the cause."""
    if isinstance(error, TrainingStopped):
        return "cancelled" if str(error) == CANCELLED else "interrupted", str(error)
    return "failed", str(error) if isinstance(error, FlipError) else f"{type(error).__name__}: {error}"


class Trainer:
    """One attempt's model, position and instruments."""

    def __init__(
        self, run: RunDir, attempt: int, flag: StopFlag, config: Config, world: parallel.World, watchdog: Watchdog
    ) -> None:
        self.run, self.attempt, self.flag, self.config, self.world = run, attempt, flag, config, world
        self.watchdog = watchdog
        self.spans = stage_spans(config)
        self.total, self.steps = self.spans[-1].end, sum(span.steps for span in self.spans)
        self.samples, self.step, self.seconds = 0, 0, 0.0
        self.coordinated_stop = CoordinatedStop(world.control, world.size)
        self.watcher = RunWatcher(run, attempt, flag) if world.first else None
        self.checkpoints = CheckpointManager(run, attempt, world, config, watchdog)
        told = config.monitor
        self.guard = anomaly.NonFiniteGuard(run, attempt, world.rank, told.spike, told.spike_window)
        self.tokenizer = Tokenizer.of(config.data.tokenizer, config.model.text)
        self.monitor: MetricsWriter = NullMetricsWriter()
        if world.first:
            self.monitor = MetricsWriter(run, attempt, self.total, self.steps, told.status_seconds)
        witness = os.environ.get("FLIP_WITNESS") == "1"
        model = config.model
        batches = WorkerConfig(config.data, config.augment, model.image, model.text, config.seed, witness)
        self.loader = Loader(batches, world.rank, world.size, pinned=world.device.type == "cuda")
        self.loader.outages.show = lambda text: self.monitor.status(storage=text)
        self.witness = SampleLog(run, attempt, world.rank) if witness else None

    # -- position ----------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Build the model with its first weights, then go on from the newest commit where there is one."""
        if self.watcher is not None:
            self.watcher.start()
        compute = self.config.compute
        with torch.device("meta"):
            self.pair = clip.build(self.config.model, self.config.augment, compute.attention, compute.recompute)
        parallel.place(self.pair, self.world, compute)
        clip.init_weights(self.pair, self.config.seed)
        parallel.check(self.pair)
        start = partial(warm_start.apply, self.pair, self.config, self.checkpoints.checkpointer.restorer, self.watchdog)
        source = self.checkpoints.restore(self.pair, start)
        if source is not None:
            self.samples, self.step, self.seconds = source.samples, source.record["step"], source.record["seconds"]
        self.tally = RankCounters(self.world, self.loader, source)
        self.instruments = MetricsCollector(
            self.run, self.attempt, self.config, self.world, self.pair, self.tally, self.checkpoints
        )
        self.say("attempt %d: S = %d of %d, %d ranks", self.attempt, self.samples, self.total, self.world.size)
        self.monitor.start(self.samples, self.step, self.config)

    def save(self, span: StageSpan, optimizer: torch.optim.Optimizer) -> None:
        """Commit the present position unless it is committed or about to be."""
        if not self.checkpoints.is_unsaved(self.samples):
            return
        self.guard.flush()
        self.watchdog.heartbeat(f"committing S = {self.samples}", times=LONG_OPERATION_FACTOR)
        state = saver.model_state(self.pair) | saver.optimizer_state(self.pair, optimizer)
        self.checkpoints.save(
            state, span.stage.name, self.samples,
            step=self.step, seconds=self.seconds, manifest=self.loader.digest, order=order.VERSION,
            replaced=self.tally.total_replaced(), peak_memory=self.tally.peak_memory(),
        )  # fmt: skip

    def run_stages(self) -> None:
        """Restore, train what is left, evaluate, write the result. Raises Stopped when the last save has settled."""
        try:
            self.restore()
            for span in self.spans:
                if self.samples < span.end:
                    self.run_stage(span)
                if self.samples == span.end < self.total:
                    self.validate(span)
            self.finish()
        except TrainingStopped:
            self.checkpoints.wait()
            raise

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run_stage(self, span: StageSpan) -> None:
        """Steps of one stage from the present position to its end, with a commit at the end."""
        optimizer = optim.build(self.pair.named_parameters(), self.config.optim)
        source = self.checkpoints.resumed_from
        if source is not None and span.start < self.samples and source.stage == span.stage.name:
            self.checkpoints.checkpointer.restorer.load(source, saver.optimizer_state(self.pair, optimizer))
        if span.start < self.samples and self.crossed(self.config.evaluate.every, span):
            self.validate(span)  # a kill between a commit and its score
        stage = span.stage
        batches = self.loader.batches(self.samples, stage.batch, stage.mask, stage.text_mask, stage.text_masking)
        self.instruments.reset()
        try:
            while self.samples < span.end:
                self.watchdog.heartbeat(f"a step from S = {self.samples}")
                stop, save = self.coordinated_stop.poll(*self.wishes())
                if stop or save:
                    self.coordinated_stop.flush()
                    self.save(span, optimizer)
                if stop:
                    raise TrainingStopped(self.told())
                begin = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - begin
                with self.instruments.profiler.step(self.step + 1, self.samples, span.stage.batch):
                    loss, accuracy, norm = self.train_step(span, optimizer, batch)
                self.instruments.window.add(span.stage.batch, waited, time.perf_counter() - begin)
                self.samples, self.step = self.samples + span.stage.batch, self.step + 1
                self.seconds += time.perf_counter() - begin
                self.tally.replaced += batch.replaced
                if self.witness is not None:
                    self.witness.log(self.samples - span.stage.batch, batch)
                if self.step % self.config.monitor.log_every == 0 or self.samples >= span.end:
                    self.report(span, optimizer, loss, accuracy, norm, grad_cache.positions(self.pair, batch.tokens))
                scored = self.crossed(self.config.evaluate.every, span) and self.samples < span.end
                if (
                    self.checkpoints.save_after_first_step
                    or scored
                    or self.crossed(self.config.checkpoint.samples, span)
                ):
                    self.coordinated_stop.flush()
                    self.save(span, optimizer)
                if scored:
                    with self.instruments.evaluating():
                        self.validate(span)
            self.coordinated_stop.flush()
            self.save(span, optimizer)
        finally:
            self.loader.close()

    def train_step(self, span: StageSpan, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[Any, Any, Any]:
        """One optimiser step over the local batch (b, K, p*p*3); loss and accuracy are those of the global batch."""
        compute = self.config.compute
        inputs = batch.patches, batch.keep, batch.tokens, *([] if batch.places is None else [batch.places])
        rate = optim.set_learning_rate(optimizer, span.stage, self.samples - span.start)
        optimizer.zero_grad(set_to_none=True)
        autocast = parallel.autocast(compute, self.world)
        loss, accuracy = grad_cache.gradients(self.pair, inputs, compute.accumulate, self.world.device, autocast)
        norm = optim.gradient_norm(self.pair)
        after = self.samples + span.stage.batch
        self.guard.check_step(
            optimizer, anomaly.Step(self.step + 1, after, span.stage.name, rate, batch.ids), loss, norm
        )
        if self.config.optim.clip:
            torch.nn.utils.clip_grads_with_norm_(self.pair.parameters(), self.config.optim.clip, norm)
        optimizer.step()
        return loss, accuracy, norm

    def wishes(self) -> tuple[bool, bool]:
        """What this rank wants at this step: (stop, save). The interval in minutes is kept by rank 0's clock alone.

        A save that failed in the background is a stop, so that all ranks raise it at the same step.
        """
        return bool(self.flag) or self.checkpoints.checkpointer.failed, self.checkpoints.is_due()

    def told(self) -> str:
        return self.flag.reason or "another rank was told to stop"

    def crossed(self, interval: int, span: StageSpan) -> bool:
        """Whether the step just done passed a multiple of ``interval`` samples; 0: never."""
        return bool(interval) and self.samples // interval > (self.samples - span.stage.batch) // interval

    # -- what it tells -----------------------------------------------------------------------------------------------

    def report(self, span: StageSpan, optimizer: Any, loss: Any, accuracy: Any, norm: Any, positions: float) -> None:
        """One metric line, for which the device is waited for. ``positions``: of a caption of the newest batch."""
        self.guard.flush()
        position = {"step": self.step, "samples": self.samples, "stage": span.stage.name, "attempt": self.attempt}
        norms = norm, *optim.weight_norms(optimizer, self.world.size)
        record = position | self.instruments.collect(span, optimizer, loss, accuracy, norms, positions)
        record["seconds"] = self.seconds
        self.instruments.reset()
        self.monitor.step(record)
        told = record["loss"], record["samples_per_second"]
        self.say("step %d of %d, loss %.3f, %.0f samples/s", self.step, self.steps, *told)

    def say(self, text: str, *values: Any) -> None:
        """A line in the log, of the first rank."""
        if self.world.first:
            log.info(text, *values)

    # -- evaluation and the end --------------------------------------------------------------------------------------

    def validate(self, span: StageSpan) -> None:
        """Score the committed position on the validation sets, unless an attempt before has done it."""
        scores = self.run.eval / f"{span.stage.name}-{self.samples}.json"
        if not run_on_first(scores.exists, self.world.control):
            self.evaluate(span, "validation")

    def evaluate(self, span: StageSpan, role: str) -> list[dict[str, Any]]:
        """Score the sets of this role (``""``: all), all ranks together; kept in eval/ and TensorBoard.

        Scores are of the fp32 weights in fp32 arithmetic, whatever the precision of training: as exported.
        The position must be committed: a stop that is agreed between two sets leaves at once.
        """
        items = [item for item in self.config.evaluate.sets if not role or item.role == role]
        if not items:
            return []
        self.monitor.status(phase="evaluating")
        results = self.score(span, items)
        if self.world.size > 1:
            gc.collect()  # modules of an fp32 copy refer to each other: without it the copy's memory stays taken
        self.checkpoints.wait()  # a score of weights that nobody has any more would be kept
        results = self.record_scores(span, results)
        self.monitor.status(phase="training")
        return results

    def score(self, span: StageSpan, items: Sequence[EvaluationSet]) -> list[dict[str, Any]]:
        """Results of the present weights on these sets, in fp32. Raises Stopped if a stop is agreed between two."""
        encoder, data = self.encoder(), self.config.data
        patience = RetryPolicy(deadline=data.deadline, timeout=data.timeout)
        ranks = RankGroup(self.world.rank, self.world.size, self.world.control)
        results = []
        for item in items:
            if self.coordinated_stop.poll_blocking(bool(self.flag)):
                raise TrainingStopped(self.told())
            self.watchdog.heartbeat(f"evaluating {item.name}")
            evaluator = Evaluator(
                encoder, self.config.evaluate.batch, ranks, partial(self.watchdog.heartbeat, f"evaluating {item.name}"),
                device=self.world.device,
            )  # fmt: skip
            with torch.compiler.set_stance("force_eager"):  # as jobs/evaluate.py does, and each shape comes seldom
                scored = evaluator.score(LoadedDataset.from_config(item, patience))
            parallel.reshard(encoder.pair)
            for result in scored:
                results.append(result | {"stage": span.stage.name, "samples": self.samples})
                self.say("%s", format_result(result))
        return results

    def record_scores(self, span: StageSpan, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Write the scores of a committed position, with its commit. Only rank 0 reads the commit and writes."""
        if not self.world.first:
            return results
        record = commit.summary_at(self.run, self.samples)
        results = [result | {"commit": record} for result in results]
        self.monitor.evaluation(span.stage.name, self.samples, self.seconds, results)
        return results

    def encoder(self) -> PairEncoder:
        """The present weights, computing in fp32."""
        config = self.config

        def build() -> clip.CLIPModel:
            with torch.device("meta"):
                return clip.build(config.model, config.augment, config.compute.attention)

        pair = parallel.in_fp32(self.pair, build, self.world, config.compute)
        view = EvaluationView.of(config)
        return PairEncoder(pair, self.tokenizer, config.model.image, self.world.device, view=view)

    def finish(self) -> None:
        """Everything is trained: score all sets once, write result.json, which makes the run complete."""
        evaluations = self.evaluate(self.spans[-1], "")
        self.checkpoints.wait()
        replaced = self.tally.total_replaced()
        if not self.world.first or not self.run.is_current_attempt(self.attempt):
            return
        last = commit.commits(self.run)[-1]
        cost = sum(
            (span.end - span.start) * costs.training_flops(self.config.model, span.stage.mask, positions)["total"]
            for span in self.spans
            for positions in [derived.kept_tokens(self.config.model.text, span.stage.text_mask)]
        )
        create_json(self.run.result, {
            "run": self.run.name, "stage": last.stage, "samples": self.samples, "steps": self.step,
            "seconds": self.seconds, "samples_per_second": self.samples / self.seconds, "world": self.world.size,
            "parameters": costs.parameters(self.config.model), "flops": cost, "evaluations": evaluations,
            "commit": {"path": str(last.path.relative_to(self.run.path)), "samples": last.samples},
            "attempts": self.attempt, "replaced": replaced, "manifest": self.loader.digest,
            "peak_memory": self.tally.peak_memory(), "time": time.time(),
        })  # fmt: skip

    def close(self, phase: str, reason: str) -> None:
        self.watchdog.close()
        if self.watcher is not None:
            self.watcher.close()
        self.loader.close()
        with contextlib.suppress(OSError):  # the end's own cause must not be lost for a status line
            self.monitor.close(phase, reason)
