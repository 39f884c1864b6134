"""Tests of flip/muon.py: its update by the plain formula, on any number of ranks, and its cost in the plan."""

import math
from functools import partial

import pytest
import torch
from torch import distributed, nn
from torch.utils.flop_counter import FlopCounterMode

from flip import model_costs
from flip.checkpoint import saver
from flip.common import plain_data
from flip.config import identity, merge, schema
from flip.config.schema import Compute, Optim
from flip.distributed import parallel
from flip.muon import orthogonalised
from flip.optimizer_kinds import KIND, OPTIMIZERS, is_block_matrix
from flip.runs.errors import ConfigError
from flip.runs.rundir import RunDir
from flip.traffic import step_phases
from flip.training import parameter_groups, trainer
from tests.flip.models.test_clip import sized, tiny
from tests.flip.training.test_user_callbacks import assert_same, created, killed, state, trained
from tests.harness.sharded_models import built, compute, launch
from tests.harness.training_run import BATCH, configuration
from tests.synthetic import make_dataset, make_tokenizer

RATE = 1e-2
STEPS = 3
OPTIM = Optim(name="muon", weight_decay=0.2, momentum=0.9)


def gradients(pair, step):
    """Full gradients by name, which depend on the number of the step alone."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in pair.named_parameters()}


def train(pair, optimizer, steps):
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = RATE
        full = gradients(pair, step)
        for name, parameter in pair.named_parameters():
            parameter.grad = parallel.shard_like(full[name].to(parameter.dtype), parameter)
        optimizer.step()


def plain_update(weight, momentum, gradient):
    """Weight and momentum after a step, written from the formulas of the two papers."""
    momentum = 0.9 * momentum + 0.1 * gradient
    x = 0.1 * gradient + 0.9 * momentum
    x = x / x.square().sum().sqrt()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    scale = 0.2 * math.sqrt(max(weight.shape))
    return weight * (1 - RATE * 0.2) - RATE * scale * x, momentum


def test_update_of_matrices_is_the_plain_formula_and_that_of_the_rest_is_adamw():
    pair, reference = tiny().double(), tiny().double()
    train(pair, parameter_groups.build(pair.named_parameters(), OPTIM), range(STEPS))
    train(reference, parameter_groups.build(reference.named_parameters(), Optim(weight_decay=0.2)), range(STEPS))
    expected = dict(reference.named_parameters())
    steps = [gradients(pair, step) for step in range(STEPS)]
    matrices = 0
    for name, start in tiny().double().named_parameters():
        weight = start.detach()
        result = dict(pair.named_parameters())[name]
        if not is_block_matrix(name, weight.ndim):
            assert torch.equal(result, expected[name]), name
            continue
        matrices += 1
        momentum = torch.zeros_like(weight)
        for gradient in steps:
            weight, momentum = plain_update(weight, momentum, gradient[name])
        assert torch.allclose(result, weight, rtol=1e-10, atol=1e-12), name
    assert matrices == 4 * 5 == len(model_costs.block_matrices(sized("tiny")))


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32)])
def test_update_is_that_of_torch_up_to_its_bf16(shape):
    """torch.optim.Muon multiplies in bf16, so that its orthogonal matrix has an error of some thousandths."""
    ours, theirs = (nn.ParameterDict({"blocks_0": nn.Parameter(torch.zeros(shape))}) for _ in range(2))
    optimizer = parameter_groups.build([("x.blocks.0", ours["blocks_0"])], OPTIM)
    muon = torch.optim.Muon(
        theirs.parameters(), lr=RATE, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for parameter in (ours["blocks_0"], theirs["blocks_0"]):
            parameter.grad = torch.randn(shape, generator=generator.manual_seed(step))
        for group in optimizer.param_groups:
            group["lr"] = RATE
        optimizer.step()
        muon.step()
    apart = (ours["blocks_0"] - theirs["blocks_0"]).norm() / theirs["blocks_0"].norm()
    assert 0 < apart < 0.02


def test_orthogonalised_has_singular_values_near_1():
    matrix = torch.randn(24, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert values.min() > 0.6 and values.max() < 1.3


def stepped(config, world, folder=None):
    """Takes steps, and returns all weights and moments, the norms that metrics show, and the exchanges of a step.

    Saves them, if there is a ``folder``.
    """
    pair = built(config, world)
    optimizer = parameter_groups.build(pair.named_parameters(), OPTIM)
    calls = []
    exchange = distributed.all_to_all_single

    def counted(output, input, *args, **options):
        calls.append(input.nbytes + output.nbytes)
        return exchange(output, input, *args, **options)

    distributed.all_to_all_single = counted
    train(pair, optimizer, range(STEPS))
    distributed.all_to_all_single = exchange
    state = saver.model_state(pair) | saver.optimizer_state(pair, optimizer)
    result = {name: parallel.full_tensor(value).detach().clone() for name, value in state.items()}
    result["norms"] = torch.stack(parameter_groups.weight_norms(optimizer, world.size))
    result["calls"] = torch.tensor([len(calls) / STEPS, sum(calls) / 2 / STEPS])
    if folder:
        saver.Checkpointer(RunDir(folder), 1, world, keep=2).save(state, "pretrain", STEPS * 8)
    return result


def continued(config, world, folder):
    """Weights after further steps from the checkpoint in a folder."""
    pair = built(config, world)
    optimizer = parameter_groups.build(pair.named_parameters(), OPTIM)
    restorer = saver.Checkpointer(RunDir(folder), 1, world, keep=2).restorer
    restorer.load(restorer.newest(), saver.model_state(pair) | saver.optimizer_state(pair, optimizer))
    train(pair, optimizer, range(STEPS, 2 * STEPS))
    return {name: parallel.full_tensor(value).detach().clone() for name, value in pair.named_parameters()}


def assert_equal_to_rounding(results, expected):
    for name, value in expected.items():
        assert torch.allclose(results[name], value, rtol=1e-4, atol=2e-6), name


@pytest.mark.long
@pytest.mark.parametrize(
    "world, replicate", [(2, 1), pytest.param(3, 1, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)]
)
def test_ranks_agree_with_single_process_to_rounding(world, replicate):
    (alone,) = launch(1, [compute()], stepped)
    (shared,) = launch(world, [compute(replicate=replicate)], stepped)
    shards = world // replicate
    (exchange,) = step_phases(sized("tiny"), compute(replicate=replicate), 8, world, "muon")[-1].collectives
    assert exchange.kind == "exchange" and exchange.ranks == shards
    calls, sent = shared.pop("calls").tolist()
    assert calls == exchange.calls and alone.pop("calls")[0] == 0
    assert sent == pytest.approx(exchange.bytes, rel=0.1)  # of rank 0, whose shards are no smaller than others'
    assert_equal_to_rounding(shared, alone)


@pytest.mark.long
def test_state_of_two_ranks_continues_on_one(tmp_path):
    (straight,) = launch(1, [compute()], uninterrupted)
    folder = tmp_path / "s" / "run"
    launch(2, [compute()], stepped, folder)
    (resumed,) = launch(1, [compute()], partial(continued, folder=folder))
    assert_equal_to_rounding(resumed, straight)


def uninterrupted(config, world):
    pair = built(config, world)
    train(pair, parameter_groups.build(pair.named_parameters(), OPTIM), range(2 * STEPS))
    return {name: value.detach().clone() for name, value in pair.named_parameters()}


@pytest.mark.long
def test_stopped_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    """Stopped in both stages: between checkpoints, and after the border at which the momenta start new.

    Killed in the first one.
    """
    data = make_dataset(tmp_path / "data", samples=120, shards=2, chunk=4, classes=4)
    make_tokenizer(data / "tokenizer.json")
    config = configuration(data, world=1, samples=(4, 4))
    config.data.workers = 0
    config.evaluate.sets = config.evaluate.sets[:1]
    config.checkpoint.samples = 2 * BATCH
    config.optim.name = "muon"
    calm = trained(created(tmp_path, "calm", config), None)
    dead = created(tmp_path, "killed", config)
    killed(dead, 3)
    assert_same(trained(dead, None), calm)
    original_step = trainer.Trainer.train_step

    def interrupted(self, *args):
        if (self.attempt, self.step) in ((1, 3), (2, 6)):
            self.flag.set("signal SIGTERM")
        return original_step(self, *args)

    monkeypatch.setattr(trainer.Trainer, "train_step", interrupted)
    stopped = trained(created(tmp_path, "stopped", config), None, attempts=3)
    assert stopped.newest_attempt() == 3 and stopped.result.exists()
    assert any("momentum_buffer" in name for _, name in state(calm))
    assert_same(stopped, calm)


def test_model_without_matrices_in_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"the model has no matrices in blocks, which muon updates.*adamw"):
        parameter_groups.build(nn.Linear(3, 3).named_parameters(), OPTIM)


def test_matrices_are_decayed_and_all_other_groups_are_those_of_adamw():
    pair = tiny()
    groups = parameter_groups.build(pair.named_parameters(), OPTIM).param_groups
    assert [(group[KIND], group["weight_decay"]) for group in groups] == [("muon", 0.2), ("adamw", 0.2), ("adamw", 0)]
    alone = parameter_groups.build(pair.named_parameters(), Optim()).param_groups
    assert [group[KIND] for group in alone] == ["adamw", "adamw"]
    assert groups[2]["params"] == alone[1]["params"]


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (64, 16), (32, 32)])
def test_flops_of_an_update_are_those_that_torch_counts(shape):
    with FlopCounterMode(display=False) as counter:
        orthogonalised(torch.ones(shape))
    assert counter.get_total_flops() == OPTIMIZERS["muon"].matrix_flops(*shape)


def test_plan_counts_flops_of_the_update_per_pair_of_the_batch():
    stage = schema.Stage(samples=1 << 20, batch=1024)
    config = merge.merge([("test", {"model": {"size": "B/16"}})])
    without = model_costs.stage_flops(config, stage)
    config.optim.name = "muon"
    width = {768: 12, 512: 12}
    expected = 0
    for columns, layers in width.items():
        for rows in (1, 3, 4, 4):
            expected += layers * 5 * (4 * rows + 2) * columns**3
    assert model_costs.stage_flops(config, stage) - without == expected // 1024
    config.compute.replicate = 4
    assert model_costs.stage_flops(config, stage) - without == 4 * expected // 1024
    assert step_phases(config.model, Compute(), 8, 4, "adamw") == step_phases(config.model, Compute(), 8, 4)


def test_identity_has_momentum_only_if_it_is_not_the_default():
    """Runs of before have neither field in their identity."""
    config = merge.merge([("test", {})])
    fields = plain_data.flatten(identity.identity(config, "code"))
    assert "optim.beta1" in str(fields) and not any("momentum" in name or "optim.name" in name for name in fields)
