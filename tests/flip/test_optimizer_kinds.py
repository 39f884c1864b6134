"""Tests of flip/optimizer_kinds.py: every optimiser resumes exactly, and its sizes and changes are those it declares.

The tests also run with ``Momentum``, an optimiser with other moments, registered as CONTRIBUTING describes.
"""

from dataclasses import replace

import pytest
import torch

from flip import model_costs
from flip.checkpoint.saver import Checkpointer, model_state, optimizer_state
from flip.config import schema
from flip.config.schema import Config, Optim, Stage
from flip.distributed import parallel
from flip.optimizer_kinds import OPTIMIZERS, AdamW, OptimizerKind
from flip.runs import checkpoint_folder
from flip.runs.rundir import RunDir
from flip.training import parameter_groups
from tests.flip.models.test_clip import sized, tiny


class Momentum(OptimizerKind):
    """SGD with momentum, which torch stores under another name and without a count of steps."""

    moment_bytes = 4

    def build(self, groups, optim, fused):
        return torch.optim.SGD(groups, lr=0.0, momentum=optim.beta1, fused=fused)

    def first_moments(self, parameter):
        return {"momentum_buffer": torch.zeros_like(parameter)}

    def last_change(self, after, moments, group):
        change = torch._foreach_mul([each["momentum_buffer"] for each in moments], group["lr"])
        return list(change)


@pytest.fixture(params=[*OPTIMIZERS, "momentum"])
def optim(request, monkeypatch):
    """Settings of each registered optimiser, and of one that is registered for the test."""
    monkeypatch.setitem(OPTIMIZERS, "momentum", Momentum())
    return Optim(name=request.param, weight_decay=0.0 if request.param == "momentum" else 0.2)


def test_choices_of_configuration_are_the_registered_optimisers():
    assert schema.Optim.__dataclass_fields__["name"].metadata["choices"] == tuple(OPTIMIZERS)


def train(pair, optimizer, steps):
    """Take steps with gradients that depend on the number of the step alone."""
    for step in steps:
        parameter_groups.set_learning_rate(optimizer, Stage(samples=8 * 256, batch=256, base_lr=1e-2), step * 256)
        generator = torch.Generator().manual_seed(step)
        for parameter in pair.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.long
@pytest.mark.parametrize("saved_after", [0, 3])
def test_training_continues_from_a_checkpoint_as_without_it(tmp_path, optim, saved_after):
    """Also from one that is saved before the first step, when torch has no moments yet."""
    straight = tiny()
    optimizer = parameter_groups.build(straight.named_parameters(), optim)
    train(straight, optimizer, range(6))

    world = parallel.World(0, 1, torch.device("cpu"), None, None)
    run = RunDir(tmp_path / "s" / "run")
    saver = Checkpointer(run, run.start_attempt({}), world, keep=2)
    first = tiny()
    optimizer = parameter_groups.build(first.named_parameters(), optim)
    train(first, optimizer, range(saved_after))
    saver.save(model_state(first) | optimizer_state(first, optimizer), "pretrain", saved_after)

    second = tiny(trained=False)  # other weights
    optimizer = parameter_groups.build(second.named_parameters(), optim)
    (newest,) = checkpoint_folder.checkpoints(run)
    saver.restorer.load(newest, model_state(second) | optimizer_state(second, optimizer))
    train(second, optimizer, range(saved_after, 6))
    for (name, expected), (_, resumed) in zip(straight.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(expected, resumed), f"{optim.name}: first_moments lacks a value, or has a wrong one: {name}"


def test_step_with_found_inf_changes_nothing(optim):
    """As after a gradient that is not finite: all ranks skip the step."""
    pair = tiny()
    optimizer = parameter_groups.build(pair.named_parameters(), optim)
    train(pair, optimizer, [0])
    before = {name: value.clone() for name, value in (model_state(pair) | optimizer_state(pair, optimizer)).items()}
    optimizer.found_inf = torch.ones(())
    train(pair, optimizer, [1])
    after = model_state(pair) | optimizer_state(pair, optimizer)
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert not changed, f"{optim.name}: its torch optimiser must change nothing if found_inf is 1"


def test_optimiser_that_does_not_obey_found_inf_is_refused(monkeypatch):
    class Unfused(Momentum):
        def build(self, groups, optim, fused):
            return super().build(groups, optim, fused=False)

    monkeypatch.setitem(OPTIMIZERS, "unfused", Unfused())
    with pytest.raises(RuntimeError, match="unfused: its torch optimiser does not obey found_inf"):
        parameter_groups.build(tiny().named_parameters(), Optim(name="unfused"))


def test_moments_take_the_declared_memory(optim):
    pair = tiny()
    optimizer = parameter_groups.build(pair.named_parameters(), optim)
    train(pair, optimizer, [0])
    moments = [value for name, value in optimizer_state(pair, optimizer).items() if value.dim() or ".step." not in name]
    config = replace(Config(), model=sized("tiny"), optim=optim)
    expected = sum(value.nbytes for value in moments)
    what = f"{optim.name}: moment_bytes in flip/optimizer_kinds.py is not the size of its moments for one parameter"
    assert model_costs.moment_bytes(config.model, optim.name) == expected, what
    assert model_costs.state_bytes(config) == 4 * model_costs.parameters(config.model)["total"] + expected
    planned = model_costs.device_memory(config.model, config.compute, 8, "0.5", optimizer=optim.name)
    assert planned["moments"] == expected


def test_last_change_is_the_difference_of_the_weights(optim):
    pair = tiny()
    optimizer = parameter_groups.build(pair.named_parameters(), optim)
    train(pair, optimizer, range(3))
    before = [parameter.detach().double() for parameter in pair.parameters()]
    train(pair, optimizer, [3])
    steps = [old - new.detach().double() for old, new in zip(before, pair.parameters(), strict=True)]
    expected = torch.stack([step.norm() for step in steps]).norm()
    change = float(parameter_groups.weight_norms(optimizer, 1)[1])
    what = f"{optim.name}: last_change in flip/optimizer_kinds.py is not what its step has changed"
    assert change == pytest.approx(float(expected), rel=1e-4), what


def test_optimiser_with_other_moments_than_declared_is_refused_at_its_first_save(monkeypatch):
    """A run that could not be resumed must not go on."""

    class Wrong(Momentum):
        first_moments = AdamW.first_moments

    monkeypatch.setitem(OPTIMIZERS, "wrong", Wrong())
    pair = tiny()
    optimizer = parameter_groups.build(pair.named_parameters(), Optim(name="wrong"))
    train(pair, optimizer, [0])
    with pytest.raises(RuntimeError, match=r"wrong stores momentum_buffer, but .* declares step, exp_avg, exp_avg_sq"):
        optimizer_state(pair, optimizer)
