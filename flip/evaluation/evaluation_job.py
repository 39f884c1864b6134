"""The evaluation job: scores checkpoints of a run, or an open_clip folder, on data sets.

A restarted job skips the results that it has already written; features are cached.
"""

import dataclasses
import logging
import time
from functools import partial
from typing import Any

import torch

from flip.checkpoint import saver
from flip.checkpoint.restorer import CheckpointRestorer
from flip.common.shutdown import LONG_OPERATION_FACTOR, EndCallback, PeerWatcher, StopFlag, Watchdog
from flip.config import merge
from flip.config.derived import weights_config
from flip.data.storage.retry import RetryPolicy
from flip.data.view import EvaluationView
from flip.distributed import parallel
from flip.distributed.collectives import RankGroup
from flip.evaluation.datasets import catalog
from flip.evaluation.datasets.catalog import DatasetRequest, ResolvedDataset
from flip.evaluation.encoding import open_clip_folder
from flip.evaluation.encoding.encoders import Encoder, ModelEncoder, OpenClipEncoder
from flip.evaluation.encoding.features import FeatureCache
from flip.evaluation.evaluator import Evaluator
from flip.evaluation.label_check import check_resolved_labels
from flip.evaluation.metrics.measures import format_result
from flip.evaluation.metrics.predictions import path_of
from flip.evaluation.metrics.result_files import COLUMNS, PUBLISHED, is_shown, scores_of_job, suffix, write_result
from flip.evaluation.request import CONFIGURED, EvaluationRequest
from flip.models import attention, clip
from flip.runs import checkpoint_folder
from flip.runs.checkpoint_folder import SavedCheckpoint
from flip.runs.errors import DataError
from flip.runs.rundir import RunDir, create_json, write_json
from flip.tokenizer import Tokenizer

log = logging.getLogger(__name__)

STATUS_SECONDS = 2.0
"""Seconds between two writes of status.json."""


class EvaluationStopped(Exception):
    """This rank received a stop request; there is nothing to save."""


def evaluate(job: RunDir, attempt: int, flag: StopFlag, on_end: EndCallback) -> None:
    """Run the job's request: write results to the subject's eval/, then result.json, which completes the job.

    ``on_end`` is called before the process exits as in training. Raises EvaluationStopped or FlipError.
    """
    request = EvaluationRequest.read(job)
    watchdog = Watchdog(60 * request.hang_minutes, on_end)
    world = parallel.start(request.compute, request.hang_minutes, connecting=watchdog.connecting)
    peers = PeerWatcher(world.control_group, world.rank, world.size, on_end)
    try:
        results = Evaluation(job, attempt, request, world, watchdog, flag).run()
        if world.is_rank0:
            create_json(job.result, {"evaluations": results, "subject": request.subject, "time": time.time()})
        peers.close()  # not after an error or a stop, which each rank meets alone
    finally:
        watchdog.close()


class Evaluation:
    """One attempt of the job on one rank."""

    def __init__(
        self, job: RunDir, attempt: int, request: EvaluationRequest, world: parallel.World, watchdog: Watchdog,
        flag: StopFlag,
    ) -> None:  # fmt: skip
        self.job = job
        self.attempt = attempt
        self.request = request
        self.world = world
        self.watchdog = watchdog
        self.flag = flag
        self._written = float("-inf")
        self.subject = RunDir(request.subject)
        # rank 0 may index shards or fit a probe meanwhile, so this is the group with the longest timeout
        self.ranks = RankGroup(world.rank, world.size, world.checkpoint_group)
        self.retry_policy = RetryPolicy.of(request)
        self.autocast = parallel.autocast(request.compute, world)

    def run(self) -> list[dict[str, Any]]:
        """All results, including those of earlier attempts."""
        self.watchdog.heartbeat("looking for the data sets", times=LONG_OPERATION_FACTOR)
        sets = []
        for values in self.request.sets:
            resolved = self.ranks.on_rank0(partial(self._resolve, DatasetRequest(**values)))
            sets.append(ResolvedDataset.from_dict(resolved))
        progress = partial(self._beat, "comparing labels with class names")
        check_resolved_labels(sets, self.ranks, self.retry_policy, progress)
        results = []
        for source in self._sources():
            if isinstance(source, dict):
                checkpoint = source
            else:
                checkpoint = checkpoint_folder.summary(source)
            encoders = self._encoders(source)
            for dataset in sets:
                for (mask, ensemble), encoder in encoders.items():
                    name = dataset.name + suffix(mask, ensemble)
                    results += self._score(dataclasses.replace(dataset, name=name), encoder, checkpoint)
        return results

    def _beat(self, what: str) -> None:
        if self.flag:
            raise EvaluationStopped(self.flag.reason)
        self.watchdog.heartbeat(what, times=LONG_OPERATION_FACTOR)

    def _write_status(self, name: str, done: int, total: int) -> None:
        """Write how much of a data set is encoded to status.json, on rank 0, every few seconds."""
        now = time.monotonic()
        if not self.world.is_rank0 or now < self._written + STATUS_SECONDS:
            return
        self._written = now
        status = {"attempt": self.attempt, "phase": name, "samples": done, "total": total, "time": time.time()}
        try:
            write_json(self.job.status, status)
        except OSError as error:  # it is for people alone
            log.warning("status.json cannot be written: %s", error)

    def _resolve(self, request: DatasetRequest) -> dict[str, Any]:
        if request.path != CONFIGURED:
            return dataclasses.asdict(catalog.resolve_dataset(request, self.request.data, self.retry_policy))
        sets = merge.read_config(self.subject.config).evaluate.sets
        item = next(item for item in sets if item.name == request.name)
        return dataclasses.asdict(ResolvedDataset.from_config(item))

    # -- models ------------------------------------------------------------------------------------------------------

    def _sources(self) -> list[SavedCheckpoint | dict[str, Any]]:
        """The checkpoints, equal on all ranks; for an open_clip folder the fields that stand for a checkpoint."""
        if self.request.model:
            folder = self.request.model.partition(":")[2]
            self._beat("verifying the model")
            digest = self.ranks.on_rank0(partial(open_clip_folder.verified_digest, folder))
            return [{"path": folder, "stage": PUBLISHED, "samples": 0, "digest": digest}]
        names = self.ranks.on_rank0(lambda: list(self.request.commits) or self._newest())
        return [self._checkpoint(name) for name in names]

    def _newest(self) -> list[str]:
        """The newest checkpoint, pinned: a run in training may write newer ones, and delete this one before it is
        read."""
        while checkpoints := checkpoint_folder.checkpoints(self.subject):
            newest = checkpoints[-1]
            checkpoint_folder.pin(self.subject, self.job, newest.stage, newest.samples_seen)
            if (newest.path / checkpoint_folder.COMMIT_FILE).exists():
                return [f"{newest.stage}/{newest.path.name}"]
        raise checkpoint_folder.no_checkpoint(self.subject)

    def _checkpoint(self, name: str) -> SavedCheckpoint:
        try:
            return checkpoint_folder.read_checkpoint(self.subject.checkpoints / name)
        except checkpoint_folder.CorruptCheckpoint as error:
            remedy = "It was deleted since, or is damaged: name another one with --checkpoint."
            raise DataError(f"this checkpoint cannot be read: {error}", name, remedy=remedy) from error

    def _encoders(self, source: SavedCheckpoint | dict[str, Any]) -> dict[tuple[str, bool], Encoder]:
        """(mask, ensemble) -> encoder."""
        self._beat("loading the model")
        device = self.world.device
        compute = self.request.compute
        if isinstance(source, dict):
            return {("0", False): OpenClipEncoder(str(source["path"]), device, compute.precision)}
        config = weights_config(merge.read_config(self.subject.config), source.stage)
        if device.type == "cuda" and attention.is_fused(compute.attention):
            attention.prefer(compute.attention)
        with torch.device("meta"):
            model = clip.CLIPModel(config.model, config.augment, compute.attention)
        parallel.apply_parallelism(model, self.world, compute)
        checkpoints = CheckpointRestorer(self.subject, 0, self.world, self.retry_policy, self.request.url)
        checkpoints.load(checkpoints.open(source.path), saver.model_state(model), (saver.TRAINING_ONLY,))
        checkpoints.close()
        parallel.check_initialised(model)
        model.eval()
        tokenizer = Tokenizer.of(config.data.tokenizer, config.model.text)
        eval_view = EvaluationView.of(config)
        ways = {stage.name: stage.patch_masking for stage in config.stages}
        make = partial(
            ModelEncoder, model, tokenizer, config.model.image, device, self.autocast,
            precision=compute.precision, view=eval_view, patch_masking=ways.get(source.stage, "uniform"),
        )  # fmt: skip
        return {view: make(*view) for view in self.request.views}

    # -- results -----------------------------------------------------------------------------------------------------

    def _score(self, dataset: ResolvedDataset, encoder: Encoder, checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
        if done := self.ranks.on_rank0(lambda: self._done(dataset, checkpoint)):
            return done
        self._beat(f"evaluating {dataset.name}")
        evaluator = Evaluator(
            encoder,
            self.request.batch,
            self.ranks,
            partial(self._beat, f"evaluating {dataset.name}"),
            self._cache(checkpoint),
            self.world.device,
            self.request.cost,
            retry_policy=self.retry_policy,
            counted=partial(self._write_status, dataset.name),
        )
        results = evaluator.score(dataset)
        if self.request.model and self.world.is_rank0:
            open_clip_folder.register(self.subject, self.request.model.partition(":")[2])
        for result in results:
            if self.world.is_rank0:
                if (name := result["name"]) in evaluator.predictions and is_shown(self.subject, result, checkpoint):
                    path = path_of(self.subject, checkpoint["stage"], checkpoint["samples"], name)
                    evaluator.predictions[name].write(path)
                write_result(self.subject, result, checkpoint, self.job.name)
                self.job.record_progress(self.attempt)
                self._log(dataset, result)
        return [
            {**result, "commit": checkpoint, "stage": checkpoint["stage"], "samples": checkpoint["samples"]}
            for result in results
        ]

    def _cache(self, checkpoint: dict[str, Any]) -> FeatureCache | None:
        if not self.request.cache:
            return None
        compute = self.request.compute
        # a sharded model rounds differently in bf16; one of an open_clip folder is never sharded
        sharded = []
        if self.world.size > 1 and not self.request.model:
            sharded = ["sharded"]
        key = (str(checkpoint["digest"])[:32], compute.device, compute.precision, compute.attention, *sharded)
        return FeatureCache(self.request.cache, "-".join(key))

    def _done(self, dataset: ResolvedDataset, checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
        """The results of an earlier attempt of this job, if they are complete."""
        own = dataset.name, dataset.task
        scores = scores_of_job(self.subject, checkpoint["stage"], checkpoint["samples"], self.job.name)
        done = [score for score in scores if (score.get("set"), score.get("task")) == own]
        if len(done) == len(COLUMNS[dataset.task]):
            return done
        return []

    def _log(self, dataset: ResolvedDataset, result: dict[str, Any]) -> None:
        expected = catalog.expected(dataset.name)
        images = result.get("images", result["n"])
        log.info("%s", format_result(result))
        if expected is not None and images != expected:
            log.warning("%s: %d images, but this data set has %d", dataset.name, images, expected)
