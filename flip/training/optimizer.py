"""AdamW with the recipe's two parameter groups, and the learning rate as a function of samples."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from flip.config import schema


def decays(name: str, decay_logit_scale: bool) -> bool:
    """Whether weight decay applies: all but biases (logit_bias is one), gains of LayerNorm, positions."""
    if name == "logit_scale":
        return decay_logit_scale
    owner, _, leaf = name.rpartition(".")
    return leaf not in ("bias", "positions", "logit_bias") and not owner.rpartition(".")[2].startswith("norm")


def build(named_parameters: Iterable[tuple[str, nn.Parameter]], optim: schema.Optim) -> torch.optim.AdamW:
    """AdamW over all parameters that train, decayed ones in the first group. Decay is decoupled, times the rate.

    The rate is set before each step by ``set_learning_rate``. One fused kernel updates all parameters of a group, whole
    or sharded (DTensor), on CPUs and CUDA.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            groups[decays(name, optim.decay_logit_scale)].append(parameter)
    fused = all(p.device.type in ("cpu", "cuda") for group in groups.values() for p in group)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": optim.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=fused,
    )


def learning_rate(stage: schema.Stage, seen: int) -> float:
    """The rate of the step that begins after ``seen`` samples of this stage.

    Linear from 0 over ``warmup`` samples to base_lr * batch / 256, then a cosine to 0 at the stage's end. The curve is
    read in the middle of the step: read at its beginning the first step would have a rate of 0, at its end the last.
    """
    peak = stage.base_lr * stage.batch / 256
    middle = seen + stage.batch / 2
    if middle < stage.warmup:
        return peak * middle / stage.warmup
    end = -(-stage.samples // stage.batch) * stage.batch
    progress = min((middle - stage.warmup) / max(end - stage.warmup, 1), 1.0)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, stage: schema.Stage, seen: int) -> float:
    """Give all groups the rate of the coming step, and return it."""
    rate = learning_rate(stage, seen)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
