"""AdamW with two parameter groups, the learning rate as a function of samples, and norms of gradients and weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from flip.config import schema
from flip.distributed.parallel import full_tensor, local, replica_of

PART = 2**27
"""Elements whose norms are computed together; their copies take twice 4 bytes each."""


def uses_weight_decay(name: str, decay_logit_scale: bool) -> bool:
    """All parameters except biases (also logit_bias), gains of LayerNorm, and positions."""
    if name == "logit_scale":
        return decay_logit_scale
    owner, _, leaf = name.rpartition(".")
    return leaf not in ("bias", "positions", "logit_bias") and not owner.rpartition(".")[2].startswith("norm")


def build(named_parameters: Iterable[tuple[str, nn.Parameter]], optim: schema.Optim) -> torch.optim.AdamW:
    """AdamW over all parameters, those with weight decay in the first group. Decay is multiplied by the rate.

    ``set_learning_rate`` sets the rate before each step. One fused kernel updates a group, also of DTensors.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named_parameters:
        groups[uses_weight_decay(name, optim.decay_logit_scale)].append(parameter)
    fused = all(p.device.type in ("cpu", "cuda") for group in groups.values() for p in group)
    decayed = {"params": groups[True], "weight_decay": optim.weight_decay}
    others = {"params": groups[False], "weight_decay": 0.0}
    betas = (optim.beta1, optim.beta2)
    return torch.optim.AdamW([decayed, others], lr=0.0, betas=betas, eps=optim.eps, fused=fused)


def learning_rate(stage: schema.Stage, seen: int) -> float:
    """The rate of the step that starts after ``seen`` samples of this stage.

    Linear from 0 over ``warmup`` samples to base_lr * batch / 256, then by ``schedule``. The decay of schedule wsd is
    1 - sqrt (Haegele et al. 2024, arXiv 2405.18392). The curve is evaluated in the middle of the step, so that neither
    the first nor the last step has a rate of 0.
    """
    peak = stage.base_lr * stage.batch / 256
    middle = seen + stage.batch / 2
    if middle < stage.warmup:
        return peak * middle / stage.warmup
    end = -(-stage.samples // stage.batch) * stage.batch
    if stage.schedule == "cosine":
        progress = min((middle - stage.warmup) / max(end - stage.warmup, 1), 1.0)
        return peak * (1 + math.cos(math.pi * progress)) / 2
    left = max(end - middle, 0.0)
    return peak if left >= stage.cooldown else peak * (1 - math.sqrt(1 - left / stage.cooldown))


def set_learning_rate(optimizer: torch.optim.Optimizer, stage: schema.Stage, seen: int) -> float:
    """Set the rate of the next step in all groups and return it."""
    rate = learning_rate(stage, seen)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def gradient_norm(model: nn.Module) -> Tensor:
    """The 2-norm () of all gradients, the same on all ranks; not finite if a gradient is not. Collective if sharded."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return full_tensor(torch.nn.utils.get_total_norm(gradients))


@torch.no_grad()
def weight_norms(optimizer: torch.optim.AdamW, world_size: int) -> tuple[Tensor, Tensor]:
    """2-norms of all weights and of their change in the last step, both () on the device. Collective if sharded.

    The change is computed from AdamW's state, so that no copy of the weights is needed: with a = lr * m / (1 - b1^t) /
    (sqrt(v / (1 - b2^t)) + eps) the step was w' = (1 - lr * decay) * w - a, hence w - w' = (a + lr * decay * w') / (1 -
    lr * decay).
    """
    weights, changes, scales = list[Tensor](), list[Tensor](), list[float]()
    for group in optimizer.param_groups:
        parameters = [parameter for parameter in group["params"] if optimizer.state[parameter]]
        for part in _parts(parameters):
            after, states = [local(parameter) for parameter in part], [optimizer.state[parameter] for parameter in part]
            change = _last_change(after, states, group)
            # fp64, so that diverging weights show as large numbers, not as an overflow
            weights += torch._foreach_norm(after, 2, torch.float64)
            changes += torch._foreach_norm(change, 2, torch.float64)
            scales += [replica_of(parameter)[1] ** -0.5 for parameter in part]  # each replica counts
    norms = torch.stack([torch.stack(weights), torch.stack(changes)])
    squares = (norms * torch.tensor(scales, dtype=norms.dtype, device=norms.device)).square().sum(dim=1)
    if world_size > 1:
        distributed.all_reduce(squares)
    of_weights, of_changes = squares.sqrt().unbind()
    return of_weights, of_changes


def _parts(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parts of at most PART elements on this rank, or single parameters: a part is copied as a whole."""
    part, elements = list[nn.Parameter](), 0
    for parameter in parameters:
        count = local(parameter).numel()
        if part and elements + count > PART:
            yield part
            part, elements = [], 0
        part.append(parameter)
        elements += count
    if part:
        yield part


def _last_change(after: list[Tensor], states: Sequence[Mapping[str, Tensor]], group: Mapping[str, Any]) -> list[Tensor]:
    """w - w' of parameters of one group, few kernels for all of them."""
    rate, decay = group["lr"], group["lr"] * group["weight_decay"]
    corrections = [1 - beta ** states[0]["step"] for beta in group["betas"]]  # all have taken the same steps
    root = torch._foreach_div([local(state["exp_avg_sq"]) for state in states], corrections[1])
    torch._foreach_sqrt_(root)
    torch._foreach_add_(root, group["eps"])
    change = torch._foreach_div([local(state["exp_avg"]) for state in states], corrections[0])
    torch._foreach_div_(change, root)
    torch._foreach_mul_(change, rate)
    if decay:
        torch._foreach_add_(change, after, alpha=decay)
        torch._foreach_div_(change, 1 - decay)
    return list(change)
