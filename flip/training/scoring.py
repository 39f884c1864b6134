"""Scores of the weights in training, as a callback: along the way, after each stage and at the end."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from flip.checkpoint.manager import CheckpointManager
from flip.config.derived import stage_spans
from flip.config.schema import Config, EvaluationSet
from flip.data.storage.retry import RetryPolicy
from flip.data.view import EvaluationView
from flip.distributed import parallel
from flip.distributed.collectives import RankGroup, run_on_first
from flip.distributed.parallel import World
from flip.distributed.shutdown import Watchdog
from flip.evaluation.datasets.catalog import ResolvedDataset
from flip.evaluation.encoding.encoders import ModelEncoder
from flip.evaluation.evaluator import Evaluator
from flip.evaluation.label_check import check_labels
from flip.evaluation.metrics.measures import format_result
from flip.evaluation.metrics.predictions import Predictions, path_of
from flip.evaluation.metrics.result_files import ScoreRecord, training_file, write_scores
from flip.models import clip
from flip.runs import commit
from flip.runs.rundir import RunDir
from flip.tokenizer import Tokenizer
from flip.training.callbacks import Callback, Training
from flip.training.metric_lines import MetricLines

log = logging.getLogger(__name__)


class Scoring(Callback):
    """Scores the present weights: on the validation sets along the way, on all sets at the end of the run.

    The fp32 weights are scored in fp32, as exported, whatever the precision of training.

    Args:
        metrics: writes the scores, and counts the time.
    """

    def __init__(
        self, run: RunDir, attempt: int, config: Config, world: World, checkpoints: CheckpointManager,
        watchdog: Watchdog, metrics: MetricLines,
    ) -> None:  # fmt: skip
        self._run = run
        self._attempt = attempt
        self._config = config
        self._world = world
        self._checkpoints = checkpoints
        self._watchdog = watchdog
        self._metrics = metrics
        self._ranks = RankGroup(world.rank, world.size, world.control_group)
        self._retry_policy = RetryPolicy.of(config.data, absent_is_outage=True)
        self._end = stage_spans(config)[-1].end

    def start(self, training: Training) -> None:
        """At S = 0, compare labels and class names of evaluation sets: now, not after all steps."""
        if training.samples_seen == 0:
            heartbeat = partial(self._watchdog.heartbeat, "comparing labels with class names")
            check_labels(self._config.evaluate.sets, self._ranks, self._retry_policy, heartbeat)

    def evaluate(self, training: Training) -> list[dict[str, Any]]:
        """At the end of the run, score all sets and return their results. Before it, score the validation sets, unless
        an earlier attempt has done so."""
        if training.samples_seen == self._end:
            return self._evaluate(training, self._config.evaluate.sets, keep_predictions=True)
        scores = training_file(self._run, training.span.stage.name, training.samples_seen)
        if not run_on_first(scores.exists, self._world.control_group):
            validation = [item for item in self._config.evaluate.sets if item.role == "validation"]
            self._evaluate(training, validation, keep_predictions=False)  # they take much space
        return []

    def _evaluate(
        self, training: Training, items: Sequence[EvaluationSet], keep_predictions: bool
    ) -> list[dict[str, Any]]:
        """Score these sets; write the results to eval/ and TensorBoard.

        The position must be saved or being saved, because a stop between two sets does not save.
        """
        if not items:
            return []
        with self._metrics.evaluating():
            results, predictions = self._score(training, items)
            if self._world.size > 1:
                gc.collect()  # frees the fp32 copy, whose modules refer to each other
            self._checkpoints.wait()  # otherwise the results might belong to weights that are lost
            return self.record_scores(training, results, predictions if keep_predictions else {})

    def _score(
        self, training: Training, items: Sequence[EvaluationSet]
    ) -> tuple[list[dict[str, Any]], dict[str, Predictions]]:
        """Results of the present weights, and on rank 0 the predictions for each image. Raises TrainingStopped if the
        ranks agree to stop between two sets."""
        encoder = self._encoder(training)
        results = list[dict[str, Any]]()
        predictions = dict[str, Predictions]()
        for item in items:
            training.stop_if_requested()
            heartbeat = partial(self._watchdog.heartbeat, f"evaluating {item.name}")
            heartbeat()
            evaluator = Evaluator(
                encoder, self._config.evaluate.batch, self._ranks, heartbeat, device=self._world.device,
                predictions=predictions, retry_policy=self._retry_policy,
            )  # fmt: skip
            with torch.compiler.set_stance("force_eager"):  # as in flip evaluate; shapes rarely repeat
                scored = evaluator.score(ResolvedDataset.from_config(item), item.role)
            parallel.reshard(encoder.model)
            for result in scored:
                results.append(result | {"stage": training.span.stage.name, "samples": training.samples_seen})
                if self._world.is_rank0:
                    log.info("%s", format_result(result))
        return results, predictions

    def record_scores(
        self, training: Training, results: list[dict[str, Any]], predictions: Mapping[str, Predictions]
    ) -> list[dict[str, Any]]:
        """Write the results with the commit of their position, and the predictions. Only rank 0 reads and writes, and
        only while no newer attempt does: the commit could be that one's."""
        if not self._world.is_rank0 or not self._run.is_current_attempt(self._attempt):
            return results
        stage = training.span.stage.name
        samples_seen = training.samples_seen
        record = commit.summary_at(self._run, samples_seen)
        results = [result | {"commit": record} for result in results]
        point = ScoreRecord(stage, samples_seen, results, seconds=training.seconds, attempt=self._attempt)
        write_scores(self._run, point)
        self._metrics.writer.add_scores(samples_seen, results)
        for name, prediction in predictions.items():
            prediction.write(path_of(self._run, stage, samples_seen, name))
        return results

    def _encoder(self, training: Training) -> ModelEncoder:
        """The present weights as an encoder that computes in fp32."""
        config = training.stage_config

        def build() -> clip.CLIPModel:
            with torch.device("meta"):
                return clip.CLIPModel(config.model, config.augment, config.compute.attention)

        model = parallel.in_fp32(training.model, build, self._world, config.compute)
        view = EvaluationView.of(config)
        tokenizer = Tokenizer.of(config.data.tokenizer, config.model.text)
        return ModelEncoder(model, tokenizer, config.model.image, self._world.device, view=view)
