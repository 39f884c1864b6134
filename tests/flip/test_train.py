"""The loop in this process, with one rank: what is scored at the end, and how that is told."""

import logging

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from flip import parallel
from flip.config.load import dump
from flip.config.schema import EvaluationSet
from flip.interrupt import StopFlag
from flip.rundir import RunDir, read_json
from flip.train import Trainer, train
from flip.watchdog import Watchdog
from tests.arena import configuration
from tests.synthetic import make_dataset, make_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_dataset(tmp_path_factory.mktemp("data"), samples=120, shards=2, chunk=4, classes=4)
    make_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_gets_its_batches_from_pinned_memory(data, tmp_path, monkeypatch, device):
    """As far as can be seen without one: what the loader is asked for (test_gpu.py has the rest)."""

    class Asked(Exception):
        pass

    def asked(*_, pinned, **__):
        raise Asked(pinned)

    monkeypatch.setattr("flip.train.Loader", asked)
    monkeypatch.setattr("flip.train.Saving", lambda *_: None)
    run = RunDir(tmp_path / "sweep" / "run")
    world = parallel.World(0, 1, torch.device(device), None, None)
    with pytest.raises(Asked) as error:
        Trainer(
            run, run.begin_attempt({}), StopFlag(), configuration(data, world=1), world, Watchdog(0, lambda what: None)
        )
    assert error.value.args == (device == "cuda",)


def test_sets_of_every_task_are_scored_and_told(data, tmp_path, caplog):
    """Columns, log, TensorBoard and its table of hyperparameters speak of the same results."""
    config, place = configuration(data, world=1, samples=(2, 1)), str(data)
    config.data.workers = config.evaluate.every = 0
    config.evaluate.sets = [
        EvaluationSet("named", place, classes=f"{place}/classes.json"),
        EvaluationSet("paired", place, task="retrieval"),
        EvaluationSet("fitted", place, task="probe", train=place),
    ]
    config.evaluate.preprocess, config.data.to_rgb = "resize_crop", "convert"
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    run.config.write_text(dump(config))
    try:
        with caplog.at_level(logging.INFO, logger="flip"):
            train(run, run.begin_attempt({}), StopFlag(), lambda what: None)
    finally:
        parallel.stop()
    found = {one["name"]: one for one in read_json(run.result)["evaluations"]}
    assert list(found) == ["named", "paired-text", "paired-image", "fitted-probe"]
    assert {one["view"] for one in found.values()} == {f"{config.model.image.size}px-resize_crop-convert"}
    assert [one["n"] for one in found.values()] == [120, 120, 240, 120], "two captions of every image"
    for name, words in {
        "named": "top-1 {:.2%} of 120 images",
        "paired-text": "R@1 {:.2%} of 120 images",
        "paired-image": "R@1 {:.2%} of 240 captions",
        "fitted-probe": "top-1 {:.2%} of 120 images",
    }.items():
        assert f"{name}: {words.format(found[name]['top1'])}" in caplog.messages
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    tags = {f"{one['task']}/{name}_top1" for name, one in found.items()}
    told = metadata.parse_experiment_plugin_data(
        events.PluginTagToContent(metadata.PLUGIN_NAME)[metadata.EXPERIMENT_TAG]
    )
    assert tags < {info.name.tag for info in told.metric_infos}
    assert tags == {tag for tag in events.Tags()["scalars"] if tag.endswith("_top1")}
