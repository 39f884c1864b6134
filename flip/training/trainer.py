"""The training loop of one run: restore, stages of steps, saves and stops, result.

The position is one integer, S, the samples seen, counted after the optimiser step. Stage, batch and learning rate
follow from it and the configuration.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flip.checkpoint import saver
from flip.checkpoint.manager import CheckpointManager
from flip.checkpoint.restorer import CheckpointRestorer
from flip.common.shutdown import (
    CANCELLED,
    COMPILE_MINUTES,
    LONG_OPERATION_FACTOR,
    CoordinatedStop,
    EndCallback,
    PeerWatcher,
    RunWatcher,
    StopFlag,
    Watchdog,
)
from flip.config import derived, merge
from flip.config.derived import StageSpan, stage_spans
from flip.config.schema import Config, Stage
from flip.data.loader import Batch, Loader
from flip.data.token_table import TokenTable
from flip.data.worker import WorkerConfig
from flip.distributed import parallel
from flip.distributed.collectives import mean_over_ranks
from flip.models import attention, clip
from flip.monitoring.rank_counters import RankCounters
from flip.runs.errors import FlipError
from flip.runs.rundir import RunDir
from flip.training import anomaly, conversion, grad_cache, parameter_groups, warm_start
from flip.training.callbacks import TrainingStopped
from flip.training.result import write_result
from flip.training.standard_callbacks import standard_callbacks

log = logging.getLogger(__name__)


def train(run: RunDir, attempt: int, flag: StopFlag, on_end: EndCallback) -> None:
    """Train the run from its newest checkpoint to its end and write result.json.

    ``on_end`` is called before the process exits because no progress is made within ``monitor.hang_minutes`` (code 71),
    or because another rank has ended and this one cannot (code 70).
    Raises TrainingStopped after all ranks have agreed to stop, FlipError for expected failures.
    """
    config = derived.at_world(merge.read_config(run.config), int(os.environ.get("WORLD_SIZE", 1)))
    watchdog = Watchdog(60 * config.monitor.hang_minutes, on_end)
    world = parallel.start(config.compute, config.monitor.hang_minutes, run.compiled, watchdog.connecting)
    peers = PeerWatcher(world.control_group, world.rank, world.size, on_end)
    trainer = Trainer(run, attempt, flag, config, world, watchdog)
    phase = "complete"
    reason = ""
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


def token_weights(config: Config) -> Tensor:
    """(V,) the weights of tokens in the targets of the text classification head. Raises ConfigError."""
    rarities = TokenTable.read(config.data.token_table, config.data.tokenizer).rarities()
    weights = torch.zeros(config.model.text.vocabulary)
    weights[: len(rarities)] = torch.from_numpy(rarities)
    return weights


class Trainer:
    """One rank's training in one attempt: loop, step, stop and save. Everything else is a callback, which sees it as
    ``flip.training.callbacks.Training``.
    """

    model: clip.CLIPModel
    counters: RankCounters

    def __init__(
        self, run: RunDir, attempt: int, flag: StopFlag, config: Config, world: parallel.World, watchdog: Watchdog,
    ) -> None:  # fmt: skip
        self.run = run
        self.attempt = attempt
        self.flag = flag
        self.watchdog = watchdog
        self.config = config
        self.world = world
        self.spans = stage_spans(config)
        self.span = self.spans[0]
        self.total = self.spans[-1].end
        self.samples_seen = 0
        self.step = 0
        self.seconds = 0.0
        self.optimizer: torch.optim.Optimizer | None = None
        self.batch: Batch | None = None
        self.features: grad_cache.PairFeatures | None = None
        self.loss: Tensor | None = None
        self.classification_loss: Tensor | None = None
        self.token_weights: Tensor | None = None
        self.accuracy: Tensor | None = None
        self.gradient_norm: Tensor | None = None
        self.waited = 0.0
        self.coordinated_stop = CoordinatedStop(world.control_group, world.size, world.device.type == "cuda")
        self.watcher: RunWatcher | None = None
        if world.is_rank0:
            self.watcher = RunWatcher(run, attempt, flag)
        self.checkpoints = CheckpointManager(run, attempt, world, config, watchdog)
        self.guard = anomaly.NonFiniteGuard(run, attempt, world.rank, config.monitor.spike, config.monitor.spike_window)
        self.callbacks = standard_callbacks(run, attempt, config, world, self.checkpoints, watchdog)
        self.stage_config = derived.for_stage(config, config.stages[0])
        """The configuration of the present model: with the image size and text length of its stage."""
        pinned = world.device.type == "cuda"
        self.loader = Loader(WorkerConfig.of(self.stage_config), world.rank, world.size, pinned=pinned)

    # -- position ----------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Build the model and resume from the newest checkpoint, or initialise the weights."""
        if self.watcher is not None:
            self.watcher.start()
        source = self.checkpoints.find(partial(warm_start.extended_checkpoint, self.config.init))
        if source is not None:
            self.samples_seen = source.samples_seen
            self.step = source.record["step"]
            self.seconds = source.record["seconds"]
        stage = derived.stage_at(self.config, self.samples_seen)
        self.stage_config = derived.for_stage(self.config, stage)
        self.model = self.allocate(self.stage_config, stage)
        self.checkpoints.load_weights(self.model, self.initialise)
        parallel.check_initialised(self.model)
        self.counters = RankCounters(self.world, self.loader, source)
        self.callbacks.call("start", self)

    def initialise(self, restorer: CheckpointRestorer) -> None:
        """Fill the weights of a run without checkpoints: from its seed, or from the source that ``init`` names."""
        clip.init_weights(self.model, self.config.seed)
        warm_start.apply(self.model, self.stage_config, restorer, self.watchdog)

    def allocate(self, config: Config, stage: Stage, like: clip.CLIPModel | None = None) -> clip.CLIPModel:
        """A compiled and sharded model of a stage without values. ``like``: a model whose process groups it uses."""
        compute = config.compute
        mesh = getattr(next(like.parameters()), "device_mesh", None) if like else None
        with torch.device("meta"):
            model = clip.CLIPModel(
                config.model, config.augment, compute.attention, compute.recompute, bool(stage.classification)
            )
        model.lock(stage.locked)  # before sharding, which copies requires_grad
        parallel.apply_parallelism(model, self.world, compute, mesh)
        parallel.separate_reductions(model, self.world, like)
        return model

    def enter(self, stage: Stage) -> None:
        """Convert the model if a stage has another image size, patch, text length or normalisation, other locked
        towers, or another answer to whether there is a text classification head. A new head starts as in a first stage.
        Collective.

        The checkpoint at the border has the old model, so an attempt that resumes there converts the same weights.
        """
        before = self.stage_config
        self.stage_config = derived.for_stage(self.config, stage)
        shapes = [(config.model, config.augment.mean, config.augment.std) for config in (before, self.stage_config)]
        has_head = self.model.head is not None
        same_locked = self.model.locked == set(stage.locked)
        if shapes[0] == shapes[1] and has_head == bool(stage.classification) and same_locked:
            self.model.set_recompute(self.stage_config.compute.recompute)
            return
        self.checkpoints.wait()  # a save in the background reads the old weights
        self.watchdog.heartbeat(f"converting the model for stage {stage.name}", times=LONG_OPERATION_FACTOR)
        model = self.allocate(self.stage_config, stage, self.model)
        conversion.copy_weights(self.model, model)
        if not has_head:
            clip.init_weights(model, self.config.seed, "head.")
        parallel.check_initialised(model)
        self.model = model
        image = self.stage_config.model.image
        text = self.stage_config.model.text
        if self.world.is_rank0:
            values = stage.name, image.size, image.patch, text.length
            log.info("stage %s: images of %d px, patches of %d px, captions of %d tokens", *values)

    def choose_attention(self, stage: Stage) -> None:
        """Find the kernel of every attention of a stage on a GPU, and log it."""
        compute = self.config.compute
        model = self.stage_config.model
        shapes = attention.stage_shapes(model, derived.visible_patch_count(model.image, stage.mask))
        pairs = stage.batch // self.world.size // compute.accumulate
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[compute.precision]
        kernels = attention.choose_kernels(compute.attention, shapes, pairs, dtype, self.world.device)
        if kernels and self.world.is_rank0:
            log.info("stage %s, attention kernels: %s", stage.name, attention.format_kernels(kernels))

    def save(self, span: StageSpan, optimizer: torch.optim.Optimizer) -> None:
        """Start a save of the present position, unless it is saved or being saved."""
        if not self.checkpoints.is_unsaved(self.samples_seen):
            return
        self.wait_for_device()
        self.watchdog.heartbeat(f"saving S = {self.samples_seen}", times=LONG_OPERATION_FACTOR)
        state = saver.model_state(self.model) | saver.optimizer_state(self.model, optimizer)
        self.checkpoints.save(
            state, span.stage.name, self.samples_seen,
            step=self.step, seconds=self.seconds, manifest=self.loader.digest, order=self.loader.order_number,
            replaced=self.counters.totals()[0], peak_memory=self.counters.peak_memory(),
        )  # fmt: skip
        self.callbacks.call("save", self)

    def run_stages(self) -> None:
        """Restore, train the remaining stages, evaluate and write the result.

        Raises TrainingStopped after the last save is complete.
        """
        try:
            self.restore()
            for span in self.spans:
                self.span = span
                if self.samples_seen < span.end:
                    self.run_stage(span)
                if self.samples_seen == span.end < self.total:
                    self.callbacks.evaluate(self)
            self.callbacks.call("stop", self)
            self.finish()
        except TrainingStopped:
            self.checkpoints.wait()
            if self.samples_seen < self.total:
                self.callbacks.call("stop", self)
            raise

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run_stage(self, span: StageSpan) -> None:
        """Train one stage from the present position to its end, and save."""
        self.enter(span.stage)
        self.choose_attention(span.stage)
        self.optimizer = optimizer = parameter_groups.build(self.model.named_parameters(), self.config.optim)
        if span.start < self.samples_seen:
            self.checkpoints.load_optimizer(self.model, optimizer, span.stage.name)
            if self.passed_multiple(self.config.evaluate.every, span):
                self.callbacks.evaluate(self)  # the process was killed between a checkpoint and its score
        stage = span.stage
        self.token_weights = None
        if stage.classification:
            self.token_weights = token_weights(self.config).to(self.world.device)
        batches = self.loader.batches(
            self.samples_seen, stage.batch, stage.mask, stage.text_mask, stage.text_masking,
            WorkerConfig.of(self.stage_config), derived.target_count(stage), stage.patch_masking,
        )  # fmt: skip
        self.callbacks.call("start_stage", self)
        is_first = True
        try:
            while self.samples_seen < span.end:
                self.announce_step(span, is_first)
                is_first = False
                self.save_or_stop_if_requested(span, optimizer)
                self.timed_step(span, optimizer, batches)
                scored = self.samples_seen < span.end and self.passed_multiple(self.config.evaluate.every, span)
                if scored or self.is_save_due(span):
                    self.coordinated_stop.flush()
                    self.save(span, optimizer)
                if scored:
                    self.callbacks.evaluate(self)
            self.coordinated_stop.flush()
            self.save(span, optimizer)
        finally:
            self.loader.close()
            self.optimizer = None  # its memory is free before the next model

    def announce_step(self, span: StageSpan, is_first: bool) -> None:
        """Give the watchdog the next operation and its limit: the first step of a stage may compile its blocks."""
        if is_first and self.config.compute.compile == "yes":
            what = f"compiling the blocks in the first step of stage {span.stage.name}"
            self.watchdog.heartbeat(what, at_least=60 * COMPILE_MINUTES)
        else:
            self.watchdog.heartbeat(f"a step from S = {self.samples_seen}")

    def save_or_stop_if_requested(self, span: StageSpan, optimizer: torch.optim.Optimizer) -> None:
        """Save if a rank requests it. Raises TrainingStopped, after a save, if a rank requests a stop. Collective."""
        stop, save = self.coordinated_stop.poll(*self.poll_requests())
        if stop or save:
            self.coordinated_stop.flush()
            self.save(span, optimizer)
        if stop:
            raise TrainingStopped(self.stop_reason())

    def timed_step(self, span: StageSpan, optimizer: torch.optim.Optimizer, batches: Iterator[Batch]) -> None:
        """Train on the next batch, advance the position, and count the time."""
        start_time = time.perf_counter()
        batch = next(batches)
        # while the device computes the step before, a wait for the batch costs nothing
        if self.guard.is_device_busy:
            self.waited = 0.0
        else:
            self.waited = time.perf_counter() - start_time
        self.callbacks.call("before_step", self)
        self.loss, self.accuracy, self.gradient_norm = self.train_step(span, optimizer, batch)
        self.samples_seen += span.stage.batch
        self.step += 1
        self.seconds += time.perf_counter() - start_time
        self.counters.replaced += batch.replaced
        self.batch = batch
        self.callbacks.call("step", self)
        self.batch = None
        self.features = None

    def is_save_due(self, span: StageSpan) -> bool:
        """Whether the configuration asks for a save at this position."""
        section = self.config.checkpoint
        due = self.samples_seen in section.keep_at or self.passed_multiple(section.samples, span)
        return due or self.checkpoints.save_after_first_step

    def train_step(self, span: StageSpan, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[Any, Any, Any]:
        """One optimiser step on the local batch (b, K, p*p*3). Returns loss, accuracy (global batch), gradient norm."""
        compute = self.config.compute
        fields = (batch.patches, batch.keep_indices, batch.tokens, batch.position_ids)
        inputs = tuple(field for field in fields if field is not None)
        rate = parameter_groups.set_learning_rate(optimizer, span.stage, self.samples_seen - span.start)
        optimizer.zero_grad(set_to_none=True)
        autocast = parallel.autocast(compute, self.world)
        classification = None
        if batch.targets is not None:
            assert self.token_weights is not None
            classification = grad_cache.Classification(span.stage.classification, batch.targets, self.token_weights)
        numbers = {}
        if batch.fields is not None:
            numbers = dict(zip(self.config.data.fields, batch.fields.unbind(dim=1), strict=True))
        statistics = grad_cache.grad_cache_backward(
            self.model, inputs, compute.accumulate, self.world.device, autocast, compute.loss_tile,
            compute.loss_tf32 == "yes", classification, self.set_features if self.config.monitor.callbacks else None,
            numbers,
        )  # fmt: skip
        requests = self.coordinated_stop.requests(self.world.device)
        loss, accuracy, *of_head = mean_over_ranks(torch.stack(statistics), self.world.size, requests)
        self.classification_loss = of_head[0] if of_head else None
        self.coordinated_stop.submit(requests)
        norm = parameter_groups.gradient_norm(self.model)
        after = self.samples_seen + span.stage.batch
        step = anomaly.TrainedStep(self.step + 1, after, span.stage.name, rate, batch.ids)
        self.guard.check_step(optimizer, step, loss, norm)
        if self.config.optim.clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.optim.clip, norm)
        optimizer.step()
        return loss, accuracy, norm

    def set_features(self, features: grad_cache.PairFeatures) -> None:
        """Show the features of this step to callbacks."""
        self.features = features

    def wait_for_device(self) -> None:
        """Wait for the device, which may still compute the newest step, and count this time as the step's."""
        start_time = time.perf_counter()
        self.guard.flush()
        self.seconds += time.perf_counter() - start_time

    def poll_requests(self) -> tuple[bool, bool]:
        """(stop, save) as this rank requests them for this step.

        A failed save in the background is a request to stop, so that all ranks raise its error at the same step.
        """
        return bool(self.flag) or self.checkpoints.has_failed(), self.checkpoints.is_due()

    def stop_if_requested(self) -> None:
        """Raise TrainingStopped if a rank requests a stop now. Waits for the slowest rank. Collective."""
        if self.coordinated_stop.poll_blocking(bool(self.flag)):
            raise TrainingStopped(self.stop_reason())

    def stop_reason(self) -> str:
        return self.flag.reason or "another rank requested the stop"

    def passed_multiple(self, interval: int, span: StageSpan) -> bool:
        """Whether the last step passed a multiple of ``interval`` samples; 0: never."""
        return bool(interval) and self.samples_seen // interval > (self.samples_seen - span.stage.batch) // interval

    # -- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Evaluate on all sets and write result.json, which completes the run."""
        evaluations = self.callbacks.evaluate(self)
        self.checkpoints.wait()
        replaced = self.counters.totals()[0]
        if self.world.is_rank0 and self.run.is_current_attempt(self.attempt):
            write_result(self.run, self.attempt, self.config, self, self.world.size, replaced, evaluations)

    def close(self, phase: str, reason: str) -> None:
        self.watchdog.close()
        if self.watcher is not None:
            self.watcher.close()
        self.loader.close()
        self.callbacks.call("end", self, phase, reason)
