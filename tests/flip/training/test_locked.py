"""Tests that a locked tower keeps its weights, costs a forward pass, and can be unlocked in a later stage."""

import contextlib
import os
from pathlib import Path

import pytest
import torch
from torch import distributed

from flip import model_costs
from flip.checkpoint import saver
from flip.config import schema
from flip.config.validate import validate
from flip.distributed import parallel
from flip.models import clip
from flip.runs.errors import ConfigError
from flip.training import grad_cache, parameter_groups
from flip.training.trainer import Trainer
from tests.flip.models.test_clip import sized, tiny
from tests.flip.training.test_grad_cache import B, batch
from tests.flip.training.test_trainer import configuration
from tests.harness.ranks import run_ranks

CHOICES = [["image"], ["text"], ["image", "text"]]


def is_fixed(name, locked):
    return name.split(".")[0] in locked and ".projection." not in name


def train(pair, fields, micro=1, steps=3):
    """Returns the optimiser after some steps."""
    optimizer = parameter_groups.build(pair.named_parameters(), schema.Optim(clip=1.0))
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        grad_cache.grad_cache_backward(pair, fields, micro, torch.device("cpu"), contextlib.nullcontext())
        norm = parameter_groups.gradient_norm(pair)
        torch.nn.utils.clip_grads_with_norm_(pair.parameters(), 1.0, norm)
        optimizer.step()
    return optimizer


def check(pair, optimizer, before, locked):
    for name, parameter in pair.named_parameters():
        fixed = is_fixed(name, locked)
        assert (parameter.grad is None) == fixed, name
        assert (parameter not in optimizer.state) == fixed, name
        assert torch.equal(parallel.full_tensor(parameter.detach()), before[name]) == fixed, name
    moments = {name.split(".", 2)[2] for name in saver.optimizer_state(pair, optimizer)}
    assert moments == {name for name in before if not is_fixed(name, locked)}


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("locked", CHOICES)
def test_locked_tower_has_no_gradient_and_no_moments_and_keeps_its_bits(locked, micro):
    pair = tiny()
    pair.lock(locked)
    before = {name: parameter.detach().clone() for name, parameter in pair.named_parameters()}
    check(pair, train(pair, batch(), micro), before, locked)


def test_train_mode_does_not_reach_a_locked_tower():
    pair = tiny()
    pair.lock(["image"])
    pair.train()
    assert not any(module.training for module in pair.image.modules())
    assert pair.training and all(module.training for module in pair.text.modules())


def rank_main(rank, size, store, locked):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), FLIP_STORE=store)
    compute = schema.Compute(device="cpu", precision="fp32", attention="explicit", threads=1)
    world = parallel.start(compute)
    pair = tiny()
    before = {name: parameter.detach().clone() for name, parameter in pair.named_parameters()}
    pair.lock(locked)
    parallel.apply_parallelism(pair, world, compute)
    share = B // size
    optimizer = train(pair, [field[rank * share : (rank + 1) * share] for field in batch()])
    check(pair, optimizer, before, locked)
    distributed.barrier()
    parallel.stop()


@pytest.mark.long
@pytest.mark.parametrize("locked", CHOICES)
def test_two_sharded_ranks_keep_a_locked_tower(locked, tmp_path):
    run_ranks(rank_main, 2, 2, str(tmp_path / "store"), locked)


def test_later_stage_unlocks_a_tower_with_its_weights():
    config = configuration(Path("unused"), world=1)
    config.stages[0].locked = ["image"]
    trainer = Trainer.__new__(Trainer)
    trainer.config = config
    trainer.world = parallel.World(0, 1, torch.device("cpu"), None, None)
    trainer.stage_config = config
    trainer.watchdog = trainer.checkpoints = type("Idle", (), {"heartbeat": lambda *_, **__: 0, "wait": lambda _: 0})()
    trainer.model = trainer.allocate(config, config.stages[0])
    clip.init_weights(trainer.model, 3)
    first = trainer.model
    assert not first.get_parameter("image.patch.weight").requires_grad
    trainer.enter(config.stages[1])
    assert trainer.model is not first and all(p.requires_grad for p in trainer.model.parameters())
    for name, parameter in trainer.model.named_parameters():
        if parameter.shape == first.get_parameter(name).shape:
            assert torch.equal(parameter, first.get_parameter(name)), name


@pytest.mark.parametrize(
    ("locked", "optimizer", "message"),
    [(["image", "image"], "adamw", "names a tower twice"), (["image", "text"], "muon", "no matrix of a block")],
)
def test_locked_is_refused_if_it_repeats_a_tower_or_leaves_muon_nothing(locked, optimizer, message):
    config = configuration(Path("unused"), world=1)
    config.stages[0].locked = locked
    config.optim.name = optimizer
    with pytest.raises(ConfigError, match=message):
        validate(config)


def test_plan_has_no_moments_and_no_saved_activations_of_a_locked_tower():
    model = sized("tiny")
    compute = schema.Compute(device="cpu", precision="fp32")
    free, locked = (model_costs.device_memory(model, compute, 8, "0.5", locked=towers) for towers in ([], ["image"]))
    fixed = model_costs.parameters(model)["image"] - model.image.width * model.embed
    assert free["moments"] - locked["moments"] == 8 * fixed
    assert locked["total"] < free["total"] - 8 * fixed


def test_flops_of_a_locked_tower_are_those_of_its_forward_pass():
    model = sized("tiny")
    fields = {"text_mask": "0", "optimizer": "adamw", "copies": 1, "has_head": False}
    forward = model_costs.forward_flops(model, "0.5")
    flops = model_costs.pair_flops(model, 8, "0.5", locked=["image"], **fields)
    assert flops == 3 * forward["text"] + forward["image"] + 2 * model.image.width * model.embed
