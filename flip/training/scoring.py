"""Scores of the weights in training, as a callback: along the way, after each stage and at the end."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from flip.checkpoint.manager import CheckpointManager
from flip.common.shutdown import Watchdog
from flip.config.derived import stage_spans
from flip.config.schema import Config, EvaluationSet
from flip.data.storage.retry import RetryPolicy
from flip.data.view import EvaluationView
from flip.distributed import parallel
from flip.distributed.collectives import RankGroup
from flip.distributed.parallel import World
from flip.evaluation.datasets.catalog import ResolvedDataset
from flip.evaluation.encoding.encoders import ModelEncoder
from flip.evaluation.evaluator import Evaluator
from flip.evaluation.label_check import check_labels
from flip.evaluation.metrics.measures import format_result
from flip.evaluation.metrics.predictions import Predictions, path_of
from flip.evaluation.metrics.result_files import ScoreRecord, read_score_file, training_file, write_scores
from flip.models import clip
from flip.runs import checkpoint_folder
from flip.runs.rundir import RunDir
from flip.tokenizer import Tokenizer
from flip.training.callbacks import Callback, Training
from flip.training.metrics_callback import MetricLines

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
        """At the end of the run, score all sets and return their results. Before it, score the validation sets."""
        if training.samples_seen == self._end:
            return self._evaluate(training, self._config.evaluate.sets, keep_predictions=True)
        validation = [item for item in self._config.evaluate.sets if item.role == "validation"]
        self._evaluate(training, validation, keep_predictions=False)  # they take much space
        return []

    def _evaluate(
        self, training: Training, items: Sequence[EvaluationSet], keep_predictions: bool
    ) -> list[dict[str, Any]]:
        """Score the sets that no earlier attempt has scored; write the results to eval/ and TensorBoard.

        Each set is written when it is scored: after a stop the next attempt scores the others. The position must be
        saved or being saved, because a stop between two batches does not save.
        """
        if not items:
            return []
        with self._metrics.evaluating():
            done = self._stored(training)
            left = [item for item in items if item.name not in done]
            if not left:
                return _in_order(items, done)
            encoder = self._encoder(training)
            for item in left:
                predictions = dict[str, Predictions]()
                scored = self._score(training, encoder, item, predictions)
                self._checkpoints.wait()  # otherwise the results might belong to weights that are lost
                done[item.name] = self.with_checkpoint(training, scored)
                if not keep_predictions:
                    predictions.clear()
                self.write(training, _in_order(items, done), predictions)
            del encoder
            if self._world.size > 1:
                gc.collect()  # frees the fp32 copy, whose modules refer to each other
            results = _in_order(items, done)
            if self._is_writer():
                self._metrics.writer.add_scores(training.samples_seen, results)
            return results

    def _stored(self, training: Training) -> dict[str, list[dict[str, Any]]]:
        """Name of a set -> its results of the present weights from an earlier attempt. Collective."""
        path = training_file(self._run, training.span.stage.name, training.samples_seen)
        if not self._ranks.on_rank0(path.exists):
            return {}
        self._checkpoints.wait()

        def read() -> dict[str, list[dict[str, Any]]]:
            try:
                scores = read_score_file(path).scores
            except (FileNotFoundError, ValueError):  # damaged: the sets are scored again
                return {}
            record = checkpoint_folder.summary_at(self._run, training.samples_seen)
            by_set: dict[str, list[dict[str, Any]]] = {}
            for score in scores:
                if record is not None and score.get("commit") == record:
                    by_set.setdefault(str(score.get("set")), []).append(score)
            return by_set

        return self._ranks.on_rank0(read)

    def _score(
        self, training: Training, encoder: ModelEncoder, item: EvaluationSet, predictions: dict[str, Predictions]
    ) -> list[dict[str, Any]]:
        """Results of the present weights on a set. Raises TrainingStopped if the ranks agree to stop between two
        batches.

        ``predictions``: filled on rank 0 with those for each image.
        """
        training.stop_if_requested()
        heartbeat = partial(self._watchdog.heartbeat, f"evaluating {item.name}")
        heartbeat()
        evaluator = Evaluator(
            encoder, self._config.evaluate.batch, self._ranks, heartbeat, device=self._world.device,
            predictions=predictions, retry_policy=self._retry_policy, stop_if_requested=training.stop_if_requested,
        )  # fmt: skip
        with torch.compiler.set_stance("force_eager"):  # as in flip evaluate; shapes rarely repeat
            scored = evaluator.score(ResolvedDataset.from_config(item), item.role)
        parallel.reshard(encoder.model)
        if self._world.is_rank0:
            for result in scored:
                log.info("%s", format_result(result))
        return scored

    def with_checkpoint(self, training: Training, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The results with their position and, on rank 0, which alone reads it, the record of its checkpoint."""
        position: dict[str, Any] = {"stage": training.span.stage.name, "samples": training.samples_seen}
        if self._is_writer():
            position["commit"] = checkpoint_folder.summary_at(self._run, training.samples_seen)
        return [result | position for result in results]

    def write(self, training: Training, results: list[dict[str, Any]], predictions: Mapping[str, Predictions]) -> None:
        """Write the results of the position so far, and the predictions of a set."""
        if not self._is_writer():
            return
        stage = training.span.stage.name
        samples_seen = training.samples_seen
        point = ScoreRecord(stage, samples_seen, results, seconds=training.seconds, attempt=self._attempt)
        write_scores(self._run, point)
        for name, prediction in predictions.items():
            prediction.write(path_of(self._run, stage, samples_seen, name))

    def _is_writer(self) -> bool:
        """Whether this is rank 0, and no newer attempt works: the checkpoint of a position could be that attempt's."""
        return self._world.is_rank0 and self._run.is_current_attempt(self._attempt)

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


def _in_order(items: Sequence[EvaluationSet], done: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The results of the sets that are done, in the order of the configuration."""
    return [result for item in items for result in done.get(item.name, ())]
