"""Tests of trainings with other image towers: timm's, and a class of a user; killed, on one and two ranks."""

import hashlib
import os

import pytest
import torch

from flip.common import user_classes
from flip.common.user_classes import UserClass
from flip.config.schema import Augment, Model
from flip.distributed import parallel
from flip.models.image_towers import build_image_tower
from flip.runs import checkpoint_folder
from flip.runs.errors import ConfigError
from flip.runs.rundir import RunDir
from flip.training.trainer import Trainer
from tests.flip.training.test_user_callbacks import BATCH, assert_same, configured, created, killed, trained
from tests.flip.training.test_user_callbacks import data as data  # a fixture
from tests.harness.ranks import run_ranks

FILE = '''"""An image tower of a user: a mixer of the visible patches."""

import torch
from torch import nn

from flip.config.derived import patches
from flip.models.image_encoder import project
from flip.tower_kinds import UserImageTower


class Mean(UserImageTower):
    """Blocks of one layer each, without attention."""

    def build(self, model, augment, attention):
        return MeanTower(model)

    def parameters(self, model):
        image = model.image
        width = image.width
        inputs = 3 * image.patch**2 * width + patches(image) * width
        return inputs + image.layers * (width**2 + 2 * width) + width * model.embed


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.full((width,), 7.0))

    def forward(self, x):
        return x + self.scale * torch.tanh(self.mix(x))


class MeanTower(nn.Module):
    def __init__(self, model):
        super().__init__()
        image = model.image
        self.patch = nn.Linear(3 * image.patch**2, image.width, bias=False)
        self.positions = nn.Parameter(torch.zeros(patches(image), image.width))
        self.blocks = nn.ModuleList(Block(image.width) for _ in range(image.layers))
        self.projection = nn.Linear(image.width, model.embed, bias=False)
        with torch.device("cpu"):
            self.register_buffer("middle", torch.tensor(127.5), persistent=False)

    def forward(self, patches, keep_indices=None, with_pooled=False):
        x = self.patch((patches.to(self.patch.weight.dtype) - self.middle) / self.middle)
        x = x + (self.positions if keep_indices is None else self.positions[keep_indices.long()])
        for block in self.blocks:
            x = block(x)
        pooled = x.mean(dim=1, dtype=torch.float32)
        features = project(pooled, self.projection)
        return (features, pooled) if with_pooled else features

    def draw(self, name, value, generator):
        if not name.endswith(".scale"):
            return False
        value.fill_(0.1)
        return True
'''


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Puts a version of the file into a snapshot, and returns the entry of its class."""
    monkeypatch.setenv("FLIP_SNAPSHOT", str(tmp_path / "code"))

    def copy(text=FILE):
        name = UserClass("mine.py", "Mean", hashlib.sha256(text.encode()).hexdigest())
        path = tmp_path / "code" / user_classes.FOLDER / name.copy
        path.parent.mkdir(parents=True)
        path.write_text(text)
        return str(name)

    return copy


def with_timm(data, world=1):
    config = configured(data, world)
    image = config.model.image
    image.tower = "timm"
    image.registers = 2
    image.qk_norm = True
    image.pool = "attention"
    return config


def with_own(data, entry, world=1):
    config = configured(data, world)
    config.model.image.tower = entry
    return config


@pytest.mark.long
@pytest.mark.parametrize("tower", ["timm", "own"])
def test_killed_run_resumes_to_the_same_bits(data, copied, tmp_path, tower):
    entry = copied()
    config = with_timm(data) if tower == "timm" else with_own(data, entry)
    calm = trained(created(tmp_path, "calm", config), None)
    dead = created(tmp_path, "dead", config)
    killed(dead, 6)
    assert_same(trained(dead, None), calm)


def rank_main(rank, store, path, attempt, steps):
    """Trains as rank ``rank`` of two; ends without a save after so many steps."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", FLIP_STORE=store)
    from flip.common.shutdown import StopFlag, Watchdog
    from flip.config.merge import read_config

    run = RunDir(path)
    config = read_config(run.config)
    world = parallel.start(config.compute)
    if steps:
        original = Trainer.train_step

        def dies(self, *args):
            if self.step == steps:
                os._exit(9)
            return original(self, *args)

        Trainer.train_step = dies
    trainer = Trainer(run, attempt, StopFlag(), config, world, Watchdog(0, lambda *_: None))
    trainer.run_stages()
    names = [type(module).__name__ for module in trainer.model.image.blocks]
    trainer.close("complete", "")
    parallel.stop()
    return names


@pytest.mark.long
@pytest.mark.parametrize("tower", ["timm", "own"])
def test_two_ranks_that_die_resume_to_the_same_bits(data, copied, tmp_path, tower):
    entry = copied()
    config = with_timm(data, 2) if tower == "timm" else with_own(data, entry, 2)
    config.checkpoint.background = "no"
    calm = created(tmp_path, "calm", config)
    names = run_ranks(rank_main, 2, str(tmp_path / "calm.store"), str(calm.path), calm.start_attempt({}), 0)
    assert all(name.startswith("FSDP") for name in names[0]), "each block is sharded"
    dead = created(tmp_path, "dead", config)
    with pytest.raises(AssertionError):  # the ranks end without an answer
        run_ranks(rank_main, 2, str(tmp_path / "dead.store"), str(dead.path), dead.start_attempt({}), 6)
    newest, last = (checkpoint_folder.checkpoints(run)[-1].samples_seen for run in (dead, calm))
    assert 4 * BATCH <= newest <= 6 * BATCH < last
    run_ranks(rank_main, 2, str(tmp_path / "again.store"), str(dead.path), dead.start_attempt({}), 0)
    assert_same(dead, calm)


BROKEN = {
    "has no nn.ModuleList `blocks`": ("self.blocks = nn.ModuleList(", "self.parts = nn.ModuleList("),
    "has no nn.Linear `projection`": ("self.projection =", "self.last ="),
    "dropout or stochastic depth.*blocks.0.drop": ("self.mix =", "self.drop = nn.Dropout(0.1)\n        self.mix ="),
    "a buffer of the tower has no values.*middle": ('torch.device("cpu")', 'torch.device("meta")'),
    "parameters, and its class says": ("2 * width)", "3 * width)"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_wrong_tower_is_refused_by_name(copied, message):
    before, after = BROKEN[message]
    assert before in FILE
    model = Model()
    model.image.tower = copied(FILE.replace(before, after))
    with pytest.raises(ConfigError, match=message) as error, torch.device("meta"):
        build_image_tower(model, Augment(), "sdpa", "no")
    assert error.value.remedy


def test_blocks_that_recompute_nothing_are_refused(copied):
    model = Model()
    model.image.tower = copied()
    with pytest.raises(ConfigError, match="the blocks of the tower recompute nothing"), torch.device("meta"):
        build_image_tower(model, Augment(), "sdpa", "block")
