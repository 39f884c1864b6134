"""Tests that labels are compared with class names on the node, before the first step."""

import json

import pytest
from torch import distributed

from flip.common.shutdown import StopFlag
from flip.config.merge import dump
from flip.config.schema import EvaluationSet
from flip.data.chunk_reader import ChunkReader
from flip.data.manifest.manifest import Manifest, write
from flip.distributed import parallel
from flip.distributed.collectives import RankGroup
from flip.evaluation import label_check
from flip.evaluation.datasets.catalog import DatasetLocation, ResolvedDataset
from flip.evaluation.datasets.image_sources import File
from flip.evaluation.datasets.prompts import Prompts
from flip.evaluation.label_check import check_labels, check_resolved_labels
from flip.runs.errors import ConfigError, DataError
from flip.runs.rundir import RunDir
from flip.training.trainer import train
from tests.harness.ranks import run_ranks
from tests.harness.training_run import configuration
from tests.synthetic import make_dataset, make_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set with 8 labels, with and without counts in the manifest, and two files of class names."""
    folder = make_dataset(tmp_path_factory.mktemp("data"), samples=120, shards=2, chunk=4, classes=8)
    make_tokenizer(folder / "tokenizer.json")
    manifest = Manifest.load(folder)
    write(folder / "without", manifest, manifest.checksums)
    write(folder / "excluding", manifest, manifest.checksums, {i: "bad" for i in range(120) if i % 8 > 1})
    for number in (2, 8):
        names = {"names": [f"class {i}" for i in range(number)], "templates": ["a {}"]}
        (folder / f"{number}.json").write_text(json.dumps(names))
    return folder


def item(data, manifest, number, **fields):
    return EvaluationSet("shapes", str(data / manifest), classes=str(data / f"{number}.json"), **fields)


def test_sets_with_counts_are_not_read(data, monkeypatch):
    monkeypatch.setattr(ChunkReader, "read_chunk", None)
    check_labels([item(data, "", 8), item(data, "without", 2, task="retrieval")])
    with pytest.raises(DataError, match="90 of 120 labels have no class name: the largest is 7, with 2 class names"):
        check_labels([item(data, "", 2)])


def test_sets_without_counts_are_read(data):
    batches = []
    check_labels([item(data, "without", 8)], progress=lambda: batches.append(1))
    assert batches == [1]
    with pytest.raises(DataError, match="90 of 120 labels have no class name") as error:
        check_labels([item(data, "without", 2)])
    assert error.value.remedy and str(data / "2.json") in str(error.value)
    check_labels([item(data, "excluding", 2)])  # excluded samples are not scored
    with pytest.raises(ConfigError):
        check_labels([item(data, "without", 3)])  # no such file


def _rank(rank, folder, store):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    read = []
    ranks = RankGroup(rank, 2, distributed.group.WORLD)
    try:
        label_check.BATCH = 32
        check_labels([item(folder, "without", 2)], ranks, progress=lambda: read.append(1))
    except DataError as error:
        return len(read), str(error)


@pytest.mark.long
def test_each_rank_reads_a_share_and_all_raise_the_error(data, tmp_path):
    ends = run_ranks(_rank, 2, data, tmp_path / "store")
    assert [read for read, _ in ends] == [2, 2], "four batches of 120 samples"
    assert ends[0][1] == ends[1][1] and "90 of 120 labels have no class name" in ends[0][1]


@pytest.mark.long
def test_run_stops_before_its_first_step(data, tmp_path):
    config = configuration(data, world=1)
    config.data.workers = 0
    config.evaluate.sets = [item(data, "without", 2)]
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    run.config.write_text(dump(config))
    try:
        with pytest.raises(DataError, match="90 of 120 labels have no class name"):
            train(run, run.start_attempt({}), StopFlag(), lambda *_: None)
    finally:
        parallel.stop()
    assert not list(run.metrics.glob("*.jsonl")) or not any(path.read_text() for path in run.metrics.glob("*.jsonl"))
    assert not list(run.checkpoints.glob("*/*"))


def test_labels_of_an_evaluation_job_are_compared_in_every_form(data, tmp_path):
    """The counts of the manifest, samples that are read, and the labels of a list of files."""
    prompts = [Prompts([f"class {i}" for i in range(number)], ["a {}"]) for number in (2, 8)]
    files = tuple(File(f"{i}.png", i % 8) for i in range(120))
    locations = [
        DatasetLocation("counted", manifest=str(data)),
        DatasetLocation("read", manifest=str(data / "without")),
        DatasetLocation("listed", files=files),
    ]
    for location in locations:
        check_resolved_labels([ResolvedDataset("shapes", "zeroshot", location, prompts[1])])
        with pytest.raises(DataError, match=rf"{location.where}: 90 of 120 labels.*the largest is 7, with 2 class"):
            check_resolved_labels([ResolvedDataset("shapes", "zeroshot", location, prompts[0])])
    check_resolved_labels([ResolvedDataset("shapes", "retrieval", locations[0])])
