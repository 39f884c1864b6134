"""Tests of kill and resume across stages with different image sizes, patches, text lengths and augmentation."""

import signal
from dataclasses import replace

import numpy as np
import pytest

import flip
from flip import model_costs
from flip.config.derived import for_stage, stage_spans
from flip.config.schema import StageAugment, StageImage, StageText
from flip.data.token_table import count_tokens
from flip.runs import checkpoint_folder
from flip.runs.rundir import read_json
from flip.tokenizer import Tokenizer
from tests.harness.common import metric_lines
from tests.harness.training_run import TrainingRun, configuration
from tests.synthetic import caption, make_dataset, make_tokenizer
from tests.test_worlds import check_ids
from tests.verdicts import check_equal

pytestmark = pytest.mark.kill

STEPS = 8
"""Steps of each stage. The model has 64 px, patches of 8 px and 32 tokens."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_dataset(tmp_path_factory.mktemp("data"), samples=200, shards=3, chunk=4, classes=8)
    make_tokenizer(folder / "tokenizer.json")
    tokenizer = Tokenizer(folder / "tokenizer.json", 77, prepend_cls=False)
    count_tokens(tokenizer, map(caption, range(200)), parts_of_speech=False).write(folder / "table.json")
    return folder


def configured(data, world):
    """Return three stages: small images and short texts; the model's own sizes; a larger patch. The first and the last
    one train a text classification head."""
    config = configuration(data, world, samples=(STEPS, STEPS))
    first, last = config.stages
    first.image = StageImage(size=32)
    first.text = StageText(length=16)
    first.augment = StageAugment(crop_area=[0.8, 1.0], brightness=0.2, mean=[0.5, 0.5, 0.5])
    middle = replace(first, name="full", image=StageImage(), text=StageText(), augment=StageAugment())
    last.image = StageImage(patch=16)
    last.text = StageText(length=24)
    config.stages = [first, middle, last]
    first.classification = 0.5
    last.classification = 1.0
    config.data.token_table = str(data / "table.json")
    config.evaluate.every = 0
    return config


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_run_killed_around_stage_borders_ends_with_same_bits(world, data, tmp_path):
    config = configured(data, world)
    calm = TrainingRun(tmp_path, "calm", config, pause=0)
    storm = TrainingRun(tmp_path, "storm", config)
    calm.submit()
    calm.wait_over()
    storm.submit()
    storm.wait_step(STEPS - 1)
    storm.kill(rank=world - 1)
    storm.wait_attempt(2)
    storm.wait(
        lambda: (
            checkpoint_folder.checkpoints(storm.run)
            and checkpoint_folder.checkpoints(storm.run)[-1].stage == "pretrain"
        ),
        "a checkpoint",
    )
    border = stage_spans(config)[0].end
    storm.wait(
        lambda: checkpoint_folder.checkpoints(storm.run)[-1].samples_seen >= border,
        "the checkpoint at the first border",
    )
    storm.kill()
    storm.wait_attempt(3)
    storm.wait_step(STEPS + 2)  # in the second stage, before its first checkpoint
    storm.kill(number=signal.SIGTERM)
    storm.wait_attempt(4)
    storm.wait_step(2 * STEPS + 1)
    storm.kill(rank=world - 1)
    storm.wait_over()
    check_equal(calm, storm, scores=4)
    assert storm.run.newest_attempt() >= 5
    check_weights(calm)


def check_weights(arena):
    """Check that evaluation, cost and the loaded model have the sizes of the stage that trained the weights."""
    config = arena.config
    result = read_json(arena.run.result)
    spans = stage_spans(config)
    flops = [(span.end - span.start) * model_costs.stage_flops(config, span.stage) for span in spans]
    assert result["flops"] == sum(flops)
    pixels = np.zeros((40, 50, 3), np.uint8)
    for span, (size, patch, length) in zip(spans, ((32, 8, 16), (64, 8, 32), (64, 16, 24)), strict=True):
        loaded = flip.load(arena.run.path, at=f"{span.stage.name}/{span.end}")
        image = loaded.config.model.image
        text = loaded.config.model.text
        assert (image.size, image.patch, text.length) == (size, patch, length)
        assert loaded.preprocess(pixels).shape[-1] == size and loaded.encode_image(pixels).shape == (1, 48)
        assert loaded.encode_text("a red circle").shape == (1, 48)
        views = {e["view"] for p in arena.run.eval.glob(f"{span.stage.name}-{span.end}.json")
                 for e in read_json(p)["evaluations"]}  # fmt: skip
        assert views == {f"{size}px"}, views
    lines = {line["samples"]: line for line in metric_lines(arena.run)}
    gains = [lines[span.end]["masking_speedup"] for span in spans]
    assert gains[0] > 1 and gains[2] == 1


@pytest.mark.slow
def test_run_moves_from_two_ranks_to_single_rank_and_back(data, tmp_path):
    """Across both borders, the global batches are the same, and the losses equal the losses of two ranks to 1e-5."""
    calm = TrainingRun(tmp_path, "calm", configured(data, 2), pause=0)
    calm.submit()
    calm.wait_over()
    arena = TrainingRun(tmp_path, "moved", configured(data, 2))
    for size, step in ((2, STEPS - 1), (1, 2 * STEPS - 1), (2, None)):
        arena.config.resources.processes = arena.world = size
        arena.save_config()
        arena.submit()
        if step is not None:
            arena.wait_step(step)
            arena.kill_supervisor()
    arena.wait_over()
    assert arena.run.result.exists(), arena.story()
    check_ids(arena)
    own, other = ({line["step"]: line["loss"] for line in metric_lines(a.run)} for a in (arena, calm))
    assert len(own) == 3 * STEPS and own == pytest.approx(other, rel=1e-5)


def test_for_stage_uses_model_sizes_if_stage_sets_none(data):
    config = configured(data, 1)
    assert for_stage(config, config.stages[1]) == config
    changed = for_stage(config, config.stages[0])
    assert changed.augment == replace(config.augment, crop_area=[0.8, 1.0], brightness=0.2, mean=[0.5, 0.5, 0.5])
    assert for_stage(changed, config.stages[0]) == changed
