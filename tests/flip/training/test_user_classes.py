"""Tests of a training whose optimiser, loss, augmentation step and text masking are classes in a user's file."""

import hashlib
from multiprocessing import forkserver

import pytest

from flip import loss_kinds, model_costs, optimizer_kinds
from flip.common import user_classes
from flip.common.user_classes import UserClass
from flip.data.augment import unchanged_share
from tests.flip.training.test_user_callbacks import assert_same, configured, created, killed, trained
from tests.flip.training.test_user_callbacks import data as data  # a fixture

FILE = '''"""Four classes of a user."""

import numpy as np
import torch

from flip.data.augment import AugmentationStep
from flip.data.text_masking import TextMasking
from flip.loss_kinds import Loss, SigmoidLoss
from flip.optimizer_kinds import OptimizerKind


class Lion(OptimizerKind):
    """Lion (Chen et al. 2023)."""

    moment_bytes = 4

    def build(self, groups, optim, fused):
        return LionOptimizer(groups, {"lr": 0.0, "betas": (optim.beta1, optim.beta2)})

    def first_moments(self, parameter):
        return {"exp_avg": torch.zeros_like(parameter)}

    def last_change(self, after, moments, group):
        return [torch.zeros_like(each) for each in after]


class LionOptimizer(torch.optim.Optimizer):
    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure=None):
        if getattr(self, "found_inf", None):
            return
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                moment = state["exp_avg"]
                update = torch.sign(first * moment + (1 - first) * parameter.grad)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
                moment.mul_(second).add_(parameter.grad, alpha=1 - second)


class Margin(SigmoidLoss):
    """The sigmoid loss with a second learned bias."""

    parameters = {"logit_bias": "Bias.", "margin": "A second bias."}
    first_values = {"margin": 0.25}

    def shift(self, logits, *parameters):
        return logits.add_(parameters[0]).add_(parameters[1])

    def gradient(self, tiles, columns, logits, saved):
        grad, (of_bias,) = super().gradient(tiles, columns, logits, saved)
        return grad, (of_bias, of_bias)


class Erase(AugmentationStep):
    """A black square."""

    purpose = 100
    count = 2

    def apply(self, view, augment, draws):
        row, column = (draws * (view.size - 8)).astype(int)

        def erase(pixels):
            pixels = pixels.copy()
            pixels[row : row + 8, column : column + 8] = 0
            return pixels

        view.changes.append(erase)


class Backwards(TextMasking):
    """The last positions stay."""

    def ranks(self, captions):
        return np.broadcast_to(-np.arange(captions.tokens.shape[1]), captions.tokens.shape)
'''


@pytest.fixture
def files(tmp_path):
    """The folder of the copies of a snapshot."""
    folder = tmp_path / "code" / user_classes.FOLDER
    path = folder / entry("Lion").copy
    path.parent.mkdir(parents=True)
    path.write_text(FILE)
    return folder


def entry(cls):
    return UserClass("mine.py", cls, hashlib.sha256(FILE.encode()).hexdigest())


def with_classes(data, workers):
    config = configured(data, 1)
    config.data.workers = workers
    config.optim.name = str(entry("Lion"))
    config.model.objective = str(entry("Margin"))
    config.augment.steps = [str(entry("Erase"))]
    for stage in config.stages:
        stage.text_mask = "0.5"
        stage.text_masking = str(entry("Backwards"))
    return config


@pytest.mark.long
def test_killed_run_with_four_classes_resumes_to_the_same_bits(data, files, tmp_path, monkeypatch):
    monkeypatch.setenv("FLIP_SNAPSHOT", str(files.parent))  # also of the process that is killed
    forkserver._forkserver._stop()  # one of an earlier test does not have the variable
    calm = trained(created(tmp_path, "calm", with_classes(data, 0)), files)
    dead = created(tmp_path, "dead", with_classes(data, 1))
    killed(dead, 6)
    assert_same(trained(dead, files), calm)
    plain = trained(created(tmp_path, "plain", configured(data, 1)), files)
    with pytest.raises(AssertionError):
        assert_same(plain, calm)


def test_plan_counts_declarations_without_execution(data, monkeypatch):
    """The learned parameters, moments and kernel's share, also of a file that this process could not execute."""
    text = f"raise SystemExit('executed')\n{FILE}".encode()
    digest = user_classes.remember(text)
    config = with_classes(data, 0)
    plain = configured(data, 1)
    config.optim.name = f"mine.py:Lion@sha256:{digest}"
    config.model.objective = f"mine.py:Margin@sha256:{digest}"
    config.augment.steps = [f"mine.py:Erase@sha256:{digest}"]
    before = model_costs.parameters(plain.model)["total"]
    total = model_costs.parameters(config.model)["total"]
    assert total == before + 2
    assert model_costs.moment_bytes(config.model, config.optim.name) == 4 * total
    assert loss_kinds.first_values(config.model) == {"logit_bias": -10.0, "margin": 0.25}
    assert unchanged_share(plain.augment) == 1.0 and unchanged_share(config.augment) == 0.0
    assert type(optimizer_kinds.declared(config.optim.name)).__name__ == "Lion"
