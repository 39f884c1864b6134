"""Tests that 1, 2 and 4 sharded ranks get the same predictions for every image, task and view."""

import gc
import os
import weakref

import pytest
import torch

from flip.config import schema
from flip.config.schema import Augment, EvaluationSet
from flip.distributed import parallel
from flip.distributed.collectives import RankGroup
from flip.evaluation.datasets.catalog import DatasetLocation, ResolvedDataset
from flip.evaluation.datasets.image_sources import File
from flip.evaluation.evaluator import Evaluator
from flip.models import clip
from flip.runs.errors import DataError, Diverged
from tests.flip.evaluation.conftest import CONFIG, built, encoder_of
from tests.harness.ranks import run_ranks
from tests.synthetic import draw_image, encode, make_dataset, make_tokenizer

pytestmark = pytest.mark.long


def empty():
    with torch.device("meta"):
        return clip.CLIPModel(CONFIG, Augment(), "sdpa")


def rank_main(rank, world, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), FLIP_STORE=str(folder / f"store-{world}"))
    # a world of two ranks trains in bf16 but scores in fp32
    precision = "bf16" if world == 2 else "fp32"
    compute = schema.Compute(device="cpu", precision=precision, attention="sdpa", threads=1)
    context = parallel.start(compute)
    trained = parallel.apply_parallelism(built(), context, compute)
    model = parallel.in_fp32(trained, empty, context, compute)
    assert (model is trained) == (precision == "fp32")
    ranks = RankGroup(context.rank, context.size, context.control_group)
    scores = []
    data = str(folder)
    classes = str(folder / "classes.json")
    sets = [
        EvaluationSet("zero", data, classes),
        EvaluationSet("pairs", data, task="retrieval"),
        EvaluationSet("probe", data, task="probe", train=str(folder / "train")),
    ]
    for masking in ({}, {"mask": "0.5"}, {"mask": "0.75", "ensemble": True}):
        evaluator = Evaluator(encoder_of(model, folder, **masking), 4, ranks, C=1.0)
        for item in sets if not masking else sets[:1]:
            scores += evaluator.score(ResolvedDataset.from_config(item))
            parallel.reshard(model)
    if model is not trained:  # evaluation during training releases its fp32 copy
        copy = weakref.ref(parallel.in_fp32(trained, empty, context, compute))
        gc.collect()
        assert copy() is None
    errors = []
    try:
        evaluator.score(ResolvedDataset.from_config(EvaluationSet("few", data, str(folder / "few.json"))))
    except DataError as error:
        errors.append(str(error))
    parallel.reshard(model)
    with torch.no_grad():
        model.logit_scale.fill_(0.0)
        next(p for p in model.image.parameters() if p.ndim == 2).fill_(float("nan"))
    try:
        evaluator.score(ResolvedDataset.from_config(sets[0]))
    except Diverged as error:
        errors.append(str(error))
    parallel.stop()
    return rank, scores, errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_dataset(tmp_path_factory.mktemp("data"), samples=45, shards=3, classes=7, chunk=6)
    make_dataset(folder / "train", samples=60, shards=2, classes=7, seed=3)
    make_tokenizer(folder / "tokenizer.json")
    (folder / "few.json").write_text('{"names": ["a", "b"], "templates": ["{}"]}')
    return folder


def test_evaluator_results_are_equal_for_1_2_and_4_ranks(folder):
    reports = [report for world in (1, 2, 4) for report in run_ranks(rank_main, world, world, folder)]
    _, expected, errors = reports[0]
    for score in expected:
        assert score["seconds"] > 0
    assert [score["name"] for score in expected] == ["zero", "pairs-text", "pairs-image", "probe-probe", "zero", "zero"]
    assert [score["n"] for score in expected] == [45, 45, 90, 45, 45, 45]
    assert len({score["view"] for score in expected}) == 3 and len({score["predictions"] for score in expected}) == 6
    assert len(errors) == 2 and "no class name" in errors[0] and "not finite" in errors[1]
    for rank, actual, messages in reports[1:]:
        assert [{**score, "seconds": 0} for score in actual] == [{**score, "seconds": 0} for score in expected], rank
        assert messages == errors


def test_evaluator_predictions_are_equal_for_files_and_shards(model, encoder, data, tmp_path):
    files = []
    for i in range(50):
        (tmp_path / f"{i:03}.png").write_bytes(encode(draw_image(i)))
        files.append(File(str(tmp_path / f"{i:03}.png"), i % 7))
    of_shards = ResolvedDataset.from_config(EvaluationSet("x", str(data), str(data / "classes.json")))
    of_files = ResolvedDataset("x", "zeroshot", DatasetLocation(str(tmp_path), files=tuple(files)), of_shards.prompts)
    (shard_score,), (file_score,) = (Evaluator(encoder, 8).score(dataset) for dataset in (of_shards, of_files))
    assert shard_score["predictions"] == file_score["predictions"] and shard_score["data"] != file_score["data"]
    (tmp_path / "007.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"007\.png.*repair the file"):
        Evaluator(encoder, 8).score(of_files)
