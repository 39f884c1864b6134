"""An evaluation as a job of its own: committed checkpoints of a run, or somebody else's model, on data sets by name.

It resumes by what is there: a result of this job is not computed again, and features are cached.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from flip.checkpoint import saver
from flip.checkpoint.restorer import CheckpointRestorer
from flip.config import merge, schema
from flip.data.storage.retry import RetryPolicy
from flip.data.view import EvaluationView
from flip.distributed import parallel
from flip.distributed.collectives import RankGroup
from flip.distributed.shutdown import StopFlag
from flip.distributed.watchdog import LONG, Watchdog
from flip.evaluation import datasets, foreign, open_clip_folder, prompts
from flip.evaluation.cache import FeatureCache
from flip.evaluation.datasets import Found, Wanted
from flip.evaluation.encoders import Encoder, PairEncoder
from flip.evaluation.evaluator import DataSet, Scorer
from flip.evaluation.forms import Place
from flip.evaluation.metrics import told
from flip.evaluation.task import COLUMNS, CONFIGURED, Task, keep_result, suffix
from flip.models import clip
from flip.runs import commit
from flip.runs.commit import Commit
from flip.runs.errors import ConfigError, DataError
from flip.runs.records import LATER
from flip.runs.rundir import RunDir, create_json, read_record
from flip.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Stopped(Exception):
    """This rank was told to stop; there is nothing to save."""


def evaluate(job: RunDir, attempt: int, flag: StopFlag, hung: Callable[[str], None]) -> None:
    """Do what the job's task.json says; results go to the subject's eval/, result.json makes the job complete.

    Raises Stopped, or FlipError for what can be named.
    """
    config, task = merge.read(job.config), Task.read(job)
    watchdog = Watchdog(60 * config.monitor.hang_minutes, hung)
    world = parallel.start(config.compute, config.monitor.hang_minutes)
    try:
        results = Evaluation(job, attempt, task, config, world, watchdog, flag).run()
        if world.first:
            create_json(job.result, {"evaluations": results, "subject": task.subject, "time": time.time()})
    finally:
        watchdog.close()


class Evaluation:
    """One life of the job on one rank."""

    def __init__(
        self, job: RunDir, attempt: int, task: Task, config: schema.Config, world: parallel.World,
        watchdog: Watchdog, flag: StopFlag,
    ) -> None:  # fmt: skip
        self.job, self.attempt, self.task, self.config, self.world = job, attempt, task, config, world
        self.watchdog, self.flag = watchdog, flag
        self.subject = RunDir(task.subject)
        # rank 0 may index shards or fit a probe meanwhile: the group that waits longest
        self.ranks = RankGroup(world.rank, world.size, world.storage)
        self.patience = RetryPolicy(deadline=config.data.deadline, timeout=config.data.timeout)
        self.autocast = parallel.autocast(config.compute, world)

    def run(self) -> list[dict[str, Any]]:
        """All results, those of an earlier life of the job included."""
        self.watchdog.beat("looking for the data sets", times=LONG)
        sets = [
            Found.of(self.ranks.on_rank0(lambda one=one: dataclasses.asdict(self._find(Wanted(**one)))))  # type: ignore[misc]
            for one in self.task.sets
        ]
        results = []
        for source in self._sources():
            about = source if isinstance(source, dict) else commit.brief(source)
            encoders = self._encoders(source)
            for found in sets:
                for (mask, ensemble), encoder in encoders.items():
                    name = found.name + suffix(mask, ensemble)
                    results += self._score(replace(found, name=name), encoder, about)
        return results

    def _beat(self, what: str) -> None:
        if self.flag:
            raise Stopped(self.flag.reason)
        self.watchdog.beat(what, times=LONG)

    # -- what is scored on -------------------------------------------------------------------------------------------

    def _find(self, wanted: Wanted) -> Found:
        if wanted.path != CONFIGURED:
            return datasets.find(wanted, self.task.data, self.patience)
        item = next(one for one in merge.read(self.subject.config).evaluate.sets if one.name == wanted.name)
        train = Place(item.train, manifest=item.train) if item.task == "probe" else None
        wording = prompts.read(item.classes) if item.task == "zeroshot" else None
        return Found(item.name, item.task, Place(item.manifest, manifest=item.manifest), wording, train)

    def _open(self, found: Found) -> DataSet:
        train = found.train.open(self.patience) if found.train else None
        return DataSet(found.name, found.task, found.place.open(self.patience), found.wording, train)

    # -- what is scored ----------------------------------------------------------------------------------------------

    def _sources(self) -> list[Commit | dict[str, Any]]:
        """The commits, agreed by all ranks; of a foreign model what stands for its commit."""
        if self.task.model:
            folder = self.task.model.partition(":")[2]
            self._beat("verifying the model")
            digest = self.ranks.on_rank0(partial(self._verified, folder))
            return [{"path": folder, "stage": "foreign", "samples": 0, "digest": digest}]
        names = self.ranks.on_rank0(lambda: list(self.task.commits) or self._newest())
        return [self._commit(name) for name in names]

    @staticmethod
    def _verified(folder: str) -> str:
        """The digest of an open_clip folder whose files are what its checksums say, if it has any."""
        open_clip_folder.check(folder)
        open_clip_folder.verify(folder)
        return open_clip_folder.digest(folder)

    def _newest(self) -> list[str]:
        """Pinned first: a run that trains may make newer ones, and delete it, before it is read."""
        while found := commit.commits(self.subject):
            commit.pin(self.subject, self.job, found[-1].stage, found[-1].samples)
            if (found[-1].path / commit.MARK).exists():
                return [f"{found[-1].stage}/{found[-1].path.name}"]
        remedy = "Let it train to its first."
        raise ConfigError("this run has no checkpoint yet", self.subject.checkpoints, remedy=remedy)

    def _commit(self, name: str) -> Commit:
        try:
            return commit.read(self.subject.checkpoints / name)
        except commit.Damaged as error:
            remedy = "It was deleted since, or is damaged: name another one with --commit."
            raise DataError(f"this checkpoint cannot be read: {error}", name, remedy=remedy) from error

    def _encoders(self, source: Commit | dict[str, Any]) -> dict[tuple[str, bool], Encoder]:
        """View -> the model that looks so."""
        self._beat("loading the model")
        if isinstance(source, dict):
            masked = [mask for mask, _ in self.task.views if float(mask)]
            if masked:
                raise ConfigError("only our own runs are evaluated with a mask", "--mask", masked[0])
            precision = self.config.compute.precision
            encoder = foreign.OpenClipEncoder(str(source["path"]), self.world.device, precision)
            return {("0", False): encoder}
        theirs = merge.read(self.subject.config)
        with torch.device("meta"):
            pair = clip.build(theirs.model, theirs.augment, self.config.compute.attention)
        parallel.place(pair, self.world, self.config.compute)
        checkpoints = CheckpointRestorer(self.subject, 0, self.world, self.patience, self.task.url)
        checkpoints.load(checkpoints.open(source.path), saver.model_state(pair))
        checkpoints.close()
        parallel.check(pair)
        pair.eval()
        tokenizer, eval_view = Tokenizer.of(theirs.data.tokenizer, theirs.model.text), EvaluationView.of(theirs)
        return {
            view: PairEncoder(
                pair,
                tokenizer,
                theirs.model.image,
                self.world.device,
                self.autocast,
                *view,
                precision=self.config.compute.precision,
                view=eval_view,
            )  # fmt: skip
            for view in self.task.views
        }

    # -- results -----------------------------------------------------------------------------------------------------

    def _score(self, found: Found, encoder: Encoder, about: dict[str, Any]) -> list[dict[str, Any]]:
        done = self.ranks.on_rank0(lambda: self._done(found, about))
        if done:
            return done
        self._beat(f"evaluating {found.name}")
        compute = self.config.compute
        cache = None
        if self.task.cache:
            # a sharded pair rounds otherwise in bf16; a foreign model is whole on every rank
            whole = ("sharded",) if self.world.size > 1 and not self.task.model else ()
            kind = "-".join((str(about["digest"])[:32], compute.device, compute.precision, compute.attention, *whole))
            cache = FeatureCache(self.task.cache, kind)
        scorer = Scorer(
            encoder, self.task.batch, self.ranks, partial(self._beat, f"evaluating {found.name}"), cache,
            self.world.device, self.task.cost,
        )  # fmt: skip
        results = scorer.score(self._open(found))
        if self.task.model and self.world.first:
            open_clip_folder.register(self.subject, self.task.model.partition(":")[2])
        for one in results:
            if notes := [note for note in (found.note, one.get("note")) if note]:
                one["note"] = "; ".join(notes)
            if self.world.first:
                keep_result(self.subject, one, about, self.job.name)
                self.job.note_progress(self.attempt)
                self._tell(found, one)
        return [{**one, "commit": about, "stage": about["stage"], "samples": about["samples"]} for one in results]

    def _done(self, found: Found, about: dict[str, Any]) -> list[dict[str, Any]]:
        """What an earlier life of this job has found."""
        folder, done = self.subject.eval / f"{about['stage']}-{about['samples']}", []
        for path in sorted(folder.glob("*.json")):
            one = read_record(path, LATER) or {}
            if [one.get(key) for key in ("job", "set", "task")] == [self.job.name, found.name, found.task]:
                done.append(one)
        return done if len(done) == len(COLUMNS[found.task]) else []

    def _tell(self, found: Found, result: dict[str, Any]) -> None:
        known = datasets.expected(found.name)
        images = result.get("images", result["n"])
        log.info("%s", told(result))
        if known is not None and images != known:
            log.warning("%s: %d images, where this data set has %d", found.name, images, known)
