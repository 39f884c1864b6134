"""Tests that a stop request ends an evaluation between two batches, and that the next attempt scores the rest."""

import os

import pytest
import torch

from flip.common.shutdown import CoordinatedStop, StopFlag
from flip.config.merge import dump, read_config
from flip.config.schema import EvaluationSet
from flip.distributed import parallel
from flip.distributed.collectives import RankGroup
from flip.evaluation import evaluation_job
from flip.evaluation.datasets.catalog import ResolvedDataset
from flip.evaluation.encoding.encoders import ModelEncoder
from flip.evaluation.evaluator import Evaluator
from flip.evaluation.metrics.result_files import read_scores
from flip.evaluation.request import CONFIGURED, EvaluationRequest
from flip.models import clip
from flip.runs.rundir import RunDir, read_json
from flip.tokenizer import Tokenizer
from flip.training.callbacks import TrainingStopped
from flip.training.trainer import train
from tests.harness.ranks import run_ranks
from tests.harness.training_run import configuration
from tests.synthetic import make_dataset, make_tokenizer

BATCHES = 8
"""Batches of images of the set."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_dataset(tmp_path_factory.mktemp("data"), samples=128, shards=2, chunk=4, classes=4)
    make_tokenizer(folder / "tokenizer.json")
    return folder


def created(folder, data):
    """A run of few steps with three evaluation sets, each of BATCHES batches of images."""
    config = configuration(data, world=1, samples=(2, 1))
    config.data.workers = config.evaluate.every = 0
    config.evaluate.batch = 128 // BATCHES
    classes = f"{data}/classes.json"
    config.evaluate.sets = [
        EvaluationSet("first", str(data), classes=classes),
        EvaluationSet("second", str(data), task="retrieval"),
        EvaluationSet("third", str(data), classes=classes),
    ]
    run = RunDir(folder / "sweep" / "run")
    run.path.mkdir(parents=True)
    run.config.write_text(dump(config))
    return run


def trained(run, flag):
    try:
        train(run, run.start_attempt({}), flag, lambda *_: None)
    finally:
        parallel.stop()


class Batches:
    """Counts the batches of images that are encoded, and sets a flag in the batch of a number."""

    def __init__(self, monkeypatch, flag=None, stop_in=0):
        self.count = 0
        encode = ModelEncoder.image

        def image(encoder, *args):
            self.count += 1
            if self.count == stop_in:
                flag.set("signal SIGTERM")
            return encode(encoder, *args)

        monkeypatch.setattr(ModelEncoder, "image", image)


def comparable(scores):
    """Scores without the times and the number of the attempt."""
    return [{key: value for key, value in score.items() if key not in ("seconds", "commit")} for score in scores]


@pytest.mark.long
def test_stop_request_ends_evaluation_after_its_batch_and_keeps_scored_sets(data, tmp_path, monkeypatch):
    calm = created(tmp_path / "calm", data)
    trained(calm, StopFlag())
    run = created(tmp_path / "stopped", data)
    flag = StopFlag()
    with monkeypatch.context() as patch:
        batches = Batches(patch, flag, BATCHES + 2)
        with pytest.raises(TrainingStopped, match="SIGTERM"):
            trained(run, flag)
        assert batches.count == BATCHES + 2, "no batch follows that in which the stop was requested"
    (point,) = read_scores(run)
    assert [score["name"] for score in point.scores] == ["first"] and not run.result.exists()
    with monkeypatch.context() as patch:
        batches = Batches(patch)
        trained(run, StopFlag())
        assert batches.count == 2 * BATCHES, "the first set is not scored again"
    expected = read_json(calm.result)["evaluations"]
    scores = read_json(run.result)["evaluations"]
    assert [score["name"] for score in scores] == ["first", "second-text", "second-image", "third"]
    assert comparable(scores) == comparable(expected)
    (point,) = read_scores(run)
    assert point.scores == scores
    folder = run.eval / f"{point.stage}-{point.samples_seen}"
    assert sorted(path.name for path in folder.iterdir()) == ["first.predictions.jsonl", "third.predictions.jsonl"]


@pytest.mark.long
def test_stop_request_ends_evaluation_job_after_its_batch_and_keeps_scored_sets(data, tmp_path, monkeypatch):
    subject = created(tmp_path, data)
    trained(subject, StopFlag())
    config = read_config(subject.config)
    sets = tuple({"name": item.name, "path": CONFIGURED} for item in config.evaluate.sets)
    request = EvaluationRequest(str(subject.path), config.compute, sets=sets, batch=config.evaluate.batch)
    job = RunDir(tmp_path / "sweep" / "run-eval")
    job.path.mkdir()
    request.write(job)

    def evaluated(flag):
        try:
            evaluation_job.evaluate(job, job.start_attempt({}), flag, lambda *_: None)
        finally:
            parallel.stop()

    flag = StopFlag()
    with monkeypatch.context() as patch:
        batches = Batches(patch, flag, BATCHES + 2)
        with pytest.raises(evaluation_job.EvaluationStopped, match="SIGTERM"):
            evaluated(flag)
        assert batches.count == BATCHES + 2
    with monkeypatch.context() as patch:
        batches = Batches(patch)
        evaluated(StopFlag())
        assert batches.count == 2 * BATCHES, "the first set is not scored again"
    digests = [score["predictions"] for score in read_json(job.result)["evaluations"]]
    assert digests == [score["predictions"] for score in read_json(subject.result)["evaluations"]]


@pytest.mark.long
def test_scores_of_other_weights_are_not_taken(data, tmp_path, monkeypatch):
    """A file of scores at this position whose checkpoint is another one, or that is damaged, counts as none."""
    run = created(tmp_path, data)
    trained(run, StopFlag())
    (path,) = run.eval.glob("*.json")
    for content in (path.read_text().replace('"digest": "', '"digest": "0'), "{"):
        path.write_text(content)
        run.result.unlink()
        with monkeypatch.context() as patch:
            batches = Batches(patch)
            trained(run, StopFlag())
            assert batches.count == 3 * BATCHES


def rank_main(rank, folder):
    """Scores the set until rank 1 requests a stop in its second batch. Returns the batches of this rank."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", FLIP_STORE=f"{folder}/store")
    config = configuration(folder, world=2)
    world = parallel.start(config.compute)
    stop = CoordinatedStop(world.control_group, world.size)
    model = clip.CLIPModel(config.model, config.augment, "sdpa")
    clip.init_weights(model, 0)
    encoder = ModelEncoder(model, Tokenizer.of(config.data.tokenizer, config.model.text), config.model.image)
    batches = 0

    def stop_if_requested():
        nonlocal batches
        batches += 1
        if stop.poll_blocking(rank == 1 and batches == 2):
            raise TrainingStopped("agreed")

    ranks = RankGroup(world.rank, world.size, world.control_group)
    evaluator = Evaluator(encoder, 128 // BATCHES, ranks, stop_if_requested=stop_if_requested)
    item = EvaluationSet("paired", str(folder), task="retrieval")
    with torch.no_grad(), pytest.raises(TrainingStopped):
        evaluator.score(ResolvedDataset.from_config(item))
    parallel.stop()
    return batches


@pytest.mark.long
def test_all_ranks_end_evaluation_after_the_same_batch(data):
    assert run_ranks(rank_main, 2, data) == [2, 2]
