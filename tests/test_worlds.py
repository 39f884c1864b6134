"""Tests of resuming: the same bits on the same number of ranks, the same data and close losses on other numbers.

The visible-patch kernel decodes the images of these runs, and the checks decode them as a whole.
"""

import os
import signal
from copy import deepcopy

import pytest

from flip.config.derived import stage_spans, world_size
from flip.data import kernel
from flip.monitoring.results import read_run
from flip.runs import checkpoint_folder
from flip.runs.rundir import read_json
from tests.harness.common import metric_lines
from tests.harness.training_run import TrainingRun, configuration, decoded_images
from tests.synthetic import make_dataset, make_tokenizer
from tests.verdicts import check_attempts, check_data, check_equal, check_ids

pytestmark = [pytest.mark.kill, pytest.mark.slow]

LENGTHS = 24, 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_dataset(tmp_path_factory.mktemp("data"), samples=200, shards=3, chunk=4, classes=8, fmt="jpg")
    make_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def calm(data, tmp_path_factory):
    """Train an undisturbed run with four ranks."""
    arena = TrainingRun(tmp_path_factory.mktemp("calm"), "calm", configured(data), pause=0)
    arena.submit()
    arena.wait_over(240)
    check_kernel(arena)
    return arena


def configured(data, samples=LENGTHS):
    config = configuration(data, world=4, samples=samples, decoder="simplejpeg")
    config.evaluate.every = 0
    return config


def check_kernel(arena):
    """Check that all attempts have used the visible-patch kernel, if this machine has it."""
    used = kernel.use(arena.config)
    assert used == "yes" or os.environ.get("FLIP_REQUIRE_KERNEL") != "1", used
    for n in arena.run.attempt_numbers():
        assert read_json(arena.run.attempt(n) / "ready.json")["environment"]["kernel"].startswith(used)


def test_four_ranks_resume_to_same_bits(data, calm, tmp_path):
    arena = TrainingRun(tmp_path, "storm", configured(data))
    arena.submit()
    arena.wait_step(8)
    arena.kill(rank=2)
    arena.wait_attempt(2)
    arena.wait_step(17)
    arena.kill(rank=1, number=signal.SIGTERM)
    arena.wait_over(240)
    assert arena.run.newest_attempt() >= 3
    check_equal(calm, arena, scores=3)
    check_data(arena, decoded_images(data))
    check_kernel(arena)


def test_run_moves_from_four_ranks_to_two_and_back(data, calm, tmp_path):
    """The global batches are the same, and the losses equal the losses of four ranks to 1e-5."""
    arena = TrainingRun(tmp_path, "moved", configured(data))
    for size, step in ((4, 8), (2, 16), (4, None)):
        arena.config.resources.processes = arena.world = size
        arena.save_config()
        assert world_size(arena.config) == size
        arena.submit()
        if step is not None:
            arena.wait_step(step)
            arena.kill_supervisor()
    arena.wait_over(240)
    assert arena.run.result.exists(), arena.story()
    worlds = [newest.record["world"] for newest in checkpoint_folder.checkpoints(arena.run)]
    assert worlds[-1] == 4 and arena.run.newest_attempt() >= 3
    check_ids(arena)
    own, other = ({line["step"]: line["loss"] for line in metric_lines(a.run)} for a in (arena, calm))
    assert len(own) == sum(span.steps for span in stage_spans(arena.config))
    assert own == pytest.approx(other, rel=1e-5) and own != other


def test_run_with_range_of_nodes_goes_on_with_fewer_and_grows_again(data, calm, tmp_path):
    """The configuration stays: ranks are started as an allocation has nodes. Order and batches are the same."""
    config = configured(data)
    config.resources.nodes, config.resources.least_nodes, config.resources.processes = 4, 1, 1
    arena = TrainingRun(tmp_path, "ranged", config)
    for size, step in ((4, 8), (2, 16), (4, None)):
        arena.world = size
        arena.submit()
        if step is not None:
            arena.wait_step(step)
            arena.kill_supervisor()
    arena.wait_over(240)
    assert arena.run.result.exists(), arena.story()
    check_ids(arena)
    ready = [read_json(arena.run.attempt(n) / "ready.json") for n in arena.run.attempt_numbers()]
    starts = [read_json(arena.run.attempt(n) / "start.json") for n in arena.run.attempt_numbers()]
    assert {(start["world"], row["accumulate"]) for start, row in zip(starts, ready, strict=True)} == {(4, 1), (2, 2)}
    assert set(read_run(arena.run.path).samples_by_world) == {2, 4}
    own, other = ({line["step"]: line["loss"] for line in metric_lines(a.run)} for a in (arena, calm))
    assert own == pytest.approx(other, rel=1e-5)


def test_replicated_weights_resume_from_url_to_same_bits(data, tmp_path):
    """With two copies over two ranks each, a background save to disk or to a URL holds all optimizer moments."""
    config = configured(data, (8, 3))
    config.compute.replicate = 2
    calm, storm = (
        TrainingRun(tmp_path, name, deepcopy(config), pause) for name, pause in (("calm", 0), ("storm", 0.05))
    )
    calm.submit()
    calm.wait_over(240)
    storm.config.checkpoint.url = str(tmp_path / "bucket")
    storm.save_config()
    storm.submit()
    storm.wait_step(7)
    storm.kill(rank=3)  # a rank of the second copy, which writes nothing
    storm.wait_over(240)
    check_equal(calm, storm, scores=3)
    check_attempts(storm)
    assert storm.run.newest_attempt() == 2 and not list(storm.run.checkpoints.rglob("*.safetensors"))
