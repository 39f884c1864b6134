"""The training loop of one run, readable from top to bottom: restore, stages of steps, evaluate, result.

The whole position is one integer, S, the samples seen, counted after the optimiser step. Everything else follows from
the configuration: the stage, the step's number, the batch, the learning rate.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from flip import checkpoint, commit, flops, model, monitor, optim, parallel, step
from flip.config import load, stages
from flip.config.schema import Config
from flip.config.stages import Span, spans
from flip.data import order
from flip.data.loader import Batch, Loader
from flip.data.retry import Patience
from flip.evaluate.zeroshot import zeroshot
from flip.exitcodes import DataError, Diverged
from flip.interrupt import Agreement, StopFlag
from flip.rundir import RunDir, create_json, read_json
from flip.tally import Tally
from flip.tokenizer import Tokenizer
from flip.watchdog import LONG, Watchdog
from flip.witness import Witness

log = logging.getLogger(__name__)


class Stopped(Exception):
    """All ranks agreed to stop, and what was to be saved is saved."""


def train(run: RunDir, attempt: int, flag: StopFlag, hung: Callable[[str], None]) -> None:
    """Train the run from its newest commit to its end and write result.json.

    Raises Stopped when a stop was agreed, FlipError for what can be named. Where nothing moves any more, ``hung`` is
    called with what is known of it, and the process ends.
    """
    config = load.read(run.config)
    watchdog = Watchdog(60 * config.monitor.hang_minutes, hung)
    world = parallel.start(config.compute, config.monitor.hang_minutes)
    trainer = Trainer(run, attempt, flag, config, world, watchdog)
    phase = "stopped"
    try:
        trainer.restore()
        for span in trainer.spans:
            if trainer.samples < span.end:
                trainer.run_stage(span)
            if trainer.samples == span.end < trainer.total:
                trainer.validate(span)
        trainer.finish()
        phase = "complete"
    finally:
        trainer.close(phase)


class Trainer:
    """One attempt's model, position and instruments."""

    def __init__(
        self, run: RunDir, attempt: int, flag: StopFlag, config: Config, world: parallel.World, watchdog: Watchdog
    ) -> None:
        self.run, self.attempt, self.flag, self.config, self.world = run, attempt, flag, config, world
        self.watchdog = watchdog
        self.spans = spans(config)
        self.total, self.steps = self.spans[-1].end, sum(span.steps for span in self.spans)
        self.samples, self.step, self.seconds = 0, 0, 0.0
        self.source: commit.Commit | None = None
        self.saved = -1
        """S of the newest commit."""
        start = read_json(run.attempt(attempt) / "start.json") or {}
        self.commit_soon = bool(start.get("first_commit"))
        self.agreement = Agreement(world.control, world.size)
        self.checkpointer = checkpoint.Checkpointer(run, attempt, world, config.checkpoint.keep)
        self.tokenizer = Tokenizer.of(config.data.tokenizer, config.model.text)
        self.monitor: monitor.Monitor = monitor.Silent()
        if world.first:
            self.monitor = monitor.Monitor(run, attempt, self.total, self.steps, config.monitor.status_seconds)
        witness = os.environ.get("FLIP_WITNESS") == "1"
        self.loader = Loader(
            config.data, config.augment, config.model.image, config.model.text, config.seed,
            rank=world.rank, world=world.size, witness=witness,
        )  # fmt: skip
        self.witness = Witness(run, attempt, world.rank) if witness else None

    # -- position ----------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Build the model with its first weights, then go on from the newest commit where there is one."""
        compute = self.config.compute
        self.pair = model.build(self.config.model, self.config.augment, compute.attention, compute.recompute == "block")
        model.initialise(self.pair, self.config.seed)
        parallel.place(self.pair, self.world, compute.compile == "yes")
        dtype = torch.bfloat16 if compute.precision == "bf16" else torch.float32
        self.peak = monitor.measure_peak(self.world.device, dtype)
        self.source = self.checkpointer.newest()
        if self.source is not None:
            if self.source.record["order"] != order.VERSION:
                remedy = "Finish the run with the code that it was begun with."
                found = self.source.record["order"]
                raise DataError(
                    f"this code has version {order.VERSION} of the order of samples", self.run.path, found, remedy
                )
            self.samples = self.saved = self.source.samples
            self.step, self.seconds = self.source.record["step"], self.source.record["seconds"]
            self.checkpointer.load(self.source, checkpoint.model_state(self.pair))
        self.tally = Tally(self.world, self.loader, self.source)
        self.say("attempt %d: S = %d of %d, %d ranks", self.attempt, self.samples, self.total, self.world.size)
        self.saved_at = time.monotonic()
        self.monitor.begin(self.samples)

    def save(self, span: Span, optimizer: torch.optim.Optimizer) -> None:
        """Commit the present position unless it is committed."""
        if self.saved == self.samples or self.samples == 0:
            return
        self.watchdog.beat(f"committing S = {self.samples}", times=LONG)
        begin = time.perf_counter()
        state = checkpoint.model_state(self.pair) | checkpoint.optimizer_state(self.pair, optimizer)
        self.checkpointer.save(
            state, span.stage.name, self.samples,
            step=self.step, seconds=self.seconds, manifest=self.loader.digest, order=order.VERSION,
            replaced=self.tally.replaced_everywhere(), peak_memory=self.tally.peak_memory(),
        )  # fmt: skip
        self.saved, self.saved_at, self.commit_soon = self.samples, time.monotonic(), False
        self.tally.saves, self.tally.saving = self.tally.saves + 1, self.tally.saving + time.perf_counter() - begin
        self.say("committed S = %d in stage %s", self.samples, span.stage.name)

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run_stage(self, span: Span) -> None:
        """Steps of one stage from the present position to its end, with a commit at the end."""
        optimizer = optim.build(self.pair.named_parameters(), self.config.optim)
        if self.source is not None and span.start < self.samples and self.source.stage == span.stage.name:
            self.checkpointer.load(self.source, checkpoint.optimizer_state(self.pair, optimizer))
        if span.start < self.samples and self.crossed(self.config.evaluate.every, span):
            self.validate(span)  # a kill between a commit and its score
        stage = span.stage
        batches = self.loader.batches(self.samples, stage.batch, stage.mask, stage.text_mask, stage.text_masking)
        window = monitor.Window()
        try:
            while self.samples < span.end:
                self.watchdog.beat(f"a step from S = {self.samples}")
                stop, save = self.agreement.poll(*self.wishes())
                if stop or save:
                    self.agreement.settle()
                    self.save(span, optimizer)
                if stop:
                    raise Stopped(self.told())
                begin = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - begin
                loss, accuracy, norm = self.train_step(span, optimizer, batch)
                window.add(span.stage.batch, waited, time.perf_counter() - begin)
                self.samples, self.step = self.samples + span.stage.batch, self.step + 1
                self.seconds += time.perf_counter() - begin
                self.tally.replaced += batch.replaced
                if self.witness is not None:
                    self.witness.saw(self.samples - span.stage.batch, batch)
                if self.step % self.config.monitor.log_every == 0 or self.samples >= span.end:
                    positions = step.positions(self.pair, batch.tokens)
                    self.report(span, optimizer, loss, accuracy, norm, window, positions)
                    window = monitor.Window()
                scored = self.crossed(self.config.evaluate.every, span) and self.samples < span.end
                if self.commit_soon or scored or self.crossed(self.config.checkpoint.samples, span):
                    self.agreement.settle()
                    self.save(span, optimizer)
                if scored:
                    self.validate(span)
            self.agreement.settle()
            self.save(span, optimizer)
        finally:
            self.loader.close()

    def train_step(self, span: Span, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[Any, Any, Any]:
        """One optimiser step over the local batch (b, K, p*p*3); loss and accuracy are those of the global batch."""
        compute = self.config.compute
        inputs = batch.patches, batch.keep, batch.tokens, *([] if batch.places is None else [batch.places])
        optim.set_learning_rate(optimizer, span.stage, self.samples - span.start)
        optimizer.zero_grad(set_to_none=True)
        autocast = parallel.autocast(compute, self.world)
        loss, accuracy = step.gradients(self.pair, inputs, compute.accumulate, self.world.device, autocast)
        norm = None
        if self.config.optim.clip or (self.step + 1) % self.config.monitor.log_every == 0:
            bound = self.config.optim.clip or math.inf
            norm = parallel.whole(torch.nn.utils.clip_grad_norm_(self.pair.parameters(), bound))
        optimizer.step()
        return loss, accuracy, norm

    def wishes(self) -> tuple[bool, bool]:
        """What this rank wants at this step: (stop, save). The interval in minutes is kept by rank 0's clock alone."""
        if self.world.first and not self.run.holds(self.attempt):
            self.flag.set("superseded by a newer attempt")
        if self.world.first and self.run.cancel.exists():  # the signal may have come before anybody listened
            self.flag.set("cancelled")
        due = time.monotonic() - self.saved_at > self.config.checkpoint.minutes * 60
        return bool(self.flag), self.world.first and due and not self.config.checkpoint.samples

    def told(self) -> str:
        return self.flag.reason or "another rank was told to stop"

    def crossed(self, interval: int, span: Span) -> bool:
        """Whether the step just done passed a multiple of ``interval`` samples; 0: never."""
        return bool(interval) and self.samples // interval > (self.samples - span.stage.batch) // interval

    # -- what it tells -----------------------------------------------------------------------------------------------

    def report(
        self, span: Span, optimizer: Any, loss: Any, accuracy: Any, norm: Any, window: monitor.Window, positions: float
    ) -> None:
        """One metric line. The only place of the loop that waits for the device. ``positions``: of a caption, as in
        ``flops.forward_flops``, of the newest batch."""
        value, slope = float(loss), None if norm is None else float(norm)
        if not math.isfinite(value) or not math.isfinite(slope or 0.0):
            raise Diverged(
                "the loss or its gradient is not finite", f"stage {span.stage.name}, S = {self.samples}",
                f"loss {value}, gradient norm {slope}",
                "Lower `base_lr` or lengthen `warmup`; the newest commit is from before.",
            )  # fmt: skip
        speed = window.samples / window.seconds
        cost = flops.training_flops(self.config.model, span.stage.mask, positions)["total"]
        record = {
            "step": self.step, "samples": self.samples, "stage": span.stage.name, "attempt": self.attempt,
            "loss": value, "accuracy": float(accuracy), "lr": optimizer.param_groups[0]["lr"],
            "logit_scale": float(self.pair_scale()), **self.pair_bias(), "grad_norm": slope,
            "samples_per_second": speed, "data_wait": window.waited / window.seconds,
            "mfu": cost * speed / (self.peak * self.world.size), "replaced": self.tally.replaced_everywhere(),
            "seconds": self.seconds, "time": time.time(), "storage": self.tally.storage_everywhere(),
            "saves": self.tally.saves, "saving": self.tally.saving,
        }  # fmt: skip
        self.monitor.step(record)
        self.say("step %d of %d, loss %.3f, %.0f samples/s", self.step, self.steps, value, speed)

    def say(self, text: str, *values: Any) -> None:
        """A line in the log, of the first rank."""
        if self.world.first:
            log.info(text, *values)

    def pair_scale(self) -> torch.Tensor:
        """exp(logit_scale), clamped as in the forward pass; a collective where the parameter is sharded."""
        raw = parallel.whole(self.pair.logit_scale.detach())
        return raw.exp().clamp(1.0, self.config.model.max_logit_scale)

    def pair_bias(self) -> dict[str, float]:
        """SigLIP's bias of the logits, where there is one; a collective where the parameter is sharded."""
        bias = self.pair.logit_bias
        return {} if bias is None else {"logit_bias": float(parallel.whole(bias.detach()))}

    # -- evaluation and the end --------------------------------------------------------------------------------------

    def validate(self, span: Span) -> None:
        """Score the committed position on the validation sets, unless an attempt before has done it."""
        there = [(self.run.eval / f"{span.stage.name}-{self.samples}.json").exists()]
        torch.distributed.broadcast_object_list(there, src=0, group=self.world.storage)
        if not there[0]:
            self.evaluate(span, "validation")

    def evaluate(self, span: Span, role: str) -> list[dict[str, Any]]:
        """Zero-shot on the sets of this role (``""``: all), all ranks together; kept in eval/ and TensorBoard.

        The position must be committed: a stop that is agreed between two sets leaves at once.
        """
        items = [item for item in self.config.evaluate.sets if not role or item.role == role]
        if items:
            self.monitor.status(phase="evaluating")
        results, data = [], self.config.data
        patience = Patience(deadline=data.deadline, timeout=data.timeout)
        for item in items:
            stop, _ = self.agreement.poll(bool(self.flag), False)
            self.agreement.settle()
            if stop:
                raise Stopped(self.told())
            self.watchdog.beat(f"evaluating {item.name}")
            result = zeroshot(
                self.pair, item, self.tokenizer, self.config.model.image, self.config.evaluate.batch,
                rank=self.world.rank, world=self.world.size, device=self.world.device,
                autocast=parallel.autocast(self.config.compute, self.world), group=self.world.control,
                progress=partial(self.watchdog.beat, f"evaluating {item.name}"),
                patience=patience,
            )  # fmt: skip
            parallel.reshard(self.pair)
            results.append(result | {"stage": span.stage.name, "samples": self.samples})
            self.say("%s: top-1 %.2f %% of %d", item.name, 100 * result["top1"], result["n"])
        if items:
            self.monitor.evaluation(span.stage.name, self.samples, self.seconds, results)
            self.monitor.status(phase="training")
        return results

    def finish(self) -> None:
        """Everything is trained: score all sets once, write result.json, which makes the run complete."""
        evaluations = self.evaluate(self.spans[-1], "")
        replaced = self.tally.replaced_everywhere()
        if not self.world.first or not self.run.holds(self.attempt):
            return
        last = commit.commits(self.run)[-1]
        cost = sum(
            (span.end - span.start) * flops.training_flops(self.config.model, span.stage.mask, positions)["total"]
            for span in self.spans
            for positions in [stages.positions(self.config.model.text, span.stage.text_mask)]
        )
        create_json(self.run.result, {
            "run": self.run.name, "stage": last.stage, "samples": self.samples, "steps": self.step,
            "seconds": self.seconds, "samples_per_second": self.samples / self.seconds, "world": self.world.size,
            "parameters": flops.parameters(self.config.model), "flops": cost, "evaluations": evaluations,
            "commit": {"path": str(last.path.relative_to(self.run.path)), "samples": last.samples},
            "attempts": self.attempt, "replaced": replaced, "manifest": self.loader.digest,
            "peak_memory": self.tally.peak_memory(), "time": time.time(),
        })  # fmt: skip

    def close(self, phase: str) -> None:
        self.watchdog.close()
        self.loader.close()
        with contextlib.suppress(OSError):  # the end's own cause must not be lost for a status line
            self.monitor.close(phase)
