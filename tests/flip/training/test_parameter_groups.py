"""Tests AdamW: its parameter groups, its learning-rate schedules, and the norms of a step."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flip.config.schema import Optim, Stage
from flip.training import parameter_groups
from tests.flip.models.test_clip import tiny
from tests.flip.training.test_anomaly import Training


@pytest.mark.parametrize("radford", [False, True])
@pytest.mark.parametrize("decay_logit_scale", [True, False])
def test_build_decays_only_the_parameters_of_the_recipe(decay_logit_scale, radford):
    built = tiny(radford=radford)
    optimizer = parameter_groups.build(built.named_parameters(), Optim(decay_logit_scale=decay_logit_scale))
    names = {id(p): name for name, p in built.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert decayed | spared == set(names.values())
    assert {"image.class_token", "text.tokens.weight", "image.patch.weight", "text.blocks.1.mlp.fc2.weight"} <= decayed
    assert {
        "text.positions",
        "image.norm.weight",
        "text.blocks.0.norm2.weight",
        "image.blocks.2.attn.qkv.bias",
    } <= spared
    assert ("logit_scale" in decayed) == decay_logit_scale
    assert ({"image.positions", "image.norm_pre.weight"} <= spared) == radford
    assert all(name.endswith((".bias", "positions")) or ".norm" in name or name == "logit_scale" for name in spared)


def test_optimizer_step_is_adamw_with_decoupled_decay():
    weight = torch.nn.Parameter(torch.tensor([[2.0, -1.0]]))
    settings = Optim(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.2)
    optimizer = parameter_groups.build([("image.patch.weight", weight)], settings)
    stage = Stage(samples=10 * 256, batch=256, base_lr=0.1)
    assert parameter_groups.set_learning_rate(optimizer, stage, 0) == optimizer.param_groups[1]["lr"]
    rate = optimizer.param_groups[0]["lr"]
    weight.grad = torch.tensor([[0.5, -3.0]])
    optimizer.step()
    expected = torch.tensor([[2.0, -1.0]]) * (1 - rate * 0.2) - rate * torch.tensor([[1.0, -1.0]])
    assert torch.allclose(weight.detach(), expected, atol=1e-6)


def test_learning_rate_warms_up_linearly_and_decays_by_cosine():
    stage = Stage(samples=1000 * 512, batch=512, base_lr=4e-6, warmup=100 * 512)
    rates = [parameter_groups.learning_rate(stage, step * 512) for step in range(1000)]
    assert rates[0] == pytest.approx(8e-6 * 0.5 / 100) and rates[99] == pytest.approx(8e-6 * 99.5 / 100)
    assert max(rates) == pytest.approx(8e-6, rel=1e-5) and rates.index(max(rates)) == 100
    assert rates[549] + rates[550] == pytest.approx(8e-6)  # midpoint of the decay
    assert 0 < rates[-1] < 1e-11
    assert sum(rates) * 512 == pytest.approx(8e-6 * (50 + 450) * 512, rel=1e-6)  # the exact area under the curve


def test_constant_schedule_stays_at_peak_and_wsd_cools_down_to_near_zero():
    trunk = Stage(samples=1000 * 512, batch=512, base_lr=4e-6, warmup=100 * 512, schedule="constant")
    short = replace(trunk, samples=500 * 512, schedule="wsd", cooldown=100 * 512)
    rates = [
        [parameter_groups.learning_rate(stage, step * 512) for step in range(stage.samples // 512)]
        for stage in (trunk, short)
    ]
    assert set(rates[0][100:]) == {8e-6} and rates[0][:100] == rates[1][:100]
    assert rates[1][:400] == rates[0][:400], "both schedules are equal until the cooldown"
    assert rates[1][450] == pytest.approx(8e-6 * (1 - 0.505**0.5)) and 0 < rates[1][-1] < 8e-6 * 0.003
    assert rates[1][400:] == sorted(rates[1][400:], reverse=True)


def test_learning_rate_of_last_partial_step_is_not_zero():
    stage = Stage(samples=1001, batch=500, base_lr=1.0)
    rates = [parameter_groups.learning_rate(stage, seen) for seen in (0, 500, 1000)]
    assert rates == sorted(rates, reverse=True) and rates[-1] > 0.05 * rates[0]
    warming = Stage(samples=10, batch=5, warmup=100, base_lr=1.0)
    assert parameter_groups.learning_rate(warming, 5) == pytest.approx(5 / 256 * 7.5 / 100)
    assert math.isfinite(parameter_groups.learning_rate(Stage(samples=10, batch=5, warmup=10), 10))


def norm(tensors):
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def test_norms_match_weights_update_and_gradients_of_step(tmp_path):
    training = Training(tmp_path)
    for _ in range(3):
        before = [p.detach().clone() for p in training.pair.parameters()]
        training.go()
        after = [p.detach() for p in training.pair.parameters()]
        weights, change = parameter_groups.weight_norms(training.optimizer, 1)
        assert float(weights) == pytest.approx(norm(after), rel=1e-6)
        moved = [new.double() - old.double() for new, old in zip(after, before, strict=True)]
        assert float(change) == pytest.approx(norm(moved), rel=1e-4)
        gradients = [p.grad for p in training.pair.parameters()]
        assert float(parameter_groups.gradient_norm(training.pair)) == pytest.approx(norm(gradients), rel=1e-6)


def test_gradient_norm_is_not_finite_if_a_gradient_is_nan(tmp_path):
    training = Training(tmp_path)
    training.go()
    training.pair.image.patch.weight.grad[0, 0] = float("nan")
    assert not torch.isfinite(parameter_groups.gradient_norm(training.pair))


class Dispatches(TorchDispatchMode):
    """Counts dispatched operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_weight_norms_take_few_operations_for_any_parameter_count(tmp_path, monkeypatch):
    training = Training(tmp_path)
    training.go()
    with Dispatches() as full:
        norms = [float(value) for value in parameter_groups.weight_norms(training.optimizer, 1)]
    assert full.count <= 50 < len(list(training.pair.parameters()))
    monkeypatch.setattr(parameter_groups, "PART", 5000)
    with Dispatches() as parts:
        again = [float(value) for value in parameter_groups.weight_norms(training.optimizer, 1)]
    assert again == pytest.approx(norms, rel=1e-12)
    assert parts.count > full.count
